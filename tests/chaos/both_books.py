"""The vendor's ledger against the client's, call by call: what each attempt met, what it cost, and what was kept of it."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stillhouse.pipeline.records import Trace
from stillhouse.teachers.fault_answers import SyntheticAnswers
from stillhouse.teachers.fault_ledger import ServedCall
from stillhouse.teachers.fault_plan import FAULTS, FaultPlan

KEPT = frozenset({"stop", "length"})
"""How a whole answer of the fault server may end."""
_BROKEN_MIDWAY = frozenset({"reset_midway", "truncated_body", "truncated_stream"})
_MOST_SENTENCES = 20
ON_ITS_WAY_S = 0.25
"""A request that left before the client knew of a refusal may be read by a busy server so much later."""


@dataclass(frozen=True)
class Asked:
    """One planned trace: its key, what the server calls its request, and whether it is streamed."""

    key: str
    identity: str
    stream: bool

    def faults(self, plan: FaultPlan) -> list[str]:
        """What each attempt will meet until one delivers; the last is "" or a fault that delivers."""
        met = []
        while True:
            fault = plan.fault(self.identity, len(met), stream=self.stream)
            met.append(fault.name if fault else "")
            if fault is None or fault.delivers:
                return met


@dataclass
class Comparison:
    """Counts of a comparison, and a sentence for each way in which the two sides differ."""

    violations: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def expect(self, holds: bool, sentence: str, example: object = "") -> None:
        if not holds:
            self.violations[sentence] += 1
            self.examples.setdefault(sentence, str(example)[:300])

    def report(self) -> dict[str, Any]:
        found = [f"{count} × {text}: {self.examples[text]}" for text, count in self.violations.most_common(_MOST_SENTENCES)]
        return {**self.figures, "num_differences": self.violations.total(), "differences": found}


def compare(
    planned: Sequence[Asked],
    plan: FaultPlan,
    answers: SyntheticAnswers,
    *,
    served: Sequence[ServedCall],
    calls: Iterable[Mapping[str, Any]],
    traces: Iterable[Trace],
) -> Comparison:
    """Compare what the plan says, what the server served, what the client's ledger says and what the store holds.

    Args:
        calls: rows of the sealed ledger, in order of their call ids.
        traces: every row of the store's shards, repeated keys and all; read once.
    """
    found = Comparison()
    known = _compare_calls(found, planned, plan, served, calls)
    _compare_waits(found, served, known)
    _compare_traces(found, planned, plan, answers, traces)
    return found


def _compare_calls(
    found: Comparison,
    planned: Sequence[Asked],
    plan: FaultPlan,
    served: Sequence[ServedCall],
    calls: Iterable[Mapping[str, Any]],
) -> dict[int, float]:
    """Every attempt at every planned trace; returns when our ledger had the end of each served call, by its number."""
    theirs_by_identity: dict[str, list[ServedCall]] = defaultdict(list)
    for call in sorted(served, key=lambda call: call.attempt):
        theirs_by_identity[call.identity].append(call)
    ours_by_key: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in calls:
        ours_by_key[row["key"]].append(row)
    tokens = {"prompt_tokens": {"vendor": 0, "ours": 0}, "completion_tokens": {"vendor": 0, "ours": 0}}
    states_by_fault: dict[str, Counter[str]] = defaultdict(Counter)
    known: dict[int, float] = {}
    for asked in planned:
        theirs, ours = theirs_by_identity.pop(asked.identity, []), ours_by_key.pop(asked.key, [])
        expected, met = asked.faults(plan), [call.fault for call in theirs]
        found.expect(met == expected, "the server did not serve what its plan says", f"{asked}: {met}, planned {expected}")
        found.expect(len(ours) == len(theirs), "number of calls differs", f"{asked}: {len(ours)} sent, {len(theirs)} served")
        for call, row in zip(theirs, ours):
            states_by_fault[call.fault or "none"][row["state"]] += 1
            known[call.number] = row["done_at"]
            _compare_call(found, call, row)
            if row["state"] == "answered" and call.fault != "missing_usage":
                for name, sums in tokens.items():
                    sums["vendor"] += getattr(call, name)
                    sums["ours"] += row[name] or 0
    found.expect(not theirs_by_identity, "requests that nobody planned were served", list(theirs_by_identity)[:3])
    found.expect(not ours_by_key, "calls that nobody planned stand in the ledger", list(ours_by_key)[:3])
    for name, sums in tokens.items():
        found.expect(sums["vendor"] == sums["ours"], f"{name} differ", sums)
    found.figures |= {
        "states_by_fault": {fault: dict(states) for fault, states in sorted(states_by_fault.items())},
        "counted_tokens": tokens,
    }
    return known


def _compare_call(found: Comparison, call: ServedCall, row: Mapping[str, Any]) -> None:
    example = f"{call.fault or 'no fault'} (stream: {call.stream}) became {dict(row)}"
    fault = FAULTS[call.fault] if call.fault else None
    if fault is None or fault.delivers:
        found.expect(row["state"] == "answered", "a whole answer was not taken as one", example)
        tokens = (row["prompt_tokens"], row["completion_tokens"])
        if call.fault != "missing_usage":
            billed = (call.prompt_tokens, call.completion_tokens)
            found.expect(tokens == billed, "an answer's tokens differ", f"{example}, billed {billed}")
        return
    states = {"failed", "truncated"} if call.fault in _BROKEN_MIDWAY else {"failed", "unreadable"}
    found.expect(row["state"] in states, "a broken answer has the wrong state", example)
    if call.fault not in _BROKEN_MIDWAY and row["state"] != "unreadable":  # which has none: the answer was taken as whole
        found.expect(row["status"] == call.status, "the status differs", example)
    if call.completion_tokens:  # without tokens of its own a call counts with what it had reserved
        found.expect(row["prompt_tokens"] is None, "a broken answer that was billed gives its reservation back", example)


def _compare_waits(found: Comparison, served: Sequence[ServedCall], known: Mapping[int, float]) -> None:
    """No request comes before its Retry-After, nor another one to the same endpoint once the client knew of that.

    Args:
        known: number of a served call → when the client's ledger had its end; both sides read the same clock.
    """
    latest_s = 0.0
    waits: dict[str, list[ServedCall]] = defaultdict(list)
    for call in sorted(served, key=lambda call: call.time):
        found.expect(call.early != "request", "a request came before its own Retry-After", call)
        refusals = waits[call.endpoint] = [refusal for refusal in waits[call.endpoint] if refusal.not_before > call.time]
        for refusal in refusals:
            since_s = call.time - known.get(refusal.number, call.time)
            latest_s = max(latest_s, since_s)
            found.expect(since_s <= ON_ITS_WAY_S, "a request came before its endpoint's Retry-After", [call, refusal])
        if call.not_before:
            refusals.append(call)
    found.figures["latest_after_refusal_was_known_s"] = round(latest_s, 3)


def _compare_traces(
    found: Comparison, planned: Sequence[Asked], plan: FaultPlan, answers: SyntheticAnswers, traces: Iterable[Trace]
) -> None:
    """One trace with the text that was sent under each planned key, and no others but cut ones under keys of their own."""
    by_key = {asked.key: asked for asked in planned}
    kept: Counter[str] = Counter()
    num_partial = 0
    for trace in traces:
        if asked := by_key.get(trace.key):
            kept[trace.key] += 1
            found.expect(trace.finish_reason in KEPT, "a truncated trace stands under a planned key", trace.key)
            _compare_text(found, asked, asked.faults(plan)[-1], trace, answers)
        else:
            num_partial += 1
            found.expect(trace.finish_reason == "truncated", "a trace that nobody planned", trace.key)
    for asked in planned:
        found.expect(kept[asked.key] == 1, "a planned key has not exactly one trace", f"{asked}: {kept[asked.key]}")
    found.figures |= {
        "num_planned": len(planned),
        "num_kept_under_planned_keys": kept.total(),
        "num_partial_traces": num_partial,
    }


def _compare_text(found: Comparison, asked: Asked, fault: str, trace: Trace, answers: SyntheticAnswers) -> None:
    reasoning, answer = answers.text(asked.identity)
    if fault == "null_content":
        whole = trace.completion.startswith(f"<think>\n{reasoning}") and trace.finish_reason == "length"
    else:
        whole = trace.completion == f"<think>\n{reasoning}\n</think>\n\n{answer}" and trace.finish_reason == "stop"
    found.expect(whole, "a trace has another text than was sent", json.dumps([fault, trace.finish_reason, trace.completion]))
    found.expect(
        trace.usage_counted == (fault != "missing_usage"), "usage_counted is wrong", f"{trace.key} after {fault or 'no fault'}"
    )
