"""The 4-bit layer on a CUDA device, through the public interface; and the GPU benchmark's manners where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch

from stillhouse.kernels import formats, gpu
from stillhouse.kernels import linear as kernels_linear
from stillhouse.kernels.bench import gpu as benchmark

HAS_CUDA = torch.cuda.is_available()
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")]
layouts = pytest.mark.parametrize("layout", benchmark.LAYOUTS)


def gpu_test(function):
    for mark in on_gpu:
        function = mark(function)
    return function


@gpu_test
@layouts
@pytest.mark.parametrize("shape", [benchmark.SMALL, benchmark.ODD])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_and_gradients_are_within_bounds(layout, shape, dtype):
    """If it failed, a 4-bit layer on a GPU would give other numbers than the same layer on the CPU."""
    packed = benchmark.make_packed(layout, shape)
    for m in benchmark.CHECKED_BATCHES:
        found = benchmark.check(packed, m, dtype)
        assert found["ok"], (m, found)


@gpu_test
@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_hot_activations_give_the_decoded_weight_on_the_device(layout, dtype):
    """If it failed, compiled code would read another weight than the interpreter did: nibbles, scales or places mixed up."""
    packed = benchmark.make_packed(layout, benchmark.SMALL)
    expected = formats.dequantize(packed, dtype)
    eye = torch.eye(packed.shape[1], dtype=dtype, device="cuda")
    for m in (1, 16, 32, 64, packed.shape[1]):
        for start in range(0, packed.shape[1] - m + 1, max(m, 37)):
            y = kernels_linear.linear4bit(eye[start : start + m], packed)
            assert torch.equal(y, expected.T[start : start + m]), (m, start)


@gpu_test
@pytest.mark.parametrize("layout", ["int4 g32", "nf4 nested"])
@pytest.mark.parametrize("m", [1, 8, 128])
def test_a_captured_graph_replays_with_new_activations(layout, m):
    """If it failed, decoding under CUDA graphs (vLLM, torch.compile's reduce-overhead) would repeat its first token."""
    packed = benchmark.make_packed(layout, benchmark.SMALL)
    x = torch.randn(m, packed.shape[1], device="cuda", dtype=torch.bfloat16)
    kernels_linear.linear4bit(x, packed)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels_linear.linear4bit(x, packed)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(y, kernels_linear.linear4bit(x, packed))


@gpu_test
@pytest.mark.parametrize("m", [1, 16, 64])
def test_every_run_gives_the_same_bits(m):
    """If it failed, a greedy generation could not be repeated: partial sums would be added in the order of their arrival."""
    packed = benchmark.make_packed("int4 g32", (512, 4096))
    x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
    first = kernels_linear.linear4bit(x, packed)
    assert all(torch.equal(first, kernels_linear.linear4bit(x, packed)) for _ in range(20))


@gpu_test
def test_two_streams_at_once():
    """If it failed, two requests served at the same time would write into each other's decoded weight."""
    weights = [benchmark.make_packed(layout, (1024, 1024)) for layout in ("int4 g32", "nf4 nested")]
    x = torch.randn(256, 1024, device="cuda", dtype=torch.bfloat16)
    expected = [kernels_linear.linear4bit(x, packed) for packed in weights]
    streams = [torch.cuda.Stream() for _ in weights]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for packed, stream in zip(weights, streams):
            with torch.cuda.stream(stream):
                found.append(kernels_linear.linear4bit(x, packed))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


@gpu_test
def test_float32_is_not_tf32():
    """If it failed, a float32 layer would lose thirteen bits where a script has allowed TF32 for its own products."""
    packed = benchmark.make_packed("int4 g32", benchmark.SMALL)
    torch.set_float32_matmul_precision("high")
    try:
        assert benchmark.check(packed, 8, torch.float32)["ok"]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@gpu_test
def test_a_weight_on_another_device_is_refused():
    """If it failed, a half-moved model would end in an illegal memory access."""
    packed = benchmark.make_packed("int4 g32", benchmark.SMALL, device="cpu")
    with pytest.raises(ValueError, match=r"x is on cuda:0, the 4-bit weight on cpu"):
        kernels_linear.linear4bit(torch.zeros(1, 264, device="cuda"), packed)


def test_a_missing_triton_is_said(monkeypatch):
    """If it failed, a GPU machine without triton would be slow and nobody would know why."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "hip", None)
    with (
        torch.library._scoped_library("stillhouse", "FRAGMENT") as library,
        pytest.warns(UserWarning, match=r"triton is not installed; pip install 'stillhouse\[gpu\]'"),
    ):
        assert gpu.register(library) is False


def test_registering_puts_four_operators_on_the_gpu_without_triton():
    """If it failed, importing stillhouse on a GPU machine would load triton, or leave an operator on the plain path."""
    code = (
        "import importlib.util, sys, torch\n"
        "importlib.util.find_spec = lambda name, find=importlib.util.find_spec: name if name == 'triton' else find(name)\n"
        "from stillhouse.kernels import gpu, ops\n"
        "library = torch.library.Library('stillhouse', 'FRAGMENT')\n"
        "names = ('linear_int4', 'linear_int4_grad_x', 'linear_nf4', 'linear_nf4_grad_x')\n"
        "has = lambda n: torch._C._dispatch_has_kernel_for_dispatch_key(f'stillhouse::{n}', 'CUDA')\n"
        "before = all(map(has, names))\n"
        "print(before or gpu.register(library), all(map(has, names)), 'triton' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-P", "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.split() == ["True", "True", "False"], ran.stderr


def test_int8_activations_are_said_to_be_missing():
    """If it failed, somebody would time 'int8' on a GPU and publish what is bf16."""
    gpu._warn_no_int8.cache_clear()
    with pytest.warns(UserWarning, match="int8"):
        gpu._warn_no_int8()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpu._warn_no_int8()


@pytest.mark.skipif(HAS_CUDA, reason="there is a CUDA device: the benchmark would measure it")
def test_the_benchmark_says_that_there_is_no_gpu(tmp_path):
    """If it failed, a run on the wrong machine would end in a traceback, or in a file of nothing."""
    command = [sys.executable, "-P", "-m", "stillhouse.kernels.bench.gpu", "--json", str(tmp_path / "gpu.json")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 4
    assert ran.stderr.startswith("This benchmark needs an NVIDIA GPU")
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / "gpu.json").exists()


def test_the_benchmarks_help_needs_no_torch():
    """If it failed, --help would take the seconds that importing torch takes."""
    code = (
        "import sys\nfrom stillhouse.kernels.bench import gpu\n"
        "try:\n    gpu.main(['--help'])\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert "--json" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "0 False"


def test_a_run_that_is_cut_off_keeps_its_figures(tmp_path, monkeypatch, capsys):
    """If it failed, eight minutes of a GPU would be lost to the one row that crashed."""

    def rows(missing):
        yield {"what": "first", "value": 1.5}
        raise RuntimeError("out of memory")

    monkeypatch.setattr(benchmark, "why_not_here", lambda: "")
    monkeypatch.setattr(benchmark, "machine", rows)
    with pytest.raises(RuntimeError, match="out of memory"):
        benchmark.main(["--json", str(tmp_path / "gpu.json"), "--sections", "machine"])
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["sections"]["machine"]["rows"] == [{"what": "first", "value": 1.5}]
    assert written["sections"]["machine"]["complete"] is False
    assert "first" in capsys.readouterr().out


def test_a_wrong_result_is_seen_and_ends_in_1(tmp_path, monkeypatch):
    """If it failed, the benchmark would publish the speed of a kernel that is wrong."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(4, 64, generator=generator), torch.randn(64, 32, generator=generator).double()
    good = (left.double() @ right).to(torch.bfloat16)
    bad = good.clone()
    bad[1, 7] *= 1.2
    unwritten = good.clone()
    unwritten[3, 31] = float("nan")
    assert benchmark.compare(good, left, right, None)["ok"]
    assert not benchmark.compare(bad, left, right, None)["ok"]
    assert not benchmark.compare(unwritten, left, right, None)["ok"]
    found = benchmark.compare(bad, left, right, None)
    row = {"layout": "int4 g32", "shape": [32, 64], "dtype": "torch.bfloat16", "M": 4}
    monkeypatch.setattr(benchmark, "why_not_here", lambda: "")
    monkeypatch.setattr(
        benchmark, "correctness", lambda missing: iter([row | {"ok": False, "forward": found, "backward": found}])
    )
    assert benchmark.main(["--json", str(tmp_path / "gpu.json"), "--sections", "correctness"]) == 1
