"""LoRA adapters of PEFT over packed 4-bit layers: values, training, saving, merging."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from stillhouse.kernels.formats import dequantize, quantize
from stillhouse.kernels.linear import Linear4bit
from stillhouse.kernels.peft_lora import LoraLinear4bit, adopt_lora, linear4bit_module_names, merged_weight, register_with_peft


def _model(format: str = "int4", dtype: torch.dtype = torch.float32):
    """A tiny Qwen2 with packed projections, and the same model with the decoded weights in ordinary layers."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=80, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    torch.manual_seed(0)
    dense = Qwen2ForCausalLM(config).to(dtype)
    packed = copy.deepcopy(dense)
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            packed.set_submodule(name, Linear4bit.from_linear(packed.get_submodule(name), format))
            module.weight.data = dequantize(quantize(module.weight, format), dtype)
    return packed, dense


def _config(**kwargs):
    from peft import LoraConfig

    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "down_proj"]} | kwargs))


def _wrap(model, config, seed: int = 1):
    from peft import get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of layers that it does not know
        wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def _ids() -> torch.Tensor:
    return torch.arange(24).view(2, 12)


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_forward_and_gradients_equal_lora_over_the_decoded_weights(format):
    """PEFT's own layer over the decoded weights is the oracle: if it failed, adapters would train towards another function."""
    packed, dense = _model(format)
    ours, theirs = _wrap(packed, register_with_peft(_config())), _wrap(dense, _config())
    losses = [model(input_ids=_ids(), labels=_ids()).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    found = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item(), msg=name)


def test_a_few_steps_learn_and_leave_the_base_alone():
    """If it failed, QLoRA would not learn, or it would move the weights it promises to keep."""
    packed, _ = _model()
    nn.init.normal_(packed.lm_head.weight, std=0.2)  # as drawn, its logits are too small for a low loss
    model = _wrap(packed, register_with_peft(_config(lora_dropout=0.1)))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(15):
        loss = model(input_ids=_ids(), labels=_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_adapters_and_base_may_differ_in_dtype(base_dtype, lora_dtype):
    """If it failed, float32 adapters over a bfloat16 base, PEFT's default, would raise or change the output's dtype."""
    layer = Linear4bit.from_linear(nn.Linear(64, 24).to(base_dtype))
    lora = _wrap_layer(layer).to(lora_dtype)
    x = torch.randn(3, 64).to(base_dtype).requires_grad_()
    y = lora(x)
    assert y.dtype == base_dtype
    y.sum().backward()
    assert lora.lora_A["default"].weight.grad.abs().sum() > 0
    # The base is cast to lora_dtype in name only; x alone decides what it computes in.
    delta = lora.get_delta_weight("default")
    expected = x.detach().double() @ (layer.dequantize_weight(base_dtype).double() + delta.double()).T + layer.bias.double()
    eps = torch.finfo(torch.promote_types(base_dtype, base_dtype)).eps + torch.finfo(lora_dtype).eps
    # Roundings of hidden (r = 4 terms), of its product, and of the two sums, each within eps of terms this large.
    magnitude = x.detach().double().abs() @ (layer.weight.double().abs() + _absolute_delta(lora)).T + layer.bias.double().abs()
    assert ((y.double() - expected).abs() <= 4 * eps * magnitude).all()


def _wrap_layer(layer: Linear4bit) -> LoraLinear4bit:
    torch.manual_seed(2)
    lora = LoraLinear4bit(layer, "default", _config(), r=4, lora_alpha=8)
    nn.init.normal_(lora.lora_B["default"].weight, std=0.1)
    return lora


def _absolute_delta(lora: LoraLinear4bit) -> torch.Tensor:
    down, up = lora.lora_A["default"].weight.double().abs(), lora.lora_B["default"].weight.double().abs()
    return lora.scaling["default"] * up @ down


def test_dropout_acts_in_training_only():
    """If it failed, evaluation would be random, or training would go without its regularizer."""
    torch.manual_seed(0)
    layer = Linear4bit.from_linear(nn.Linear(64, 24))
    lora = LoraLinear4bit(layer, "default", _config(lora_dropout=0.5), r=4, lora_alpha=8)
    nn.init.normal_(lora.lora_B["default"].weight)
    x = torch.randn(3, 64)
    assert not torch.equal(lora.train()(x), lora(x))
    assert torch.equal(lora.eval()(x), lora(x))
    torch.testing.assert_close(lora(x), nn.functional.linear(x, merged_weight(lora), layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["int4", "nf4"])
def test_merged_weight_is_base_plus_delta_of_the_active_adapters(format):
    """If it failed, the emitted student would not be the one that was trained."""
    packed, dense = _model(format)
    model = _wrap(packed, register_with_peft(_config()))
    model.add_adapter("other", register_with_peft(_config(r=2)))
    name = "model.layers.1.mlp.up_proj"
    layer = model.base_model.model.get_submodule(name)
    base = dense.get_submodule(name).weight
    A, B = (getattr(layer, part)["default"].weight.detach() for part in ("lora_A", "lora_B"))
    assert torch.equal(merged_weight(layer), base + (B @ A) * 2.0)
    assert not merged_weight(layer).requires_grad
    assert torch.equal(merged_weight(layer, torch.bfloat16), merged_weight(layer).to(torch.bfloat16))
    with model.disable_adapter():
        assert torch.equal(merged_weight(layer), base)
    model.set_adapter("other")  # its B is still zero
    assert torch.equal(merged_weight(layer), base)
    assert torch.equal(merged_weight(layer.get_base_layer()), base)
    with pytest.raises(TypeError, match="not a Linear"):
        merged_weight(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="merged_weight"):
        model.merge_and_unload()


def test_save_and_reload_onto_a_fresh_base(tmp_path):
    """If it failed, a trained adapter could not be used again."""
    from peft import LoraConfig, PeftModel

    packed, _ = _model()
    model = _wrap(copy.deepcopy(packed), register_with_peft(_config())).eval()
    model.save_pretrained(tmp_path)
    config = register_with_peft(LoraConfig.from_pretrained(tmp_path))
    again = PeftModel.from_pretrained(packed, tmp_path, config=config).eval()
    with torch.inference_mode():
        assert torch.equal(again(_ids()).logits, model(_ids()).logits)


def test_two_adapters_in_one_batch():
    """adapter_names at inference: if it failed, rows would get each other's adapter."""
    packed, _ = _model()
    model = _wrap(packed, register_with_peft(_config())).eval()
    with torch.inference_mode():
        adapted = model(_ids()).logits
        with model.disable_adapter():
            plain = model(_ids()).logits
        mixed = model(_ids(), adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed, torch.stack((adapted[0], plain[1])), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(adapted[1], plain[1])


def test_all_linear_covers_packed_and_ordinary_layers_but_the_head():
    """If it failed, 'all-linear' would put adapters on nothing, or on part of the model, without a word."""
    packed, _ = _model()
    packed.set_submodule("model.layers.0.mlp.up_proj", nn.Linear(64, 96, bias=False))
    with pytest.raises(ValueError, match="pass the model"):
        register_with_peft(_config(target_modules="all-linear"))
    model = _wrap(packed, register_with_peft(_config(target_modules="all-linear"), packed))
    wrapped = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert len(wrapped) == 14
    assert wrapped == {n.removesuffix(".base_layer") for n in linear4bit_module_names(model.base_model.model)} | {
        "model.layers.0.mlp.up_proj"
    }


def test_what_would_be_lost_silently_is_refused():
    """If it failed, DoRA, a bias or a rewritten base would be accepted and then ignored; or PEFT would take us for a Linear."""
    from peft import get_peft_model

    packed, _ = _model()
    for options, message in (
        ({"use_dora": True}, "variant"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "rewrites the base weight"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(copy.deepcopy(packed), register_with_peft(_config(**options)))
    with pytest.raises(ValueError, match=r"Linear4bit.* is not supported"):
        get_peft_model(packed, _config())


def test_a_foreign_lora_layer_is_adopted_or_refused():
    """If it failed, swapping the base under a trained adapter would drop a part of what the adapter does."""
    from peft import IA3Config, LoraConfig, get_peft_model

    def wrapped(config, merge=False):
        torch.manual_seed(3)
        model = get_peft_model(nn.Sequential(nn.Linear(64, 24)), config)
        if merge:
            model.merge_adapter()
        return model.base_model.model[0]

    layer = wrapped(LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    x, parameters = torch.randn(3, 64), dict(layer.named_parameters())
    expected = layer(x)
    adopt_lora(layer)
    assert isinstance(layer, LoraLinear4bit)
    assert torch.equal(layer(x), expected)
    assert all(parameters[name] is parameter for name, parameter in layer.named_parameters())
    adopt_lora(layer)  # and once more does nothing
    for settings, merge, reason in (
        ({"use_dora": True}, False, "a variant such as DoRA"),
        ({"lora_bias": True}, False, "lora_bias=True"),
        ({}, True, "a merged adapter"),
    ):
        with pytest.raises(ValueError, match=reason):
            adopt_lora(wrapped(LoraConfig(r=4, target_modules=["0"], **settings), merge))
    with pytest.raises(ValueError, match="PEFT wraps it in a Linear; only LoRA"):
        adopt_lora(wrapped(IA3Config(target_modules=["0"], feedforward_modules=[])))


def test_a_wrapped_layer_can_be_pickled():
    """If it failed, Ray could not send a model with adapters to a worker."""
    lora = _wrap_layer(Linear4bit.from_linear(nn.Linear(64, 24)))
    x = torch.randn(2, 64)
    assert torch.equal(pickle.loads(pickle.dumps(lora))(x), lora(x))
