"""The contenders: one frozen linear layer each, in enough copies that the next one to be called is in no cache.

Ours: int4 of groups of 32 with bfloat16 and with int8 activations, and NF4 with nested absmax. Peers, each as its users run it:

- ``torch dense``: ``torch.nn.Linear`` in bfloat16.
- ``decode + torch``: our own decoder, then torch's bfloat16 matmul; what a fused kernel has to beat.
- ``bitsandbytes``: its NF4 layer in training mode, the default; ``bitsandbytes eval``: in eval mode without gradients, where on
  a CPU with AVX-512 BF16 it repacks the weight and runs a fused kernel.
- ``aten int4pack``: torch's own int4 matmul for CPUs, groups of 64, scale and zero point in bfloat16.
- ``torchao``: its int4 weight-only layer for CPUs, groups of 32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from stillhouse.kernels.formats import quantize
from stillhouse.kernels.linear import Linear4bit

Pass = Literal["forward", "forward+backward"]

INT4, INT4_INT8, NF4 = "int4", "int4 int8-act", "nf4"
DENSE, DECODE_INT4, DECODE_NF4 = "torch dense", "decode int4 + torch", "decode nf4 + torch"
BITSANDBYTES, BITSANDBYTES_EVAL = "bitsandbytes", "bitsandbytes eval"
ATEN, TORCHAO = "aten int4pack", "torchao"

OURS = (INT4, INT4_INT8, NF4)
FORWARD = (*OURS, DENSE, DECODE_INT4, DECODE_NF4, BITSANDBYTES, BITSANDBYTES_EVAL, ATEN, TORCHAO)
BACKWARD = (INT4, NF4, DENSE, BITSANDBYTES)
ATEN_GROUP = 64


@dataclass(frozen=True)
class Contender:
    """One way to hold the weight, in enough copies that the next one is never in the cache.

    Args:
        shape: (N, K) of the weight.
        layers: take x of shape (..., K), give (..., N); frozen.
        bytes_per_copy: of one copy's packed weight, all its tensors together.
        arithmetic: what its multiply-adds are made of, ``bf16`` or ``int8``: the peak that it is held against.
        pool: contenders of one pool share their layers, and take the next copy in turn.
    """

    name: str
    shape: tuple[int, int]
    layers: Sequence[nn.Module]
    bytes_per_copy: int
    arithmetic: str
    pool: str


class AtenInt4(nn.Module):
    """torch's own int4 layer for CPUs: ``w = (q − 8) · scale + zero``, scale and zero in bfloat16 for each group along K."""

    def __init__(self, weight_NK: torch.Tensor, group_size: int) -> None:
        super().__init__()
        num_rows, num_columns = weight_NK.shape
        groups = weight_NK.view(num_rows, -1, group_size)
        low, high = groups.aminmax(dim=-1, keepdim=True)
        scales = ((high - low) / 15).clamp(min=1e-8)
        codes = ((groups - low) / scales).round().to(torch.int32).clamp(0, 15).view(num_rows, num_columns)
        scales_and_zeros = torch.cat((scales, low + 8 * scales), dim=-1).transpose(0, 1).contiguous()
        self.group_size = group_size
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.register_buffer("scales_and_zeros", scales_and_zeros.to(torch.bfloat16))

    def forward(self, x_MK: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK, self.packed, self.group_size, self.scales_and_zeros)


class DecodeThenMatmul(nn.Module):
    """Our packed weight, decoded whole, then torch's matmul."""

    def __init__(self, layer: Linear4bit) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_MK: torch.Tensor) -> torch.Tensor:
        return F.linear(x_MK, self.layer.dequantize_weight(x_MK.dtype))


def make_layer(name: str, weight_NK: torch.Tensor) -> nn.Module:
    """One layer of a contender, standing for ``weight_NK`` (float32, N and K multiples of 64), for bfloat16 activations.

    Raises:
        ImportError, RuntimeError: the peer is not installed, or does not run here.
    """
    num_rows, num_columns = weight_NK.shape
    if name in (INT4, INT4_INT8):
        activations = "int8" if name == INT4_INT8 else "bf16"
        return Linear4bit(quantize(weight_NK, "int4", group_size=32), activations=activations, dtype=torch.bfloat16)
    if name == NF4:
        return Linear4bit(quantize(weight_NK, "nf4", block_size=64, double_quant=True), dtype=torch.bfloat16)
    if name in (BITSANDBYTES, BITSANDBYTES_EVAL):
        return bitsandbytes_layer(weight_NK).train(name == BITSANDBYTES)
    if name == ATEN:
        return AtenInt4(weight_NK, ATEN_GROUP)
    layer = nn.Linear(num_columns, num_rows, bias=False, dtype=torch.bfloat16)
    layer.weight = nn.Parameter(weight_NK.to(torch.bfloat16, copy=True), requires_grad=False)
    if name == TORCHAO:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import quantize_

        quantize_(layer, PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False))
    return layer


def bitsandbytes_layer(weight_NK: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
    """bitsandbytes' NF4 layer with nested absmax, as transformers makes it for QLoRA with bfloat16 compute."""
    import bitsandbytes as bnb

    num_rows, num_columns = weight_NK.shape
    settings = {"quant_type": "nf4", "compress_statistics": True}
    with torch.device("meta"):  # its weight is replaced below
        layer = bnb.nn.Linear4bit(num_columns, num_rows, bias=False, compute_dtype=torch.bfloat16, **settings)
    layer.weight = bnb.nn.Params4bit(weight_NK.clone(), requires_grad=False, module=layer, **settings)
    layer.bias = bias
    return layer.to("cpu")  # this is where it quantizes


def contenders(names: Sequence[str], weight_NK: torch.Tensor, *, min_bytes: int) -> tuple[list[Contender], dict[str, str]]:
    """Make the contenders of those names.

    Args:
        weight_NK: the weight that all of them stand for, float32 (N, K), N and K multiples of 64.
        min_bytes: copies are made until each contender holds this much packed weight.

    Returns:
        the contenders, and for each peer that is not here, why.
    """
    made: dict[str, Contender] = {}
    missing: dict[str, str] = {}
    for name in names:
        shared = {INT4_INT8: INT4, DECODE_INT4: INT4, DECODE_NF4: NF4}.get(name)
        if shared in made:
            made[name] = _of_pool(name, made[shared])
            continue
        try:
            layer = make_layer(name, weight_NK)
            size = packed_bytes(name, layer)
            # A peer may be installed and not run on this machine; on a copy, because a first call may change the layer.
            run_once(copy.deepcopy(layer), *_ones(weight_NK.shape), "forward")
            layers = [layer, *(copy.deepcopy(layer) for _ in range(-(-min_bytes // size) - 1))]
        except (ImportError, RuntimeError) as error:
            if name in OURS:
                raise
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        made[name] = Contender(name, tuple(weight_NK.shape), layers, size, "bf16", pool=name)
    return list(made.values()), missing


def _of_pool(name: str, pool: Contender) -> Contender:
    """A contender over the packed weights of another one."""
    if name == INT4_INT8:
        layers = [Linear4bit(layer.packed, activations="int8", dtype=layer.dtype) for layer in pool.layers]
    else:
        layers = [DecodeThenMatmul(layer) for layer in pool.layers]
    arithmetic = "int8" if name == INT4_INT8 else "bf16"
    return Contender(name, pool.shape, layers, pool.bytes_per_copy, arithmetic, pool.pool)


def packed_bytes(name: str, layer: nn.Module) -> int:
    """Bytes that the layer's weight takes, with scales and all."""
    if name in (BITSANDBYTES, BITSANDBYTES_EVAL):
        state = layer.weight.quant_state
        tensors = [layer.weight.data, state.absmax, *([state.state2.absmax] if state.nested else [])]
    elif name == TORCHAO:
        tensors = [getattr(layer.weight, part) for part in ("qdata", "scale_and_zero")]
    else:
        tensors = [*layer.parameters(), *layer.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def next_layer(made: Sequence[Contender]) -> dict[str, Callable[[], nn.Module]]:
    """For each contender, a function that gives its next layer; one turn for all contenders of a pool."""
    turns = {contender.pool: 0 for contender in made}

    def take(contender: Contender) -> nn.Module:
        turns[contender.pool] = (turns[contender.pool] + 1) % len(contender.layers)
        return contender.layers[turns[contender.pool]]

    return {contender.name: (lambda contender=contender: take(contender)) for contender in made}


def warm_up(made: Sequence[Contender], passed: Pass) -> None:
    """Call every copy once, so that whatever a layer does at its first call (bitsandbytes repacks) is done."""
    for contender in made:
        for layer in contender.layers:
            run_once(layer, *_ones(contender.shape), passed)


def _ones(shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of x and of dy."""
    num_rows, num_columns = shape
    return torch.ones(1, num_columns, dtype=torch.bfloat16), torch.ones(1, num_rows, dtype=torch.bfloat16)


def run_once(
    layer: nn.Module, x_MK: torch.Tensor, dy_MN: torch.Tensor, passed: Pass
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is timed: y of shape (M, N), and dx of shape (M, K) for ``forward+backward``, else None."""
    if passed == "forward":
        with torch.no_grad():
            return layer(x_MK), None
    x_MK = x_MK.detach().requires_grad_()
    y_MN = layer(x_MK)
    y_MN.backward(dy_MN)
    return y_MN, x_MK.grad
