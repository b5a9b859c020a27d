"""An emitted checkpoint on its two paths: as transformers and compressed-tensors load it, and on our own kernels."""

from __future__ import annotations

import pytest
import torch

from stillhouse.jobs.generators import GeneratorSpec, build_generator
from stillhouse.kernels import cpu
from stillhouse.kernels.linear import Linear4bit
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.records import Sampling
from stillhouse.students.base_models import load_base
from stillhouse.students.emitting import emit_checkpoint
from stillhouse.students.served import describe_device, describe_path
from tests.tiny_models import ARCHITECTURES, make_model

NUM_LINEARS = 14
LONGEST_SUM = 512
"""Terms of a dot product: columns of the widest layer. Sums of 128 terms and fewer come out bit-equal on both paths."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def emitted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    dense = make_model(folder / "dense", request.param, hidden_size=256)
    emit_checkpoint(dense, folder / "checkpoint", provenance={}, card="")
    return folder / "checkpoint"


def load_both(folder, dtype):
    """The checkpoint's two generators, as the runner builds them."""
    return [build_generator(GeneratorSpec(str(folder), dtype=dtype, kernels=kernels)) for kernels in (False, True)]


def logits(model, num_tokens):
    ids = torch.arange(60, 60 + num_tokens, device=model.device)[None]
    with torch.inference_mode():
        return model(ids).logits.double()


@pytest.mark.parametrize("num_tokens", [1, 40], ids=["one token", "a prompt"])  # few rows take another kernel
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_paths_hold_the_same_weights_and_give_the_same_logits(emitted, dtype, num_tokens):
    """If it failed, what was measured on our kernels would be another model than the one a user loads."""
    plain, ours = load_both(emitted, dtype)
    theirs, found = logits(plain.model, num_tokens), logits(ours.model, num_tokens)  # the first forward decodes the plain one
    widths = {module.in_features for module in ours.model.modules() if isinstance(module, Linear4bit)}
    assert max(widths) == LONGEST_SUM
    decoded = {name: module for name, module in ours.model.named_modules() if isinstance(module, Linear4bit)}
    assert len(decoded) == NUM_LINEARS
    for name, layer in decoded.items():
        weight = plain.model.get_submodule(name).weight
        assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(weight, layer.dequantize_weight(weight.dtype)), name
    # A product of each path is off by eps / 2 where it is rounded on its way out and, where it is summed in eps too (float32;
    # bfloat16 is summed in float32), by eps / 2 a term. Roundings are independent: n of them add up to sqrt(n), over the terms
    # of a sum and over the layers, whose relative errors norms and residuals pass on. Two paths, so twice eps / 2; and a factor
    # of 2 for the largest of some thousand logits.
    eps = torch.finfo(getattr(torch, dtype)).eps
    terms = LONGEST_SUM if dtype == "float32" else 1
    bound = (NUM_LINEARS * terms) ** 0.5 * eps * theirs.abs().max().item()
    assert (found - theirs).abs().max().item() <= 2 * bound
    assert describe_path(ours.model).startswith(f"{NUM_LINEARS} × int4 on {cpu.describe()}")
    assert describe_path(plain.model).startswith(f"{NUM_LINEARS} × int4 that compressed-tensors decoded to {dtype}, in torch")


def test_both_paths_write_the_same_in_float32(emitted):
    """If it failed, the gate would compare two samplings instead of two paths."""
    sampling = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=24)
    prompts, seeds = ["What is 3 + 4 - 2?", "Add 7 and 2, step by step."], [3, 5]
    plain, ours = load_both(emitted, "float32")
    assert plain.complete(prompts, seeds, sampling) == ours.complete(prompts, seeds, sampling)


def test_a_checkpoint_without_a_packed_layer_says_what_to_do(tmp_path):
    """If it failed, a recipe that keeps every layer in 16 bits would end in a worker's traceback."""
    folder = make_model(tmp_path / "dense", "Qwen2")
    with pytest.raises(RecipeError, match=r"cannot run on our kernels: nothing to swap.*gate\.kernels=false"):
        build_generator(GeneratorSpec(str(folder), dtype="float32", kernels=True))


@pytest.fixture
def choose_isa(monkeypatch):
    """Ask for one of the kernels' instruction sets for the time of a test."""

    def choose(isa):
        monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
        cpu.forget_choice()

    yield choose
    cpu.forget_choice()


@pytest.mark.parametrize(
    ("base_weights", "path"),
    [
        ("int4", f"{NUM_LINEARS} × int4 on {{serves}}; 1 × float32 in torch"),
        ("nf4", f"{NUM_LINEARS} × nf4 on {{serves}}; 1 × float32 in torch"),
        ("bitsandbytes", f"{NUM_LINEARS} × bitsandbytes Linear4bit; 1 × float32 in torch"),
        ("bf16", f"{NUM_LINEARS + 1} × float32 in torch"),
    ],
)
@pytest.mark.parametrize("isa", ["", "torch"])
def test_what_serves_a_base_under_lora_is_named(base_weights, path, isa, tmp_path, choose_isa):
    """If it failed, the report of a run would praise our kernels where plain torch or bitsandbytes did the work."""
    from stillhouse.students.training import _add_lora

    choose_isa(isa)
    base = load_base(str(make_model(tmp_path / "dense", "Llama")), base_weights=base_weights, dtype="float32", device="cpu")
    model = _add_lora(base, base_weights, rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    assert describe_path(model) == path.format(serves=cpu.describe())
    assert describe_device(model) == "CPU"
    if isa == "torch" and base_weights in ("int4", "nf4"):
        assert "plain torch" in describe_path(model)
