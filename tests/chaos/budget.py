"""64 workers share one budget and their process is killed 20 times: the vendor's own books never show more than the cap.

    python -m tests.chaos.budget --kills 20 --calls 12000

Three caps after one another: dollars, tokens, hours. The vendor is a process of its own that bills what it likes up to each
call's reservation, bills callers that were killed too, and cuts off or refuses some. The witness (this process) reads the
vendor's bills as they are made, kills the driver, and starts it again over the same spool until the cap stops it. Prints one
JSON object; exit code 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import json
import os
import random
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stillhouse.pipeline.errors import BudgetReached
from stillhouse.pipeline.trace_store.budget import Budget, Prices
from stillhouse.pipeline.trace_store.checks import verify_store
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.writer import TraceWriter
from tests.chaos.forking import in_a_child
from tests.chaos.synthetic import make_intent, parse_answer, planned_key
from tests.chaos.vendor import REFUSED, serve_vendor

PRICES = Prices(dollars_per_million_input=3.0, dollars_per_million_output=15.0)
SMALLEST, LARGEST = 100, 600
MEAN_TOKENS = 2 * (SMALLEST + LARGEST) / 4
MEAN_DOLLARS = PRICES.dollars(1, 1) * MEAN_TOKENS / 2
NUM_WORKERS = 64
HANGS_AFTER_S = 120.0


def drive(folder: Path, port: int, budget: Budget, opened: int) -> None:
    """The driver's life: 64 workers ask the vendor until the budget refuses; ends the process."""
    faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
    code = 0
    try:
        writer = TraceWriter(
            TraceStore(folder / "store"), folder / "spool", parse=parse_answer, prices=PRICES, budget=budget,
            shard_bytes=300_000, seal_after_s=0.5,
        )  # fmt: skip
        os.write(opened, b"opened")
        asyncio.run(_drive_all(writer, port))
        writer.close()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        code = 1
    finally:
        os._exit(code)


async def _drive_all(writer: TraceWriter, port: int) -> None:
    async with asyncio.TaskGroup() as group:
        for number in range(NUM_WORKERS):
            group.create_task(_work(writer, port, random.Random(f"{os.getpid()}/{number}/{time.monotonic_ns()}")))


async def _work(writer: TraceWriter, port: int, draw: random.Random) -> None:
    vendor = await asyncio.open_connection("127.0.0.1", port)
    while True:
        prompt, completion = draw.randint(SMALLEST, LARGEST), draw.randint(SMALLEST, LARGEST)
        intent = make_intent(planned_key("budget", draw.getrandbits(64)), prompt, completion)
        try:
            (call,) = await asyncio.wrap_future(writer.begin([intent]))
        except BudgetReached:
            if not writer.in_flight:
                return
            await asyncio.sleep(0.005)  # a call that settles gives back what it did not use
            continue
        vendor[1].write(f"{call} {prompt} {completion}\n".encode())
        raw = await vendor[0].readline()
        if raw == REFUSED:
            await asyncio.wrap_future(writer.failed(call, error="refused", status=429, billed="no"))
        elif not raw.endswith(b"\n"):
            await asyncio.wrap_future(writer.failed(call, error="cut off", status=None, billed="unknown"))
            vendor = await asyncio.open_connection("127.0.0.1", port)
        else:
            await asyncio.wrap_future(writer.answered(call, raw))


@dataclass
class Books:
    """What the witness saw: the vendor's bills and the driver's hours."""

    cap: float
    unit: str
    bills: dict[int, tuple[int, int]] = field(default_factory=dict)
    billed: float = 0.0
    open_s: float = 0.0
    last_bill_at_s: float = 0.0
    """Of the time that the driver was open."""
    num_kills: int = 0
    violations: list[str] = field(default_factory=list)
    rest: bytes = b""

    def read(self, bills: int) -> None:
        *lines, self.rest = (self.rest + os.read(bills, 1 << 16)).split(b"\n")
        for line in lines:
            self.hear(line)

    @property
    def progress(self) -> float:
        """How far the cap is used up, in its unit."""
        return self.open_s / 3600 if self.unit == "hours" else self.billed

    def hear(self, line: bytes) -> None:
        call, prompt, completion = map(int, line.split())
        if call in self.bills:
            self.violations.append(f"call id {call} was sent twice")
        self.bills[call] = prompt, completion
        self.last_bill_at_s = self.open_s
        self.billed += PRICES.dollars(prompt, completion) if self.unit == "dollars" else prompt + completion
        if self.unit != "hours" and self.billed > self.cap and not self.violations:
            self.violations.append(f"the vendor has billed {self.billed} {self.unit}, the cap is {self.cap}")


@contextmanager
def running_vendor() -> Any:
    """The vendor in a process of its own; gives its port and the descriptor of its bills."""
    reading, writing = os.pipe()
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        serve_vendor(listening, writing)
    port = listening.getsockname()[1]
    listening.close()
    os.close(writing)
    try:
        yield port, reading
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)


def run_cap(unit: str, cap: float, num_kills: int, folder: Path, seed: int) -> dict[str, Any]:
    """Spend one budget to its end with ``num_kills`` kills on the way."""
    budget = Budget(**{f"max_{unit}": cap if unit != "tokens" else int(cap)})
    draw, books = random.Random(f"{seed}/{unit}"), Books(cap, unit)
    folder.mkdir()
    # Each kill falls somewhere in its slice of the first 60 % of the cap: what is lost in flight takes its part of the rest.
    marks = [0.6 * cap * (number + draw.random()) / num_kills for number in range(num_kills)]
    started = time.monotonic()
    with running_vendor() as (port, bills):
        while True:
            opened, opening = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(opened)
                drive(folder, port, budget, opening)
            os.close(opening)
            status = watch_life(pid, opened, bills, books, marks, draw)
            if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
                break
            books.num_kills += 1
        if status:
            raise SystemExit(f"the driver failed (its traceback is above); its folder is {folder}")
        while select.select([bills], [], [], 0.2)[0]:
            books.read(bills)
    return in_a_child(lambda: compare(folder, books)) | {"seconds": round(time.monotonic() - started, 1)}


def watch_life(pid: int, opened: int, bills: int, books: Books, marks: list[float], draw: random.Random) -> int:
    """Read the vendor's bills until the driver has ended, by itself or killed at the next mark; returns its status."""
    born, open_since, seconds_before = time.monotonic(), None, books.open_s
    waiting = [bills, opened]
    while True:
        ready, _, _ = select.select(waiting, [], [], 0.01)
        now = time.monotonic()
        if opened in ready:
            open_since = now
            waiting.remove(opened)
            os.close(opened)
        if bills in ready:
            books.read(bills)
        books.open_s = seconds_before + (now - open_since if open_since else 0.0)
        if books.num_kills < len(marks) and open_since and books.progress >= marks[books.num_kills]:
            time.sleep(draw.random() * 0.01)
            os.kill(pid, signal.SIGKILL)
        elif now - born > 2 * HANGS_AFTER_S:
            os.kill(pid, signal.SIGKILL)
            raise SystemExit("the driver does not come to an end")
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status


def compare(folder: Path, books: Books) -> dict[str, Any]:
    """Our ledger beside the vendor's books, call by call."""
    store = TraceStore(folder / "store")
    rows, violations = {}, books.violations
    for commit in store.commits():
        for entry in commit.calls:
            with store.folder.open(entry.name) as file:
                for row in pq.read_table(file).to_pylist():
                    if row["call_id"] in rows:
                        violations.append(f"call {row['call_id']} is in the ledger twice")
                    rows[row["call_id"]] = row
    unknown = set(books.bills) - set(rows)
    if unknown:
        violations.append(f"{len(unknown)} calls were billed that the ledger does not know")
    for call in set(books.bills) & set(rows):
        row, dollars = rows[call], PRICES.dollars(*books.bills[call])
        counted = row["dollars"] if row["dollars"] is not None else row["dollars_reserved"]
        if row["state"] == "answered" and (row["prompt_tokens"], row["completion_tokens"]) != books.bills[call]:
            violations.append(f"call {call} was billed {books.bills[call]}, the ledger says {row}")
        if counted < dollars - 1e-12:
            violations.append(f"call {call} was billed {dollars} dollars and counts with {counted}")
    totals = store.totals()
    spent = {
        "dollars": totals.dollars + totals.dollars_lost,
        "tokens": totals.prompt_tokens + totals.completion_tokens + totals.tokens_lost,
        "hours": totals.seconds / 3600,
    }[books.unit]
    if books.unit != "hours":
        if spent < books.billed * (1 - 1e-12):
            violations.append(f"the ledger counts {spent} {books.unit}, the vendor billed {books.billed}")
        if spent > books.cap * (1 + 1e-12):
            violations.append(f"the ledger counts {spent} {books.unit}, the cap is {books.cap}")
    elif books.last_bill_at_s > books.cap * 3600 + 0.5 + 0.1 * books.num_kills:  # each kill hides what was not committed yet
        violations.append(f"calls went out until {books.last_bill_at_s:.1f} s, the cap is {books.cap * 3600:.1f} s")
    if spent < 0.97 * books.cap:
        violations.append(f"stopped at {spent} {books.unit}, far below the cap of {books.cap}")
    check = verify_store(folder / "store")
    if not check.sound:
        violations.append(f"verify: {check}")
    states = Counter(row["state"] for row in rows.values())
    return {
        "cap": books.cap,
        **({"last_call_at": books.last_bill_at_s / 3600} if books.unit == "hours" else {"billed_by_vendor": books.billed}),
        "spent_by_ledger": spent,
        "num_kills": books.num_kills,
        "num_workers": NUM_WORKERS,
        "num_calls_billed": len(books.bills),
        "num_calls": totals.num_calls,
        "calls_by_state": dict(states),
        "violations": violations,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills under each cap")
    parser.add_argument("--calls", type=int, default=12_000, help="about how many calls the caps in dollars and tokens pay for")
    parser.add_argument("--seconds", type=float, default=30.0, help="the cap in hours, in seconds")
    parser.add_argument("--caps", nargs="+", default=["dollars", "tokens", "hours"], choices=["dollars", "tokens", "hours"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    gc.freeze()
    caps = {"dollars": options.calls * MEAN_DOLLARS, "tokens": options.calls * MEAN_TOKENS, "hours": options.seconds / 3600}
    with tempfile.TemporaryDirectory(prefix="budget-") as folder:
        results = {unit: run_cap(unit, caps[unit], options.kills, Path(folder, unit), options.seed) for unit in options.caps}
    print(json.dumps(results, indent=2))
    return 1 if any(result["violations"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
