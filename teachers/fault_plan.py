"""Which request meets which fault: the plan of a fault server, fixed by its seed.

A plan is a pure function of (seed, identity of the request, attempt), where the identity is a hash of all that the request
asks for and the attempt counts how often the server has seen that identity. The order in which requests arrive is no part of
it, so a run with hundreds in flight meets the same faults each time, and what a correct client has to do can be computed
beforehand.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to break an answer.

    Args:
        status: what the client reads; None where it reads nothing.
        generates: the answer was written before it broke, so a vendor bills it.
        delivers: a whole answer reaches the client, odd as it may be.
        stream_only: means nothing for an answer in one piece.
    """

    name: str
    what: str
    status: int | None
    generates: bool = False
    delivers: bool = False
    stream_only: bool = False


_ALL = (
    Fault("status_408", "request time-out", 408),
    Fault("status_409", "conflict", 409),
    Fault("status_429_seconds", "too many requests, Retry-After in seconds", 429),
    Fault("status_429_date", "too many requests, Retry-After as an HTTP date", 429),
    Fault("status_429_bare", "too many requests, no word about when to come back", 429),
    Fault("status_500", "internal error", 500),
    Fault("status_502", "bad gateway, with a proxy's HTML page", 502),
    Fault("status_503", "overloaded", 503),
    Fault("status_504", "gateway time-out, with a proxy's HTML page", 504),
    Fault("reset", "RST before a byte of the answer", None),
    Fault("reset_midway", "RST within the body", 200, generates=True),
    Fault("stall", "no byte for stall_s seconds, then the connection closes", None, generates=True),
    Fault("slow_body", "the whole answer, dribbled over slow_s seconds", 200, generates=True, delivers=True),
    Fault("truncated_stream", "events that end without finish_reason and [DONE]", 200, generates=True, stream_only=True),
    Fault("truncated_body", "a body that closes before its announced end", 200, generates=True),
    Fault("null_content", "content is null, all text stands in the reasoning", 200, generates=True, delivers=True),
    Fault("missing_usage", "no token counts", 200, generates=True, delivers=True),
    Fault("wrong_json", "JSON that is no chat completion, or no JSON", 200),
    Fault("html_200", "a proxy's HTML page with status 200", 200),
    Fault("duplicate_id", "the response id of an earlier answer", 200, generates=True, delivers=True),
    Fault("empty_choices", "a chat completion without a choice", 200),
    Fault("unauthorized", "401 that repeats the key; only where it is named", 401),
)
FAULTS: Mapping[str, Fault] = types.MappingProxyType({fault.name: fault for fault in _ALL})
DEFAULT_WEIGHTS: Mapping[str, float] = types.MappingProxyType({name: 1.0 for name in FAULTS if name != "unauthorized"})

_HOW_NOT_WHAT = frozenset({"stream", "stream_options"})


def request_identity(body: Mapping[str, Any]) -> str:
    """Name a request by what it asks for: 32 hex digits over model, messages, seed and sampling.

    Streamed or whole is how the answer travels, so a request asked both ways has one identity.
    """
    asked = {name: value for name, value in body.items() if name not in _HOW_NOT_WHAT}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


def parse_faults(text: str) -> dict[str, float]:
    """Read ``name,name:weight,…`` as weights; a name without one counts 1.

    Raises:
        ValueError: a weight is no number.
    """
    weights = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, weight = part.partition(":")
        try:
            weights[name] = float(weight) if weight else 1.0
        except ValueError as error:
            raise ValueError(f"the fault {part!r} should read name or name:weight with a number, such as reset:0.5") from error
    return weights


@dataclass(frozen=True)
class FaultPlan:
    """A seeded share of requests that meet a fault, and how bad each is.

    Args:
        rate: share of requests that meet a fault, 0 to 1.
        weights: faults by name with their relative frequency; a stream-only fault is left out where the answer is whole.
        retry_after_s: shortest and longest wait that a 429 asks for. A wait of a second and more is rounded up to whole
            seconds, as RFC 9110 has it, a shorter one is sent as a fraction; a date always names a whole second.
        stall_s: how long ``stall`` sends nothing.
        slow_s: how long ``slow_body`` takes.

    Raises:
        ValueError: a fault that does not exist, or a number out of its range.
    """

    seed: int = 0
    rate: float = 0.2
    weights: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    retry_after_s: tuple[float, float] = (1.0, 3.0)
    stall_s: float = 30.0
    slow_s: float = 5.0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.weights) - set(FAULTS)):
            raise ValueError(f"there is no fault {', '.join(unknown)}; there are {', '.join(FAULTS)}")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"the fault rate is a share from 0 to 1, not {self.rate}")
        if min(self.weights.values(), default=1) <= 0 or (self.rate and all(FAULTS[f].stream_only for f in self.weights)):
            raise ValueError(f"faults need weights above 0 and one that also breaks whole answers; got {dict(self.weights)}")
        low, high = self.retry_after_s
        if not 0 <= low <= high or self.stall_s < 0 or self.slow_s < 0:
            raise ValueError(
                f"waits cannot be negative or end before they start; got retry_after_s={self.retry_after_s}, "
                f"stall_s={self.stall_s}, slow_s={self.slow_s}"
            )

    def fault(self, identity: str, attempt: int, *, stream: bool = False) -> Fault | None:
        """What the given attempt (0 is the first) at a request meets; None answers it well."""
        if self.draw("whether", identity, attempt) >= self.rate:
            return None
        candidates = [(FAULTS[name], weight) for name, weight in self.weights.items() if stream or not FAULTS[name].stream_only]
        left = self.draw("which", identity, attempt) * sum(weight for _, weight in candidates)
        for fault, weight in candidates:
            left -= weight
            if left < 0:
                return fault
        return candidates[-1][0]  # the sum was rounded

    def wait_s(self, identity: str, attempt: int) -> float:
        """Seconds that a 429 of this attempt asks for."""
        low, high = self.retry_after_s
        return low + (high - low) * self.draw("wait", identity, attempt)

    def draw(self, what: str, identity: str, attempt: int) -> float:
        """A number in [0, 1), uniform over seeds and requests, for one decision about one attempt."""
        digest = hashlib.blake2b(f"{self.seed} {what} {identity} {attempt}".encode(), digest_size=7).digest()
        return (int.from_bytes(digest, "big") >> 3) / 2**53
