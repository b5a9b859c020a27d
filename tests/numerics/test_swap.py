"""Models that bitsandbytes or compressed-tensors packed, taken over by our kernels in place."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.kernels.formats import dequantize, quantize
from stillhouse.kernels.linear import Linear4bit, linear4bit_module_names
from stillhouse.kernels.swap import swap_to_kernels
from stillhouse.students.emitting import emit_checkpoint
from tests.tiny_models import make_model

IDS = torch.tensor([[60, 61, 62, 63, 64, 65, 66, 67]])
NUM_LINEARS = 14


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("dense"), "Qwen2", hidden_size=64)


@pytest.fixture(scope="module")
def compressed(dense, tmp_path_factory):
    """An emitted checkpoint as a user finds it."""
    folder = tmp_path_factory.mktemp("compressed") / "checkpoint"
    emit_checkpoint(dense, folder, provenance={}, card="")
    return folder


def load(folder, dtype=torch.bfloat16, **kwargs):
    from transformers import AutoModelForCausalLM

    from stillhouse.kernels.huggingface import register

    register()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).eval()


def load_bitsandbytes(folder, quant_type="nf4", nested=True, dtype=torch.bfloat16, **kwargs):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
        **kwargs,
    )
    return load(folder, dtype, quantization_config=config)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def decoded(model) -> dict[str, torch.Tensor]:
    """Every linear layer's weight as bitsandbytes, compressed-tensors or we decode it, in the layer's dtype."""
    import bitsandbytes
    from compressed_tensors.compressors.base import decompress_module

    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weights[name] = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif hasattr(module, "weight_packed"):
            module = copy.deepcopy(module)
            decompress_module(module)
            weights[name] = module.weight.detach()
        elif isinstance(module, Linear4bit):
            weights[name] = module.dequantize_weight()
        elif getattr(module, "quantization_scheme", None) is not None:
            weights[name] = module.weight.detach().clone()
    return weights


def layer_outputs(model) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every linear layer in one training-mode forward (in eval, bitsandbytes would repack its weights)."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Linear4bit)) and name != "lm_head":
            hook = lambda module, args, y, name=name: seen.__setitem__(name, (args[0].detach(), y.detach()))  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        model.train()(IDS)
    for handle in handles:
        handle.remove()
    model.eval()
    return seen


def assert_swapped_exactly(model, before: dict[str, torch.Tensor], report) -> None:
    assert set(report.swapped) == set(before)
    assert len(before) == NUM_LINEARS
    assert report.left == {"lm_head": "not packed"}
    after = decoded(model)
    for name, weight in before.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, Linear4bit)
        assert after[name].dtype == weight.dtype
        assert torch.equal(after[name], weight), name


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_bitsandbytes_model_decodes_to_the_same_bits_and_computes_the_same(quant_type, nested, dense):
    """If it failed, a QLoRA base would change under its adapters the moment our kernels took it over."""
    model = load_bitsandbytes(dense, quant_type, nested)
    before, outputs = decoded(model), layer_outputs(model)
    pointers = {name: model.get_submodule(name).weight.data_ptr() for name in before}
    biases = {name: model.get_submodule(name).bias for name in before}
    report = swap_to_kernels(model)
    assert report.counts == {f"bitsandbytes {quant_type}": NUM_LINEARS}
    assert_swapped_exactly(model, before, report)
    for name, (x, y) in outputs.items():
        layer = model.get_submodule(name)
        assert layer.codes.data_ptr() == pointers[name]  # the same memory, not a copy
        assert layer.bias is biases[name]
        # The same x and weights, summed in float32 by both. Each rounds the product and the bias's sum to bfloat16, and
        # bitsandbytes the weight before, which ours may or may not: at most 6 roundings of 2^-9 of the terms' magnitudes.
        magnitude = x.float().abs() @ before[name].float().abs().T
        magnitude = magnitude if layer.bias is None else magnitude + layer.bias.float().abs()
        with torch.no_grad():
            assert ((layer(x).float() - y.float()).abs() <= 6 * 2**-9 * magnitude).all(), name


def test_logits_of_a_float32_bitsandbytes_model_stay(dense):
    """If it failed, the model as a whole would answer otherwise: a bias, a dtype or a layer would be mixed up."""
    model = load_bitsandbytes(dense, dtype=torch.float32)
    with torch.no_grad():
        before = model.train()(IDS).logits  # in eval mode bitsandbytes rounds its scales
    swap_to_kernels(model.eval())
    # Both compute in float32 with the same weights; 14 layers of at most 128 terms amplify its 6e-8 to well under 1e-4.
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4 * before.abs().max().item())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_weight_that_bitsandbytes_repacked_keeps_what_it_multiplied_by(quant_type, nested, dense):
    """If it failed, a model that had answered once could not be taken over, or would get scrambled weights."""
    import bitsandbytes

    fresh = decoded(load_bitsandbytes(dense, quant_type, nested, dtype=torch.float32))
    model = load_bitsandbytes(dense, quant_type, nested, dtype=torch.float32)
    logits(model)
    layer = model.get_submodule(next(iter(fresh)))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks on processors with AVX-512 BF16 only")
    # What it multiplies by now: the same codes, and scales that were rounded to bfloat16, one rounding of 2^-9 relative.
    rounded = {name: model.get_submodule(name).weight.quant_state.absmax.T.float() for name in fresh}
    report = swap_to_kernels(model)
    assert report.counts == {f"bitsandbytes {quant_type}, repacked": NUM_LINEARS}
    for name, weight in fresh.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.absmax, rounded[name].flatten())
        found = layer.dequantize_weight(torch.float32)
        assert ((found - weight).abs() <= 2**-8 * weight.abs()).all(), name
    assert bitsandbytes.nn.Linear4bit not in {type(module) for module in model.modules()}


def decoded_at_loading():
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("state", ["compressed", "decompressed", "dequantized"])
def test_a_compressed_tensors_checkpoint_in_each_state_of_loading(dtype, state, compressed):
    """If it failed, what a user loads with transformers would change, or stay unswapped, depending on what ran before."""
    reference = load(compressed, dtype)
    before = decoded(reference)
    expected = logits(reference)
    model = load(compressed, dtype, **(decoded_at_loading() if state == "dequantized" else {}))
    if state == "decompressed":
        logits(model)
        assert not hasattr(model.model.layers[0].mlp.up_proj, "weight_packed")
    if state == "dequantized":
        with pytest.raises(ValueError, match=r"nothing to swap in this Qwen2ForCausalLM: 15 × not packed"):
            swap_to_kernels(model)
    report = swap_to_kernels(model, checkpoint=compressed if state == "dequantized" else None)
    suffix = {"compressed": "", "decompressed": ", decompressed", "dequantized": ", from the files"}[state]
    assert report.counts == {f"compressed-tensors int4{suffix}": NUM_LINEARS}
    assert_swapped_exactly(model, before, report)
    found = logits(model)
    assert all(isinstance(model.get_submodule(name), Linear4bit) for name in before)  # and no hook decoded them
    if dtype == torch.float32:  # one sum in another order a layer, as above
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("decompress", [False, True])
def test_zero_points_of_compressed_tensors(strategy, decompress):
    """If it failed, an asymmetric layer would be shifted. The library itself packs and decodes it here.

    (transformers 5.23 with compressed-tensors 0.20 cannot load such a checkpoint packed: it allots unpacked zero points.)
    """
    from compressed_tensors.compressors.base import compress_module, decompress_module
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group_size = 32 if strategy == "group" else 96
    torch.manual_seed(0)
    packed = quantize(torch.randn(70, 96), "int4", group_size=group_size, symmetric=False)
    args = QuantizationArgs(
        num_bits=4, symmetric=False, strategy=strategy, group_size=group_size if strategy == "group" else None
    )
    linear = nn.Linear(96, 70)
    linear.quantization_scheme = QuantizationScheme(targets=["Linear"], weights=args)
    linear.weight.data = dequantize(packed)
    linear.weight_scale = nn.Parameter(packed.scales.float(), requires_grad=False)
    linear.weight_zero_point = nn.Parameter((packed.zero_points.short() - 8).to(torch.int8), requires_grad=False)
    compress_module(linear)
    if decompress:
        decompress_module(linear)
        assert torch.equal(linear.weight, dequantize(packed))
    model = nn.Sequential(linear)
    swap_to_kernels(model)
    found = model[0].packed.tensors()
    assert found.keys() == packed.tensors().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in packed.tensors().items())


def test_an_asymmetric_checkpoint_is_read_from_its_files(dense, tmp_path):
    """If it failed, asymmetric checkpoints, which transformers can only decode while loading, would stay dense."""
    folder = tmp_path / "checkpoint"
    emit_checkpoint(dense, folder, symmetric=False, provenance={}, card="")
    for dtype in (torch.bfloat16, torch.float32):
        model = load(folder, dtype, **decoded_at_loading())
        weights = {name: module.weight.detach() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        report = swap_to_kernels(model, checkpoint=folder)
        assert len(report.swapped) == NUM_LINEARS
        for name in report.swapped:
            layer = model.get_submodule(name)
            assert layer.zero_points is not None
            # transformers decodes in float16, where a scale of 8 bits times a difference of 4 rounds; ours does not.
            found = layer.dequantize_weight(torch.float32)
            roundings = torch.finfo(torch.float16).eps / 2 + (torch.finfo(dtype).eps / 2)
            assert ((weights[name].float() - found).abs() <= 1.01 * roundings * found.abs()).all(), name


def test_weights_that_were_trained_since_are_left_and_said(compressed):
    """If it failed, fine-tuned weights would silently be rounded back to the checkpoint's."""
    for kwargs, checkpoint, reason in (
        ({}, None, "no longer lie on the int4 grid"),
        (decoded_at_loading(), compressed, "not those of the checkpoint"),
    ):
        model = load(compressed, **kwargs)
        logits(model)
        model.model.layers[0].mlp.up_proj.weight.data[3, 5] += 0.03
        report = swap_to_kernels(model, checkpoint=checkpoint)
        assert reason in report.left["model.layers.0.mlp.up_proj"]
        assert len(report.swapped) == NUM_LINEARS - 1


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators made and that are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.live, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return result

    def see(self, storage) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key, size) -> None:
        self.known.discard(key)
        self.live -= size

    def watch(self, model) -> None:
        import bitsandbytes

        for tensor in (*model.parameters(), *model.buffers()):
            self.see(tensor.untyped_storage())
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                state = module.weight.quant_state
                nested = getattr(state, "state2", None)  # gone from a repacked one
                for part in (state.absmax, *((nested.absmax,) if nested else ())):
                    self.see(part.untyped_storage())
        self.peak = self.live


@pytest.mark.parametrize("kind", ["bitsandbytes", "repacked", "compressed", "decompressed"])
def test_at_most_one_layer_is_held_twice(kind, tmp_path):
    """If it failed, a model that fills a machine's memory would not survive the swap."""
    folder = make_model(tmp_path / "dense", "Llama", hidden_size=512)
    if kind in ("bitsandbytes", "repacked"):
        model = load_bitsandbytes(folder)
    else:
        emit_checkpoint(folder, tmp_path / "checkpoint", provenance={}, card="")
        model = load(tmp_path / "checkpoint")
    if kind in ("repacked", "decompressed"):
        logits(model)
    live = LiveBytes()
    live.watch(model)
    before = live.live
    gc.disable()  # what is freed has to be freed at once
    try:
        with live:
            swap_to_kernels(model)
    finally:
        gc.enable()
    sizes = [layer.packed.size_bytes for layer in model.modules() if isinstance(layer, Linear4bit)]
    # Repacked scales are bfloat16 and have no other home than float32: 2 bytes more a block of 32 bytes of codes.
    grown = sum(sizes) / 16 if kind == "repacked" else 0
    rows_at_work = 2 * 32 * 1024 * 4  # two float32 copies of 32 rows, whatever the layer's size
    assert live.live <= before + grown + 1000
    assert live.peak <= before + grown + max(sizes) + rows_at_work
    assert max(sizes) + rows_at_work < sum(sizes) / 4  # so it would have been noticed
    if kind == "bitsandbytes":
        assert live.peak <= before + 1000  # nothing is copied


def test_lora_around_bitsandbytes_keeps_its_adapters_and_its_gradients(dense):
    """If it failed, a half-trained adapter would be lost or would go on training towards another function."""
    from peft import LoraConfig, get_peft_model

    from stillhouse.kernels.peft_lora import LoraLinear4bit

    model = load_bitsandbytes(dense, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"]))
    adapters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in adapters.items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = {name: parameter.grad for name, parameter in adapters.items()}
    model.zero_grad()

    report = swap_to_kernels(model)
    assert len(report.swapped) == NUM_LINEARS
    assert sum(isinstance(module, LoraLinear4bit) for module in model.modules()) == 6
    after = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert after.keys() == adapters.keys()
    assert all(after[name] is adapters[name] for name in adapters)  # an optimizer goes on with them
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(after[name].grad, gradient, rtol=0, atol=1e-4 * gradient.abs().max().item(), msg=name)
    with pytest.raises(ValueError, match="merged_weight"):
        model.merge_and_unload()


def test_lora_around_a_decompressed_checkpoint(compressed):
    """If it failed, an adapter put on a checkpoint after its first forward (PEFT finds no weight before) would be lost."""
    from peft import LoraConfig, get_peft_model

    model = load(compressed, torch.float32)
    logits(model)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(model, config).eval()
    expected = logits(model)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), expected)
    report = swap_to_kernels(model)
    assert len(report.swapped) == len(linear4bit_module_names(model)) == NUM_LINEARS
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_an_adapter_that_is_more_than_lora_is_left_and_said(dense):
    """If it failed, DoRA's magnitudes would be dropped without a word."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_bitsandbytes(dense), LoraConfig(r=4, target_modules=["up_proj"], use_dora=True))
    report = swap_to_kernels(model)
    assert len(report.swapped) == NUM_LINEARS - 2
    reasons = [reason for name, reason in report.left.items() if name.endswith("up_proj.base_layer")]
    assert reasons == ["its adapter has a variant such as DoRA"] * 2


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int4"])
def test_a_swapped_model_saves_and_reloads_as_ours(kind, dense, compressed, tmp_path):
    """If it failed, saving a swapped model would write a folder that loads as noise."""
    model = load(compressed) if kind == "int4" else load_bitsandbytes(dense, kind, dtype=torch.float32)
    swap_to_kernels(model)
    before = logits(model)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, model.dtype)
    assert len(linear4bit_module_names(again)) == NUM_LINEARS
    tensors = model.state_dict()
    assert again.state_dict().keys() == tensors.keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(logits(again), before)


def test_activations_are_set_on_every_layer(compressed, tmp_path):
    """If it failed, a model swapped for fast serving would run in the slow mode, or only until it is saved."""
    model = load(compressed)
    swap_to_kernels(model, activations="int8")
    model.save_pretrained(tmp_path)
    for swapped in (model, load(tmp_path)):
        assert {swapped.get_submodule(name).activations for name in linear4bit_module_names(swapped)} == {"int8"}


def test_a_model_that_no_config_describes_refuses_to_be_saved(dense, tmp_path, caplog):
    """If it failed, a model of two formats would be saved as one of them."""
    model = load_bitsandbytes(dense)
    swap_to_kernels(model)
    layer = nn.Linear(64, 128, bias=False)
    model.model.layers[0].mlp.up_proj = Linear4bit.from_linear(layer, "int4")
    from stillhouse.kernels.huggingface import mark_as_packed

    mark_as_packed(model)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    assert "packed in 2 ways" in caplog.text


def test_nothing_to_swap_is_an_error(dense):
    """If it failed, a user would believe that a dense model runs on 4-bit kernels."""
    with pytest.raises(
        ValueError, match=r"nothing to swap in this Qwen2ForCausalLM: 15 × not packed.*quantized while it loads"
    ):
        swap_to_kernels(load(dense))
    with pytest.raises(ValueError, match="no linear layer"):
        swap_to_kernels(nn.ReLU())
    with pytest.raises(ValueError, match=r"holds neither model.safetensors"):
        swap_to_kernels(load(dense), checkpoint=dense / "nowhere")


def test_a_layer_registered_twice_stays_one_layer():
    """If it failed, a module shared between two places would be copied, or one of the places kept the old one."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4").to("cpu")
    model = nn.ModuleDict({"one": layer, "other": nn.Sequential(layer)})
    report = swap_to_kernels(model)
    assert model["one"] is model["other"][0]
    assert isinstance(model["one"], Linear4bit)
    assert list(report.swapped) == ["one"]


def test_a_hooked_layer_is_left():
    """If it failed, a hook that someone hung on a layer would silently never run again."""
    import bitsandbytes

    model = nn.Sequential(*(bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4") for _ in range(2))).to("cpu")
    model[0].register_forward_hook(lambda *args: None)
    report = swap_to_kernels(model)
    assert report.left == {"0": "forward hooks hang on it and would be lost"}
    assert report.swapped == {"1": "bitsandbytes nf4"}
