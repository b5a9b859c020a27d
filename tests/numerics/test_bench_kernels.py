"""The kernel benchmark times what it says: contenders compute the product; ratios, plot and export say what was measured."""

from __future__ import annotations

import itertools
import json
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

from stillhouse.kernels import gguf as our_gguf
from stillhouse.kernels.bench import generation, layers, main, models, peers, plot, qlora, tables, timing, workers
from stillhouse.kernels.formats import dequantize, quantize

pytestmark = pytest.mark.slow

NUM_ROWS, NUM_COLUMNS, BATCH = 128, 256, 5
LAYER_SECTIONS = ("machine", "decode", "prefill", "backward")


def _decoded(name: str, weight: torch.Tensor) -> torch.Tensor | None:
    """The weight that a contender of that name stands for, by the reference or its own decoder; None where it has none."""
    if name == peers.DENSE:
        return weight
    if name in (peers.BITSANDBYTES, peers.BITSANDBYTES_EVAL):
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(*bnb.quantize_nf4(weight, blocksize=64, compress_statistics=True)).float()
    if name in (peers.INT4, peers.INT4_INT8, peers.DECODE_INT4):
        return dequantize(quantize(weight, "int4", group_size=32))
    if name in (peers.NF4, peers.DECODE_NF4):
        return dequantize(quantize(weight, "nf4", block_size=64))
    return None


def _operands() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCH, NUM_COLUMNS, generator=generator).to(torch.bfloat16)
    return x, torch.randn(BATCH, NUM_ROWS, generator=generator).to(torch.bfloat16)


def test_every_contender_computes_the_product():
    """If it failed, the benchmark would compare layers that do different work."""
    weight = layers.random_weight((NUM_ROWS, NUM_COLUMNS))
    made, missing = peers.contenders(peers.FORWARD, weight, min_bytes=3 * NUM_ROWS * NUM_COLUMNS)
    assert {contender.name for contender in made} | set(missing) == set(peers.FORWARD)
    assert set(missing) <= {peers.TORCHAO}  # the others come with the package
    x, dy = _operands()
    for contender in made:
        decoded = _decoded(contender.name, weight)
        for layer in contender.layers[:2]:
            y, dx = peers.run_once(layer, x, dy, "forward")
            assert dx is None
            assert y.dtype == torch.bfloat16
            error = y.double() - x.double() @ weight.double().T
            # 16 levels for a Gaussian weight: an error of a tenth of the result, and bfloat16's own is far below it.
            assert float(error.norm() / (x.double() @ weight.double().T).norm()) < 0.13, contender.name
            if decoded is None:
                continue
            # Inputs, weights and results are each rounded once, to 8 significant bits.
            bound = 4 * 2**-8 * (x.double().abs() @ decoded.double().abs().T) + 1e-6
            if contender.name == peers.INT4_INT8:  # x to 8 bits: half a step of its group's largest / 127
                steps = x.double().view(BATCH, -1, 32).abs().amax(-1) / 127
                bound += 0.51 * steps @ decoded.double().abs().view(NUM_ROWS, -1, 32).sum(-1).T
            assert ((y.double() - x.double() @ decoded.double().T).abs() <= bound).all(), contender.name


def test_every_contender_computes_the_gradient():
    """If it failed, forward + backward would be timed on a layer that trains nothing, or something else."""
    weight = layers.random_weight((NUM_ROWS, NUM_COLUMNS))
    made, _ = peers.contenders(peers.BACKWARD, weight, min_bytes=1)
    assert [contender.name for contender in made] == list(peers.BACKWARD)
    x, dy = _operands()
    for contender in made:
        decoded = _decoded(contender.name, weight).double()
        y, dx = peers.run_once(contender.layers[0], x, dy, "forward+backward")
        assert ((y.double() - x.double() @ decoded.T).abs() <= 4 * 2**-8 * (x.double().abs() @ decoded.abs().T) + 1e-6).all()
        assert ((dx.double() - dy.double() @ decoded).abs() <= 4 * 2**-8 * (dy.double().abs() @ decoded.abs()) + 1e-6).all()


def test_copies_fill_the_working_set_and_share_no_memory():
    """If it failed, the weights would sit in the cache and every 4-bit layer would look faster than it is."""
    min_bytes = 10 * NUM_ROWS * NUM_COLUMNS
    made, _ = peers.contenders(peers.FORWARD, layers.random_weight((NUM_ROWS, NUM_COLUMNS)), min_bytes=min_bytes)
    for contender in made:
        codes = [layer.layer if isinstance(layer, peers.DecodeThenMatmul) else layer for layer in contender.layers]
        tensors = [[*layer.parameters(), *layer.buffers()] for layer in codes]
        if contender.name == peers.TORCHAO:  # its weight is a shell around two tensors
            tensors = [[layer.weight.qdata, layer.weight.scale_and_zero] for layer in codes]
        addresses = {tensor.data_ptr() for of_layer in tensors for tensor in of_layer}
        assert len(addresses) == sum(len(of_layer) for of_layer in tensors), contender.name
        held = sum(tensor.numel() * tensor.element_size() for of_layer in tensors for tensor in of_layer)
        assert contender.bytes_per_copy * len(contender.layers) >= min_bytes
        assert held >= 0.95 * min_bytes, contender.name  # bitsandbytes keeps its scales elsewhere


def test_contenders_of_one_pool_take_turns_with_its_copies():
    """If it failed, one of them would find the weight in the cache that another one had just read."""
    made, _ = peers.contenders(
        (peers.INT4, peers.INT4_INT8, peers.DECODE_INT4), layers.random_weight((64, 64)), min_bytes=5 * 64 * 64
    )
    turns = peers.next_layer(made)
    seen = []
    for _ in range(len(made[0].layers)):
        for name in (peers.DECODE_INT4, peers.INT4, peers.INT4_INT8):
            layer = turns[name]()
            seen.append(getattr(layer, "layer", layer).codes.data_ptr())
    num_copies = len(made[0].layers)
    assert num_copies == 9  # 5 × 4096 bytes in copies of 2304
    assert all(len(set(seen[start : start + num_copies])) == num_copies for start in range(len(seen) - num_copies))


def test_ratios_say_how_many_times_as_fast_ours_is():
    """If it failed, slower would read as faster."""
    seconds = {"ours": 2.0, "our other": 4.0, "peer": 8.0}
    assert timing.ratios(seconds, ("ours", "our other")) == {"peer / ours": 4.0, "peer / our other": 2.0}
    tokens_per_s = {"ours": 30.0, "peer": 10.0}
    assert timing.ratios(tokens_per_s, ("ours", "not here"), larger_is_faster=True) == {"peer / ours": 3.0}
    assert timing.median_and_quartiles([4.0, 1.0, 2.0, 3.0, 90.0]) == (3.0, 2.0, 4.0)
    assert timing.median_and_quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_rounds_meet_every_contender_in_changing_order():
    """If it failed, one contender would always run right after the same other one, in its cache or its slow spell."""
    calls: list[str] = []
    samples = timing.interleave({name: (lambda name=name: calls.append(name) or len(calls)) for name in "abcd"}, rounds=8)
    rounds = ["".join(calls[start : start + 4]) for start in range(0, 32, 4)]
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 4
    assert all(calls[place - 1] == name for name, places in samples.items() for place in places)


@pytest.fixture(scope="module")
def quick() -> dict:
    return main.measure(LAYER_SECTIONS, threads=1, quick=True)


def test_the_json_has_every_case_and_ratios_that_follow_from_it(quick):
    """If it failed, `stillhouse bench kernels --json` would leave out a case, or its ratios would not be those of its times."""
    assert json.loads(json.dumps(quick)) == quick
    assert {"machine", "date", "threads", "path", "versions", "missing", "roofs", *LAYER_SECTIONS[1:]} <= set(quick)
    assert quick["versions"]["torch"] == torch.__version__
    assert "read, 1 thread" in quick["roofs"]["rates"]
    assert all(rate["q1"] <= rate["median"] <= rate["q3"] for rate in quick["roofs"]["rates"].values())
    num_weights = quick["shape"][0] * quick["shape"][1]
    for section, names, batches, passes in (
        ("decode", peers.FORWARD, [1, 8], 1),
        ("prefill", peers.FORWARD, [16, 64], 1),
        ("backward", peers.BACKWARD, [32, 64], 2),
    ):
        rows = quick[section]["rows"] if section == "backward" else quick[section]
        assert [row["batch"] for row in rows] == batches
        for row in rows:
            assert set(row["contenders"]) == set(names) - set(quick["missing"])
            for name, found in row["contenders"].items():
                seconds = found["median_us"] / 1e6
                assert found["gop_s"] == pytest.approx(2 * passes * row["batch"] * num_weights / 1e9 / seconds)
                assert found["share_of_read"] == pytest.approx(found["gb_s"] / row["roofs"]["read"])
                kind = "int8" if name == peers.INT4_INT8 else "bf16"
                if kind in row["roofs"]:
                    assert found["share_of_peak"] == pytest.approx(found["gop_s"] / row["roofs"][kind])
                for our in set(peers.OURS) & set(row["contenders"]):
                    if name not in peers.OURS:
                        expected = found["median_us"] / row["contenders"][our]["median_us"]
                        assert row["ratios"][f"{name} / {our}"] == pytest.approx(expected)
    dense = quick["decode"][0]["contenders"][peers.DENSE]
    assert dense["op_per_byte"] == 1.0  # 2 operations for each weight of 2 bytes
    int4 = quick["decode"][0]["contenders"][peers.INT4]
    assert int4["op_per_byte"] == pytest.approx(2 / (4.5 / 8))


def test_the_table_shows_every_contender_of_every_case(quick):
    """If it failed, a reader of the terminal would not see a case that the JSON has."""
    lines = tables.text(quick).splitlines()
    for row in [*quick["decode"], *quick["prefill"], *quick["backward"]["rows"]]:
        start = next(index for index, line in enumerate(lines) if line.startswith(f"M = {row['batch']} "))
        block = lines[start + 2 : start + 2 + len(row["contenders"])]
        assert [line.strip().split("  ")[0] for line in block] == list(row["contenders"])
        lines = lines[start + 1 :]


def test_the_extra_memory_of_a_layer_that_decodes_is_seen():
    """If it failed, `extra memory` would read near zero for a layer that makes a whole 16-bit copy of its weight."""
    if not workers.can_measure_memory():
        pytest.skip("the peak of a process's memory can be reset on Linux alone")
    from stillhouse.kernels.bench import layer_memory

    shape = (2048, 2048)
    (row,) = layer_memory.run((peers.BITSANDBYTES,), shape=shape, threads=1, repeats=1)
    assert row["name"] == peers.BITSANDBYTES
    assert 2 * 2048 * 2048 <= row["extra_bytes"] < 8 * 2048 * 2048


def test_a_missing_peer_is_said(monkeypatch):
    """If it failed, a table without bitsandbytes or llama.cpp would look as if nobody had thought of them."""
    for module in ("bitsandbytes", "torchao.prototype.quantization.int4", "torchao", "llama_cpp"):
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    facts = main.measure(("decode", "model"), threads=1, quick=True, batches=(1,), shape=(64, 64))
    assert set(facts["missing"]) == {peers.BITSANDBYTES, peers.BITSANDBYTES_EVAL, peers.TORCHAO, generation.LLAMA_CPP}
    assert "llama_cpp" in facts["missing"][generation.LLAMA_CPP]
    assert peers.BITSANDBYTES not in facts["decode"][0]["contenders"]
    text = tables.text(facts)
    for name, why in facts["missing"].items():
        assert f"missing: {name}: {why}" in text
    assert facts["model"][0]["decode"]["ratios"] == {}
    assert all(row["tokens_per_s"] > 0 for row in facts["model"][0]["decode"]["contenders"].values())


def test_the_plot_has_a_point_for_each_measured_contender(quick):
    """If it failed, the roofline in the README would leave a contender out, or place the slower above the faster."""
    root = ET.fromstring(plot.roofline(quick))
    namespace = "{http://www.w3.org/2000/svg}"
    heights = {}
    for point in root.iter(f"{namespace}g"):
        assert point.get("class") == "point"
        marker = next(child for child in point if child.tag != f"{namespace}title")
        if marker.tag == f"{namespace}circle":
            height = float(marker.get("cy"))
        else:
            ys = [float(pair.split(",")[1]) for pair in marker.get("points").split()]
            height = (min(ys) + max(ys)) / 2
        heights[point.get("data-contender"), int(point.get("data-batch"))] = height
    rates = {
        (name, row["batch"]): found["gop_s"]
        for row in (*quick["decode"], *quick["prefill"])
        for name, found in row["contenders"].items()
    }
    assert heights.keys() == rates.keys()
    order = sorted(rates, key=rates.get)
    assert all(heights[slow] >= heights[fast] - 1 for slow, fast in itertools.pairwise(order))  # SVG's y points down
    written = " ".join("".join(element.itertext()) for element in root.iter(f"{namespace}text"))
    assert all(fact in written for fact in (quick["date"], torch.__version__, quick["path"]))
    assert all(name in written for name, _ in rates)


def test_the_plot_needs_a_layer():
    """If it failed, `--svg` would write an empty plot."""
    with pytest.raises(ValueError, match="needs the section decode or prefill"):
        plot.roofline({"model": []})


def test_the_exported_model_holds_our_weights_bit_for_bit(tmp_path):
    """If it failed, llama.cpp would be timed, and its logits compared, on another model than ours."""
    gguf = pytest.importorskip("gguf")
    shape = models.LlamaShape("test", hidden=64, intermediate=96, num_layers=2, num_heads=4, num_key_value_heads=2, vocab=288)
    model = models.random_llama(shape)
    models.write_gguf(model, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    embedding = torch.from_numpy(tensors.pop("token_embd.weight").data.copy())
    assert torch.equal(embedding.float(), model.model.embed_tokens.weight.float())
    names = {"output.weight": "lm_head"} | {
        f"blk.{index}.{theirs}.weight": f"model.layers.{index}.{ours}"
        for index in range(2)
        for ours, theirs in models.LAYER_NAMES.items()
    }
    for theirs, ours in names.items():
        tensor = tensors.pop(theirs)
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0
        packed = model.get_submodule(ours).packed
        if "attn_q" in theirs or "attn_k" in theirs:
            packed = models.rope_rows(packed, 4 if "attn_q" in theirs else 2)
        back = our_gguf.from_q4_0(torch.from_numpy(tensor.data.copy()), packed.shape)
        assert torch.equal(back.codes, packed.codes)
        assert torch.equal(back.scales.view(torch.int16), packed.scales.view(torch.int16))
        decoded = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(torch.from_numpy(decoded), dequantize(packed))
    assert all(name.endswith("norm.weight") for name in tensors)
    assert len(tensors) == 5


def test_rope_rows_turn_halves_into_neighbouring_pairs():
    """If it failed, llama.cpp would rotate other pairs of a head's dimensions than transformers does."""
    generator = torch.Generator().manual_seed(4)
    packed = models.random_packed((16, 32), generator)  # two heads of eight rows
    x = torch.randn(32, generator=generator)
    halves = (dequantize(packed) @ x).view(2, 2, 4)  # head, half, pair
    pairs = (dequantize(models.rope_rows(packed, 2)) @ x).view(2, 4, 2)  # head, pair, member
    assert torch.equal(pairs, halves.transpose(1, 2))


def test_our_logits_are_llama_cpps_on_the_same_model():
    """If it failed, the whole-model ratios would compare two different models."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    (found,), missing = generation.run((generation.TINY,), threads=1, rounds=1, new_tokens=4, prefill_tokens=16)
    assert missing == {}
    for mode in generation.MODES:
        assert found["agreement"][f"{mode} correlation"] > 0.99
    for section in ("decode", "prefill"):
        speeds = {name: row["tokens_per_s"] for name, row in found[section]["contenders"].items()}
        for name, speed in speeds.items():
            if name != generation.LLAMA_CPP:
                ratio = found[section]["ratios"][f"{generation.LLAMA_CPP} / {name}"]
                assert ratio == pytest.approx(speed / speeds[generation.LLAMA_CPP])


@pytest.mark.slow
def test_all_qlora_contenders_train_the_same_model():
    """If it failed, tokens/s and memory of a training step would be compared between models that learn different things."""
    found, missing = qlora.run(threads=1, num_layers=1, tokens=((1, 16), (1, 16)), rounds=1, vocab=256)
    assert missing == {}
    for row in found["rows"]:
        cases = row["contenders"]
        assert set(cases) == {*qlora.OURS, *qlora.PEERS}
        losses = [case["loss"] for case in cases.values()]
        assert max(losses) - min(losses) < 0.1  # logits of a random model, 4 bits against 16
        for peer in qlora.PEERS:
            for our in qlora.OURS:
                expected = cases[our]["tokens_per_s"] / cases[peer]["tokens_per_s"]
                assert row["ratios"][f"{peer} / {our}"] == pytest.approx(expected)
    first, second = found["rows"]
    for name, case in second["contenders"].items():
        assert case["loss"] < first["contenders"][name]["loss"]  # the steps before have taught it something
        if workers.can_measure_memory():
            assert case["peak_bytes"] > found["memory"][name]["loaded_bytes"]
    if workers.can_measure_memory():
        own = {name: memory["loaded_bytes"] - memory["imports_bytes"] for name, memory in found["memory"].items()}
        assert own[qlora.NF4] < own[qlora.BF16]
    assert "QLORA" in tables.text(main.measure((), threads=1, quick=True) | {"qlora": found})


def test_a_worker_that_dies_says_why():
    """If it failed, a peer that crashes would leave the benchmark waiting, or fail without its reason."""
    with (
        workers.Worker("stillhouse.kernels.bench.llama_cpp_worker", "no-such-file.gguf", "1", "64") as worker,
        pytest.raises(RuntimeError, match=r"llama_cpp_worker no-such-file\.gguf.*ended with code 1(.|\n)*Error"),
    ):
        worker.ask(op="decode", tokens=[1], count=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"only": "decode,speed"}, "not 'speed'"),
        ({"batches": "1,many"}, "--batches takes whole numbers"),
        ({"batches": "0"}, "at least 1"),
        ({"shape": "4096x100"}, "multiples of 64"),
        ({"shape": "4096"}, "takes NxK"),
        ({"only": "qlora", "svg": "plot.svg"}, "--svg draws decode and prefill"),
    ],
)
def test_an_option_that_means_nothing_is_refused(options, said):
    """If it failed, a typo would measure something else for minutes, or end in a traceback."""
    with pytest.raises(ValueError, match=said):
        main.read_options(**({"only": None, "batches": None, "shape": None, "svg": None} | options))


def test_sections_run_in_the_order_of_the_roofs_first():
    """If it failed, `--only decode,machine` would measure the roofs after what is held against them."""
    assert main.read_options("decode,machine", "1,16", "128x64", None) == {
        "sections": ("machine", "decode"),
        "batches": (1, 16),
        "shape": (128, 64),
        "svg": None,
    }


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_and_plots_what_it_measured(as_json, capsys, tmp_path):
    """If it failed, `stillhouse bench kernels` would print what no program can read, or mix progress into it."""
    main.main(as_json=as_json, sections=("decode",), quick=True, batches=(1, 3), threads=1, svg=tmp_path / "roofline.svg")
    captured = capsys.readouterr()
    assert "measuring decode" in captured.err
    if as_json:
        assert [row["batch"] for row in json.loads(captured.out)["decode"]] == [1, 3]
    else:
        assert "M = 3 " in captured.out
    points = ET.parse(tmp_path / "roofline.svg").getroot().findall("{http://www.w3.org/2000/svg}g")
    assert {int(point.get("data-batch")) for point in points} == {1, 3}
