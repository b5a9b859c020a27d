"""The kernel benchmark times what it says: every contender computes the product, and the ratios are peer over ours."""

from __future__ import annotations

import json

import pytest
import torch

from stillhouse.kernels.bench import linear as bench
from stillhouse.kernels.formats import dequantize, quantize

NUM_ROWS, NUM_COLUMNS, BATCH = 128, 256, 5


def _weight() -> torch.Tensor:
    return torch.randn(NUM_ROWS, NUM_COLUMNS, generator=torch.Generator().manual_seed(1)) * NUM_COLUMNS**-0.5


def _decoded(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight that a contender of that name stands for, by the reference; bitsandbytes' by its own decoder."""
    if name == bench.DENSE:
        return weight
    if name == bench.BITSANDBYTES:
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(*bnb.quantize_nf4(weight, blocksize=64, compress_statistics=True)).float()
    return dequantize(quantize(weight, "int4", group_size=32) if name == bench.INT4 else quantize(weight, "nf4", block_size=64))


@pytest.mark.parametrize("passed", bench.PASSES)
@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_every_contender_computes_the_product_and_its_gradient(dtype, passed):
    """If it failed, the benchmark would compare layers that do different work."""
    weight = _weight()
    made, missing = bench.contenders(weight, dtype=dtype, passed=passed, min_bytes=3 * NUM_ROWS * NUM_COLUMNS)
    assert [contender.name for contender in made] == [bench.INT4, bench.NF4, bench.BITSANDBYTES, bench.DENSE]
    assert missing == ""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(BATCH, NUM_COLUMNS, generator=generator).to(dtype)
    dy = torch.randn(BATCH, NUM_ROWS, generator=generator).to(dtype)
    for contender in made:
        decoded = _decoded(contender.name, weight).double()
        if contender.name != bench.DENSE:  # all stand for the same weight, as far as 4 bits go
            assert 0.05 < float((decoded - weight).norm() / weight.norm()) < 0.12
        # Inputs, weights and results are each rounded once, to 8 significant bits at worst: bitsandbytes computes in bfloat16
        # whatever x is, and rounds its scales as well.
        unit = 2**-23 if dtype == torch.float32 and contender.name != bench.BITSANDBYTES else 2**-8
        for layer in contender.layers[:2]:
            y, dx = bench.run_once(layer, x, dy, passed)
            assert y.dtype == dtype
            bound = 4 * unit * (x.double().abs() @ decoded.abs().T) + 1e-6
            assert ((y.double() - x.double() @ decoded.T).abs() <= bound).all(), contender.name
            if passed == "forward":
                assert dx is None
                continue
            bound = 4 * unit * (dy.double().abs() @ decoded.abs()) + 1e-6
            assert ((dx.double() - dy.double() @ decoded).abs() <= bound).all(), contender.name


def test_copies_fill_the_working_set_and_share_no_memory():
    """If it failed, the weights would sit in the cache and every 4-bit layer would look faster than it is."""
    min_bytes = 10 * NUM_ROWS * NUM_COLUMNS
    made, _ = bench.contenders(_weight(), dtype=torch.bfloat16, passed="forward", min_bytes=min_bytes)
    for contender in made:
        tensors = [tensor for layer in contender.layers for tensor in (*layer.parameters(), *layer.buffers())]
        addresses = {tensor.data_ptr() for tensor in tensors}
        assert len(addresses) == len(tensors)
        assert contender.bytes_per_copy * len(contender.layers) >= min_bytes
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert held >= 0.95 * min_bytes  # bitsandbytes keeps its scales outside parameters and buffers


def test_ratios_are_peer_over_ours_of_medians():
    """If it failed, slower would read as faster."""
    samples = {
        bench.INT4: [1.0, 2.0, 90.0],
        bench.NF4: [4.0, 4.0, 4.0],
        bench.BITSANDBYTES: [8.0, 9.0, 1.0],
        bench.DENSE: [1.0, 0.5, 1.0],
    }
    summary = bench.summarize(samples)
    assert summary["median_us"][bench.INT4] == 2e6
    assert summary["ratios"] == {
        "bitsandbytes nf4 / int4 g32": 4.0,
        "bitsandbytes nf4 / nf4": 2.0,
        "torch dense / int4 g32": 0.5,
        "torch dense / nf4": 0.25,
    }
    samples.pop(bench.BITSANDBYTES)
    assert list(bench.summarize(samples)["ratios"]) == ["torch dense / int4 g32", "torch dense / nf4"]


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_every_case(as_json, capsys, monkeypatch):
    """If it failed, `stillhouse bench kernels` would leave out a case, or print what no program can read."""
    monkeypatch.setattr(bench, "NUM_ROWS", NUM_ROWS)
    monkeypatch.setattr(bench, "NUM_COLUMNS", NUM_COLUMNS)
    monkeypatch.setattr(bench, "SECONDS_PER_SAMPLE", 1e-4)
    monkeypatch.setattr(bench, "MIN_BYTES", 1)
    bench.main(as_json=as_json)
    out = capsys.readouterr().out
    cases = {
        (str(dtype).removeprefix("torch."), passed, batch)
        for dtype in bench.DTYPES
        for passed in bench.PASSES
        for batch in bench.BATCHES
    }
    if as_json:
        facts = json.loads(out)
        assert {(row["dtype"], row["pass"], row["batch"]) for row in facts["rows"]} == cases
        assert all(set(row["median_us"]) == {*bench.OURS, *bench.PEERS} for row in facts["rows"])
        assert all(value > 0 for row in facts["rows"] for value in row["median_us"].values())
        assert facts["threads"] == torch.get_num_threads()
        assert facts["versions"]["torch"] == torch.__version__
    else:
        found = {
            (words[0], words[1], int(words[2]))
            for words in map(str.split, out.splitlines())
            if words[:1] in (["bfloat16"], ["float32"])
        }
        assert found == cases
