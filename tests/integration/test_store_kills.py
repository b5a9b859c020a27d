"""The kill harness of tests/chaos, made short: what a killed writer acknowledged is in the store, once, with its text."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.writer import TraceWriter
from tests.chaos.kill_check import Witnessed, check_store
from tests.chaos.synthetic import make_answer, make_intent, parse_answer, planned_key

ROOT = Path(__file__).parents[2]
SHA_OF_A = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"


def kills(*arguments: str) -> dict[str, dict[str, object]]:
    command = [sys.executable, "-m", "tests.chaos.kills", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout)


def test_killed_writers_lose_nothing_that_was_acknowledged():
    """A killed run would lose paid answers, or pay and train on some twice."""
    found = kills("--kills", "10", "--acknowledged", "800")["local"]
    assert found["num_kills"] >= 10
    assert found["num_acknowledged"] >= 800
    assert found["num_lost"] == found["num_duplicated"] == found["num_changed"] == 0
    assert found["num_calls_lost"] > 0, "no kill caught a call in flight: the harness kills too late"


@pytest.mark.slow
def test_killed_at_every_durable_operation_and_over_an_object_store():
    """As above at every fsync, rename, commit and PUT, with two writers at once, and where S3 cannot refuse a second PUT."""
    found = kills("--kills", "24", "--acknowledged", "3000", "--object-store-kills", "8", "--seed", "5")
    assert set(found) == {"local", "s3 with conditional PUT", "s3 without conditional PUT"}
    for figures in found.values():
        assert figures["num_lost"] == figures["num_duplicated"] == figures["num_changed"] == 0
    assert found["local"]["num_kills_at_operations"] > 0


@pytest.fixture
def small_store(tmp_path):
    """A store with three answered calls, and what a witness saw of it."""
    keys = [planned_key("small", index) for index in range(3)]
    with TraceWriter(TraceStore(tmp_path / "store"), tmp_path / "spool", parse=parse_answer) as writer:
        calls = writer.begin([make_intent(key) for key in keys]).result()
        writer.answered_many([(call, make_answer("a", 1, 1)) for call in calls]).result()
    return str(tmp_path / "store"), Witnessed(frozenset(keys), dict.fromkeys(keys, SHA_OF_A), frozenset(), 3, 0, 0)


def test_the_harness_accepts_a_sound_store(small_store):
    """Its violations would be false alarms."""
    root, witnessed = small_store
    assert check_store(root, witnessed)["violations"] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"acknowledged": {planned_key("small", 7): SHA_OF_A}, "planned": None}, "1 acknowledged traces are lost"),
        ({"acknowledged": {planned_key("small", 0): "0" * 64}}, "1 acknowledged traces have another text"),
        ({"partial": frozenset({"0" * 64})}, "1 acknowledged partial answers are lost"),
        ({"num_begun": 4}, "3 calls in the ledger; begun 4"),
    ],
)
def test_the_harness_sees_a_broken_promise(small_store, change, said):
    """A harness that cannot see a loss would call every store safe."""
    root, witnessed = small_store
    if change.get("planned", 1) is None:
        change = change | {"planned": witnessed.planned | {planned_key("small", 7)}}
    found = check_store(root, dataclasses.replace(witnessed, **change))
    assert any(said in sentence for sentence in found["violations"]), found["violations"]
