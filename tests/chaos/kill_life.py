"""One life of a writing process: forked warm, opens the spool and the store, asks, acknowledges, and is killed.

It tells the witness at the other end of a pipe what has happened, one line each, written with one ``os.write`` after the
fact, so that nothing is lost with the process:

    R              the writer is open
    S index        resuming: this planned key is there already
    B index        begin() is durable: from here the call counts
    A index sha    answered() is durable: from here the trace must never be lost, and this is its text
    P sha          a stream was cut: from here what it had delivered must never be lost
    F              failed() is durable
    D place when   a durable operation of this place is where the process dies now
    N place        a durable operation of this place was seen for the first time
    C              closed cleanly
    X text         something that must not happen
"""

from __future__ import annotations

import asyncio
import faulthandler
import hashlib
import os
import random
import signal
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.pipeline.trace_store.budget import Prices
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.writer import TraceWriter
from tests.chaos.failpoints import When, watch
from tests.chaos.synthetic import RESERVED_TOKENS, make_answer, make_intent, make_text, parse_answer, planned_key

PRICES = Prices(dollars_per_million_input=3.0, dollars_per_million_output=15.0)
NUM_WORKERS = 48
LARGEST_GROUP = 6
MOST_IN_FLIGHT = NUM_WORKERS * LARGEST_GROUP
OPENING = "opening: "


@dataclass(frozen=True)
class Death:
    """Where a life ends: at the ``number``-th durable operation whose place begins with ``place``, before or after it.

    Places of what happens while the writer is opened begin with OPENING. ``number=0``: nowhere by itself; the witness may
    still kill it.
    """

    place: str = ""
    number: int = 0
    when: When = "before"


@dataclass(frozen=True)
class LifePlan:
    """What one life is to do: which planned indices, from where, how much of it, and where it dies."""

    store: str
    spool: Path
    plan: str
    life: int
    indices: tuple[int, ...]
    quota: int
    death: Death
    shard_bytes: int
    known_places: frozenset[str]
    acknowledged: tuple[int, ...]
    """Some indices that were acknowledged in earlier lives: the writer must know them."""
    threads: bool = False


def live(plan: LifePlan, pipe: int) -> None:
    """Run the life in this process; does not return."""

    def tell(line: str) -> None:
        os.write(pipe, f"{line}\n".encode())

    faulthandler.dump_traceback_later(180, exit=True)
    reaper = _Reaper(plan, tell)
    watch(reaper.observe, object_store="://" in plan.store)
    code = 0
    try:
        _work(plan, tell, reaper)
        tell("C")
    except BaseException:
        traceback.print_exc()
        tell(f"X {traceback.format_exc(limit=-3)!r}")
        code = 1
    finally:
        sys.stderr.flush()
        os._exit(code)


class _Reaper:
    """Ends the process at the operation that its plan names."""

    def __init__(self, plan: LifePlan, tell: Callable[[str], None]):
        self._death, self._tell = plan.death, tell
        self._seen = set(plan.known_places)
        self._num_visits: Counter[When] = Counter()
        self._lock = threading.Lock()
        self.phase = OPENING

    def observe(self, place: str, when: When) -> None:
        place = self.phase + place
        with self._lock:
            if place not in self._seen:
                self._seen.add(place)
                self._tell(f"N {place}")
            if not place.startswith(self._death.place):
                return
            self._num_visits[when] += 1
            if when == self._death.when and self._num_visits[when] == self._death.number:
                self._tell(f"D {place} {when}")
                os.kill(os.getpid(), signal.SIGKILL)


def _work(plan: LifePlan, tell: Callable[[str], None], reaper: _Reaper) -> None:
    writer = TraceWriter(
        TraceStore(plan.store), plan.spool, parse=parse_answer, prices=PRICES, shard_bytes=plan.shard_bytes, seal_after_s=0.25
    )
    reaper.phase = ""
    tell("R")
    known = writer.keys()
    lost = [index for index in plan.acknowledged if planned_key(plan.plan, index) not in known]
    if lost:
        raise AssertionError(f"acknowledged and gone: indices {lost[:5]} and {len(lost)} in all")
    waiting: deque[int] = deque()
    for index in plan.indices:
        if planned_key(plan.plan, index) in known:
            tell(f"S {index}")
        elif len(waiting) < plan.quota:
            waiting.append(index)
    (_ask_from_threads if plan.threads else _ask_from_asyncio)(_Vendor(plan, writer, waiting, tell))
    writer.close()


class _Vendor:
    """The calls of one life, one group at a time; ``steps`` is the same program for threads and for asyncio."""

    def __init__(self, plan: LifePlan, writer: TraceWriter, waiting: deque[int], tell: Callable[[str], None]):
        self.plan, self.writer, self.waiting, self.tell = plan, writer, waiting, tell

    def steps(self, worker: int) -> Any:
        """Yields futures and seconds to wait for; is sent the futures' results."""
        draw = random.Random(f"{self.plan.plan}/{self.plan.life}/{worker}")
        while self.waiting:
            group = [self.waiting.popleft() for _ in range(min(len(self.waiting), draw.randint(1, LARGEST_GROUP)))]
            intents = [make_intent(planned_key(self.plan.plan, index)) for index in group]
            calls = yield self.writer.begin(intents)
            for index in group:
                self.tell(f"B {index}")
            yield draw.random() * 0.004
            if draw.random() < 0.3:
                traces = yield self.writer.answered_many(
                    [(call, self._answer(index, draw)) for call, index in zip(calls, group)]
                )
                for index, trace in zip(group, traces):
                    self._acknowledge(index, trace)
                continue
            for call, index in zip(calls, group):
                yield from self._settle(call, index, draw)

    def _settle(self, call: int, index: int, draw: random.Random) -> Any:
        kind = draw.random()
        if kind < 0.92:
            trace = yield self.writer.answered(call, self._answer(index, draw))
            self._acknowledge(index, trace)
            return
        if kind < 0.94:
            unread = yield _Unreadable(self.writer.answered(call, b"<html>no answer</html>"))
            assert isinstance(unread, ValueError), f"an answer that is none came back as {unread!r}"
        elif kind < 0.97:
            yield self.writer.failed(call, error="refused", status=503, billed="no")
        else:
            text = self._text(index, draw)
            partial = make_answer(text, 100, 50)
            yield self.writer.failed(call, error="cut off", status=None, billed="unknown", partial=partial)
            self.tell(f"P {_sha(text)}")
        self.tell("F")
        self.waiting.append(index)

    def _text(self, index: int, draw: random.Random) -> str:
        # No two calls get the same text: what is in the store must be what was acknowledged, not another call's answer.
        return make_text(f"{index}/{self.plan.life}/{draw.getrandbits(32):08x}")

    def _answer(self, index: int, draw: random.Random) -> bytes:
        return make_answer(self._text(index, draw), draw.randint(1, RESERVED_TOKENS), draw.randint(1, RESERVED_TOKENS))

    def _acknowledge(self, index: int, trace: Any) -> None:
        assert trace.key == planned_key(self.plan.plan, index)
        self.tell(f"A {index} {_sha(trace.completion)}")


@dataclass(frozen=True)
class _Unreadable:
    """A future that has to end with ValueError, which is handed back."""

    future: Future[Any]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _ask_from_asyncio(vendor: _Vendor) -> None:
    async def worker(number: int) -> None:
        program, result = vendor.steps(number), None
        while True:
            try:
                wanted = program.send(result)
            except StopIteration:
                return
            if isinstance(wanted, float):
                result = await asyncio.sleep(wanted)
            elif isinstance(wanted, _Unreadable):
                (result,) = await asyncio.gather(asyncio.wrap_future(wanted.future), return_exceptions=True)
            else:
                result = await asyncio.wrap_future(wanted)

    async def everyone() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(NUM_WORKERS):
                group.create_task(worker(number))

    asyncio.run(everyone())


def _ask_from_threads(vendor: _Vendor) -> None:
    failures: list[BaseException] = []

    def worker(number: int) -> None:
        program, result = vendor.steps(number), None
        try:
            while True:
                try:
                    wanted = program.send(result)
                except StopIteration:
                    return
                if isinstance(wanted, float):
                    result = threading.Event().wait(wanted)
                elif isinstance(wanted, _Unreadable):
                    result = wanted.future.exception(60)
                else:
                    result = wanted.result(60)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(NUM_WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
