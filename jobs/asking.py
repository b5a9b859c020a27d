"""Put a plan's requests to the teacher, so that every paid token is on disk before anyone looks at it.

Two ways to ask: HTTP servers, by one asynchronous client of this process, whoever started them; and the in-process pool of
actors. Both reserve in the ledger first, commit the raw answer next, and tell the plan last. A budget that refuses a request
lets what is under way finish, because it may settle for less than it reserved; only then is the budget called reached.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stillhouse.jobs.generators import GeneratorPool
from stillhouse.jobs.servers import Servers
from stillhouse.jobs.trace_plan import TracePlan
from stillhouse.pipeline.errors import BudgetReached, StillhouseError, TeacherError, first_line
from stillhouse.pipeline.records import Sampling, Trace
from stillhouse.pipeline.trace_store.writer import TraceWriter
from stillhouse.teachers.answers import completion_bytes
from stillhouse.teachers.endpoint import RefusedRequestError
from stillhouse.teachers.tracing import TraceRequest, intent_of

MIN_REFUSALS, MAX_REFUSED_SHARE = 3, 0.05
"""With so many refused requests, and more than this share of all, it is not single prompts that are wrong."""


@dataclass(slots=True)
class Asked:
    """How the asking ended.

    Args:
        reached: what the budget said, where it was reached.
        refused: requests that the teacher refuses and would again (a prompt that is too long, say), with its words.
    """

    reached: BudgetReached | None = None
    refused: dict[TraceRequest, str] = field(default_factory=dict)

    def refuse(self, request: TraceRequest, error: RefusedRequestError, num_answered: int) -> None:
        """Note a refusal. Raises it where refusals are no exception: then it is not the prompt that is wrong."""
        self.refused[request] = first_line(error)
        count = len(self.refused)
        if count >= MIN_REFUSALS and count > MAX_REFUSED_SHARE * (num_answered + count):
            raise error


async def ask_servers(
    servers: Servers,
    plan: TracePlan,
    *,
    context: Callable[[TraceRequest], bytes],
    on_trace: Callable[[Trace], None],
) -> Asked:
    """Ask until the plan has nothing more, or the budget nothing left.

    Args:
        context: what a call's answer is turned into a trace with, see `stillhouse.teachers.chat_response.call_context`.

    Raises:
        TeacherError: the teacher failed for good, or refuses most requests; what was under way is in the store.
        ClusterError: its servers did.
    """
    finished: asyncio.Queue[tuple[TraceRequest | None, Trace | BaseException]] = asyncio.Queue()
    servers.failed.add_done_callback(lambda failed: finished.put_nowait((None, failed.exception())))
    tasks: set[asyncio.Task[None]] = set()
    asked = Asked()
    over_budget: deque[TraceRequest] = deque()
    failure: StillhouseError | None = None
    in_flight = num_answered = 0
    room = alone = False  # something settled since the last refusal; the last request went out with no other under way

    async def one(request: TraceRequest) -> None:
        try:
            result: Trace | Exception = await servers.client.complete(request, servers.sampling, context(request))
        except Exception as error:  # the loop below raises what is neither the teacher's nor the budget's
            result = error
        finished.put_nowait((request, result))

    try:
        while True:
            wanted: list[TraceRequest] = []
            if failure is None and not over_budget:
                wanted = plan.take(servers.max_in_flight - in_flight)
            elif failure is None and (room or in_flight == 0):
                wanted, room = [over_budget.popleft()], False
            alone = in_flight == 0 and len(wanted) == 1
            for request in wanted:
                task = asyncio.create_task(one(request))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            in_flight += len(wanted)
            if in_flight == 0:
                break
            request, result = await finished.get()
            if request is None:
                raise result
            in_flight -= 1
            if isinstance(result, Trace):
                room, num_answered = True, num_answered + 1
                # Judging an adaptive plan's trace may take a while, and the connections have to be served meanwhile.
                await asyncio.to_thread(plan.tell, result)
                on_trace(result)
            elif isinstance(result, BudgetReached):
                over_budget.appendleft(request)
                if alone:
                    plan.give_back(list(over_budget))
                    asked.reached = result
                    return asked
            elif isinstance(result, RefusedRequestError):
                try:
                    asked.refuse(request, result, num_answered)
                except RefusedRequestError as error:
                    failure = failure or error
            elif isinstance(result, StillhouseError):
                failure = failure or result
            else:
                raise result
    finally:
        for task in tasks:
            task.cancel()
    if failure is None and asked.refused and not num_answered:
        failure = TeacherError(next(iter(asked.refused.values())))
    if failure is not None:
        raise failure
    return asked


def ask_pool(
    pool: GeneratorPool,
    plan: TracePlan,
    writer: TraceWriter,
    *,
    sampling: Sampling,
    context: Callable[[TraceRequest], bytes],
    batch_size: int,
    on_trace: Callable[[Trace], None],
) -> Asked:
    """Ask the in-process teacher, batch by batch, until the plan has nothing more, or the budget nothing left.

    Raises:
        TeacherError: the teacher failed for good; what was under way is in the store.
        ClusterError: its workers keep dying.
    """
    calls: dict[str, int] = {}
    reached: BudgetReached | None = None

    def next_batch() -> Sequence[TraceRequest]:
        nonlocal reached
        batch = plan.take(batch_size)
        # Prompts of like length side by side: a batch is padded to its longest.
        batch.sort(key=lambda request: len(request.rendered_prompt))
        while batch:
            try:
                begin(batch)
            except BudgetReached as error:
                if calls or len(batch) == 1:
                    plan.give_back(batch)
                    reached = None if calls else error
                    return ()
                plan.give_back(batch[len(batch) // 2 :])
                batch = batch[: len(batch) // 2]
            else:
                return batch
        return ()

    def begin(batch: Sequence[TraceRequest]) -> None:
        intents = [intent_of(request, sampling, context(request)) for request in batch]
        for request, call_id in zip(batch, writer.begin(intents).result()):
            calls[request.key] = call_id

    def begin_again(batch: Sequence[TraceRequest]) -> bool:
        for request in batch:
            writer.failed(calls.pop(request.key), error="the worker died", status=None, billed="unknown").result()
        try:
            begin(batch)
        except BudgetReached:
            plan.give_back(batch)
            return False
        return True

    answered = pool.map(
        next_batch,
        prompts=lambda batch: [request.rendered_prompt for request in batch],
        seeds=lambda batch: [request.seed for request in batch],
        sampling=sampling,
        begin_again=begin_again,
    )
    for batch, completions, seconds in answered:
        raws = [completion_bytes(completion, seconds / len(batch)) for completion in completions]
        for trace in writer.answered_many([(calls.pop(r.key), raw) for r, raw in zip(batch, raws)]).result():
            plan.tell(trace)
            on_trace(trace)
    return Asked(reached)
