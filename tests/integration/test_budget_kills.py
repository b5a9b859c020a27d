"""The budget harness of tests/chaos, made short: no kill makes a vendor bill more than the cap."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def budget(*arguments: str) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "tests.chaos.budget", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_cap_in_dollars_holds_over_kills():
    """A run that crashes and restarts would spend more than its user allowed."""
    found = budget("--caps", "dollars", "--kills", "3", "--calls", "900")["dollars"]
    assert found["num_kills"] == 3
    assert 0 < found["billed_by_vendor"] <= found["spent_by_ledger"] <= found["cap"]
    assert found["calls_by_state"]["lost"] > 0, "no kill caught a call in flight"


@pytest.mark.slow
def test_every_cap_holds_over_ten_kills():
    """As above for dollars, tokens and hours."""
    found = budget("--kills", "10", "--calls", "4000", "--seconds", "6")
    for unit in ("dollars", "tokens"):
        assert found[unit]["billed_by_vendor"] <= found[unit]["spent_by_ledger"] <= found[unit]["cap"]
    assert [figures["num_kills"] for figures in found.values()] == [10, 10, 10]
