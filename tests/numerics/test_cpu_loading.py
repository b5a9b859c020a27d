"""Which compiled library serves: the choice, forcing another, and what happens where nothing was built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stillhouse.kernels import cpu
from stillhouse.kernels.formats import dequantize, quantize
from stillhouse.kernels.linear import linear4bit

PRODUCT = """
import torch
from stillhouse.kernels import cpu
from stillhouse.kernels.formats import quantize
from stillhouse.kernels.linear import linear4bit
torch.manual_seed(0)
weight, x = torch.randn(96, 256), torch.randn(5, 256, requires_grad=True)
y = linear4bit(x, quantize(weight, "int4"))
y.square().sum().backward()
maps = open("/proc/self/maps").read().split() if __import__("os").path.exists("/proc/self/maps") else []
print(cpu.isa(), len({name for name in maps if "libgomp" in name}), y.double().norm().item(), x.grad.double().norm().item())
"""


def product(isa: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != cpu.ISA_VARIABLE}
    if isa is not None:
        environment[cpu.ISA_VARIABLE] = isa
    return subprocess.run([sys.executable, "-c", PRODUCT], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_best_library_serves_unasked_and_every_other_gives_the_same():
    """If it failed, a machine would run slower kernels than it could, or results would depend on which ones it has."""
    best = cpu.best_isa()
    if best is None:
        pytest.skip("no library was built: there is no C++ compiler")
    answers = {isa: product(isa) for isa in (None, *cpu.ISAS[cpu.ISAS.index(best) :], "torch")}
    for asked, answer in answers.items():
        assert answer.returncode == 0, answer.stderr
        found, num_openmp, y, grad = answer.stdout.split()
        assert found == (asked or best)
        # Two OpenMP runtimes would fight for the cores.
        assert int(num_openmp) <= 1
        # Norms of 480 and 1,280 float32 sums of at most 257 terms.
        assert float(y) == pytest.approx(float(answers["torch"].stdout.split()[2]), rel=257 * 2.0**-24)
        assert float(grad) == pytest.approx(float(answers["torch"].stdout.split()[3]), rel=2 * 257 * 2.0**-24)


def test_a_library_that_cannot_be_had_is_said():
    """If it failed, a typo in the variable would measure or ship something else than what was asked for."""
    answer = product("avx1024")
    assert answer.returncode != 0
    assert "STILLHOUSE_CPU_ISA must be one of ('avx512', 'avx2', 'generic', 'torch'), not 'avx1024'" in answer.stderr


def test_nothing_built_is_said_once_and_plain_torch_serves(monkeypatch):
    """If it failed, an installation without a compiler would break, or be many times slower without a word."""
    packed = quantize(torch.randn(16, 64), "nf4")
    expected = dequantize(packed)
    monkeypatch.delenv(cpu.ISA_VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "library_path", lambda isa: None)
    cpu.forget_choice()
    try:
        with pytest.warns(RuntimeWarning, match="plain torch serves"):
            y = linear4bit(torch.eye(64), packed)
        assert torch.equal(y.T, expected)
        assert cpu.isa() == "torch"
        assert "plain torch" in cpu.describe()
    finally:
        cpu.forget_choice()


def test_a_library_for_another_processor_is_refused(monkeypatch):
    """If it failed, forcing a library would end in an illegal instruction instead of a sentence."""
    cpu.load.cache_clear()
    monkeypatch.setattr(cpu, "best_isa", lambda: "generic")
    monkeypatch.setattr(cpu, "library_path", lambda isa: Path("somewhere.so"))
    with pytest.raises(RuntimeError, match="this processor cannot run the avx512 library; it has generic at most"):
        cpu.load("avx512")
