"""Which completions are asked for next: everything that is missing once, or draws until enough are verified."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stillhouse.jobs.trace_plan import AdaptivePlan, FixedPlan
from stillhouse.pipeline.records import Planned, Problem, Sampling, Trace
from stillhouse.pipeline.stopping import StoppingRule
from stillhouse.teachers.tracing import TraceRequest, trace_requests

PROBLEMS = [Problem(f"What is {number} + 1?", str(number + 1), "exact", "hand", "train") for number in range(4)]
EASY, HARD, MIXED, LAST = PROBLEMS
MAX_SAMPLES = 8


def requests_of(problem: Problem) -> list[TraceRequest]:
    settings = {"teacher": "t", "teacher_revision": "r", "served": "s", "sampling": Sampling(0.6, 0.95, 64)}
    return trace_requests([problem], [problem.prompt], samples_per_problem=MAX_SAMPLES, seed=0, **settings)


def trace_of(request: TraceRequest, problem_id: str = "") -> Trace:
    counts = {"num_prompt_tokens": 5, "num_completion_tokens": 7, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 64}
    return Trace(
        key=request.key, problem_id=problem_id or request.problem_id, teacher="t", teacher_revision="r",
        rendered_prompt=request.rendered_prompt, completion="", reasoning="", answer_text="", finish_reason="stop",
        sample_index=request.sample_index, seed=request.seed, seconds=0.1, **counts,
    )  # fmt: skip


def judge(problem: Problem, trace: Trace) -> str:
    """The easy problem is always solved, the hard one never, the others by every second sample."""
    if problem is HARD:
        return "wrong"
    return "correct" if problem is EASY or trace.sample_index % 2 else "wrong"


def adaptive(k: int = 2, committed: list[Trace] | None = None) -> AdaptivePlan:
    rule = StoppingRule(k, MAX_SAMPLES, min_pass_rate=0.5, error=0.1)
    there = committed or []
    return AdaptivePlan(
        PROBLEMS, requests_of, rule, committed=lambda wanted: [t for t in there if t.key in wanted], judge=judge
    )


def work_off(plan, at_once: int = 3) -> list[TraceRequest]:
    """Answer whatever the plan hands out, ``at_once`` requests under way; returns them in their order."""
    asked: list[TraceRequest] = []
    under_way: list[TraceRequest] = []
    while True:
        taken = plan.take(at_once - len(under_way))
        asked += taken
        under_way += taken
        if not under_way:
            return asked
        plan.tell(trace_of(under_way.pop(0)))


def test_a_fixed_plan_asks_for_what_is_missing_once_and_in_order():
    """A restart would pay for committed traces again, or leave some out."""
    requests = [request for problem in PROBLEMS for request in requests_of(problem)]
    committed = {request.key for request in requests[::3]}
    assert work_off(FixedPlan(iter(requests), committed)) == [r for r in requests if r.key not in committed]


@pytest.mark.parametrize("make", [lambda: FixedPlan(iter(requests_of(EASY)), ()), adaptive])
def test_what_is_given_back_comes_first_again(make):
    """Requests that a budget refused would never be asked when there is room again."""
    plan = make()
    first = plan.take(2)
    plan.give_back(first)
    assert plan.take(2) == first


@pytest.mark.parametrize("at_once", [1, 3, 50])
def test_a_problem_is_drawn_until_enough_are_verified_or_it_is_hopeless(at_once):
    """Every problem would be drawn a fixed number of times, whether it is solved at once or never."""
    plan = adaptive()
    drawn = [request.problem_id for request in work_off(plan, at_once)]
    rule = StoppingRule(2, MAX_SAMPLES, min_pass_rate=0.5, error=0.1)
    assert drawn.count(EASY.id) == 2
    assert drawn.count(HARD.id) == rule.give_up_after[0] < MAX_SAMPLES
    assert 4 <= drawn.count(MIXED.id) <= 6
    assert plan.counts() == {"num_problems_enough": 3, "num_problems_hopeless": 1, "num_problems_exhausted": 0}


def test_what_was_drawn_is_what_is_planned():
    """Traces that were paid for would not reach the filters, or others' traces would."""
    plan = adaptive()
    asked = work_off(plan)
    assert sorted(plan.planned(), key=lambda row: row.key) == sorted(
        (Planned(request.key, request.problem_id) for request in asked), key=lambda row: row.key
    )


def test_a_restart_judges_committed_traces_again_and_asks_for_none_of_them():
    """A crash in the middle of an adaptive run would make it draw everything again, or stop at another place."""
    whole = work_off(adaptive(), at_once=1)
    for cut in range(len(whole) + 1):
        plan = adaptive(committed=[trace_of(request, "an older id of the problem") for request in whole[:cut]])
        assert [request.key for request in work_off(plan, at_once=1)] == [request.key for request in whole[cut:]]
        assert {row.key for row in plan.planned()} == {request.key for request in whole}


def test_traces_of_other_requests_are_passed_over():
    """A spool that still holds another setting's answers, or the beginning of a cut one, would stop the run."""
    others = replace(trace_of(requests_of(EASY)[0]), key="f" * 64)
    plan = AdaptivePlan(
        PROBLEMS, requests_of, StoppingRule(2, MAX_SAMPLES, 0.5, 0.1), committed=lambda _: [others], judge=judge
    )
    assert work_off(plan) == work_off(adaptive())


def test_a_trace_lost_in_the_middle_is_drawn_again():
    """A hole among the committed samples would leave the problem one draw short for ever."""
    whole = work_off(adaptive(), at_once=1)
    lost = [request for request in whole if request.problem_id == HARD.id][1]
    plan = adaptive(committed=[trace_of(request) for request in whole if request is not lost])
    assert work_off(plan) == [lost]
