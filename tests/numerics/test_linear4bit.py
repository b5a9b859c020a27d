"""The 4-bit linear layer: values, gradients, dtypes, and what happens to it in training, saving and compiling."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stillhouse.kernels import cpu
from stillhouse.kernels.formats import PackedWeight, dequantize, quantize
from stillhouse.kernels.linear import Linear4bit, linear4bit, linear4bit_module_names

# Every code path: grouped and ragged int4, zero points, plain and nested nf4; blocks that cross rows; odd N and K.
LAYOUTS = {
    "int4": ("int4", (24, 64), {}),
    "int4-odd-ragged": ("int4", (7, 45), {}),
    "int4-asymmetric": ("int4", (5, 96), {"symmetric": False}),
    "int4-asymmetric-ragged": ("int4", (3, 31), {"symmetric": False, "group_size": 8}),
    "nf4-nested": ("nf4", (24, 64), {}),
    "nf4-nested-odd": ("nf4", (7, 45), {}),
    "nf4-plain": ("nf4", (9, 50), {"double_quant": False}),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def _packed(layout: str, seed: int = 0) -> PackedWeight:
    format, shape, options = LAYOUTS[layout]
    return quantize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), format, **options)


def _x(packed: PackedWeight, *leading: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*leading, packed.shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)


@layouts
@pytest.mark.parametrize("activations", ["bf16", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_hot_activations_give_the_decoded_weight(layout, activations, dtype):
    """If it failed, the layer would multiply by another weight than the one in the file."""
    packed = _packed(layout)
    y = linear4bit(torch.eye(packed.shape[1], dtype=dtype), packed, activations=activations)
    assert y.dtype == dtype
    assert torch.equal(y.T, dequantize(packed, dtype))


@layouts
@pytest.mark.parametrize("activations", ["bf16", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product_is_within_derived_bounds(layout, activations, dtype):
    """If it failed, 4-bit inference would carry an error beyond that of the rounding it declares."""
    packed = _packed(layout)
    x = _x(packed, 5, 3, dtype=dtype)
    bias = torch.randn(packed.shape[0], generator=torch.Generator().manual_seed(2)).to(dtype)
    y = linear4bit(x, packed, bias, activations)
    assert y.dtype == dtype
    weight = dequantize(packed).double()
    expected = x.double() @ weight.T + bias.double()
    magnitude = x.double().abs() @ weight.abs().T + bias.double().abs()
    # K + 1 additions in float32, then one rounding to the output's dtype (2 for a bias added after the product); in the bf16
    # mode the weight may be rounded to the dtype of x, half an eps of it at most.
    bound = (packed.shape[1] + 2) * 2.0**-24 * magnitude + torch.finfo(dtype).eps * (expected.abs() + bias.double().abs())
    if activations == "bf16":
        bound = bound + torch.finfo(dtype).eps / 2 * magnitude
    assert ((y.double() - expected).abs() <= bound).all()


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_dy_times_the_same_weight(layout, dtype):
    """If it failed, adapters below a 4-bit layer would train on gradients of another weight."""
    packed = _packed(layout)
    x = _x(packed, 4, 3, dtype=dtype).requires_grad_()
    bias = torch.zeros(packed.shape[0], dtype=dtype, requires_grad=True)
    dy = torch.randn(4, 3, packed.shape[0], generator=torch.Generator().manual_seed(3)).to(dtype)
    linear4bit(x, packed, bias).backward(dy)
    weight = dequantize(packed, dtype)
    expected = dy.double() @ weight.double()
    magnitude = dy.double().abs() @ weight.double().abs()
    bound = (packed.shape[0] + 1) * 2.0**-24 * magnitude + torch.finfo(dtype).eps * expected.abs()
    assert ((x.grad.double() - expected).abs() <= bound).all()
    sums = dy.double().sum((0, 1))
    sum_bound = 12 * 2.0**-24 * dy.double().abs().sum((0, 1)) + torch.finfo(dtype).eps * sums.abs()
    assert ((bias.grad.double() - sums).abs() <= sum_bound).all()


@layouts
def test_gradcheck_in_exact_mode(layout):
    """First and second derivatives against finite differences in float64."""
    packed = _packed(layout)
    x = _x(packed, 2, dtype=torch.float64).requires_grad_()
    bias = torch.zeros(packed.shape[0], dtype=torch.float64, requires_grad=True)

    def function(x, bias):
        return linear4bit(x, packed, bias, "exact").square()

    assert torch.autograd.gradcheck(function, (x, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, bias), fast_mode=True)


@layouts
def test_operators_keep_torchs_contract(layout):
    """opcheck of every operator: if it failed, torch.compile or export of a 4-bit model would break or be wrong."""
    packed = _packed(layout)
    num_rows, num_columns = packed.shape
    x = _x(packed, 3, dtype=torch.float32).requires_grad_()
    dy = torch.randn(3, num_rows, requires_grad=True)
    bias = torch.randn(num_rows, requires_grad=True)
    ops = torch.ops.stillhouse
    if packed.format == "int4":
        weight = (packed.codes, packed.scales, packed.zero_points)
        settings = (num_columns, packed.group_size, "exact")
        calls = [(ops.linear_int4, (x, *weight, bias, *settings)), (ops.linear_int4_grad_x, (dy, *weight, *settings))]
    else:
        weight = (packed.codes, packed.absmax, packed.nested_absmax, packed.nested_quant_map, packed.nested_offset)
        settings = (num_rows, num_columns, packed.block_size, packed.format, "exact")
        calls = [(ops.linear_nf4, (x, *weight, bias, *settings)), (ops.linear_nf4_grad_x, (dy, *weight, *settings))]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("layout", ["int4", "nf4-nested"])
def test_autograd_keeps_only_the_packed_weight(layout):
    """If it failed, QLoRA training would hold a 16-bit copy of every weight between forward and backward."""
    packed = _packed(layout)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear4bit(_x(packed, 2).requires_grad_(), packed)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in packed.tensors().values()}


def test_a_backend_takes_the_plain_implementations_place():
    """The seam for C++ and Triton: if it failed, a fast kernel would be registered and never called, or lose gradients."""
    packed = _packed("int4")
    x = _x(packed, 2).requires_grad_()

    def ones(x, codes, *rest):
        return x.new_ones((*x.shape[:-1], codes.shape[0]))

    with torch.library._scoped_library("stillhouse", "IMPL") as library:
        library.impl("linear_int4", ones, "CPU")
        y = linear4bit(x, packed)
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.ones(2, 24))
    torch.testing.assert_close(gradient, dequantize(packed).sum(0).expand_as(x), rtol=1e-5, atol=1e-4)
    assert not torch.equal(linear4bit(x, packed), y)


@pytest.mark.parametrize("layout", ["int4", "nf4-nested"])
def test_nan_and_inf_activations_show_up_in_their_row_only(layout):
    """If it failed, a diverged training run would look healthy, or spoil its neighbours."""
    packed = _packed(layout)
    x = _x(packed, 3)
    x[0, 5], x[1, 6] = float("nan"), float("inf")
    y = linear4bit(x, packed)
    assert y[0].isnan().all()
    assert not y[1].isfinite().any()
    x[:2] = 0.0
    assert torch.equal(y[2], linear4bit(x, packed)[2])


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0, 3), (2, 1, 3)])
def test_any_leading_shape(leading):
    """If it failed, decoding one token, or an empty batch, would crash."""
    packed = _packed("int4-odd-ragged")
    x = _x(packed, *leading).requires_grad_()
    bias = torch.ones(packed.shape[0], requires_grad=True)
    y = linear4bit(x, packed, bias)
    assert y.shape == (*leading, packed.shape[0])
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, float(y.numel() // packed.shape[0])))
    row = dequantize(packed).sum(0)
    torch.testing.assert_close(x.grad, row.expand_as(x), rtol=1e-5, atol=1e-5 * row.abs().max().item())


def test_wrong_calls_are_refused():
    """If it failed, a mismatched layer would fail deep inside, or an unknown mode would fall back silently."""
    packed = _packed("int4")
    with pytest.raises(ValueError, match=r"shape \(24, 64\) needs x of shape \(\.\.\., 64\), not \(2, 63\)"):
        linear4bit(torch.randn(2, 63), packed)
    with pytest.raises(ValueError, match="x must be a float tensor"):
        linear4bit(torch.ones(2, 64, dtype=torch.int64), packed)
    for call in (
        lambda: linear4bit(torch.ones(2, 64), packed, activations="fp8"),
        lambda: Linear4bit(packed, activations="fp8"),
    ):
        with pytest.raises(ValueError, match=r"activations must be one of \('bf16', 'int8', 'exact'\), not 'fp8'"):
            call()


@pytest.mark.parametrize("format", ["int4", "nf4"])
@pytest.mark.skipif(cpu.isa() == "torch", reason="plain torch serves, and refuses in its own words")
def test_a_bias_or_weight_that_is_not_there_is_refused(format):
    """If it failed, the compiled kernels would read memory that is not the tensor's."""
    packed, x = quantize(torch.randn(24, 64), format), torch.ones(2, 64)
    short, elsewhere = torch.ones(7), torch.ones(24, device="meta")
    for call, bias in ((x, short), (x, elsewhere), (x.clone().requires_grad_(), short)):
        with pytest.raises(ValueError, match=r"needs a bias of shape \(24,\) there, not"):
            linear4bit(call, packed, bias)
    with pytest.raises(ValueError, match="on cpu, the 4-bit weight on meta: move one of them"):
        linear4bit(x, packed.to("meta"))


# The module


@pytest.mark.parametrize("format", ["int4", "nf4"])
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_is_the_rounded_linear(format, bias):
    """If it failed, replacing a model's layers would change more than the rounding of their weights."""
    linear = nn.Linear(64, 24, bias=bias)
    layer = Linear4bit.from_linear(linear, format)
    rounded = copy.deepcopy(linear)
    rounded.weight.data = dequantize(quantize(linear.weight, format))
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), rounded(x), rtol=0, atol=64 * 2.0**-23 * 4)
    assert layer.bias is linear.bias
    assert torch.equal(layer.weight, rounded.weight)
    assert (layer.weight.dtype, layer.weight.device) == (linear.weight.dtype, linear.weight.device)
    assert not any(parameter is not linear.bias for parameter in layer.parameters())


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_train_eval_train_keeps_gradients(format):
    """bitsandbytes loses the gradient on a CPU after an eval forward; ours must give the same one again."""
    layer = Linear4bit.from_linear(nn.Linear(64, 24), format)
    x = torch.randn(3, 64, requires_grad=True)

    def gradient() -> torch.Tensor:
        (grad,) = torch.autograd.grad(layer.train()(x).square().sum(), x)
        return grad

    before = gradient()
    with torch.inference_mode():
        layer.eval()(x)
    assert torch.equal(gradient(), before)
    assert before.abs().sum() > 0


@layouts
def test_a_file_saved_after_inference_has_the_same_bytes(layout, tmp_path):
    """If it failed, hashes in a manifest would break by using the model, and weights could drift with each save."""
    layer = Linear4bit.from_packed(_packed(layout), torch.randn(LAYOUTS[layout][1][0]))
    save_file(layer.state_dict(), tmp_path / "before.safetensors")
    with torch.inference_mode():
        layer.eval()(_x(layer.packed, 2))
    save_file(layer.state_dict(), tmp_path / "after.safetensors")
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "after.safetensors").read_bytes()
    other = Linear4bit.from_packed(_packed(layout, seed=9), torch.zeros(layer.out_features))
    other.load_state_dict(load_file(tmp_path / "after.safetensors"))
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(other(_x(layer.packed, 2)), layer(_x(layer.packed, 2)))


@pytest.mark.parametrize("layout", ["int4-asymmetric", "nf4-nested", "nf4-plain"])
def test_casting_a_model_casts_no_scale(layout):
    """model.to(bfloat16) casts every float buffer of an ordinary module: nf4 weights would be off by up to 0.4 %."""
    packed = _packed(layout)
    model = nn.Sequential(Linear4bit.from_packed(packed, torch.ones(packed.shape[0])))
    weight = model[0].dequantize_weight(torch.float32)
    dtypes = {name: tensor.dtype for name, tensor in packed.tensors().items()}
    for cast, dtype in ((model.to, torch.bfloat16), (model.to, torch.float16)):
        cast(dtype)
        assert (model[0].dtype, model[0].weight.dtype, model[0].bias.dtype) == (dtype, dtype, dtype)
        assert {name: tensor.dtype for name, tensor in model[0].packed.tensors().items()} == dtypes
        assert torch.equal(model[0].dequantize_weight(torch.float32), weight)
    assert model.double()[0].dtype == torch.float64
    assert model.to("meta")[0].packed.device == torch.device("meta")


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_gradient_checkpointing_gives_the_same_gradients(format):
    """Silently wrong gradients under checkpointing are a known failure of others (bitsandbytes #2034)."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(Linear4bit.from_linear(nn.Linear(64, 64), format) for _ in range(2)), nn.Linear(64, 5))
    x = torch.randn(3, 64, requires_grad=True)

    def gradients(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y.square().sum(), (x, layers[2].weight))

    plain = gradients(layers(x))
    checkpointed = gradients(torch.utils.checkpoint.checkpoint(layers, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed))


@pytest.mark.parametrize("format", ["int4", "nf4"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_as_one_graph_with_gradients(format, backend):
    """If it failed, torch.compile(fullgraph=True) of a model with 4-bit layers would break or change its numbers."""
    torch.manual_seed(0)
    block = nn.Sequential(Linear4bit.from_linear(nn.Linear(64, 32), format), nn.SiLU(), nn.Linear(32, 4))
    x = torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    y, expected = compiled(x), block(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), x)[0] for value in (y, expected)))


def test_autocast_computes_in_its_dtype_as_linear_does():
    """If it failed, mixed-precision training would run its 4-bit layers in float32, slowly and without a word."""
    packed = _packed("int4")
    x = _x(packed, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, exact = linear4bit(x, packed), linear4bit(x.requires_grad_(), packed, activations="exact")
        (gradient,) = torch.autograd.grad(exact.sum(), x)
    assert torch.equal(y, linear4bit(x.to(torch.bfloat16), packed))
    assert y.dtype == torch.bfloat16
    assert torch.equal(exact, linear4bit(x, packed, activations="exact"))
    torch.testing.assert_close(gradient, dequantize(packed).sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


def test_module_names_are_found_in_a_model():
    """If it failed, LoRA would be put on fewer layers than asked for."""
    inner = nn.ModuleDict({"a": Linear4bit.from_linear(nn.Linear(8, 8)), "b": nn.Linear(8, 8)})
    assert linear4bit_module_names(nn.ModuleDict({"x": inner, "y": Linear4bit.from_linear(nn.Linear(8, 8))})) == ["x.a", "y"]


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_whoever_watches_operators_sees_them(format):
    """If it failed, the short way past the dispatcher would hide products from profilers, traces and transforms."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        seen: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    packed = quantize(torch.randn(24, 64), format)
    x = torch.randn(3, 64)
    with torch.no_grad():
        unwatched = linear4bit(x, packed)
        with Watch() as watch:
            watched = linear4bit(x, packed)
        with torch.profiler.profile() as profile:
            profiled = linear4bit(x, packed)
        mapped = torch.func.vmap(lambda row: linear4bit(row, packed))(x)
    name = f"stillhouse.linear_{format}.default"
    assert name in watch.seen
    assert f"stillhouse::linear_{format}" in {event.key for event in profile.key_averages()}
    assert torch.equal(watched, unwatched)
    assert torch.equal(profiled, unwatched)
    torch.testing.assert_close(mapped, unwatched, rtol=1e-5, atol=1e-5)
