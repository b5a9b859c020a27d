"""The doctor says what is true of this machine, and tells a missing thing from a working one."""

import importlib.metadata
import platform
import re
import shutil
import sys

import pytest

from stillhouse.jobs import doctor
from stillhouse.jobs.doctor import Finding, diagnose, render_text


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
        "vllm",
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
    assert found["sandbox"].message.startswith("not used yet")
    assert not found["browser"].ok
    assert not found["sandbox"].ok
    assert "bubblewrap is not installed; unshare is not installed" in found["sandbox"].message


def test_sandbox_that_is_refused_is_not_ok(monkeypatch, tmp_path):
    """In a container that forbids namespaces, code problems would be thought to run sandboxed."""
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho 'unshare failed: Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(shutil, "which", lambda name: str(refusing) if name == "unshare" else None)
    found = {finding.topic: finding for finding in diagnose()}
    assert not found["sandbox"].ok
    assert "Operation not permitted" in found["sandbox"].message


def test_ray_address_is_said_to_be_ignored(monkeypatch):
    """A user would believe that a run joins the cluster in RAY_ADDRESS, and it starts a Ray of its own on the login node."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "RAY_ADDRESS" not in doctor._ray().message
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    message = doctor._ray().message
    assert "a run starts its own, locally, unless --address names a cluster" in message
    assert "RAY_ADDRESS=10.0.0.1:6379 is set, and a run ignores it" in message


def test_vllm_is_looked_for(monkeypatch):
    """A user with a vLLM teacher would learn only on the GPU nodes that it is not installed."""

    def version(name):
        if installed and name == "vllm":
            return "9.8.7"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    installed = True
    assert (doctor._vllm().ok, doctor._vllm().message) == (True, "9.8.7")
    installed = False
    assert (doctor._vllm().ok, doctor._vllm().message) == (False, "not installed; only teacher.kind=vllm needs it")


def test_compiler_is_not_used_until_there_is_something_to_compile(monkeypatch, tmp_path):
    """A user would install a compiler that nothing uses, or not learn that the kernels now want one."""
    monkeypatch.setattr(doctor, "_kernel_folders", lambda: [tmp_path])
    assert doctor._compiler().message.startswith("not used yet: the kernels are plain torch so far")
    (tmp_path / "int4.cpp").write_text("")
    assert "not used yet" not in doctor._compiler().message


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
