"""The writer's bookkeeping: what is under way, what it holds reserved, and which rows the next transaction makes durable.

Not thread-safe and without threads of its own: `stillhouse.pipeline.trace_store.writer.TraceWriter` runs it in one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stillhouse.pipeline.records import Trace
from stillhouse.pipeline.trace_store.answers import MAX_TOKENS, Parse, priced, read_answer, read_beginning
from stillhouse.pipeline.trace_store.budget import Account, Budget, Prices, Reservation, Usage
from stillhouse.pipeline.trace_store.spool import PendingSeal, Spool

State = Literal["answered", "failed", "lost", "truncated", "unreadable"]
"""How a call ended. ``truncated``: failed, its beginning is a trace. ``unreadable``: answered, and no trace came of it."""

NOTHING_USED = Usage(0, 0, 0.0)
MAX_ERROR = 2000
_KEY = re.compile(r"[0-9a-f]{64}")


def _now() -> float:
    """Seconds since 1970 to a tenth of a millisecond: fourteen digits, which come back from text as they were."""
    return round(time.time(), 4)


@dataclass(frozen=True, slots=True)
class Intent:
    """One call that is about to go out.

    Args:
        key: of the trace that it is for (`stillhouse.pipeline.records.content_key`).
        request: bytes that ``parse`` needs beside the answer; kept with the call.
        reserved_prompt_tokens, reserved_completion_tokens: the most that it can use; held against the budget.
        endpoint: whom it goes to, for the ledger.
    """

    key: str
    problem_id: str
    request: bytes
    reserved_prompt_tokens: int
    reserved_completion_tokens: int
    endpoint: str = ""

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key):
            raise ValueError(f"a call needs the key of its trace, a sha256 in 64 hexadecimal digits; got {self.key!r}")
        for tokens in (self.reserved_prompt_tokens, self.reserved_completion_tokens):
            if type(tokens) is not int or not 0 <= tokens <= MAX_TOKENS:
                raise ValueError(f"a call reserves the tokens that it can use, from 0 to {MAX_TOKENS:,}; got {tokens!r}")
        if not isinstance(self.request, bytes):
            raise ValueError(f"a call's request is bytes, got {type(self.request).__name__}")
        (self.problem_id + self.endpoint).encode()  # a lone half of a surrogate pair raises a ValueError


@dataclass(slots=True)
class _UnderWay:
    key: str
    request: bytes
    reservation: Reservation
    raw: bytes | None = None


class Ledger:
    """Calls of one spool, from their intent to their outcome.

    Opening it settles what a dead process left: answers are parsed, calls without one are lost.
    """

    def __init__(self, spool: Spool, *, parse: Parse, prices: Prices, budget: Budget):
        self.spool = spool
        self.account = Account(spool.totals, prices=prices, budget=budget)
        self._parse = parse
        self._prices = prices
        self._under_way: dict[int, _UnderWay] = {}
        self._new: dict[str, list[tuple[Any, ...]]] = {"calls": [], "answers": [], "outcomes": []}
        self._settle_leftovers()
        self.unsealed_bytes = spool.unsealed_bytes()

    def begin(self, intents: Sequence[Intent]) -> list[int]:
        """Reserve and note calls; they may go out once `commit` returned.

        Raises:
            BudgetReached: none of them was noted.
        """
        reservations = [self._reservation(intent) for intent in intents]
        self.account.reserve(reservations)
        now = _now()
        first = self.spool.next_call_id
        ids = list(range(first, first + len(intents)))
        self.spool.next_call_id += len(ids)
        for call_id, intent, held in zip(ids, intents, reservations):
            self._under_way[call_id] = _UnderWay(intent.key, intent.request, held)
            self._new["calls"].append(
                (
                    *(call_id, intent.key, intent.problem_id, intent.endpoint),
                    *(held.prompt_tokens, held.completion_tokens, held.dollars, now, intent.request),
                )
            )
        return ids

    def receive(self, items: Sequence[tuple[int, bytes]]) -> None:
        """Note raw answers; after `commit`, `settle` each.

        Raises:
            ValueError: a call is not under way, or was answered already, or an answer is not bytes; none was noted.
        """
        if not all(isinstance(raw, bytes) for _, raw in items):
            raise ValueError("an answer is given as the bytes that came")
        calls = [self._call(call_id) for call_id, _ in items]
        if len({call_id for call_id, _ in items}) < len(items):
            raise ValueError(f"a call is answered once; got {[call_id for call_id, _ in items]}")
        for call, (call_id, raw) in zip(calls, items):
            call.raw = raw
            self._new["answers"].append((call_id, raw))

    def settle(self, call_id: int) -> Trace:
        """Parse an answer that is durable. Whatever parse raises comes out, and the call counts as failed."""
        call = self._under_way.pop(call_id)
        self.unsealed_bytes += len(call.raw or b"")
        try:
            trace, usage = self._read(call.key, call.request, call.raw or b"")
        except Exception as error:
            self.account.settle(call.reservation, "failed", None)
            self._add_outcome(call_id, "unreadable", None, status=200, error=f"{type(error).__name__}: {error}")
            raise
        self.account.settle(call.reservation, "answered", usage)
        self._add_outcome(call_id, "answered", usage, status=200, dollars=trace.dollars)
        return trace

    def fail(self, call_id: int, *, error: str, status: int | None, billed: Literal["no", "unknown"], partial: bytes) -> None:
        """Note that a call ended without a whole answer.

        Raises:
            ValueError: the call is not under way, or status is no status.
        """
        if status is not None and not 0 <= status <= 999:
            raise ValueError(f"a call's status is HTTP's or None; got {status!r}")
        call = self._call(call_id)
        del self._under_way[call_id]
        state: State = "failed"
        dollars: float | None = 0.0 if billed == "no" else None
        if partial:
            self._new["answers"].append((call_id, partial))
            self.unsealed_bytes += len(partial)
            try:
                trace = read_beginning(self._parse, call.key, call.request, partial, writer=self.spool.writer, call_id=call_id)
                state, dollars = "truncated", self._price(trace)
            except Exception as unread:  # the call's own error stands; that its beginning is no use is said beside it
                error += f"; its first {len(partial)} bytes are kept as they came: {type(unread).__name__}: {unread}"
        usage = NOTHING_USED if billed == "no" else None
        self.account.settle(call.reservation, state, usage)
        self._add_outcome(call_id, state, usage, status=status, error=error, dollars=dollars)

    def lose_calls_under_way(self) -> None:
        """Nobody will hear of them any more: their reservations stay spent."""
        for call_id, call in list(self._under_way.items()):
            self.account.settle(call.reservation, "lost", None)
            self._add_outcome(call_id, "lost", None, error="under way when the writer was closed")
            del self._under_way[call_id]

    @property
    def has_news(self) -> bool:
        """True where `commit` has rows to write."""
        return any(self._new.values())

    def commit(self) -> None:
        """Make everything noted so far durable, with the counters.

        Raises:
            SpoolError: it could not be written.
        """
        with self.spool.transaction():
            for table, rows in self._new.items():
                self.spool.add(table, rows)
            self.spool.set_progress(self.account.totals())
        for rows in self._new.values():
            rows.clear()

    def begin_seal(self) -> PendingSeal | None:
        """The next seal: everything that is settled and durable."""
        assert not self.has_news
        seal = self.spool.begin_seal(self.account.totals())
        self.unsealed_bytes = 0
        return seal

    def _settle_leftovers(self) -> None:
        for call in self.spool.open_calls():
            held = Reservation(call.reserved_prompt_tokens, call.reserved_completion_tokens, call.dollars_reserved)
            if call.raw is None:
                self.account.settle_unheld(held, "lost", None)
                self._add_outcome(call.call_id, "lost", None, error="under way when its process died")
                continue
            try:
                trace, usage = self._read(call.key, call.request, call.raw)
            except Exception as error:  # kept with the call's row, as for an answer that cannot be read when it comes
                self.account.settle_unheld(held, "failed", None)
                self._add_outcome(call.call_id, "unreadable", None, status=200, error=f"{type(error).__name__}: {error}")
            else:
                self.account.settle_unheld(held, "answered", usage)
                self._add_outcome(call.call_id, "answered", usage, status=200, dollars=trace.dollars)
        if self.has_news:
            self.commit()

    def _read(self, key: str, request: bytes, raw: bytes) -> tuple[Trace, Usage | None]:
        trace = read_answer(self._parse, key, request, raw)
        dollars = self._price(trace)
        usage = Usage(trace.num_prompt_tokens, trace.num_completion_tokens, dollars) if trace.usage_counted else None
        return priced(trace, dollars), usage

    def _price(self, trace: Trace) -> float:
        return self._prices.dollars(trace.num_prompt_tokens, trace.num_completion_tokens)

    def _reservation(self, intent: Intent) -> Reservation:
        prompt_tokens, completion_tokens = intent.reserved_prompt_tokens, intent.reserved_completion_tokens
        return Reservation(prompt_tokens, completion_tokens, self._prices.dollars(prompt_tokens, completion_tokens))

    def _call(self, call_id: int) -> _UnderWay:
        call = self._under_way.get(call_id)
        if call is None or call.raw is not None:
            raise ValueError(f"call {call_id} is not under way: it was never begun here, or it has ended already")
        return call

    def _add_outcome(
        self,
        call_id: int,
        state: State,
        usage: Usage | None,
        *,
        status: int | None = None,
        error: str = "",
        dollars: float | None = None,
    ) -> None:
        self.spool.last_seq += 1
        error = error[:MAX_ERROR].encode(errors="replace").decode()
        tokens = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else (None, None)
        self._new["outcomes"].append((call_id, self.spool.last_seq, state, status, error, _now(), *tokens, dollars))
