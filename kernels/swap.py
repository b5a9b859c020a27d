"""Put our kernels under a model that others packed: bitsandbytes 4-bit layers and compressed-tensors int4 checkpoints.

    model = AutoModelForCausalLM.from_pretrained(folder)  # bitsandbytes 4-bit, or compressed-tensors pack-quantized
    print(swap_to_kernels(model))  # swapped: 168 × bitsandbytes nf4; left: 1 × not packed

Layers change one at a time, and the tensors of bitsandbytes are taken over as they are, so a model never stands in memory
twice. What transformers 5.23 does with a compressed-tensors checkpoint, and what is read here:

- loaded (the default): modules hold ``weight_packed``, and the first forward would decode the whole model. Read directly.
- after that forward: dense weights beside their ``weight_scale``. They lie on the int4 grid: the codes come back exactly.
- loaded with ``CompressedTensorsConfig(dequantize=True)``: dense weights alone. Name the folder as ``checkpoint`` and the
  codes are read from its files.

A layer that cannot be taken over exactly is left alone, with the reason. Exactly: the same codes and scales, so the weights
that the packed tensors stand for, bit for bit; dense ones may have been rounded once more by whoever decoded them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from stillhouse.kernels.foreign_layers import NotTaken, checkpoint_files, read_layer
from stillhouse.kernels.linear import Activations, Linear4bit


@dataclass(frozen=True)
class SwapReport:
    """What became of each linear layer, by its full name.

    Args:
        swapped: the kind that a layer was, for those that run on our kernels now: ``bitsandbytes nf4``, ``compressed-tensors
            int4`` and so on.
        left: why a layer was not touched.
    """

    swapped: dict[str, str]
    left: dict[str, str]

    @property
    def counts(self) -> dict[str, int]:
        """Swapped layers by kind."""
        return dict(Counter(self.swapped.values()))

    def __str__(self) -> str:
        return f"swapped: {_count(self.swapped)}; left: {_count(self.left)}"


def swap_to_kernels(model: nn.Module, *, activations: Activations = "bf16", checkpoint: str | Path | None = None) -> SwapReport:
    """Replace a model's packed 4-bit layers by ``Linear4bit``, in place and one layer at a time.

    Takes ``bitsandbytes.nn.Linear4bit`` (nf4 and fp4, nested or plain; also with the weight that bitsandbytes repacks in an
    eval forward on a CPU) and compressed-tensors' int4 weights. Under PEFT the LoRA layers around them become
    ``LoraLinear4bit`` with the same adapters. The new layers compute in the dtype of x; bitsandbytes rounds a float32 x to its
    ``bnb_4bit_compute_dtype``. A transformers model's quantizer and config are exchanged for ours, so that
    ``save_pretrained`` writes what :mod:`stillhouse.kernels.huggingface` reads back.

    Args:
        model: any module; a transformers or PEFT model, usually.
        activations: of the new layers, as in :func:`stillhouse.kernels.linear.linear4bit`.
        checkpoint: a compressed-tensors folder that the model's dense weights were decoded from; only needed when transformers
            loaded it with ``dequantize=True``.

    Raises:
        ValueError: no layer of the model could be taken; the sentence says what was found.
    """
    swapped: dict[str, str] = {}
    left: dict[str, str] = {}
    files = checkpoint_files(Path(checkpoint)) if checkpoint is not None else {}
    for name, aliases in _linear_names(model).items():
        module = model.get_submodule(name)
        try:
            if module._forward_hooks or module._forward_pre_hooks or getattr(module, "_hf_hook", None) is not None:
                raise NotTaken("forward hooks hang on it and would be lost")
            packed, dtype, kind = read_layer(module, name, files)
            _adopt_adapters(model, name)
        except NotTaken as reason:
            left[name] = str(reason)
            continue
        layer = Linear4bit.from_packed(packed, module.bias, activations=activations, dtype=dtype).train(module.training)
        for alias in aliases:
            model.set_submodule(alias, layer)
        swapped[name] = kind
        _break_cycles(module)
        del module, layer, packed
    if not swapped:
        found = _count(left) or "no linear layer"
        raise ValueError(
            f"nothing to swap in this {type(model).__name__}: {found}. Expected bitsandbytes 4-bit layers or a "
            "compressed-tensors int4 checkpoint; a 16-bit model is quantized while it loads (kernels/huggingface.py)"
        )
    _leave_old_quantizer(model)
    return SwapReport(swapped, left)


def _break_cycles(module: nn.Module) -> None:
    """Let a replaced layer be freed at once, before the next one is read, instead of when the garbage collector comes by."""
    for attribute in ("forward", "_original_forward_func"):  # compressed-tensors: a bound method on the instance
        module.__dict__.pop(attribute, None)
    weight = getattr(module, "weight", None)
    if getattr(weight, "module", None) is module:  # bitsandbytes: the parameter knows its layer
        weight.module = None


def _count(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{count} × {kind}" for kind, count in Counter(kinds.values()).items())


def _linear_names(model: nn.Module) -> dict[str, list[str]]:
    """Every linear layer's first name, and all its names: a module may stand in a model twice. LoRA's own are left out."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside_adapter = any(part.startswith("lora_") for part in name.split("."))
        if name and not inside_adapter and not isinstance(module, Linear4bit) and _is_linear(module):
            names.setdefault(id(module), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not hasattr(module, "base_layer")


def _adopt_adapters(model: nn.Module, name: str) -> None:
    """Where PEFT wrapped the layer, make its wrapper the one that knows ``Linear4bit``."""
    parent_name, _, child = name.rpartition(".")
    if child != "base_layer":
        return
    from stillhouse.kernels.peft_lora import adopt_lora

    try:
        adopt_lora(model.get_submodule(parent_name))
    except ValueError as error:
        raise NotTaken(str(error)) from error


def _leave_old_quantizer(model: nn.Module) -> None:
    """Exchange the marks of the old packing for ours in the transformers model that the module is, or holds."""
    for module in model.modules():
        hook = vars(module).get("ct_decompress_hook")  # vars: a PEFT model shows its base's attributes as its own
        if hook is not None and not any(hasattr(inner, "weight_packed") for inner in module.modules()):
            hook.remove()
            del module.ct_decompress_hook
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    from stillhouse.kernels.huggingface import mark_as_packed

    outermost = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if outermost is not None:
        mark_as_packed(outermost)
