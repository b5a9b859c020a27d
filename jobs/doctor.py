"""Say in words what works on this machine: Python, torch, GPU, compiler, Ray, vLLM, sandbox, versions, disk, browser, hub.

Each check looks at the machine itself and answers with one sentence. Nothing here is needed for a run: a finding that is
not ok says what will not work, or works more slowly, and what to do about it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stillhouse.jobs.model_facts import hub_cache
from stillhouse.pipeline.errors import first_line

# What constraints.txt pins; a test compares the two. The constraints file itself does not travel in the wheel.
TESTED_VERSIONS = {
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "peft": "0.21.2",
    "trl": "1.16.0",
    "datasets": "5.2.0",
    "bitsandbytes": "0.50.2",
    "accelerate": "1.15.0",
    "compressed-tensors": "0.20.0",
    "ray": "2.60.0",
}
_INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
)
_HOW_TO_COMPILE = (
    "Install a C++ compiler (g++, or clang++ with OpenMP), then from the clone: pip install --force-reinstall --no-deps ."
)
_COMPILER_USE = "used once, by an installation from source, for the 4-bit kernels"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: whether it is as a run wants it, and what that means, in one sentence."""

    topic: str
    ok: bool
    message: str


def diagnose() -> list[Finding]:
    """Look at everything a run may need on this machine. Takes a few seconds, most of them to import torch and ray."""
    checks: list[Callable[[], Finding]] = [
        _python,
        _torch,
        _gpu,
        _kernels,
        _compiler,
        _ray,
        _engines,
        _versions,
        _sandbox,
        _memory,
        _disk,
        _browser,
        _hub,
    ]
    return [check() for check in checks]


def render_text(findings: list[Finding]) -> str:
    """The findings as lines for a terminal: ``ok`` or ``--``, the topic, the sentence."""
    width = max(len(finding.topic) for finding in findings)
    return "\n".join(f"{'ok' if f.ok else '--'}  {f.topic.ljust(width)}  {f.message}" for f in findings)


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding(
        "python", ok, f"{platform.python_version()} at {sys.executable}" + ("" if ok else "; 3.11 or newer is needed")
    )


def _cpu_flags() -> list[str]:
    """The instruction sets of this CPU that matter for 4-bit kernels, from /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return []
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo.read_text(), re.MULTILINE)
    present = set(found.group(1).split()) if found else set()
    return [name for name in _INSTRUCTION_SETS if name in present]


def _torch() -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding("torch", False, f"cannot be imported ({error}); nothing that holds a model runs: pip install torch")
    flags = " ".join(_cpu_flags()) or "none that is known here"
    return Finding("torch", True, f"{torch.__version__} on {torch.get_num_threads()} threads; CPU instruction sets: {flags}")


def _gpu() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("gpu", False, "unknown, since torch cannot be imported")
    if not torch.cuda.is_available():
        driver = any(Path("/dev").glob("nvidia[0-9]*"))
        why = (
            "a device is there, but this torch is not built for it" if driver else "none; the demo needs none, 7 B students do"
        )
        return Finding("gpu", False, why)
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Finding("gpu", True, ", ".join(f"{p.name} with {p.total_memory / 2**30:.0f} GiB" for p in names))


def _kernels() -> Finding:
    """Which compiled 4-bit libraries are here, and which of them this processor runs: ``kernels/cpu.py`` is asked itself."""
    try:
        from stillhouse.kernels import cpu
    except ImportError as error:
        return Finding("kernels", False, f"stillhouse.kernels cannot be imported ({error}): the installation is not complete")
    built = [isa for isa in cpu.ISAS if cpu.library_path(isa) is not None]
    forced = os.environ.get(cpu.ISA_VARIABLE)
    try:
        best = cpu.best_isa()
        with warnings.catch_warnings(action="ignore"):  # that nothing is compiled is said below, in full
            serving = cpu.isa()
    except (ValueError, RuntimeError, OSError) as error:
        return Finding("kernels", False, f"4-bit layers on a CPU do not work: {first_line(error)}")
    if not built:
        return Finding("kernels", False, f"no compiled 4-bit library; plain torch serves, many times slower. {_HOW_TO_COMPILE}")
    compiled = f"compiled for the CPU: {', '.join(built)}"
    if serving == best:
        return Finding("kernels", True, f"{compiled}; {best} serves, the best that this processor runs")
    what = "plain torch" if serving == "torch" else serving
    return Finding("kernels", False, f"{compiled}; {what} serves, since {cpu.ISA_VARIABLE}={forced}; {best} would be faster")


def _compiler() -> Finding:
    found = next(
        (path for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (path := shutil.which(name))), None
    )
    if found is None:
        return Finding("compiler", False, f"no C++ compiler (c++, g++, clang++); {_without_compiler()}")
    answer = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=20)
    first = (answer.stdout or answer.stderr).strip().splitlines()
    ok = answer.returncode == 0 and bool(first)
    return Finding("compiler", ok, f"{found}: {first[0] if first else 'says nothing to --version'}; {_COMPILER_USE}")


def _without_compiler() -> str:
    """What the lack of a compiler costs: nothing where the libraries came with the installation."""
    try:
        from stillhouse.kernels import cpu
    except ImportError:
        return "kernels cannot be compiled"
    if any(cpu.library_path(isa) is not None for isa in cpu.ISAS):
        return "the compiled 4-bit kernels are here already, and only another installation from source would lack them"
    return "an installation from source has no compiled 4-bit kernels, and plain torch serves in their place, many times slower"


def _ray() -> Finding:
    try:
        import ray
    except ImportError as error:
        return Finding("ray", False, f"cannot be imported ({error}); no run without it: pip install 'ray[default,train]'")
    address = os.environ.get("RAY_ADDRESS")
    ignored = f"; RAY_ADDRESS={address} is set, and a run ignores it" if address else ""
    return Finding("ray", True, f"{ray.__version__}; a run starts its own, locally, unless --address names a cluster{ignored}")


def _engines() -> Finding:
    """Which engines' servers Ray could start from this environment; others may live in one of their own."""
    from stillhouse.jobs.plan_teacher import PACKAGES

    here = [kind for kind, (module, _) in PACKAGES.items() if importlib.util.find_spec(module) is not None]
    absent = [f"{kind} ({how})" for kind, (_, how) in PACKAGES.items() if kind not in here]
    found = f"here for teacher.kind: {', '.join(here) or 'none'}"
    return Finding("engines", bool(here), found + (f"; not installed: {'; '.join(absent)}" if absent else ""))


def _versions() -> Finding:
    parts, ok = [], True
    for name, tested in TESTED_VERSIONS.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            parts.append(f"{name} is not installed (tested: {tested})")
            ok = False
            continue
        if version.split("+")[0] != tested:
            parts.append(f"{name} {version} (tested: {tested})")
            ok = False
    return Finding(
        "versions", ok, "; ".join(parts) if parts else f"as tested: {', '.join(f'{n} {v}' for n, v in TESTED_VERSIONS.items())}"
    )


def _sandbox() -> Finding:
    """Which tier the code verifier's sandbox gets here, found by trying to break out of it."""
    from stillhouse.pipeline.sandbox.probe import probed

    found = probed()
    if found.tier == "strict":
        tried = f"{len(found.checks)} ways out tried, none open"
        return Finding("sandbox", True, f"strict, by {found.route} namespaces; {tried}; for problems of kind code")
    weaker = f"; STILLHOUSE_SANDBOX={found.tier} would run them without" if found.tier else ""
    return Finding("sandbox", False, f"problems of kind code cannot be judged here: {found.missing}{weaker}")


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    gib = 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ok = memory.available >= 4 * gib
    tail = "" if ok else "; the demo wants 4 GiB"
    return Finding(
        "memory", ok, f"{memory.available / gib:.1f} of {memory.total / gib:.1f} GiB available, {cores} CPU cores{tail}"
    )


def _disk() -> Finding:
    here, scratch = shutil.disk_usage(Path.cwd()), shutil.disk_usage(tempfile.gettempdir())
    ok = min(here.free, scratch.free) >= 2e9
    tail = "" if ok else "; Ray and a run want 2 GB in each"
    return Finding(
        "disk",
        ok,
        f"{here.free / 1e9:.0f} GB free in {Path.cwd()}, {scratch.free / 1e9:.0f} GB in {tempfile.gettempdir()}{tail}",
    )


def _browser() -> Finding:
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    return Finding(
        "browser", found is not None, found or "no chromium; only the test that opens the report in a browser needs one"
    )


def _hub() -> Finding:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    how = (
        "offline (HF_HUB_OFFLINE): only what is cached can be loaded"
        if offline
        else "models and data sets are downloaded on first use"
    )
    return Finding("hub", True, f"{how}; cache {hub_cache()}")
