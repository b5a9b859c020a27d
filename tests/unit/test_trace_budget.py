"""Budgets: reserved before sending, settled from usage, never overspent, remembered over restarts."""

from __future__ import annotations

import hashlib
import random
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest

from stillhouse.pipeline.errors import BudgetReached
from stillhouse.pipeline.records import Trace
from stillhouse.pipeline.trace_store.budget import Account, Budget, Prices, Reservation, Usage
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.totals import Totals
from stillhouse.pipeline.trace_store.writer import Intent, TraceWriter

PRICES = Prices(dollars_per_million_input=1_000_000.0, dollars_per_million_output=2_000_000.0)  # $1 and $2 a token


def parse(request: bytes, raw: bytes) -> Trace:
    prompt_tokens, completion_tokens, counted = map(int, raw.split())
    return Trace(
        *(request.decode(), "p", "teacher", "rev", "prompt", "text", None, "text", "stop", prompt_tokens, completion_tokens),
        *(0.6, 0.95, 100, 0, 7, 1.5),
        usage_counted=bool(counted),
    )


def intent(number: int) -> Intent:
    """Reserves 10 + 20 tokens, $50."""
    key = hashlib.sha256(str(number).encode()).hexdigest()
    return Intent(key, f"p{number}", key.encode(), 10, 20)


def open_writer(folder: Path, **caps) -> TraceWriter:
    return TraceWriter(TraceStore(folder / "store"), folder / "spool", parse=parse, prices=PRICES, budget=Budget(**caps))


def begin(writer: TraceWriter, *numbers: int) -> list[int]:
    return writer.begin([intent(number) for number in numbers]).result()


def test_a_cap_in_dollars_says_what_is_spent_and_what_was_asked_for(tmp_path):
    """Whoever hits a cap has to see from the message alone how far the money went and what to change."""
    with open_writer(tmp_path, max_dollars=150.0) as writer:
        first, _second = begin(writer, 1, 2)
        writer.answered(first, b"5 10 1").result()
        begin(writer, 3)
        with pytest.raises(BudgetReached) as caught:
            begin(writer, 4)
    assert str(caught.value) == (
        "the budget of $150.0000 is reached: $25.0000 spent, $0.0000 reserved by calls whose cost is not known, "
        "$100.0000 reserved by 2 calls under way; the next call would reserve $50.0000 and did not go out. "
        "Raise the cap to go on; everything answered is kept."
    )


def test_a_cap_in_tokens_counts_prompt_and_completion(tmp_path):
    """A cap that forgot prompts would be overspent by every long problem."""
    with open_writer(tmp_path, max_tokens=60) as writer:
        begin(writer, 1, 2)
        with pytest.raises(BudgetReached, match=r"60 tokens is reached: 0 used.*60 reserved by 2 calls.*would reserve 30"):
            begin(writer, 3)


def test_a_cap_in_hours_is_kept_over_restarts(tmp_path):
    """A run that is started again must not get its hours afresh."""
    with open_writer(tmp_path) as writer:
        begin(writer, 1)
    before = TraceStore(tmp_path / "store").totals().seconds
    assert before > 0
    with open_writer(tmp_path, max_hours=before / 3600) as writer:
        assert writer.totals().seconds > before
        with pytest.raises(BudgetReached, match="hours is reached"):
            begin(writer, 2)


def test_a_refused_call_does_not_take_others_of_its_transaction_down(tmp_path):
    """At the cap many callers ask at once: those that still fit go out, and nobody's answer is lost."""
    with open_writer(tmp_path, max_dollars=100.0) as writer:
        futures: list[Future[list[int]]] = [writer.begin([intent(n)]) for n in range(10)]
        errors = [future.exception() for future in futures]
        assert [error is None for error in errors] == [True, True] + [False] * 8
        assert all(isinstance(error, BudgetReached) for error in errors[2:])
        with pytest.raises(BudgetReached, match="the next 2 calls"):
            begin(writer, 98, 99)
        assert writer.in_flight == 2


def test_what_counts_against_the_cap(tmp_path):
    """Settled calls by usage, unbilled ones not at all, and whatever nobody knows by its reservation."""
    with open_writer(tmp_path, max_dollars=1000.0) as writer:
        used, unbilled, broken, uncounted, unreadable, _under_way = begin(writer, *range(6))
        writer.answered(used, b"5 10 1").result()
        writer.failed(unbilled, error="429", status=429, billed="no").result()
        writer.failed(broken, error="reset", status=None, billed="unknown").result()
        writer.answered(uncounted, b"1 1 0").result()
        with pytest.raises(ValueError):
            writer.answered(unreadable, b"?").result()
        totals, spent = writer.totals(), writer.spent()
        assert (totals.dollars, totals.prompt_tokens, totals.completion_tokens) == (25.0, 5, 10)
        assert (totals.dollars_lost, totals.tokens_lost) == (150.0, 90)
        assert (spent.dollars, spent.tokens) == (25.0 + 150.0 + 50.0, 15 + 90 + 30)
        assert (totals.num_calls, totals.num_answered, totals.num_failed, writer.in_flight) == (5, 2, 3, 1)
    with open_writer(tmp_path, max_dollars=225.0 + 49.0) as writer:  # the call under way was lost with its reservation
        assert writer.spent().dollars == 225.0
        with pytest.raises(BudgetReached):
            begin(writer, 7)
    with open_writer(tmp_path, max_dollars=225.0 + 50.0) as writer:
        begin(writer, 7)


def test_64_workers_never_go_beyond_their_cap(tmp_path):
    """Reservations that raced each other would let a run spend more than it was allowed to."""
    billed = [0] * 64

    def work(worker: int, writer: TraceWriter) -> None:
        rng = random.Random(worker)
        number = 1000 * worker
        while True:
            number += 1
            try:
                (call,) = begin(writer, number)
            except BudgetReached:
                return
            prompt_tokens, completion_tokens = rng.randint(0, 10), rng.randint(0, 20)
            fate = rng.random()
            if fate < 0.7:
                billed[worker] += prompt_tokens + completion_tokens
                writer.answered(call, f"{prompt_tokens} {completion_tokens} 1".encode()).result()
            elif fate < 0.9:
                billed[worker] += prompt_tokens + completion_tokens
                writer.failed(call, error="reset", status=None, billed="unknown").result()
            else:
                writer.failed(call, error="429", status=429, billed="no").result()

    cap = 20_000
    with open_writer(tmp_path, max_tokens=cap) as writer:
        threads = [threading.Thread(target=work, args=(worker, writer)) for worker in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(billed) <= writer.spent().tokens <= cap
        assert writer.spent().tokens > cap - 30, "workers gave up although another call still fitted"


def test_reservations_taken_and_given_back_leave_nothing():
    """Rounding that adds up over a million calls would eat a budget, or stretch it."""
    account = Account(Totals(), prices=Prices(0.1, 0.7), budget=Budget(max_dollars=1.0))
    rng = random.Random(5)
    held = []
    for _ in range(20_000):
        reservation = Reservation(rng.randint(0, 99), rng.randint(0, 99), 0.0)
        account.reserve([reservation])
        held.append(reservation)
        if len(held) > 50:
            account.settle(held.pop(rng.randrange(50)), "failed", Usage(0, 0, 0.0))
    for reservation in held:
        account.settle(reservation, "failed", Usage(0, 0, 0.0))
    assert (account.spent().dollars, account.spent().tokens, account.in_flight) == (0.0, 0, 0)


def test_totals_come_back_from_a_commit_file():
    """Totals written by one version are read by the next; a count that was not kept then is 0, not an error."""
    totals = Totals(7, 4, 2, 1, 1, 100, 200, 1.5, 30, 0.25, 12.5)
    assert Totals.from_json(totals.to_json()) == totals
    assert totals + totals == Totals(14, 8, 4, 2, 2, 200, 400, 3.0, 60, 0.5, 25.0)
    assert Totals.from_json({"num_calls": 3, "of_a_later_version": 1}) == Totals(num_calls=3)
    with pytest.raises(ValueError, match="need a number as dollars, got '1'"):
        Totals.from_json({"dollars": "1"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Budget(max_dollars=-1.0),
        lambda: Budget(max_hours=float("nan")),
        lambda: Prices(-1.0),
        lambda: Prices(float("nan")),
    ],
)
def test_caps_and_prices_that_are_no_amounts_are_refused(make):
    """A cap of NaN compares as never reached."""
    with pytest.raises(ValueError, match=">= 0"):
        make()
