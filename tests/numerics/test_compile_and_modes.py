"""Whole blocks and models of 4-bit layers under torch.compile, and through the modes that a model passes in its life."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from stillhouse.kernels.formats import PackedWeight, quantize
from stillhouse.kernels.linear import Linear4bit, linear4bit, linear4bit_module_names
from tests.tiny_models import make_model

FORMATS = ("int4", "nf4")
IDS = torch.tensor([[60, 61, 62, 63, 64, 65, 66, 67]])
BACKENDS = ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow))


class Block(nn.Module):
    """What a decoder layer does around its linear layers: norm, two products with an activation between, residual."""

    def __init__(self, format: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(64, eps=1e-6)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.up = Linear4bit.from_linear(nn.Linear(64, 96), format)
        self.down = Linear4bit.from_linear(nn.Linear(96, 64), format)
        self.to(dtype)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


def bound_on_block(block: Block, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The block in float64 from the decoded weights, and how far roundings to x's dtype may lead from it.

    u is half the dtype's epsilon. The norm is within 4 u (mean, root, quotient, product), a product within 3 u (weight, sum,
    bias) of its terms' magnitudes and a float32 sum of its length, silu has a slope below 1.1 and rounds, the residual rounds.
    """
    u = torch.finfo(x.dtype).eps / 2
    sums = 100 * torch.finfo(torch.float32).eps
    up, down = (layer.dequantize_weight(torch.float32).double() for layer in (block.up, block.down))
    normed = nn.functional.rms_norm(x.double(), (64,), block.norm.weight.double(), 1e-6)
    normed_error = 4 * u * normed.abs()
    hidden = normed @ up.T + block.up.bias.double()
    hidden_error = normed_error @ up.abs().T + (3 * u + sums) * (normed.abs() @ up.abs().T + block.up.bias.double().abs())
    active = nn.functional.silu(hidden)
    active_error = 1.1 * hidden_error + 2 * u * active.abs()
    y = active @ down.T + block.down.bias.double()
    y_error = active_error @ down.abs().T + (3 * u + sums) * (active.abs() @ down.abs().T + block.down.bias.double().abs())
    return x.double() + y, y_error + u * (x.double() + y).abs()


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_compiles_as_one_graph_in_eval(format, dtype, backend):
    """If it failed, serving a 4-bit model under torch.compile would break the graph at each layer, or change its numbers."""
    block = Block(format, dtype).eval()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for num_tokens in (1, 17):
        x = torch.randn(2, num_tokens, 64).to(dtype)
        with torch.inference_mode():
            found, eager = compiled(x), block(x)
        expected, bound = bound_on_block(block, x)
        assert found.dtype == dtype
        assert ((eager.double() - expected).abs() <= 1.1 * bound).all()  # 1.1: products of errors
        assert ((found.double() - expected).abs() <= 1.1 * bound).all()


def with_lora(format: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    from stillhouse.kernels.peft_lora import register_with_peft

    block = Block(format, dtype)
    torch.manual_seed(1)
    config = register_with_peft(LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], init_lora_weights=False))
    return get_peft_model(block, config).base_model.model.train()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_with_lora_trains_compiled_as_one_graph(format, backend):
    """If it failed, compiled QLoRA training would break its graph, or follow other gradients."""
    block, x = with_lora(format), torch.randn(2, 17, 64)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    results = []
    for function in (block, compiled):
        leaf = x.clone().requires_grad_()
        loss = function(leaf).square().mean()
        loss.backward()
        results.append((loss.detach(), leaf.grad, {n: p.grad for n, p in block.named_parameters() if p.grad is not None}))
        block.zero_grad()
    (loss, grad_x, grads), (found, found_x, found_grads) = results
    assert len(grads) == 4
    assert found_grads.keys() == grads.keys()
    # float32 on both sides: sums of at most 96 + 34 terms in another order, each within 130 * 2^-24 < 1e-5 of its magnitude.
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found_x, grad_x, rtol=0, atol=1e-5 * grad_x.abs().max().item())
    for name, expected in grads.items():
        assert expected.abs().max() > 0
        torch.testing.assert_close(found_grads[name], expected, rtol=0, atol=1e-5 * expected.abs().max().item(), msg=name)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_block_follows_another_length_and_another_weight():
    """If it failed, a compiled model would be compiled for one length, or keep the weights it was compiled with."""
    block = Block("int4", torch.float32).eval()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.inference_mode():
        for length in (5, 3, 11):
            x = torch.randn(1, length, 64)
            assert torch.equal(compiled(x), block(x))
        block.up.codes.copy_(block.up.codes.flip(0))
        assert torch.equal(compiled(x), block(x))


# A model's life


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), "Qwen2")


def load(folder, format):
    from transformers import AutoModelForCausalLM

    from stillhouse.kernels.huggingface import StillhouseConfig, register

    register()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=StillhouseConfig(format=format)
    )


def with_adapters(base):
    """LoRA on every packed layer, away from zero."""
    from peft import LoraConfig, get_peft_model

    from stillhouse.kernels.peft_lora import register_with_peft

    config = LoraConfig(r=4, lora_alpha=8, target_modules=linear4bit_module_names(base), init_lora_weights=False)
    torch.manual_seed(1)
    return get_peft_model(base, register_with_peft(config)).train()


def adapted(folder, format):
    return with_adapters(load(folder, format))


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert len(found) == 28
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("format", FORMATS)
def test_evaluating_in_between_leaves_training_bit_for_bit(format, folder):
    """bitsandbytes loses its gradient after an eval forward on a CPU. If it failed, validating would spoil training."""
    model, never_evaluated = adapted(folder, format), adapted(folder, format)
    expected = gradients(never_evaluated)
    model.eval()
    with torch.no_grad():
        model(IDS)
    with torch.inference_mode():
        model(IDS[:, :1])
        model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.train()
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_files_saved_after_inference_and_training_have_the_same_bytes(format, folder, tmp_path):
    """If it failed, a base's hash would change by using it, and its weights might drift with each save."""

    def save(model, name: str) -> bytes:
        model.save_pretrained(tmp_path / name)
        return (tmp_path / name / "model.safetensors").read_bytes()

    base = load(folder, format)
    before = save(base, "before")
    with torch.inference_mode():
        base.eval()(IDS)
    assert save(base, "after_inference") == before
    model = with_adapters(base)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(adapters, lr=0.1)
    old = [parameter.clone() for parameter in adapters]
    gradients(model)
    optimizer.step()
    assert not any(torch.equal(parameter, value) for parameter, value in zip(adapters, old))
    assert save(model.unload(), "after_training") == before


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(format, use_reentrant, folder):
    """Silently wrong gradients under checkpointing are a known failure of others (bitsandbytes #2034)."""
    model = adapted(folder, format)
    expected = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert model.get_base_model().is_gradient_checkpointing
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_a_copy_is_the_same_model_and_its_own(format, way, folder):
    """If it failed, a model sent to a worker, kept as a reference or saved whole would answer otherwise, or share memory."""
    model = load(folder, format).eval()
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model if way == "torch.save" else model.state_dict(), file)
        file.seek(0)
        if way == "torch.save":
            other = torch.load(file, weights_only=False)
        else:
            other = load(folder, format).eval()
            for name in linear4bit_module_names(other):
                other.get_submodule(name).codes.zero_()
            other.load_state_dict(torch.load(file, weights_only=True))
    with torch.inference_mode():
        expected = model(IDS).logits
        assert torch.equal(other(IDS).logits, expected)
        for name in linear4bit_module_names(other):
            other.get_submodule(name).codes.zero_()
        assert not torch.equal(other(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_a_cast_model_keeps_its_packed_weights_and_still_trains(format, folder):
    """If it failed, model.to(bfloat16) would change the weights, or the next training step would raise."""
    model = load(folder, format)
    layers = {name: model.get_submodule(name) for name in linear4bit_module_names(model)}
    tensors = {name: {k: t.clone() for k, t in layer.packed.tensors().items()} for name, layer in layers.items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        for name, layer in layers.items():
            found = layer.packed.tensors()
            assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in tensors[name].items())
            assert layer.dtype == dtype
        model.zero_grad()
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        loss = model(inputs_embeds=embeddings, labels=IDS).loss
        loss.backward()
        assert torch.isfinite(loss)
        assert embeddings.grad.dtype == dtype
        assert embeddings.grad.abs().max() > 0


@pytest.mark.parametrize("format", FORMATS)
def test_autocast_over_a_block_computes_as_over_linear_layers(format):
    """If it failed, mixed precision would cost accuracy or speed that it does not cost a dense model."""
    block = Block(format, torch.float32)
    dense = copy.deepcopy(block)
    for name in ("up", "down"):
        layer = getattr(block, name)
        linear = nn.Linear(layer.in_features, layer.out_features)
        linear.weight.data, linear.bias.data = layer.dequantize_weight(torch.float32), layer.bias.data
        setattr(dense, name, linear)
    x = torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = block(x), dense(x)
    assert found.dtype == expected.dtype
    rounded = Block(format, torch.float32).to(torch.bfloat16)  # the layers' weights and dtypes as autocast takes them
    _, bound = bound_on_block(rounded, x.to(torch.bfloat16))
    assert ((found - expected).abs() <= 2 * 1.1 * bound).all()  # both are within the bound of one value


# Runs in a process of its own, so that everything that is made at first use is made under inference_mode.
FIRST_USE = """
import torch
from stillhouse.kernels.formats import quantize
from stillhouse.kernels.linear import Linear4bit
for format, settings in (("int4", {}), ("int4", {"symmetric": False}), ("nf4", {}), ("nf4", {"double_quant": False})):
    layer = Linear4bit.from_packed(quantize(torch.randn(32, 64), format, **settings))
    with torch.inference_mode():
        expected = layer(torch.ones(2, 64))
    x = torch.ones(2, 64, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 64), rtol=1e-5, atol=1e-5)
print("done")
"""


def test_training_after_a_first_use_under_inference_mode():
    """If it failed, a process that first answered and then trained would stop with 'Inference tensors cannot be saved'."""
    run = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True, timeout=300, check=False)
    assert run.stdout.strip() == "done", run.stderr


LAYOUTS = ("int4", "int4-asymmetric", "nf4", "nf4-odd")


def packed_weights() -> dict[str, PackedWeight]:
    torch.manual_seed(0)
    weight = torch.randn(200, 192)
    return {
        "int4": quantize(weight, "int4"),
        "int4-asymmetric": quantize(weight, "int4", group_size=64, symmetric=False),
        "nf4": quantize(weight, "nf4"),
        "nf4-odd": quantize(weight[:67, :101], "nf4", double_quant=False),
    }


def forward_and_backward(packed: PackedWeight, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = linear4bit(x, packed)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), dx


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_threads_give_the_bits_of_one(layout, dtype):
    """If it failed, a run would not be reproducible on a machine with another number of cores."""
    from stillhouse.kernels import cpu

    if cpu.isa() == "torch":
        pytest.skip("plain torch promises no such thing of its matmul")
    packed = packed_weights()[layout]
    threads = torch.get_num_threads()
    try:
        for num_tokens in (1, 3, 7, 40, 130):
            x = torch.randn(num_tokens, packed.shape[1]).to(dtype)
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(forward_and_backward(packed, x))
            assert all(torch.equal(one, two) for one, two in zip(*results)), num_tokens
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_calls_from_several_python_threads_do_not_disturb_each_other(layout):
    """If it failed, a server that answers two requests at once would mix their scratch memory."""
    packed = packed_weights()[layout]
    xs = [torch.randn(num_tokens, packed.shape[1]).to(torch.bfloat16) for num_tokens in (1, 5, 33, 70) * 8]
    alone = [forward_and_backward(packed, x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: forward_and_backward(packed, x), xs))
    for expected, found in zip(alone, together):
        assert all(torch.equal(one, other) for one, other in zip(expected, found))
