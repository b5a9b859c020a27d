"""A client and a bad teacher API: 20 % faults, hundreds of requests in flight, and two ledgers that have to agree exactly.

    python -m tests.chaos.bad_api --calls 100000

The shipped fault server runs in a process of its own; our client asks it over several endpoints, streamed and whole, and writes
through a real TraceWriter. What each request meets is fixed by the seed, so that every attempt is known beforehand. Afterwards
the server's ledger, the sealed ledger and the stored traces are compared call by call, and against the plan. Prints one JSON
object; exit code 1 where they differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.pipeline.records import Problem, Sampling, Trace, from_table
from stillhouse.pipeline.trace_store.budget import Prices
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.totals import Totals
from stillhouse.pipeline.trace_store.writer import TraceWriter
from stillhouse.teachers.chat_response import call_context, parse_chat
from stillhouse.teachers.endpoint import ChatClient, Endpoints, TimeLimits, build_body
from stillhouse.teachers.fault_answers import SyntheticAnswers
from stillhouse.teachers.fault_ledger import ServedCall, read_ledger, summary
from stillhouse.teachers.fault_plan import FaultPlan, request_identity
from stillhouse.teachers.fault_process import RunningFaultServer, running_fault_server
from stillhouse.teachers.tracing import TraceRequest, render_for_teacher, trace_requests
from tests.chaos.both_books import Asked, compare

MODEL = "drill"
SAMPLING = Sampling(0.6, 0.95, 32_768)
PRICES = Prices(dollars_per_million_input=0.5, dollars_per_million_output=2.0)
SHAPE = "reasoning_content"
WAITS = {"retry_after_s": (0.2, 2.0), "stall_s": 1.0, "slow_s": 0.5}
"""So short that 100,000 calls take minutes."""
MEAN_CHARACTERS = 2000
NUM_ENDPOINTS = 8
MAX_ATTEMPTS = 60
"""So many that no request gives up: at 20 % faults the longest of 100,000 meets seven or eight in a row."""


@dataclass(frozen=True)
class Planned:
    """A request of the client beside what is known of it beforehand."""

    request: TraceRequest
    asked: Asked


def plan_requests(plan: FaultPlan, num_calls: int) -> list[Planned]:
    """Requests until they will make ``num_calls`` calls; half of them streamed."""
    planned: list[Planned] = []
    while num_calls > 0:
        problems = [Problem(f"Drill {len(planned) + i}: how much is it?", "", "exact", "chaos", "train") for i in range(1000)]
        prompts = render_for_teacher(
            [problem.prompt for problem in problems], kind="endpoint", model=MODEL, revision=None, system_prompt=None,
            prompt_suffix="", opens_think=True,
        )  # fmt: skip
        requests = trace_requests(
            problems, prompts, teacher=MODEL, teacher_revision="1", served="drill", sampling=SAMPLING, samples_per_problem=1,
            seed=plan.seed,
        )  # fmt: skip
        for request in requests:
            body = build_body(MODEL, json.loads(request.rendered_prompt), request.seed, SAMPLING, {})
            asked = Asked(request.key, request_identity(body), stream=len(planned) % 2 == 0)
            planned.append(Planned(request, asked))
            num_calls -= len(asked.faults(plan))
            if num_calls <= 0:
                break
    return planned


async def ask_all(
    server: RunningFaultServer, writer: TraceWriter, planned: Sequence[Planned], *, in_flight: int, longest_pause_s: float
) -> None:
    """Ask for every planned trace, over clients with an endpoint each; every second client streams."""
    share = max(2, in_flight // NUM_ENDPOINTS)
    limits = TimeLimits(connect_s=10, first_byte_s=30, idle_s=30, total_s=120)

    async def drive(number: int) -> None:
        stream = number % 2 == 0
        mine = iter([p.request for p in planned if p.asked.stream == stream][number // 2 :: NUM_ENDPOINTS // 2])
        client = ChatClient(
            Endpoints([server.endpoint(f"vendor-{number}")]), MODEL, ledger=writer, stream=stream, limits=limits,
            max_concurrent=share, min_concurrent=share // 2, max_attempts=MAX_ATTEMPTS,
            sleep=lambda seconds: asyncio.sleep(min(seconds, longest_pause_s)),
        )  # fmt: skip

        async def worker() -> None:
            for request in mine:
                context = call_context(request, teacher=MODEL, teacher_revision="1", sampling=SAMPLING)
                await client.complete(request, SAMPLING, context)

        async with client, asyncio.TaskGroup() as workers:
            # More than may be in flight, because those that wait to ask again are not.
            for _ in range(3 * share):
                workers.create_task(worker())

    async with asyncio.TaskGroup() as clients:
        for number in range(NUM_ENDPOINTS):
            clients.create_task(drive(number))


def stored(store: TraceStore) -> Iterator[Trace]:
    """Every row of every shard, repeated keys and all."""
    for entry in store.files("shards"):
        with store.parquet(entry) as parquet:
            for group in range(parquet.num_row_groups):
                yield from from_table(Trace, parquet.read_row_group(group))


def sealed_calls(store: TraceStore) -> list[dict[str, Any]]:
    """The sealed ledger, in order of the call ids."""
    rows = [row for batch in store.calls() for row in batch.to_pylist()]
    return sorted(rows, key=lambda row: row["call_id"])


def drill(
    folder: Path,
    plan: FaultPlan,
    planned: Sequence[Planned],
    *,
    in_flight: int = 400,
    latency_ms: float = 250.0,
    longest_pause_s: float = 60.0,
) -> float:
    """Ask for all that is planned, leaving the store and the server's ledger in ``folder``; returns the seconds it took.

    Args:
        longest_pause_s: cuts the client's own pauses between two attempts short; what Retry-After asks for stays.
    """
    options = {"mean-characters": MEAN_CHARACTERS, "shape": SHAPE, "latency-ms": latency_ms}
    started = time.monotonic()
    with (
        running_fault_server(plan, ledger=folder / "served.jsonl", options=options) as server,
        TraceWriter(TraceStore(folder / "store"), folder / "spool", parse=parse_chat, prices=PRICES) as writer,
    ):
        asyncio.run(ask_all(server, writer, planned, in_flight=in_flight, longest_pause_s=longest_pause_s))
        return time.monotonic() - started


def judge(
    plan: FaultPlan,
    planned: Sequence[Planned],
    *,
    served: Sequence[ServedCall],
    calls: Sequence[Mapping[str, Any]],
    traces: Iterable[Trace],
    totals: Totals,
) -> dict[str, Any]:
    """Figures of a drill; ``differences`` is a list of sentences that has to be empty."""
    answers = SyntheticAnswers(plan.seed, mean_characters=MEAN_CHARACTERS, shape=SHAPE)
    found = compare([p.asked for p in planned], plan, answers, served=served, calls=calls, traces=traces)
    billed = sum(PRICES.dollars(call.prompt_tokens, call.completion_tokens) for call in served)
    found.expect(totals.num_calls == len(served), "the totals count other calls than were served", totals)
    found.expect(totals.dollars + totals.dollars_lost >= billed, "the vendor bills more than our ledger holds spent", totals)
    return {
        "num_calls": len(served),
        "dollars": {"vendor": round(billed, 4), "ours": round(totals.dollars, 4), "reserved": round(totals.dollars_lost, 4)},
        "served": summary(served),
        **found.report(),
    }


def books(folder: Path) -> dict[str, Any]:
    """What a drill left, as `judge` takes it."""
    store = TraceStore(folder / "store")
    return {
        "served": read_ledger(folder / "served.jsonl"),
        "calls": sealed_calls(store),
        "traces": stored(store),
        "totals": store.totals(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--fault-rate", type=float, default=0.2)
    parser.add_argument("--in-flight", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="an empty folder for the store and both ledgers; default: a temporary one")
    given = parser.parse_args()
    plan = FaultPlan(given.seed, given.fault_rate, **WAITS)
    planned = plan_requests(plan, given.calls)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        seconds = drill(folder, plan, planned, in_flight=given.in_flight)
        figures = judge(plan, planned, **books(folder))
    figures["seconds"] = round(seconds, 1)
    figures["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(figures, indent=1))
    sys.exit(1 if figures["differences"] else 0)


if __name__ == "__main__":
    main()
