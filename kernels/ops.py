"""The torch operators of the 4-bit matmuls, ``torch.ops.stillhouse.*``: flat tensors in, no state object.

    linear_int4(x, codes, scales, zero_points?, bias?, in_features, group_size, activations) -> y
    linear_int4_grad_x(dy, codes, scales, zero_points?, in_features, group_size, activations) -> dx
    linear_nf4(x, codes, absmax, nested_absmax?, nested_quant_map?, nested_offset?, bias?, out_features, in_features,
               block_size, table, activations) -> y
    linear_nf4_grad_x(dy, ...) -> dx

Each computes ``reference.linear_reference`` or, for ``grad_x``, ``reference.input_gradient_reference`` over the decoded weight.
``table`` is the 4-bit code, ``nf4`` or ``fp4``. Autograd keeps the packed tensors alone: the decoded weight lives inside one
call, and x is not needed because W is frozen. The gradient of an int8 product is that of the bf16 one.

Who computes: on the CPU the compiled kernels of ``cpu.py`` wherever they take the call, on CUDA the Triton kernels of
``gpu.py``, and everywhere else plain torch. Autograd and fake tensors are the same for all.
"""

from __future__ import annotations

import torch

from stillhouse.kernels import cpu, gpu, reference

_LIBRARY = torch.library.Library("stillhouse", "DEF")
_INT4_WEIGHT = "Tensor codes, Tensor scales, Tensor? zero_points"
_NF4_WEIGHT = "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_quant_map, Tensor? nested_offset"
_INT4_SHAPE = "int in_features, int group_size, str activations"
_NF4_SHAPE = "int out_features, int in_features, int block_size, str table, str activations"

ACTIVATIONS = ("bf16", "int8", "exact")

_LIBRARY.define(f"linear_int4(Tensor x, {_INT4_WEIGHT}, Tensor? bias, {_INT4_SHAPE}) -> Tensor")
_LIBRARY.define(f"linear_int4_grad_x(Tensor dy, {_INT4_WEIGHT}, {_INT4_SHAPE}) -> Tensor")
_LIBRARY.define(f"linear_nf4(Tensor x, {_NF4_WEIGHT}, Tensor? bias, {_NF4_SHAPE}) -> Tensor")
_LIBRARY.define(f"linear_nf4_grad_x(Tensor dy, {_NF4_WEIGHT}, {_NF4_SHAPE}) -> Tensor")


def check_operand(vector: torch.Tensor, name: str, features: int, shape: tuple[int, int], activations: str) -> None:
    """Refuse an activation or gradient that does not fit a weight of ``shape``, or an unknown mode, with a ValueError."""
    if vector.dim() == 0 or vector.shape[-1] != features:
        raise ValueError(f"a 4-bit weight of shape {shape} needs {name} of shape (..., {features}), not {tuple(vector.shape)}")
    if not vector.is_floating_point():
        raise ValueError(f"{name} must be a float tensor, not {vector.dtype}")
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {ACTIVATIONS}, not {activations!r}")


def _output(like: torch.Tensor, features: int) -> torch.Tensor:
    return like.new_empty((*like.shape[:-1], features))


# int4


def _linear_int4(x, codes, scales, zero_points, bias, in_features, group_size, activations):
    check_operand(x, "x", in_features, (codes.shape[0], in_features), activations)
    weight = reference.decode_int4(codes, scales, zero_points, in_features, group_size)
    return reference.linear_reference(x, weight, bias, activations)


def _linear_int4_fake(x, codes, scales, zero_points, bias, in_features, group_size, activations):
    check_operand(x, "x", in_features, (codes.shape[0], in_features), activations)
    return _output(x, codes.shape[0])


def _linear_int4_grad_x(dy, codes, scales, zero_points, in_features, group_size, activations):
    check_operand(dy, "dy", codes.shape[0], (codes.shape[0], in_features), activations)
    weight = reference.decode_int4(codes, scales, zero_points, in_features, group_size)
    return reference.input_gradient_reference(dy, weight, activations)


def _linear_int4_grad_x_fake(dy, codes, scales, zero_points, in_features, group_size, activations):
    check_operand(dy, "dy", codes.shape[0], (codes.shape[0], in_features), activations)
    return _output(dy, in_features)


def _save_int4(ctx, inputs, output):
    _, codes, scales, zero_points, bias, *ctx.settings = inputs
    ctx.save_for_backward(codes, scales, zero_points)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_int4(ctx, dy):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.stillhouse.linear_int4_grad_x(dy, *ctx.saved_tensors, *_gradient_settings(ctx.settings))
    if ctx.needs_input_grad[4]:
        grad_bias = _grad_bias(dy, ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, None, None, None


def _save_int4_grad_x(ctx, inputs, output):
    _, codes, scales, zero_points, *ctx.settings = inputs
    ctx.save_for_backward(codes, scales, zero_points)


def _backward_int4_grad_x(ctx, grad):
    grad_dy = torch.ops.stillhouse.linear_int4(grad, *ctx.saved_tensors, None, *ctx.settings)
    return grad_dy, None, None, None, None, None, None


# nf4


def _linear_nf4(
    x, codes, absmax, nested_absmax, quant_map, offset, bias, out_features, in_features, block_size, table, activations
):
    shape = (out_features, in_features)
    check_operand(x, "x", in_features, shape, activations)
    levels = "int8" if activations == "int8" else "float32"
    weight = reference.decode_nf4(
        codes, absmax, nested_absmax, quant_map, offset, shape, block_size, table=table, levels=levels
    )
    return reference.linear_reference(x, weight, bias, activations)


def _linear_nf4_fake(
    x, codes, absmax, nested_absmax, quant_map, offset, bias, out_features, in_features, block_size, table, activations
):
    check_operand(x, "x", in_features, (out_features, in_features), activations)
    return _output(x, out_features)


def _linear_nf4_grad_x(
    dy, codes, absmax, nested_absmax, quant_map, offset, out_features, in_features, block_size, table, activations
):
    shape = (out_features, in_features)
    check_operand(dy, "dy", out_features, shape, activations)
    weight = reference.decode_nf4(codes, absmax, nested_absmax, quant_map, offset, shape, block_size, table=table)
    return reference.input_gradient_reference(dy, weight, activations)


def _linear_nf4_grad_x_fake(
    dy, codes, absmax, nested_absmax, quant_map, offset, out_features, in_features, block_size, table, activations
):
    check_operand(dy, "dy", out_features, (out_features, in_features), activations)
    return _output(dy, in_features)


def _save_nf4(ctx, inputs, output):
    _, codes, absmax, nested_absmax, quant_map, offset, bias, *ctx.settings = inputs
    ctx.save_for_backward(codes, absmax, nested_absmax, quant_map, offset)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_nf4(ctx, dy):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.stillhouse.linear_nf4_grad_x(dy, *ctx.saved_tensors, *_gradient_settings(ctx.settings))
    if ctx.needs_input_grad[6]:
        grad_bias = _grad_bias(dy, ctx.bias_dtype)
    return grad_x, None, None, None, None, None, grad_bias, None, None, None, None, None


def _save_nf4_grad_x(ctx, inputs, output):
    _, codes, absmax, nested_absmax, quant_map, offset, *ctx.settings = inputs
    ctx.save_for_backward(codes, absmax, nested_absmax, quant_map, offset)


def _backward_nf4_grad_x(ctx, grad):
    grad_dy = torch.ops.stillhouse.linear_nf4(grad, *ctx.saved_tensors, None, *ctx.settings)
    return grad_dy, None, None, None, None, None, None, None, None, None, None


def _gradient_settings(settings: list) -> list:
    """The settings of the gradient's product: rounding x to 8 bits has no gradient of its own, dy is not rounded."""
    *shape, activations = settings
    return [*shape, "bf16" if activations == "int8" else activations]


def _grad_bias(dy: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)).to(dtype)


# The compiled kernels, where they take the call


def _compiled_serves(vector: torch.Tensor, *weight: torch.Tensor | None) -> bool:
    if vector.dtype in cpu.DTYPES and cpu.serves(*weight):
        return True
    if weight[0].device != vector.device:  # torch's own product of a CPU and a meta tensor is a tensor of anything
        raise ValueError(f"x or dy is on {vector.device}, the 4-bit weight on {weight[0].device}: move one of them")
    return False


def linear_int4_cpu(x, codes, scales, zero_points, bias, in_features, group_size, activations):
    """The CPU's ``linear_int4``, also for whoever wants nothing else of the dispatcher."""
    check_operand(x, "x", in_features, (codes.shape[0], in_features), activations)
    if not _compiled_serves(x, codes, scales, zero_points):
        return _linear_int4(x, codes, scales, zero_points, bias, in_features, group_size, activations)
    return cpu.forward(cpu.int4_weight(codes, scales, zero_points, in_features, group_size), x, bias, activations)


def _linear_int4_grad_x_cpu(dy, codes, scales, zero_points, in_features, group_size, activations):
    check_operand(dy, "dy", codes.shape[0], (codes.shape[0], in_features), activations)
    if not _compiled_serves(dy, codes, scales, zero_points):
        return _linear_int4_grad_x(dy, codes, scales, zero_points, in_features, group_size, activations)
    return cpu.input_gradient(cpu.int4_weight(codes, scales, zero_points, in_features, group_size), dy, activations)


def linear_nf4_cpu(x, *arguments):
    """The CPU's ``linear_nf4``, likewise."""
    *weight, bias, out_features, in_features, block_size, table, activations = arguments
    check_operand(x, "x", in_features, (out_features, in_features), activations)
    if not _compiled_serves(x, *weight):
        return _linear_nf4(x, *arguments)
    return cpu.forward(cpu.table_weight(*weight, (out_features, in_features), block_size, table), x, bias, activations)


def _linear_nf4_grad_x_cpu(dy, *arguments):
    *weight, out_features, in_features, block_size, table, activations = arguments
    check_operand(dy, "dy", out_features, (out_features, in_features), activations)
    if not _compiled_serves(dy, *weight):
        return _linear_nf4_grad_x(dy, *arguments)
    return cpu.input_gradient(cpu.table_weight(*weight, (out_features, in_features), block_size, table), dy, activations)


for _name, _plain, _compiled, _fake, _save, _backward in (
    ("linear_int4", _linear_int4, linear_int4_cpu, _linear_int4_fake, _save_int4, _backward_int4),
    (
        "linear_int4_grad_x",
        _linear_int4_grad_x,
        _linear_int4_grad_x_cpu,
        _linear_int4_grad_x_fake,
        _save_int4_grad_x,
        _backward_int4_grad_x,
    ),
    ("linear_nf4", _linear_nf4, linear_nf4_cpu, _linear_nf4_fake, _save_nf4, _backward_nf4),
    (
        "linear_nf4_grad_x",
        _linear_nf4_grad_x,
        _linear_nf4_grad_x_cpu,
        _linear_nf4_grad_x_fake,
        _save_nf4_grad_x,
        _backward_nf4_grad_x,
    ),
):
    _LIBRARY.impl(_name, _plain, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _compiled, "CPU")
    torch.library.register_fake(f"stillhouse::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"stillhouse::{_name}", _backward, setup_context=_save, lib=_LIBRARY)

if torch.version.cuda is not None:
    gpu.register(_LIBRARY)
