"""Embeddings and output heads packed in int4 or int8: values, error bounds, tying, saving, generation, gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stillhouse.kernels.embedding import (
    PackedEmbedding,
    PackedHead,
    PackedRows,
    quantize_head,
)
from stillhouse.kernels.formats import dequantize, quantize
from stillhouse.kernels.int8_rows import decode_int8, quantize_int8
from tests.tiny_models import make_model

IDS = torch.tensor([[60, 61, 62, 63, 64, 65, 66, 67]])
FORMATS = ("int4", "int8")


def load(folder, dtype=torch.float32, **kwargs):
    from transformers import AutoModelForCausalLM

    from stillhouse.kernels.huggingface import register

    register()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {tied: make_model(tmp_path_factory.mktemp("model"), "Qwen3", tied=tied) for tied in (True, False)}


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(ids).logits


def decoded(weight: torch.Tensor, format: str, group_size: int = 32) -> torch.Tensor:
    """What a matrix becomes, by the functions that are tested apart."""
    if format == "int4":
        return dequantize(quantize(weight, "int4", group_size=group_size))
    rows = quantize_int8(weight, group_size=group_size)
    return decode_int8(rows.codes, rows.scales, rows.group_size)


@pytest.mark.parametrize("group_size", [1, 32, 33, 100])
def test_int8_rounds_by_half_a_scale_at_most(group_size):
    """If it failed, a served model's logits would be off by more than what its size promises."""
    torch.manual_seed(0)
    w = torch.randn(70, 100) * torch.logspace(-7, 4, 70).unsqueeze(1)  # down to float16's subnormal scales
    w[3] = 0
    rows = quantize_int8(w, group_size=group_size)
    assert torch.equal(rows.scales.to(torch.bfloat16).float(), rows.scales.float())
    assert rows.codes.min() >= -127
    scale = rows.scales.float().repeat_interleave(group_size, 1)[:, :100]
    found = decode_int8(rows.codes, rows.scales, group_size)
    # w - q s is rounded once by the division and once by the subtraction here, 2^-24 of at most 127 s each.
    assert ((found - w).abs() <= scale * (0.5 + 2 * 127 * 2**-24)).all()
    padded = nn.functional.pad(w, (0, -100 % group_size)).unflatten(1, (-1, group_size))
    needed = padded.abs().amax(-1) / 127
    assert (rows.scales.float() >= needed * (1 - 2**-23)).all()  # nothing is clipped
    assert (rows.scales.float() <= needed * (1 + 2**-7) + 2**-24).all()  # and nothing is wasted
    # A code says scale * code and nothing else.
    assert torch.equal(found, rows.codes.double().mul(scale.double()).float())
    assert torch.equal(found[3], torch.zeros(100))


def test_int8_refuses_what_it_cannot_hold():
    """If it failed, one infinite weight would turn a row into zeros or NaN codes without a word."""
    for bad in (float("nan"), float("inf"), 1e7):
        w = torch.ones(4, 8)
        w[2, 3] = bad
        with pytest.raises(ValueError, match="finite and within"):
            quantize_int8(w)
    with pytest.raises(ValueError, match="float matrix"):
        quantize_int8(torch.ones(4))
    with pytest.raises(ValueError, match="group_size"):
        quantize_int8(torch.ones(4, 4), group_size=0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 48), (65, 33)])
def test_an_embedding_gives_the_decoded_rows(format, dtype, shape):
    """If it failed, tokens would be read as other tokens, or with another rounding than the head multiplies by."""
    torch.manual_seed(0)
    w = torch.randn(shape)
    rows = quantize(w, "int4") if format == "int4" else quantize_int8(w)
    module = PackedEmbedding(rows, dtype=torch.float32).to(dtype)
    ids = torch.randint(shape[0], (3, 5))
    expected = decoded(w, format).to(dtype)
    assert torch.equal(module.weight, expected)
    assert torch.equal(module(ids), expected[ids])
    assert module(ids[0, 0]).shape == (shape[1],)
    assert module.scales.dtype == torch.float16
    with pytest.raises(IndexError):
        module(torch.tensor([shape[0]]))


@pytest.mark.parametrize("group_size", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize("columns", [64, 50])
def test_an_int8_head_multiplies_by_the_decoded_rows(group_size, dtype, num_tokens, columns):
    """Against float64. If it failed, logits would be wrong on one of the paths: few tokens, many, or more rows than a block."""
    torch.manual_seed(0)
    w, bias = torch.randn(5000, columns), torch.randn(5000)
    rows = PackedRows(quantize_int8(w, group_size=group_size), dtype=dtype)
    head = PackedHead(rows, bias, tied=False)
    x = torch.randn(2, num_tokens, columns).to(dtype).requires_grad_()
    y = head(x)
    assert y.dtype == dtype
    exact = decoded(w, "int8", group_size).double()
    expected = x.detach().double() @ exact.T + bias.double()
    magnitude = x.detach().double().abs() @ exact.abs().T + bias.double().abs()
    # The weight's, the bias's, the product's and the sum's roundings to the dtype, and columns + 1 sums in float32.
    bound = (4 * torch.finfo(dtype).eps / 2 + (columns + 1) * 2**-24) * magnitude
    assert ((y.double() - expected).abs() <= bound).all()

    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = dy.double() @ exact
    magnitude = dy.double().abs() @ exact.abs()
    assert ((dx.double() - expected).abs() <= (4 * torch.finfo(dtype).eps / 2 + 5001 * 2**-24) * magnitude).all()


def test_int8_operators_pass_opcheck():
    """If it failed, torch.compile or autograd would be given wrong shapes or an unregistered gradient."""
    rows = quantize_int8(torch.randn(20, 12), group_size=8)
    for x in (torch.randn(3, 12, requires_grad=True), torch.randn(2, 1, 12)):
        torch.library.opcheck(torch.ops.stillhouse.linear_int8, (x, rows.codes, rows.scales, torch.randn(20), 8))
    torch.library.opcheck(torch.ops.stillhouse.linear_int8_grad_x, (torch.randn(3, 20), rows.codes, rows.scales, 8))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_computes_with_the_decoded_rows(format, tied, folders):
    """If it failed, the packed model would be another one than its dense decoding; with tying lost it would be larger too."""
    model, oracle = load(folders[tied]), load(folders[tied])
    for module in (oracle.get_input_embeddings(), *(() if tied else (oracle.lm_head,))):
        module.weight.data = decoded(module.weight, format)
    report = quantize_head(model, format)
    assert (report.embedding, report.head, report.tied) == ("model.embed_tokens", "lm_head", tied)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedHead)
    assert torch.equal(embedding.weight, oracle.get_input_embeddings().weight)
    assert torch.equal(head.weight, oracle.lm_head.weight)  # TRL reads it
    assert (head.rows.codes.data_ptr() == embedding.codes.data_ptr()) == tied
    assert (head.rows.scales.data_ptr() == embedding.scales.data_ptr()) == tied
    held = {name: tensor for name, tensor in model.state_dict().items() if "embed" in name or "lm_head" in name}
    assert report.size_bytes_after == sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    assert report.size_bytes_before == (1 if tied else 2) * 320 * 64 * 4
    bits = 8 * report.size_bytes_after / (report.size_bytes_before / 4)
    assert bits == {"int4": 4.5, "int8": 8.5}[format]
    expected = logits(oracle)
    # The same float32 weights; sums in another order. 64 terms, then the logits' own size.
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_the_error_of_logits_is_within_what_the_scales_allow(format, tied, folders):
    """If it failed, quantizing the head would cost more than its scales say."""
    model = load(folders[tied])
    head = copy.deepcopy(model.lm_head)
    quantize_head(model, format)
    x = torch.randn(7, 64)
    with torch.inference_mode():
        error = (model.lm_head(x) - head(x)).abs()
    if format == "int8":  # each weight within half a scale
        bound = x.abs() @ (model.lm_head.rows.scales.float() / 2).repeat_interleave(32, 1).T
    else:
        # The squared error of a group is the least among candidates, of which absmax / 7 puts every weight within half a
        # step; then by Cauchy and Schwarz. 1.02: a scale is rounded to 8 bits.
        half_steps = head.weight.detach().unflatten(1, (-1, 32)).abs().amax(-1) / 14 * 1.02
        bound = x.unflatten(1, (-1, 32)).norm(dim=-1) @ (32**0.5 * half_steps).T
    assert (error <= bound + 1e-4).all()  # 1e-4: two float32 sums of 64 terms below 10
    assert error.max() > 0.01


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group_size", [32, None])
def test_generation_equals_the_decoded_models(format, group_size, folders):
    """If it failed, generate() with a packed head would break or write other text."""
    model, oracle = load(folders[True]), load(folders[True])
    weight = oracle.get_input_embeddings().weight
    weight.data = decoded(weight, format, group_size or 64)
    quantize_head(model, format, group_size=group_size)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = oracle.generate(IDS, **settings)
    assert torch.equal(model.generate(IDS, **settings), expected)
    assert expected.shape == (1, 20)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("linears", [None, "nf4"])
def test_saves_and_reloads_bit_for_bit(format, tied, linears, folders, tmp_path):
    """If it failed, a packed head could not be shipped, or a tied one would come back cut in two or as noise."""
    from stillhouse.kernels.huggingface import StillhouseConfig

    kwargs = {"quantization_config": StillhouseConfig(format=linears)} if linears else {}
    model = load(folders[tied], **kwargs)
    quantize_head(model, format, symmetric=format == "int8")
    before, tensors = logits(model), model.state_dict()
    model.save_pretrained(tmp_path / "one")
    again = load(tmp_path / "one")
    assert again.state_dict().keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = again.state_dict()[name]
        assert (found.dtype, torch.equal(found, tensor)) == (tensor.dtype, True), name
    assert (again.lm_head.rows is again.get_input_embeddings()) == tied
    assert torch.equal(logits(again), before)
    again.save_pretrained(tmp_path / "two")  # after inference
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    # And without transformers: the tensors alone, into a model that was packed in the same way.
    save_file(tensors, tmp_path / "plain.safetensors")
    other = load(folders[tied], **kwargs)
    quantize_head(other, format, symmetric=format == "int8")
    other.get_input_embeddings().codes.zero_()
    other.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_can_be_packed_while_loading(tied, folders, tmp_path):
    """If it failed, StillhouseConfig(head=...) would be ignored, or save another model than it made."""
    from stillhouse.kernels.huggingface import StillhouseConfig

    config = StillhouseConfig(format="int4", symmetric=False, head="int8", head_group_size=None)
    model = load(folders[tied], quantization_config=config)
    assert model.lm_head.rows.group_size == 64
    plain = load(folders[tied], quantization_config=StillhouseConfig(format="int4", symmetric=False))
    quantize_head(plain, "int8", group_size=None)
    before = logits(model)
    assert torch.equal(before, logits(plain))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), before)


def test_a_tied_head_stays_tied_through_copies_casts_and_tie_weights(folders):
    """If it failed, a copy, a pickle or a dtype change would leave the head multiplying by the old model's rows."""
    model = load(folders[True])
    quantize_head(model, "int4")
    before = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.lm_head.rows is other.get_input_embeddings()
        assert other.lm_head.rows is not model.get_input_embeddings()
        assert torch.equal(logits(other), before)
    model.tie_weights()
    assert model.lm_head.rows is model.get_input_embeddings()
    codes = model.get_input_embeddings().codes.clone()
    model.to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.get_input_embeddings().codes, codes)
    assert model.get_input_embeddings().scales.dtype == torch.float16


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_pass_through_a_packed_head(format, folders):
    """If it failed, an adapter could not be trained or scored under a packed head."""
    from peft import LoraConfig, get_peft_model

    gradients = []
    for when in ("before PEFT", "after PEFT", "never"):
        model = load(folders[True])
        if when == "before PEFT":
            quantize_head(model, format)
        if when == "never":
            weight = model.get_input_embeddings().weight
            weight.data = decoded(weight, format)
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        if when == "after PEFT":
            quantize_head(model, format)
        assert isinstance(model.get_output_embeddings(), PackedHead) == (when != "never")
        model.enable_input_require_grads()
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() == gradients[2].keys()
    for name, expected in gradients[2].items():
        assert expected.abs().max() > 0
        for found in gradients[:2]:
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-4 * expected.abs().max().item(), msg=name)


def test_autocast_computes_in_its_dtype():
    """If it failed, a head under autocast would run in float32, or mix dtypes and raise."""
    for rows in (quantize(torch.randn(70, 64), "int4"), quantize_int8(torch.randn(70, 64))):
        head = PackedHead(PackedRows(rows, dtype=torch.float32), tied=False)
        with torch.autocast("cpu", torch.bfloat16):
            assert head(torch.randn(2, 64)).dtype == torch.bfloat16


def test_what_cannot_be_packed_is_refused(folders):
    """If it failed, a second call or an unknown setting would damage a model instead of saying so."""
    model = load(folders[True])
    with pytest.raises(ValueError, match="format must be one of"):
        quantize_head(model, "nf4")
    with pytest.raises(ValueError, match="symmetric=False"):
        quantize_head(model, "int8", symmetric=False)
    with pytest.raises(ValueError, match="may cross rows"):
        PackedEmbedding(quantize(torch.randn(8, 8), "nf4"), dtype=torch.float32)
    quantize_head(model, "int4")
    with pytest.raises(ValueError, match="found a PackedEmbedding and a PackedHead"):
        quantize_head(model, "int4")


def test_a_compiled_head_gives_the_same(folders):
    """If it failed, serving under torch.compile would break the graph at the head."""
    for format in FORMATS:
        model = load(folders[True])
        quantize_head(model, format)
        embedding, head = model.get_input_embeddings(), model.lm_head

        def both(ids, embedding=embedding, head=head):
            return head(embedding(ids))

        torch._dynamo.reset()
        with torch.inference_mode():
            expected = both(IDS)
            found = torch.compile(both, fullgraph=True, backend="aot_eager")(IDS)
        assert torch.equal(found, expected)
