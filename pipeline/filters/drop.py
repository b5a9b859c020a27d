"""What a filter says of a trace that it would not keep."""

from __future__ import annotations

from typing import NamedTuple

FILTERS_VERSION = 3
"""Raised whenever a filter's verdict could change; part of every Verdict."""

EVIDENCE_CHARS = 200


class Drop(NamedTuple):
    """Why a trace is dropped: a reason that drops are counted by, and what was seen."""

    reason: str
    evidence: str = ""
