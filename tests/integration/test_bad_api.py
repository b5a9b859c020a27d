"""Our client against the fault server, both ledgers compared call by call: the short version of `tests.chaos.bad_api`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from stillhouse.teachers.fault_plan import DEFAULT_WEIGHTS, FAULTS, FaultPlan
from tests.chaos.bad_api import WAITS, books, drill, judge, plan_requests

# A date names a whole second, which is long for a test of a few.
QUICK_FAULTS = {name: weight for name, weight in DEFAULT_WEIGHTS.items() if name != "status_429_date"}
QUICK = FaultPlan(1, 0.3, QUICK_FAULTS, retry_after_s=(0.05, 0.2), stall_s=0.2, slow_s=0.2)
FEW = plan_requests(QUICK, 500)


@pytest.fixture(scope="module")
def quick_books(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("drill")
    drill(folder, QUICK, FEW, in_flight=100, latency_ms=20, longest_pause_s=0.1)
    found = books(folder)
    return found | {"traces": list(found["traces"])}


def _assert_exact(figures: dict[str, Any], plan: FaultPlan, num_planned: int, num_calls: int) -> None:
    assert figures["differences"] == []
    assert figures["num_calls"] >= num_calls
    assert figures["num_kept_under_planned_keys"] == num_planned
    assert figures["served"]["faults"].keys() == plan.weights.keys()
    assert figures["served"]["early"]["request"] == 0
    assert figures["counted_tokens"]["completion_tokens"]["ours"] > 100 * num_calls


def test_a_bad_api_costs_exactly_what_both_ledgers_say(quick_books):
    """A retry would go out early or be paid and not counted, or a cut answer would be kept as a whole one."""
    _assert_exact(judge(QUICK, FEW, **quick_books), QUICK, len(FEW), 500)


def _change(name: str, wanted: Callable[[Any], bool], change: Callable[[Any], list[Any]]) -> Callable[[dict], dict]:
    """Replace the first row of one of the books that is ``wanted`` by what ``change`` makes of it."""

    def doctored(found: dict[str, Any]) -> dict[str, Any]:
        rows = list(found[name])
        index = next(index for index, row in enumerate(rows) if wanted(row))
        return found | {name: rows[:index] + change(rows[index]) + rows[index + 1 :]}

    return doctored


def _served(wanted: Callable[[Any], bool] = lambda call: not call.fault, **changed: Any) -> Callable[[dict], dict]:
    return _change("served", wanted, lambda call: [replace(call, **changed)])


def _called(state: str, /, **changed: Any) -> Callable[[dict], dict]:
    return _change("calls", lambda row: row["state"] == state, lambda row: [row | changed])


def _kept(**changed: Any) -> Callable[[dict], dict]:
    return _change("traces", lambda t: t.finish_reason == "stop", lambda trace: [replace(trace, **changed)])


def _totals(**changed: Any) -> Callable[[dict], dict]:
    return lambda found: found | {"totals": replace(found["totals"], **changed)}


@pytest.mark.parametrize(
    ("doctored", "said"),
    [
        (_change("served", lambda call: True, lambda call: []), "number of calls differs"),
        (_served(fault="reset"), "did not serve what its plan says"),
        (_served(completion_tokens=1), "completion_tokens differ"),
        (_served(early="request"), "came before its own Retry-After"),
        (_served(lambda call: call.not_before, not_before=2e10), "came before its endpoint's Retry-After"),
        (_served(identity="f" * 32), "nobody planned were served"),
        (_change("calls", lambda row: row["state"] == "answered", lambda row: [row, row]), "number of calls differs"),
        (_change("calls", lambda row: row["status"] == 503, lambda row: [row | {"status": 500}]), "the status differs"),
        (_called("failed", state="answered"), "wrong state"),
        (_called("truncated", prompt_tokens=0), "gives its reservation back"),
        (_called("answered", key="f" * 64), "nobody planned stand in the ledger"),
        (_change("traces", lambda trace: trace.finish_reason == "stop", lambda trace: []), "has not exactly one trace"),
        (_change("traces", lambda trace: trace.finish_reason == "stop", lambda t: [t, t]), "has not exactly one trace"),
        (_kept(finish_reason="truncated"), "a truncated trace stands under a planned key"),
        (_kept(completion="<think>"), "another text than was sent"),
        (_kept(usage_counted=False), "usage_counted is wrong"),
        (_totals(num_calls=1), "the totals count other calls"),
        (_totals(dollars=0.0, dollars_lost=0.0), "the vendor bills more"),
    ],
)
def test_the_comparison_sees_one_wrong_row(quick_books, doctored, said):
    """The drill would report two equal ledgers whatever stands in them."""
    differences = judge(QUICK, FEW, **doctored(quick_books))["differences"]
    assert any(said in difference for difference in differences), differences


@pytest.mark.slow
def test_thousands_of_calls_at_a_bad_api_with_real_waits(tmp_path):
    """What only many requests in flight bring up, such as a refusal while hundreds are on their way, would go unseen."""
    plan = FaultPlan(2, 0.2, **WAITS)
    planned = plan_requests(plan, 3000)
    drill(tmp_path, plan, planned, in_flight=300, longest_pause_s=1.0)
    figures = judge(plan, planned, **books(tmp_path))
    _assert_exact(figures, plan, len(planned), 3000)
    assert figures["served"]["max_under_way"] >= 200
    assert sum(FAULTS[name].status == 429 for name in figures["served"]["faults"]) == 3
    assert figures["served"]["num_refused_with_wait"] > 30
