"""The doctor says what is true of this machine, and tells a missing thing from a working one."""

import dataclasses
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import sys

import pytest

from stillhouse.jobs import doctor
from stillhouse.jobs.doctor import Finding, diagnose, render_text
from stillhouse.kernels import cpu


@pytest.fixture(scope="module")
def findings():
    return {finding.topic: finding for finding in diagnose()}


def test_every_topic_is_looked_at(findings):
    """A user with a broken installation would read that all is well, because nobody looked."""
    topics = {
        "python",
        "torch",
        "gpu",
        "kernels",
        "compiler",
        "ray",
        "engines",
        "versions",
        "sandbox",
        "memory",
        "disk",
        "browser",
        "hub",
    }
    assert set(findings) == topics
    assert all(finding.message for finding in findings.values())


def test_findings_are_true_here(findings):
    """The doctor would repeat what was true on the machine it was written on."""
    import ray
    import torch

    assert platform.python_version() in findings["python"].message
    assert sys.executable in findings["python"].message
    assert torch.__version__ in findings["torch"].message
    assert f"{torch.get_num_threads()} threads" in findings["torch"].message
    assert ray.__version__ in findings["ray"].message
    assert findings["gpu"].ok == torch.cuda.is_available()
    assert findings["browser"].ok == any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))


def test_missing_programs_are_said_to_be_missing(monkeypatch, tmp_path):
    """On a machine without compiler, browser or namespaces the doctor would promise them."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = {finding.topic: finding for finding in diagnose()}
    assert not found["compiler"].ok
    assert "no C++ compiler" in found["compiler"].message
    assert not found["browser"].ok


def test_the_sandbox_is_what_the_verifier_would_get(findings, monkeypatch):
    """In a container that forbids namespaces, code problems would be thought to run sandboxed."""
    from stillhouse.pipeline.sandbox import probe

    assert findings["sandbox"].ok == (probe.probed().tier == "strict")
    refused = dataclasses.replace(probe.probed(), tier=None, route=None, missing="no user namespaces: Operation not permitted")
    monkeypatch.setattr(probe, "probed", lambda: refused)
    found = doctor._sandbox()
    assert not found.ok
    assert "cannot be judged here: no user namespaces" in found.message


def test_ray_address_is_said_to_be_ignored(monkeypatch):
    """A user would believe that a run joins the cluster in RAY_ADDRESS, and it starts a Ray of its own on the login node."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "RAY_ADDRESS" not in doctor._ray().message
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    message = doctor._ray().message
    assert "a run starts its own, locally, unless --address names a cluster" in message
    assert "RAY_ADDRESS=10.0.0.1:6379 is set, and a run ignores it" in message


def test_engines_are_looked_for(monkeypatch):
    """A user with a vLLM teacher would learn only on the GPU nodes that it is not installed, or not how to install it."""
    installed = {"vllm", "fastapi"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in installed else None)
    found = doctor._engines()
    assert found.ok
    assert "here for teacher.kind: vllm, transformers_serve; not installed: sglang (" in found.message
    assert "pip install -e '.[llama-cpp]'" in found.message
    installed.clear()
    assert not doctor._engines().ok


@pytest.fixture
def kernels_of(monkeypatch):
    """What the doctor says of the kernels with some libraries built and one asked for; the choice is made anew each time."""

    def kernels_of(built=cpu.ISAS, forced=None):
        monkeypatch.setattr(cpu, "library_path", lambda isa: real(isa) if isa in built else None)
        monkeypatch.delenv(cpu.ISA_VARIABLE, raising=False)
        if forced is not None:
            monkeypatch.setenv(cpu.ISA_VARIABLE, forced)
        cpu.forget_choice()
        return doctor._kernels()

    real = cpu.library_path
    yield kernels_of
    cpu.forget_choice()


def test_the_library_that_serves_is_named(kernels_of):
    """A user would not learn that a slower path was forced, or which of three libraries the processor runs."""
    best = cpu.best_isa()
    if best is None:
        pytest.skip("no compiled kernels in this installation")
    compiled = f"compiled for the CPU: {', '.join(isa for isa in cpu.ISAS if cpu.library_path(isa))}"
    found = kernels_of()
    assert (found.ok, found.message) == (True, f"{compiled}; {best} serves, the best that this processor runs")
    found = kernels_of(forced="torch")
    assert not found.ok
    assert found.message == f"{compiled}; plain torch serves, since STILLHOUSE_CPU_ISA=torch; {best} would be faster"
    if best != "generic":
        assert "; generic serves, since STILLHOUSE_CPU_ISA=generic; " in kernels_of(forced="generic").message
    found = kernels_of(forced="sse9")
    assert not found.ok
    assert "STILLHOUSE_CPU_ISA must be one of" in found.message


def test_kernels_that_were_not_compiled_are_said_to_be_slow(kernels_of):
    """A user whose installation found no compiler would train many times slower and not learn why."""
    found = kernels_of(built=())
    assert not found.ok
    assert found.message.startswith("no compiled 4-bit library; plain torch serves, many times slower.")
    assert "pip install" in found.message


def test_a_missing_compiler_matters_only_where_nothing_is_compiled(kernels_of, monkeypatch, tmp_path):
    """A user of a complete installation would be sent to install a compiler; one of an incomplete one would not be."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if cpu.best_isa() is not None:
        kernels_of()
        assert "the compiled 4-bit kernels are here already" in doctor._compiler().message
    kernels_of(built=())
    found = doctor._compiler()
    assert not found.ok
    assert "plain torch serves in their place, many times slower" in found.message


def test_versions_other_than_tested_are_named(monkeypatch):
    """A failure that comes from an untested version would be looked for elsewhere."""
    monkeypatch.setitem(doctor.TESTED_VERSIONS, "peft", "0.0.1")
    monkeypatch.setitem(doctor.TESTED_VERSIONS, "no-such-package", "1.0")
    found = {finding.topic: finding for finding in diagnose()}["versions"]
    assert not found.ok
    assert re.search(r"peft [\d.]+ \(tested: 0\.0\.1\)", found.message)
    assert "no-such-package is not installed (tested: 1.0)" in found.message


def test_offline_mode_is_said(monkeypatch):
    """A download that HF_HUB_OFFLINE forbids would look like a network failure."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline (HF_HUB_OFFLINE)" in {finding.topic: finding for finding in diagnose()}["hub"].message


def test_text_tells_good_from_bad():
    """Every finding would look alike in the terminal."""
    text = render_text([Finding("torch", True, "2.13"), Finding("gpu", False, "none")])
    assert text.splitlines() == ["ok  torch  2.13", "--  gpu    none"]
