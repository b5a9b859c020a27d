"""Which completions to ask the teacher for next: a fixed number a problem, or until enough of them are verified.

A plan hands out requests as long as it has some, and is told of every trace that came. It knows nothing of who answers.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Protocol

from stillhouse.pipeline.records import Outcome, Planned, Problem, Trace
from stillhouse.pipeline.stopping import Planner, StoppingRule
from stillhouse.teachers.tracing import TraceRequest


class TracePlan(Protocol):
    """What the askers of `stillhouse.jobs.asking` work off."""

    def take(self, count: int) -> list[TraceRequest]:
        """At most ``count`` requests that may go out now. None while answers are awaited may mean that more will come."""

    def give_back(self, requests: Sequence[TraceRequest]) -> None:
        """Requests that were taken and did not go out."""

    def tell(self, trace: Trace) -> None:
        """A trace came, for a request that was taken."""


class FixedPlan:
    """Every request that is not committed yet, in their order.

    Args:
        requests: all that the run wants; read as they are taken.
        committed: keys that need no asking.
    """

    def __init__(self, requests: Iterable[TraceRequest], committed: Container[str]):
        self._requests = iter(requests)
        self._committed = committed
        self._back: deque[TraceRequest] = deque()

    def take(self, count: int) -> list[TraceRequest]:
        taken = [self._back.popleft() for _ in range(min(count, len(self._back)))]
        while len(taken) < count and (request := next(self._requests, None)) is not None:
            if request.key not in self._committed:
                taken.append(request)
        return taken

    def give_back(self, requests: Sequence[TraceRequest]) -> None:
        self._back.extendleft(reversed(requests))

    def tell(self, trace: Trace) -> None:
        """Nothing depends on what came."""


class AdaptivePlan:
    """Draw each problem until enough traces are verified or it looks hopeless.

    Args:
        problems: what is drawn for, in the order in which they are begun.
        requests_of: a problem's possible requests, by sample index; called once a problem.
        rule: when to stop.
        committed: traces of earlier runs, at least those for any of these requests; those are judged again and not asked again.
        judge: ``correct`` for a trace that will be verified and kept; a draw that a filter will drop is ``wrong``.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        requests_of: Callable[[Problem], Sequence[TraceRequest]],
        rule: StoppingRule,
        *,
        committed: Callable[[Container[str]], Iterable[Trace]],
        judge: Callable[[Problem, Trace], Outcome],
    ):
        self._requests = {problem.id: requests_of(problem) for problem in problems}
        self._problems = {problem.id: problem for problem in problems}
        problem_of = {request.key: pid for pid, requests in self._requests.items() for request in requests}
        self._judge = judge
        self._planner = Planner(rule)
        # What is known of committed traces; told to the planner when their turn comes, as if they were drawn now.
        self._known = {
            trace.key: self._outcome(trace, problem_of[trace.key]) for trace in committed(problem_of) if trace.key in problem_of
        }
        self._problem_of = problem_of
        self._drawn: Counter[str] = Counter()
        self._under_way: Counter[str] = Counter()
        self._waiting = deque(problem.id for problem in problems)
        self._back: deque[TraceRequest] = deque()

    def take(self, count: int) -> list[TraceRequest]:
        taken = [self._back.popleft() for _ in range(min(count, len(self._back)))]
        while len(taken) < count and self._waiting:
            request = self._draw(self._waiting[0])
            if request is None:
                self._waiting.popleft()
            else:
                taken.append(request)
        return taken

    def give_back(self, requests: Sequence[TraceRequest]) -> None:
        self._back.extendleft(reversed(requests))

    def tell(self, trace: Trace) -> None:
        problem_id = self._problem_of[trace.key]
        self._under_way[problem_id] -= 1
        self._planner.record(problem_id, trace.sample_index, self._outcome(trace, problem_id))
        self._waiting.appendleft(problem_id)

    def _draw(self, problem_id: str) -> TraceRequest | None:
        """The problem's next request, if it wants one more under way; committed ones on the way are told to the planner."""
        requests = self._requests[problem_id]
        while self._drawn[problem_id] < len(requests):
            if self._under_way[problem_id] >= self._planner.next_draws(problem_id):
                return None
            request = requests[self._drawn[problem_id]]
            self._drawn[problem_id] += 1
            outcome = self._known.get(request.key)
            if outcome is None:
                self._under_way[problem_id] += 1
                return request
            self._planner.record(problem_id, request.sample_index, outcome)
        return None

    def _outcome(self, trace: Trace, problem_id: str) -> Outcome:
        return self._judge(self._problems[problem_id], trace)

    def planned(self) -> Iterator[Planned]:
        """What was drawn, of this run and earlier ones."""
        for problem_id, requests in self._requests.items():
            for request in requests[: self._drawn[problem_id]]:
                yield Planned(request.key, problem_id)

    def counts(self) -> dict[str, float]:
        """How the problems ended: enough verified traces, given up as hopeless, or drawn as often as allowed."""
        ends = Counter(self._planner.state(problem_id) for problem_id in self._requests)
        return {f"num_problems_{end}": ends[end] for end in ("enough", "hopeless", "exhausted")}
