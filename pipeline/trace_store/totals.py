"""What a writer's calls came to: counts, tokens, money and time, added up over its whole life."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Totals:
    """Cumulative counts of one writer's calls whose end is known: ``num_calls == num_answered + num_failed + num_lost``.

    Tokens and dollars count what an answer's own usage said. What is not known exactly is counted by its reservation in
    ``tokens_lost`` and ``dollars_lost``: calls that were lost or broken off, answers that nobody could read, answers
    without usage. Both kinds count against a budget.
    """

    num_calls: int = 0
    num_answered: int = 0
    """Answers that became traces."""
    num_failed: int = 0
    """Calls that ended without a usable answer."""
    num_lost: int = 0
    """Calls under way when their process died or closed its writer: nobody knows what became of them."""
    num_truncated: int = 0
    """Those of the failed calls whose beginning was kept as a trace with finish_reason ``truncated``."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0
    tokens_lost: int = 0
    """Tokens reserved by calls whose usage is not known."""
    dollars_lost: float = 0.0
    """Dollars reserved by calls whose usage is not known."""
    seconds: float = 0.0
    """Wall time that the writer was open, over all restarts."""

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(getattr(self, name) + getattr(other, name) for name in _NAMES))

    def to_json(self) -> dict[str, float]:
        """As a JSON object: what a commit's file holds."""
        return {name: getattr(self, name) for name in _NAMES}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Totals:
        """Read back what `to_json` wrote; a count that an older version did not keep is 0.

        Raises:
            ValueError: a value is no number.
        """
        known = {name: values[name] for name in _NAMES if name in values}
        for name, value in known.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"totals need a number as {name}, got {value!r}")
        return cls(**known)


_NAMES = tuple(field.name for field in dataclasses.fields(Totals))
