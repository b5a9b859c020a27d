"""What calls may cost: caps in money, tokens and hours, kept by reserving before sending and settling from usage.

A call reserves the most that it can cost before it goes out. Its reservation is given back when its answer says what it
used. Where nobody knows (a call lost in a crash, a broken connection, an answer without usage) the reservation stays
spent, so that a cap holds whatever the vendor billed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stillhouse.pipeline.errors import BudgetReached
from stillhouse.pipeline.trace_store.totals import Totals


@dataclass(frozen=True, slots=True)
class Prices:
    """What a teacher's tokens cost; zero for one that runs on our own machines."""

    dollars_per_million_input: float = 0.0
    dollars_per_million_output: float = 0.0

    def __post_init__(self) -> None:
        if not (self.dollars_per_million_input >= 0 and self.dollars_per_million_output >= 0):
            raise ValueError(f"prices need dollars >= 0 for a million tokens; got {self}")

    def dollars(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What these tokens cost, to twelve digits: a number that comes back from text as it was."""
        cost = prompt_tokens * self.dollars_per_million_input + completion_tokens * self.dollars_per_million_output
        return float(f"{cost / 1_000_000:.12g}")


@dataclass(frozen=True, slots=True)
class Budget:
    """Caps over the whole life of a writer, restarts included; None is no cap.

    Args:
        max_dollars: money.
        max_tokens: prompt and completion tokens together.
        max_hours: wall time that the writer is open.
    """

    max_dollars: float | None = None
    max_tokens: int | None = None
    max_hours: float | None = None

    def __post_init__(self) -> None:
        caps = (self.max_dollars, self.max_tokens, self.max_hours)
        if not all(cap is None or cap >= 0 for cap in caps):
            raise ValueError(f"a budget's caps need to be >= 0 or None; got {self}")


FREE = Prices()
UNLIMITED = Budget()


@dataclass(frozen=True, slots=True)
class Spent:
    """What counts against the caps now: used, reserved by calls whose usage is not known, reserved by calls under way."""

    dollars: float
    tokens: int
    hours: float


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer says that it used."""

    prompt_tokens: int
    completion_tokens: int
    dollars: float


@dataclass(frozen=True, slots=True)
class Reservation:
    """The most that one call can cost."""

    prompt_tokens: int
    completion_tokens: int
    dollars: float


class Account:
    """Adds up one writer's calls and refuses those that could go beyond the budget.

    One thread reserves and settles; any thread may read.

    Args:
        totals: what earlier processes of this writer came to.
    """

    def __init__(self, totals: Totals, *, prices: Prices, budget: Budget):
        self._prices = prices
        self._budget = budget
        self._counts: dict[str, Any] = totals.to_json()
        self._opened_at = time.monotonic()
        self._seconds_before = totals.seconds
        # Integers, so that a million reservations taken and given back leave exactly nothing.
        self._held_prompt_tokens = 0
        self._held_completion_tokens = 0
        self.in_flight = 0
        self._lock = threading.Lock()

    def reserve(self, reservations: Iterable[Reservation]) -> None:
        """Hold what these calls can cost at most, or nothing at all.

        Raises:
            BudgetReached: the calls could go beyond a cap; the message says which and by what.
        """
        wanted = list(reservations)
        prompt_tokens = sum(r.prompt_tokens for r in wanted)
        completion_tokens = sum(r.completion_tokens for r in wanted)
        with self._lock:
            self._refuse_beyond_caps(prompt_tokens, completion_tokens, len(wanted))
            self._held_prompt_tokens += prompt_tokens
            self._held_completion_tokens += completion_tokens
            self.in_flight += len(wanted)

    def settle(self, reservation: Reservation, kind: str, usage: Usage | None) -> None:
        """A call under way has ended.

        Args:
            kind: ``answered``, ``failed``, ``lost``, or ``truncated`` (a failed one whose beginning is kept).
            usage: what it used; None where nobody knows, then its reservation stays spent.
        """
        with self._lock:
            self._held_prompt_tokens -= reservation.prompt_tokens
            self._held_completion_tokens -= reservation.completion_tokens
            self.in_flight -= 1
            self._count(reservation, kind, usage)

    def settle_unheld(self, reservation: Reservation, kind: str, usage: Usage | None) -> None:
        """A call of an earlier process has ended; this process held nothing for it."""
        with self._lock:
            self._count(reservation, kind, usage)

    def _count(self, reservation: Reservation, kind: str, usage: Usage | None) -> None:
        counts = self._counts
        counts["num_calls"] += 1
        counts["num_failed" if kind == "truncated" else f"num_{kind}"] += 1
        counts["num_truncated"] += kind == "truncated"
        if usage is None:
            counts["tokens_lost"] += reservation.prompt_tokens + reservation.completion_tokens
            counts["dollars_lost"] += reservation.dollars
        else:
            counts["prompt_tokens"] += usage.prompt_tokens
            counts["completion_tokens"] += usage.completion_tokens
            counts["dollars"] += usage.dollars

    def totals(self) -> Totals:
        """Everything whose end is known."""
        with self._lock:
            return Totals.from_json({**self._counts, "seconds": self._seconds()})

    def spent(self) -> Spent:
        """What counts against the caps."""
        with self._lock:
            return self._spent()

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._opened_at

    def _spent(self) -> Spent:
        counts = self._counts
        held = self._held_prompt_tokens + self._held_completion_tokens
        held_dollars = self._prices.dollars(self._held_prompt_tokens, self._held_completion_tokens)
        return Spent(
            dollars=counts["dollars"] + counts["dollars_lost"] + held_dollars,
            tokens=counts["prompt_tokens"] + counts["completion_tokens"] + counts["tokens_lost"] + held,
            hours=self._seconds() / 3600,
        )

    def _refuse_beyond_caps(self, prompt_tokens: int, completion_tokens: int, num_calls: int) -> None:
        budget, counts = self._budget, self._counts
        if budget == UNLIMITED:
            return
        spent = self._spent()
        what = "the next call" if num_calls == 1 else f"the next {num_calls:,} calls"
        if budget.max_hours is not None and spent.hours >= budget.max_hours:
            raise BudgetReached(
                f"the budget of {budget.max_hours:g} hours is reached: writers of this run were open for {spent.hours:.3f}; "
                f"{what} did not go out. Raise the cap to go on; everything answered is kept."
            )
        tokens = prompt_tokens + completion_tokens
        if budget.max_tokens is not None and spent.tokens + tokens > budget.max_tokens:
            raise BudgetReached(
                f"the budget of {budget.max_tokens:,} tokens is reached: "
                f"{counts['prompt_tokens'] + counts['completion_tokens']:,} used, "
                f"{counts['tokens_lost']:,} reserved by calls whose usage is not known, "
                f"{self._held_prompt_tokens + self._held_completion_tokens:,} reserved by "
                f"{self.in_flight:,} calls under way; {what} would reserve {tokens:,} and did not go out. "
                "Raise the cap to go on; everything answered is kept."
            )
        dollars = self._prices.dollars(prompt_tokens, completion_tokens)
        if budget.max_dollars is not None and spent.dollars + dollars > budget.max_dollars:
            held = spent.dollars - counts["dollars"] - counts["dollars_lost"]
            raise BudgetReached(
                f"the budget of ${budget.max_dollars:,.4f} is reached: ${counts['dollars']:,.4f} spent, "
                f"${counts['dollars_lost']:,.4f} reserved by calls whose cost is not known, ${held:,.4f} reserved by "
                f"{self.in_flight:,} calls under way; {what} would reserve ${dollars:,.4f} and did not go out. "
                "Raise the cap to go on; everything answered is kept."
            )
