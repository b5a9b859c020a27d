"""Exact duplicates: the same problem answered in the same words, up to Unicode form, letter case and whitespace."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from stillhouse.pipeline.records import Trace, Verdict, content_key

DEDUP_VERSION = 1


def normalized_text(text: str) -> str:
    """Bring text to one form for comparison: NFKC, case folded, whitespace collapsed to single blanks."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def exact_duplicates(traces: Iterable[Trace]) -> list[Verdict]:
    """Find the traces that repeat an earlier one of the same problem.

    Returns:
        one dropping Verdict for each later duplicate, in the order given; its evidence names the first one's key. Running
        it again on what is left finds nothing.
    """
    first: dict[str, str] = {}
    verdicts = []
    for trace in traces:
        key = content_key(trace.problem_id, normalized_text(trace.completion))
        original = first.setdefault(key, trace.key)
        if original != trace.key:
            verdicts.append(Verdict(trace.key, "exact_dedup", DEDUP_VERSION, False, "duplicate of an earlier trace", original))
    return verdicts
