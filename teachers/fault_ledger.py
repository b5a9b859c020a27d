"""What a fault server served, one JSON line a request, written before the first byte of its answer goes out.

The file is a vendor's side of the story: which request came when, what it met, and what it would be billed. Together with the
client's own ledger it shows whether both agree, call by call.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stillhouse.pipeline.errors import IntegrityError


@dataclass(frozen=True, slots=True)
class ServedCall:
    """One request as the server saw it; times are seconds since 1970.

    Args:
        number: order of arrival, from 0.
        endpoint: the path in front of ``/chat/completions``; every one has Retry-After gates of its own.
        identity: see `stillhouse.teachers.fault_plan.request_identity`; "" where the body could not be read.
        attempt: how often this identity had come before.
        fault: its name; "" for none.
        status: what was sent; None where nothing was.
        prompt_tokens, completion_tokens: what a vendor bills. An answer that was written counts, even where the
            connection broke while it was sent; a refusal does not.
        not_before: the time named by this answer's Retry-After; 0 where there was none.
        early: "request" where this very request had been told here to wait longer; "endpoint" where another one had, so long
            ago that its client must have known; "" where it came at a fair time.
        in_gate_s: age of the oldest refusal whose wait was not over when this request came; 0 where there was none.
        under_way: requests in the server at that moment, this one included.
    """

    number: int
    time: float
    endpoint: str
    identity: str = ""
    attempt: int = 0
    stream: bool = False
    fault: str = ""
    status: int | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    response_id: str = ""
    not_before: float = 0.0
    early: Literal["", "request", "endpoint"] = ""
    in_gate_s: float = 0.0
    under_way: int = 1


class Gates:
    """Who was told to wait, and who came too early.

    The same request to the same endpoint has to wait to the moment. Another one may have been on its way there when the
    refusal was sent, so it is early only from ``grace_s`` after that.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._requests: dict[tuple[str, str], float] = {}
        self._endpoints: dict[str, list[tuple[float, float]]] = {}

    def close(self, endpoint: str, identity: str, *, now: float, not_before: float) -> None:
        self._requests[endpoint, identity] = not_before
        self._endpoints.setdefault(endpoint, []).append((now, not_before))

    def judge(self, endpoint: str, identity: str, now: float) -> tuple[Literal["", "request", "endpoint"], float]:
        """``early`` and ``in_gate_s`` of a request that comes now."""
        gates = self._endpoints.get(endpoint, [])
        gates[:] = [gate for gate in gates if gate[1] > now]
        in_gate_s = round(max([0.0, *(now - refused for refused, _ in gates)]), 4)
        if now < self._requests.get((endpoint, identity), 0.0):
            return "request", in_gate_s
        return ("endpoint" if in_gate_s > self._grace_s else ""), in_gate_s


class LedgerFile:
    """Appends calls to a file, each with one write, so that a killed server leaves whole lines."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, call: ServedCall) -> None:
        row = {name: getattr(call, name) for name in ServedCall.__slots__}
        os.write(self._descriptor, json.dumps(row).encode() + b"\n")

    def close(self) -> None:
        os.close(self._descriptor)


def read_ledger(path: Path) -> list[ServedCall]:
    """All calls of a ledger, in order of arrival.

    Raises:
        IntegrityError: a line is not what this module writes.
    """
    calls = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                calls.append(ServedCall(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise IntegrityError(f"line {number} of {path} is no line of a fault server's ledger: {line[:80]!r}") from error
    return sorted(calls, key=lambda call: call.number)


def summary(calls: Iterable[ServedCall]) -> dict[str, Any]:
    """Counts over a ledger: calls by fault and status, tokens billed, who came early, most under way."""
    calls = list(calls)
    return {
        "num_calls": len(calls),
        "num_requests": len({call.identity for call in calls}),
        "faults": dict(sorted(Counter(call.fault for call in calls if call.fault).items())),
        "statuses": dict(sorted(Counter(str(call.status) for call in calls).items())),
        "prompt_tokens": sum(call.prompt_tokens for call in calls),
        "completion_tokens": sum(call.completion_tokens for call in calls),
        "num_refused_with_wait": sum(call.not_before > 0 for call in calls),
        "early": {kind: sum(call.early == kind for call in calls) for kind in ("request", "endpoint")},
        "max_in_gate_s": round(max((call.in_gate_s for call in calls), default=0.0), 3),
        "max_under_way": max((call.under_way for call in calls), default=0),
        "seconds": round(max((c.time for c in calls), default=0.0) - min((c.time for c in calls), default=0.0), 3),
    }
