"""What every verifier answers."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.pipeline.records import Outcome


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a verifier said of one answer, and why."""

    outcome: Outcome
    reason: str
