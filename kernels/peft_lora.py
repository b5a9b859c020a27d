"""LoRA over packed 4-bit layers: what PEFT needs to wrap a ``Linear4bit``.

    config = register_with_peft(LoraConfig(r=32, target_modules=linear4bit_module_names(model)))
    model = get_peft_model(model, config)

PEFT's hook for layers of others is not saved with an adapter, so a reload passes a registered config again:
``PeftModel.from_pretrained(base, folder, config=register_with_peft(LoraConfig.from_pretrained(folder)))``. peft is imported at
first use. Merging into 4 bits in place is left out on purpose: it would round the delta away; :func:`merged_weight` gives
the sum in float32 for whoever quantizes next.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.kernels.linear import Linear4bit, linear4bit_module_names

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["LoraLinear4bit", "adopt_lora", "linear4bit_module_names", "merged_weight", "register_with_peft"]  # noqa: F822


def register_with_peft(lora_config: LoraConfig, model: nn.Module | None = None) -> LoraConfig:
    """Teach one LoRA config to wrap ``Linear4bit`` layers, and return it.

    Args:
        lora_config: changed in place. ``target_modules="all-linear"`` needs ``model``: PEFT's own search knows only
            ``torch.nn.Linear`` and would pass the packed layers over.
        model: with ``all-linear``, the model whose linear layers, packed or not, are listed; its output embedding is left out.

    Raises:
        ValueError: ``all-linear`` without a model.
    """
    target = lora_config.target_modules
    if isinstance(target, str) and target.lower() == "all-linear":
        if model is None:
            raise ValueError(
                "target_modules='all-linear' finds no 4-bit layer in PEFT; pass the model (register_with_peft(config, model)) "
                "or target_modules=linear4bit_module_names(model)"
            )
        lora_config.target_modules = _all_linear_names(model)
    lora_config._register_custom_module({Linear4bit: _lora_class()})
    return lora_config


def adopt_lora(layer: nn.Module) -> None:
    """Turn PEFT's LoRA layer around a linear layer into a ``LoraLinear4bit``, in place: for a base that is being swapped.

    The adapters, their settings and what an optimizer or a hook holds of them stay the same objects.

    Raises:
        ValueError: the layer does more than plain LoRA (a variant such as DoRA, a bias, an adapter that is merged), or is
            another tuner's.
    """
    from peft.tuners.lora import LoraLayer

    cls = _lora_class()
    if isinstance(layer, cls):
        return
    if not isinstance(layer, LoraLayer) or isinstance(layer, nn.Linear):
        raise ValueError(f"PEFT wraps it in a {type(layer).__name__}; only LoRA layers are known here")
    problems = {
        "a variant such as DoRA": bool(getattr(layer, "lora_variant", None)),
        "lora_bias=True": any(layer.lora_bias.values()),
        "a merged adapter (unmerge it first)": layer.merged,
        "fan_in_fan_out=True": layer.fan_in_fan_out,
    }
    if any(problems.values()):
        raise ValueError(f"its adapter has {', '.join(name for name, found in problems.items() if found)}")
    # LoraLinear4bit has no state beyond LoraLayer's, so the class alone makes the difference.
    layer.__class__ = cls


def merged_weight(layer: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight that a layer stands for: decoded base plus the active adapters' deltas, summed in float32.

    Args:
        layer: a ``LoraLinear4bit``, or a bare ``Linear4bit`` (its decoded weight).
        dtype: of the result, rounded once.

    Returns:
        (N, K), detached.

    Raises:
        TypeError: another kind of layer.
    """
    if isinstance(layer, Linear4bit):
        return layer.dequantize_weight(dtype)
    if not isinstance(layer, _lora_class()):
        raise TypeError(f"merged_weight takes a LoraLinear4bit or a Linear4bit, not a {type(layer).__name__}")
    weight = layer.get_base_layer().dequantize_weight(torch.float32)
    if not layer.disable_adapters:
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                weight = weight + layer.get_delta_weight(adapter).detach().to(torch.float32)
    return weight.to(dtype)


def __getattr__(name: str) -> Any:
    if name == "LoraLinear4bit":
        return _lora_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _lora_class() -> type[nn.Module]:
    """The class that inherits from PEFT's LoraLayer, made at first use so that importing this module stays cheap."""
    from peft.tuners.lora import LoraLayer

    class LoraLinear4bit(nn.Module, LoraLayer):
        """A ``Linear4bit`` with LoRA adapters: ``y = base(x) + scaling * B(A(dropout(x)))``.

        Both compute in the dtype of x (the autocast dtype under ``torch.autocast``), as mixed precision does: float32 adapters
        over a bfloat16 base keep their float32 masters and are rounded for the product, so that no activation is widened
        and copied. The adapters' sum is added inside the second product, before its one rounding. Plain LoRA and rsLoRA;
        variants (DoRA, aLoRA …) and ``lora_bias`` are refused.
        """

        def __init__(self, base_layer: nn.Module, adapter_name: str, config, r: int = 0, lora_alpha: int = 1, **kwargs) -> None:
            super().__init__()
            LoraLayer.__init__(self, base_layer, **kwargs)
            self.fan_in_fan_out = False
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            return module.in_features, module.out_features  # PEFT's own warns of every layer type it does not know

        def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config, **kwargs) -> None:
            if config.lora_bias:
                raise ValueError("LoraLinear4bit does not support lora_bias=True; set it to False")
            if isinstance(config.init_lora_weights, str) and config.init_lora_weights not in ("gaussian", "orthogonal", "eva"):
                raise ValueError(
                    f"init_lora_weights={config.init_lora_weights!r} rewrites the base weight, which is packed and frozen in a "
                    "LoraLinear4bit; use True, 'gaussian', 'orthogonal' or 'eva'"
                )
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self._check_forward_args(x, *args, **kwargs)
            adapter_names = kwargs.pop("adapter_names", None)
            if adapter_names is not None and not self.disable_adapters:
                return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
            result = self.base_layer(x, *args, **kwargs)
            if self.disable_adapters:
                return result
            for adapter in self.active_adapters:
                if adapter not in self.lora_A:
                    continue
                A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
                hidden = self.lora_dropout[adapter](x)
                small = F.linear(hidden, A.to(hidden.dtype)) * self.scaling[adapter]  # [..., K] @ [K, r]
                rows, small = result.reshape(-1, B.shape[0]), small.reshape(-1, B.shape[1]).to(result.dtype)
                result = torch.addmm(rows, small, B.to(result.dtype).T).view_as(result)  # [M, N] + [M, r] @ [r, N]
            return result

        def get_delta_weight(self, adapter: str) -> torch.Tensor:
            """The weight that an adapter adds, ``scaling * B @ A``, shape (N, K), in at least float32."""
            lora_A, lora_B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            dtype = torch.promote_types(lora_A.dtype, torch.float32)
            return (lora_B.to(dtype) @ lora_A.to(dtype)) * self.scaling[adapter]

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Refused: see :func:`merged_weight`."""
            raise ValueError(
                "an adapter is not merged into a 4-bit weight in place: rounding would drop most of it. "
                "Take merged_weight(layer) and quantize that, or keep the adapter beside the base."
            )

        def unmerge(self) -> None:
            """Nothing is ever merged."""

        def __repr__(self) -> str:
            return "lora." + super().__repr__()

    LoraLinear4bit.__module__, LoraLinear4bit.__qualname__ = __name__, "LoraLinear4bit"  # found by pickle
    return LoraLinear4bit


def _all_linear_names(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, Linear4bit)))
    return [name for name, module in linears if module is not head]
