"""The Triton kernels under triton's interpreter, on the CPU: the cases are in triton_interpreter_cases.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("triton_interpreter_cases.py")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'stillhouse[gpu]'")
def test_the_kernels_compute_what_the_reference_does():
    """If it failed, 4-bit layers on a GPU would give other numbers than on the CPU.

    In a process of its own: triton reads TRITON_INTERPRET when a kernel is defined, and other tests compile the same kernels.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--import-mode=importlib", "-p", "no:cacheprovider", str(CASES)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=850, cwd=CASES.parents[2])
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout, ran.stdout[-1000:]
