"""A linear layer over a packed 4-bit weight: the function ``linear4bit`` and the module ``Linear4bit``.

Dtypes. The output has the dtype of x. ``activations`` says how the product is computed:

- ``bf16`` (the default): a float32 x is never rounded and meets the decoded weights in float32. A bfloat16 or float16 x meets
  weights that are rounded to its dtype at most (for a few rows, and for float16 on the CPU, they are not rounded either).
- ``int8``: x is rounded to 8 bits, one scale for each 32 along K, and products are summed as integers: for serving. nf4
  levels are rounded to 127ths. The gradient is that of the ``bf16`` mode.
- ``exact``: in at least float32 whatever x is, rounded once at the end. For tests and for comparing files.

Sums are float32 in every mode. Under ``torch.autocast`` the first two take x in the autocast dtype and return it, as
``torch.nn.Linear`` does.

Cost. The compiled CPU kernels decode panels of the weight that fit a core's cache; the plain-torch path decodes the whole
weight in each forward and each backward (2 bytes or 4 a weight, freed at once). Neither keeps anything.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from stillhouse.kernels import formats, ops
from stillhouse.kernels.formats import Format, PackedWeight

Activations = Literal["bf16", "int8", "exact"]
ACTIVATIONS = ops.ACTIVATIONS


def linear4bit(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None, activations: Activations = "bf16"
) -> torch.Tensor:
    """Multiply by a 4-bit weight: ``y = x @ dequantize(packed).T + bias``, differentiable in x and bias.

    Args:
        x: (..., K), float16, bfloat16, float32 or float64.
        packed: weight of shape (N, K), int4 or nf4, on the device of x. It gets no gradient.
        bias: (N,), any float dtype, or None.
        activations: ``bf16`` computes in the dtype of x, ``int8`` rounds x to 8 bits, ``exact`` computes in at least float32;
            see the top of this file.

    Returns:
        (..., N), dtype of x (the autocast dtype under ``torch.autocast``).

    Raises:
        ValueError: x does not end in K, is not a float tensor, or ``activations`` is none of the three.
    """
    _check_activations(activations)
    return _multiply(x, packed, vars(packed), bias, activations)


class Linear4bit(nn.Module):
    """A frozen linear layer whose weight is packed in 4 bits; takes the place of ``torch.nn.Linear``.

    The packed tensors are plain buffers under the names of ``PackedWeight`` (``codes``, ``scales`` …), so ``state_dict`` and
    safetensors hold exactly them; nothing is repacked in use, so a file saved after inference has the same bytes. They keep
    their own dtypes: ``.to(torch.bfloat16)`` changes ``dtype`` and the bias, never a scale.

    Args:
        packed: the weight.
        bias: (N,) or None.
        activations: as in :func:`linear4bit`.
        dtype: the dtype that the layer stands for: what ``weight`` reads as, and what LoRA adapters are made in.
    """

    def __init__(
        self,
        packed: PackedWeight,
        bias: torch.Tensor | None = None,
        *,
        activations: Activations = "bf16",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check_activations(activations)
        self.out_features, self.in_features = packed.shape
        self.format = packed.format
        self.group_size = packed.group_size
        self.block_size = packed.block_size
        self.activations = activations
        self.dtype = dtype
        for name in formats.TENSOR_NAMES:
            self.register_buffer(name, getattr(packed, name))
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: torch.Tensor | None = None,
        *,
        activations: Activations = "bf16",
        dtype: torch.dtype = torch.float32,
    ) -> Linear4bit:
        """Make a layer around a packed weight without copying it."""
        return cls(packed, bias, activations=activations, dtype=dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        format: Format = "int4",
        *,
        group_size: int = 32,
        symmetric: bool = True,
        scale_search: bool = True,
        block_size: int = 64,
        double_quant: bool = True,
        activations: Activations = "bf16",
    ) -> Linear4bit:
        """Quantize a linear layer's weight; its bias (the same parameter) and its dtype are kept.

        Raises:
            ValueError: as :func:`stillhouse.kernels.formats.quantize`.
        """
        packed = formats.quantize(
            linear.weight,
            format,
            group_size=group_size,
            symmetric=symmetric,
            scale_search=scale_search,
            block_size=block_size,
            double_quant=double_quant,
        )
        return cls(packed, linear.bias, activations=activations, dtype=linear.weight.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), out_features and in_features."""
        return (self.out_features, self.in_features)

    @property
    def packed(self) -> PackedWeight:
        """The weight as it stands now, sharing the layer's tensors."""
        tensors = {name: getattr(self, name) for name in formats.TENSOR_NAMES}
        return PackedWeight(self.format, self.shape, group_size=self.group_size, block_size=self.block_size, **tensors)

    def dequantize_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Decode the weight, shape (N, K), in ``dtype`` (the layer's own by default)."""
        return formats.dequantize(self.packed, dtype or self.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The decoded weight, for code that reads a linear layer's weight, its device or its dtype.

        Decoded anew at each access and not a parameter: writing into it changes nothing.
        """
        return self.dequantize_weight()

    @property
    def qweight(self) -> torch.Tensor:
        """The packed codes. PEFT looks for this name to learn a quantized layer's device without decoding it."""
        return self.codes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Straight from the dict: a module's attribute look-up would cost a token's smallest layers a tenth of their time.
        return _multiply(x, self, self._buffers, self.bias, self.activations)

    def _apply(self, fn, recurse=True):
        before = {name: buffer for name in formats.TENSOR_NAMES if (buffer := self._buffers.get(name)) is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            # Module.to(dtype) casts every float buffer; a cast absmax or scale would be another weight.
            if self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=before["codes"].device)).dtype
        return self

    def extra_repr(self) -> str:
        per = f"group_size={self.group_size}" if self.format == "int4" else f"block_size={self.block_size}"
        size = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{size}, {self.format}, {per}"


def linear4bit_module_names(model: nn.Module) -> list[str]:
    """Full names of all ``Linear4bit`` layers in a model, in the model's order; for LoRA's ``target_modules``."""
    return [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def _check_activations(activations: str) -> None:
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {ACTIVATIONS}, not {activations!r}")


def _multiply(
    x: torch.Tensor,
    w: PackedWeight | Linear4bit,
    tensors: dict[str, torch.Tensor | None],
    bias: torch.Tensor | None,
    activations: str,
) -> torch.Tensor:
    """Call the format's operator, or its CPU implementation at once where nothing else of the dispatcher is wanted.

    ``w`` gives shape and settings, which a ``Linear4bit`` has under a packed weight's names: no object is made for a call.
    """
    if activations != "exact" and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    num_rows, num_columns = w.shape
    plain = _is_plain_call(x, bias)
    if w.format == "int4":
        multiply = ops.linear_int4_cpu if plain else torch.ops.stillhouse.linear_int4
        weight = (tensors["codes"], tensors["scales"], tensors["zero_points"])
        return multiply(x, *weight, bias, num_columns, w.group_size, activations)
    multiply = ops.linear_nf4_cpu if plain else torch.ops.stillhouse.linear_nf4
    nested = (tensors["nested_absmax"], tensors["nested_quant_map"], tensors["nested_offset"])
    weight = (tensors["codes"], tensors["absmax"], *nested)
    return multiply(x, *weight, bias, num_rows, num_columns, w.block_size, w.format, activations)


def _is_plain_call(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether nothing but the value is wanted of a CPU product: no gradient, trace, transform, mode or profile.

    Then the CPU's implementation is called without torch's dispatcher, whose way through Python costs a token's smallest
    layers as much as their arithmetic. The parts of torch that this asks are private; where one is missing, nothing is plain.
    """
    if type(x) is not torch.Tensor or not x.is_cpu or _MODES is None:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    if torch.compiler.is_compiling() or torch.autograd.profiler._is_profiler_enabled:
        return False
    return not any(count() for count in _MODES)


def _functorch_depth() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


_MODES = (
    (torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack, _functorch_depth)
    if hasattr(torch._C, "_len_torch_dispatch_stack")
    and hasattr(torch._C, "_len_torch_function_stack")
    and hasattr(torch._C, "_functorch")
    and hasattr(torch.autograd.profiler, "_is_profiler_enabled")
    else None
)
