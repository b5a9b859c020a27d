"""The spool and its seals against kills: whatever the order of calls, answers, seals and crashes, each answer is kept once.

A crash is what kill -9 leaves: the files as they are, without anything that was not committed. The image is copied and
opened as the next process would.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillhouse.pipeline.records import Trace
from stillhouse.pipeline.trace_store import spool as spool_module
from stillhouse.pipeline.trace_store.budget import Budget, Prices
from stillhouse.pipeline.trace_store.ledger import Intent, Ledger
from stillhouse.pipeline.trace_store.sealing import drop_if_committed, find_commit, publish
from stillhouse.pipeline.trace_store.spool import Spool
from stillhouse.pipeline.trace_store.store import TraceStore

STEPS = st.one_of(
    st.tuples(st.just("begin"), st.integers(1, 5)),
    st.tuples(st.just("answer"), st.integers(1, 4)),
    st.tuples(st.sampled_from(["answer garbage", "fail unbilled", "fail unknown", "fail with beginning"]), st.just(1)),
    st.tuples(st.just("answer and crash before commit"), st.integers(1, 2)),
    st.tuples(st.just("answer and crash before parsing"), st.integers(1, 2)),
    st.tuples(st.just("begin and crash before commit"), st.just(1)),
    st.tuples(st.just("crash"), st.just(0)),
    st.tuples(
        st.just("seal"), st.sampled_from(["whole", "marked", "in the files", "before commit", "published", "half dropped"])
    ),
)


class Killed(Exception):
    pass


class DyingStore(TraceStore):
    """A store whose process dies in the middle of a seal, where ``dies`` says."""

    dies = ""

    def add_shard(self, *arguments):
        if self.dies == "in the files":
            raise Killed
        return super().add_shard(*arguments)

    def commit(self, **arguments):
        if self.dies == "before commit":
            raise Killed
        commit = super().commit(**arguments)
        if self.dies == "published":
            raise Killed
        return commit


def parse(request: bytes, raw: bytes) -> Trace:
    if not raw.startswith(b"text "):
        raise ValueError("no text")
    return Trace(request.decode(), "p", "t", "r", "prompt", raw.decode(), None, None, "stop", 3, 4, 0.6, 0.95, 9, 0, 7, 1.0)


class Run:
    """One run over several processes' lives, and what its caller was told."""

    def __init__(self, root: Path):
        self.root = root
        self.store = DyingStore(root / "store")
        self.life = self.next_number = 0
        self.acknowledged: dict[str, str] = {}
        self.unacknowledged: set[str] = set()
        self.calls_noted = 0
        self.open()

    def open(self) -> None:
        self.spool = Spool(self.root / f"spool-{self.life}")
        drop_if_committed(self.store, self.spool)
        self.ledger = Ledger(self.spool, parse=parse, prices=Prices(1.0, 2.0), budget=Budget())
        self.under_way: dict[int, str] = {}

    def crash(self) -> None:
        """The next process sees the files as they are now; nothing of this one is closed properly before they are copied."""
        here, self.life = self.root / f"spool-{self.life}", self.life + 1
        shutil.copytree(here, self.root / f"spool-{self.life}", ignore=shutil.ignore_patterns("*-shm", "sealing"))
        self.spool.close()
        shutil.rmtree(here)
        self.store = DyingStore(self.root / "store")
        self.open()

    def step(self, what: str, detail) -> None:
        if what == "begin":
            self.begin(detail)
            self.ledger.commit()
            self.calls_noted += detail
        elif what == "begin and crash before commit":
            self.begin(detail)
            self.crash()
        elif what == "crash":
            self.crash()
        elif what == "seal":
            self.seal(detail)
        elif what.startswith("answer garbage"):
            for call_id in self.some(1):
                self.ledger.receive([(call_id, b"?")])
                self.ledger.commit()
                with pytest.raises(ValueError):
                    self.ledger.settle(call_id)
        elif what.startswith("fail"):
            for call_id in self.some(1):
                partial = b"text cut" if what.endswith("beginning") else b""
                billed = "no" if what.endswith("unbilled") else "unknown"
                self.ledger.fail(call_id, error="e", status=None, billed=billed, partial=partial)
                self.ledger.commit()
        else:
            self.answer(detail, what)

    def begin(self, num_calls: int) -> None:
        intents = []
        for _ in range(num_calls):
            self.next_number += 1
            key = hashlib.sha256(str(self.next_number).encode()).hexdigest()
            intents.append(Intent(key, "p", key.encode(), 5, 9))
        for call_id, intent in zip(self.ledger.begin(intents), intents):
            self.under_way[call_id] = intent.key

    def some(self, num_calls: int) -> list[int]:
        chosen = sorted(self.under_way, key=lambda call_id: call_id % 3)[:num_calls]
        self.last = {call_id: self.under_way.pop(call_id) for call_id in chosen}
        return chosen

    def answer(self, num_calls: int, what: str) -> None:
        ids = self.some(num_calls)
        self.ledger.receive([(call_id, f"text {call_id}".encode()) for call_id in ids])
        if what.endswith("before commit"):
            self.crash()
            return
        self.ledger.commit()
        if what.endswith("before parsing"):
            self.unacknowledged |= {self.last[call_id] for call_id in ids}
            self.crash()
            return
        for call_id in ids:
            trace = self.ledger.settle(call_id)
            assert trace.completion == f"text {call_id}"
            self.acknowledged[trace.key] = trace.completion

    def seal(self, dies: str) -> None:
        seal = self.spool.pending_seal()
        if seal is None:
            if self.ledger.has_news:
                self.ledger.commit()
            seal = self.ledger.begin_seal()
        if seal is None:
            return
        self.store.dies = dies
        if dies != "marked":
            try:
                if find_commit(self.store, seal, self.spool.writer) is None:
                    scratch = self.spool.path.parent / "sealing"
                    publish(
                        *(self.store, seal),
                        **{"spool": self.spool.path, "writer": self.spool.writer, "parse": parse},
                        **{"scratch": scratch, "shard_bytes": 40},
                    )
            except Killed:
                self.crash()
                return
            while self.spool.drop_sealed(seal.last_seq):
                if dies == "half dropped":
                    break
        if dies in ("marked", "half dropped"):
            self.crash()
        self.store.dies = ""

    def end(self) -> None:
        """Start once more, let everything be sealed, and stop."""
        self.crash()
        self.seal("whole")
        self.seal("whole")
        assert not list(self.spool.open_calls())
        self.spool.close()


@pytest.fixture(scope="module", autouse=True)
def _rows_leave_two_at_a_time():
    whole = spool_module.DROP_ROWS
    spool_module.DROP_ROWS = 2
    yield
    spool_module.DROP_ROWS = whole


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEPS, min_size=5, max_size=30))
def test_every_acknowledged_answer_is_stored_once_whatever_dies_when(steps):
    """The promise of the store. A failure here is a trace that is paid for again, trained on twice, or gone."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        for what, detail in steps:
            run.step(what, detail)
        run.end()
        store = TraceStore(run.root / "store")
        traces = [trace for trace in store.traces() if trace.finish_reason != "truncated"]
        stored = {trace.key: trace.completion for trace in traces}
        assert len(stored) == len(traces)
        assert stored.keys() == run.acknowledged.keys() | run.unacknowledged
        assert all(stored[key] == text for key, text in run.acknowledged.items())

        commits = store.commits()
        files = [entry for commit in commits for entry in (*commit.shards, *commit.calls)]
        assert len({entry.name for entry in files}) == len(files), "the same rows were committed twice"
        by_commit = [
            [row for entry in commit.calls for row in pq.read_table(run.root / "store" / entry.name).to_pylist()]
            for commit in commits
        ]
        assert all(rows == sorted(rows, key=lambda row: row["call_id"]) for rows in by_commit)
        rows = [row for rows in by_commit for row in rows]
        ids = [row["call_id"] for row in rows]
        assert len(set(ids)) == len(ids) == run.calls_noted

        totals = store.totals()
        assert totals.num_calls == totals.num_answered + totals.num_failed + totals.num_lost == len(rows)
        states = [row["state"] for row in rows]
        assert totals.num_answered == states.count("answered") == len(stored)
        assert totals.num_lost == states.count("lost")
        assert totals.num_truncated == states.count("truncated")
        known = [row for row in rows if row["prompt_tokens"] is not None]
        assert totals.dollars == pytest.approx(sum(row["dollars"] for row in known))
        assert totals.tokens_lost == 14 * (len(rows) - len(known))
