"""What a store must hold after many kills, judged against what the witness saw: nothing lost, nothing twice, calls add up."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import pyarrow.parquet as pq

from stillhouse.pipeline.trace_store.checks import collect_garbage, verify_store
from stillhouse.pipeline.trace_store.store import TraceStore


@dataclass(frozen=True)
class Witnessed:
    """What the witness saw of one store.

    Args:
        planned: every key that was planned.
        acknowledged: key → sha256 of the text that was acknowledged.
        partial: sha256 of the texts of cut streams whose ``failed`` was acknowledged.
        num_begun: begins that were acknowledged.
        num_unseen_at_most: calls that can have become durable without an acknowledgement.
        num_failed: failures that were acknowledged.
    """

    planned: frozenset[str]
    acknowledged: dict[str, str]
    partial: frozenset[str]
    num_begun: int
    num_unseen_at_most: int
    num_failed: int


def check_store(root: str, witnessed: Witnessed) -> dict[str, object]:
    """Figures of a store; ``violations`` is a list of sentences, empty where every promise was kept."""
    store = TraceStore(root)
    violations: list[str] = []

    def expect(holds: bool, sentence: str) -> None:
        if not holds:
            violations.append(f"{root}: {sentence}")

    texts = Counter(dict.fromkeys(witnessed.planned, 0))
    shas: dict[str, str] = {}
    truncated = set()
    for trace in store.traces():
        sha = hashlib.sha256(trace.completion.encode()).hexdigest()
        if trace.finish_reason == "truncated":
            truncated.add(sha)
        else:
            texts[trace.key] += 1
            shas[trace.key] = sha
    lost = [key for key in witnessed.acknowledged if key not in shas]
    changed = [key for key, sha in witnessed.acknowledged.items() if shas.get(key, sha) != sha]
    expect(not lost, f"{len(lost)} acknowledged traces are lost")
    expect(not changed, f"{len(changed)} acknowledged traces have another text")
    expect(set(texts) == set(witnessed.planned), f"{len(set(texts) - witnessed.planned)} keys that nobody planned")
    expect(all(count == 1 for count in texts.values()), f"{sum(count != 1 for count in texts.values())} keys not exactly once")
    expect(witnessed.partial <= truncated, f"{len(witnessed.partial - truncated)} acknowledged partial answers are lost")

    commits = store.commits()
    stored = [key for commit in commits for entry in commit.shards for key in _column(store, entry.name, "key")]
    twice = len(stored) - len(set(stored))
    expect(twice == 0, f"{twice} rows of the shards repeat a key")

    calls = [row for commit in commits for entry in commit.calls for row in _rows(store, entry.name)]
    states = Counter(row["state"] for row in calls)
    totals = store.totals()
    expect(
        totals.num_calls == totals.num_answered + totals.num_failed + totals.num_lost,
        f"the totals do not add up: {totals}",
    )
    expect(len(calls) == totals.num_calls, f"{len(calls)} rows of calls, {totals.num_calls} calls in the totals")
    expect(
        states["answered"] == totals.num_answered and states["lost"] == totals.num_lost,
        f"calls by state {dict(states)} and totals {totals} differ",
    )
    expect(
        witnessed.num_begun <= totals.num_calls <= witnessed.num_begun + witnessed.num_unseen_at_most,
        f"{totals.num_calls} calls in the ledger; begun {witnessed.num_begun}, at most {witnessed.num_unseen_at_most} unseen",
    )
    expect(totals.num_failed >= witnessed.num_failed, f"{totals.num_failed} failed calls, {witnessed.num_failed} acknowledged")
    dollars = sum(row["dollars"] or 0.0 for row in calls if row["state"] == "answered")
    expect(abs(dollars - totals.dollars) < 1e-6 * max(1.0, dollars), f"calls cost {dollars}, totals say {totals.dollars}")

    check = verify_store(root)
    expect(check.sound, f"verify: {check}")
    removed = collect_garbage(root, older_than_s=0, dry_run=False)
    expect(verify_store(root).sound, "not sound any more after gc")
    return {
        "violations": violations,
        "num_acknowledged": len(witnessed.acknowledged),
        "num_lost": len(lost),
        "num_changed": len(changed),
        "num_duplicated": twice,
        "num_traces": len(shas),
        "num_truncated": len(truncated),
        "num_commits": len(commits),
        "num_shards": sum(len(commit.shards) for commit in commits),
        "num_unlisted_files_removed": len(removed),
        "num_calls": totals.num_calls,
        "num_calls_answered": totals.num_answered,
        "num_calls_failed": totals.num_failed,
        "num_calls_lost": totals.num_lost,
    }


def _column(store: TraceStore, name: str, column: str) -> list[str]:
    with store.folder.open(name) as file:
        return pq.read_table(file, columns=[column]).column(column).to_pylist()


def _rows(store: TraceStore, name: str) -> list[dict[str, object]]:
    with store.folder.open(name) as file:
        return pq.read_table(file, columns=["state", "dollars"]).to_pylist()
