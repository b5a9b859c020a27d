"""A look into the spool of a run that may be at work: read-only, and without its lock."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from stillhouse.pipeline.trace_store.spool import FILE_NAME
from stillhouse.pipeline.trace_store.totals import Totals


@dataclass(frozen=True, slots=True)
class SpoolView:
    """What a spool held a moment ago.

    Args:
        writer: its writer's id.
        totals: what its writer's calls came to, from the first one on.
        num_unsealed: answers that are not in the store yet.
        num_under_way: calls that have no outcome yet.
        num_outcomes: calls that have ended and are not in the store's ledger yet, by how they ended.
    """

    writer: str
    totals: Totals
    num_unsealed: int
    num_under_way: int
    num_outcomes: dict[str, int]


def look_into_spool(folder: Path) -> SpoolView | None:
    """Read a spool; None where there is none, or one that is just being made."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30.0)
    try:
        (num_tables,) = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'writer'").fetchone()
        if not num_tables:
            return None
        with connection:
            connection.execute("BEGIN")  # one moment for all three
            writer, totals = connection.execute("SELECT id, totals FROM writer").fetchone()
            outcomes = dict(connection.execute("SELECT state, count(*) FROM outcomes GROUP BY state"))
            (calls,) = connection.execute("SELECT count(*) FROM calls").fetchone()
    finally:
        connection.close()
    return SpoolView(
        writer,
        Totals.from_json(json.loads(totals)),
        num_unsealed=outcomes.get("answered", 0) + outcomes.get("truncated", 0),
        num_under_way=calls - sum(outcomes.values()),
        num_outcomes=outcomes,
    )
