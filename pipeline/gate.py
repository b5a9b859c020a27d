"""The gate: may this 4-bit checkpoint go out? Pure functions over graded completions.

A floor is judged by the interval, not by the point: PASS when the whole interval is on the right side, FAIL when it is on
the wrong side, INCONCLUSIVE between, with the number of items that would decide. (A rule like "lower bound ≥ 0.95 × the
baseline's rate" refuses an unchanged model about every second time at n = 500.) What could not be measured fails.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from stillhouse.pipeline.errors import ExitCode
from stillhouse.pipeline.records import Graded
from stillhouse.pipeline.statistics import Interval, clustered, items_to_decide, mcnemar_exact, paired_difference

Judgement = Literal["PASS", "FAIL", "INCONCLUSIVE"]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a model answers, whatever it answers. Rates are shares of completions; None where there was no completion."""

    num: int
    think_closed_rate: float | None
    stop_rate: float | None
    answer_found_rate: float | None
    mean_completion_tokens: float | None


@dataclass(frozen=True, slots=True)
class Agreement:
    """How alike one checkpoint answers on two paths of computation; ``difference`` is in pass@1, paired by problem."""

    num_completions: int
    num_same_verdict: int
    num_same_completion: int
    difference: Interval


@dataclass(frozen=True, slots=True)
class GateCheck:
    """One check of the gate: what was expected, what was measured (None: nothing could be) and what that means."""

    name: str
    expected: str
    measured: float | None
    low: float | None
    high: float | None
    outcome: Judgement
    explanation: str


@dataclass(frozen=True, slots=True)
class GateResult:
    """The verdict over all checks, and what the process returns for it."""

    verdict: Judgement
    exit_code: ExitCode
    checks: list[GateCheck]


def behaviour(graded: Sequence[Graded]) -> Behaviour:
    """Summarise how completions end: think block closed, EOS written, an answer found, tokens on average."""
    if not graded:
        return Behaviour(0, None, None, None, None)
    return Behaviour(
        num=len(graded),
        think_closed_rate=fmean(row.think_closed for row in graded),
        stop_rate=fmean(row.finish_reason == "stop" for row in graded),
        answer_found_rate=fmean(row.answer_found for row in graded),
        mean_completion_tokens=fmean(row.num_completion_tokens for row in graded),
    )


def accuracy(graded: Sequence[Graded]) -> Interval | None:
    """pass@1 with its 95 % interval, clustered by problem; Wilson's for one sample a problem. None for no completion."""
    return clustered(_correct_by_item(graded)) if graded else None


def accuracy_by_family(graded: Sequence[Graded]) -> dict[str, Interval]:
    """pass@1 of each problem source, sorted by name."""
    rows: dict[str, list[Graded]] = defaultdict(list)
    for row in graded:
        rows[row.source].append(row)
    return {source: clustered(_correct_by_item(rows[source])) for source in sorted(rows)}


def agreement(a: Sequence[Graded], b: Sequence[Graded]) -> Agreement | None:
    """Compare graded completions of the same problems and samples, ``difference`` = a − b; None where they are not the same."""
    first, second = _by_sample(a), _by_sample(b)
    if not first or first.keys() != second.keys() or len(first) != len(a) or len(second) != len(b):
        return None
    return Agreement(
        num_completions=len(first),
        num_same_verdict=sum(first[key].correct == second[key].correct for key in first),
        num_same_completion=sum(first[key].completion == second[key].completion for key in first),
        difference=paired_difference(_item_scores(a), _item_scores(b)),
    )


def judge(
    *,
    base: Sequence[Graded],
    student: Sequence[Graded],
    checkpoint: Sequence[Graded],
    checkpoint_kernels: Sequence[Graded] | None,
    integrity_ok: bool,
    min_accuracy: float | None,
    min_family_accuracy: float | None,
    min_student_ratio: float | None,
    min_gain: float | None,
    max_drop: float | None,
    min_think_closed: float | None,
    max_kernel_difference: float | None,
    min_same_verdict: float | None,
) -> GateResult:
    """Judge the emitted checkpoint against absolute floors, against its base and against its 16-bit student.

    A threshold of None asks nothing, and its check is not made.

    Args:
        base, student, checkpoint: graded completions of the same problems, the same samples of each.
        checkpoint_kernels: those of the same checkpoint on our own kernels; None where they were not asked for.
        integrity_ok: what ``check_checkpoint`` said of the folder.
        min_accuracy: floor of the checkpoint's pass@1, by the interval.
        min_family_accuracy: floor of its pass@1 in each problem family, by the point estimate.
        min_student_ratio: floor of checkpoint / student, by the point estimates.
        min_gain: floor of the paired difference checkpoint − base, by the interval (superiority).
        max_drop: margin of the paired difference checkpoint − student ≥ −max_drop, by the interval (non-inferiority).
        min_think_closed: floor of the share of completions whose think block is closed, by the interval.
        max_kernel_difference: margin of the paired difference checkpoint_kernels − checkpoint, in pass@1: PASS when the whole
            interval is within ± this, FAIL when it lies outside or leaves out 0 (a difference that is not chance).
        min_same_verdict: floor of the share of completions that are right on both paths or wrong on both, by the interval. It
            finds what a difference of means cannot: answers that change in both directions. In float32 the paths differ in the
            order of sums, some 1e-5 in a logit, and nearly every completion is the same; in bfloat16 long completions part.

    Returns:
        FAIL if any check fails, else INCONCLUSIVE if any is, else PASS. The exit code is 5 for a broken folder, 4 when
        the models were not measured on the same problems, 1 for any other failure, 3 for inconclusive, 0 for a pass.

    Raises:
        ValueError: a threshold is not a finite number.
    """
    thresholds = {
        "min_accuracy": min_accuracy,
        "min_family_accuracy": min_family_accuracy,
        "min_student_ratio": min_student_ratio,
        "min_gain": min_gain,
        "max_drop": max_drop,
        "min_think_closed": min_think_closed,
        "max_kernel_difference": max_kernel_difference,
        "min_same_verdict": min_same_verdict,
    }
    for name, threshold in thresholds.items():
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"gate threshold {name} has to be a finite number; got {threshold}")

    models = {"base": base, "student": student, "checkpoint": checkpoint}
    if checkpoint_kernels is not None:
        models["checkpoint on our kernels"] = checkpoint_kernels
    comparable = _check_same_problems(models)
    checks = [_check_integrity(integrity_ok), comparable]
    measurable = comparable.outcome == "PASS"
    scores = {name: _item_scores(rows) for name, rows in (("base", base), ("student", student), ("checkpoint", checkpoint))}

    if min_think_closed is not None:
        think_closed = clustered(_by_item(checkpoint, "think_closed")) if checkpoint else None
        checks.append(_by_interval("think block closed", think_closed, min_think_closed, "share of completions"))
    if min_accuracy is not None:
        checks.append(_by_interval("accuracy", accuracy(checkpoint), min_accuracy, "pass@1"))

    if min_family_accuracy is not None:
        by_family = accuracy_by_family(checkpoint)
        for family in sorted({row.source for rows in (base, student, checkpoint) for row in rows}):
            checks.append(_by_point(f"accuracy in {family}", by_family.get(family), min_family_accuracy, "pass@1"))
        if not by_family:
            checks.append(_by_point("accuracy by family", None, min_family_accuracy, "pass@1"))

    if min_gain is not None:
        gain = paired_difference(scores["checkpoint"], scores["base"]) if measurable else None
        checks.append(_by_interval("gain over base", gain, min_gain, "checkpoint − base", _discordance(checkpoint, base)))
    if max_drop is not None:
        drop = paired_difference(scores["checkpoint"], scores["student"]) if measurable else None
        note = _discordance(checkpoint, student)
        checks.append(_by_interval("drop from 16-bit student", drop, -max_drop, "checkpoint − student", note))
    if min_student_ratio is not None:
        checks.append(_check_ratio(accuracy(checkpoint), accuracy(student), min_student_ratio))
    if checkpoint_kernels is not None:
        checks += _check_kernels(checkpoint_kernels, checkpoint, max_kernel_difference, min_same_verdict)

    outcomes = {check.outcome for check in checks}
    if "FAIL" in outcomes:
        broken = ExitCode.GATE_FAILED if measurable else ExitCode.INFRASTRUCTURE
        return GateResult("FAIL", broken if integrity_ok else ExitCode.INTEGRITY, checks)
    if "INCONCLUSIVE" in outcomes:
        return GateResult("INCONCLUSIVE", ExitCode.INCONCLUSIVE, checks)
    return GateResult("PASS", ExitCode.PASS, checks)


def _by_item(graded: Sequence[Graded], field: str) -> dict[str, list[bool]]:
    items: dict[str, list[bool]] = defaultdict(list)
    for row in graded:
        items[row.problem_id].append(bool(getattr(row, field)))
    return dict(items)


def _by_sample(graded: Sequence[Graded]) -> dict[tuple[str, int], Graded]:
    return {(row.problem_id, row.sample_index): row for row in graded}


def _correct_by_item(graded: Sequence[Graded]) -> dict[str, list[bool]]:
    return _by_item(graded, "correct")


def _item_scores(graded: Sequence[Graded]) -> dict[str, float]:
    return {item: fmean(samples) for item, samples in _correct_by_item(graded).items()}


def _percent(value: float, signed: bool = False) -> str:
    return f"{100 * value:{'+' if signed else ''}.1f} %"


def _check_integrity(ok: bool) -> GateCheck:
    explanation = "every file is what the manifest says" if ok else "the checkpoint folder is not what its manifest says"
    return GateCheck("integrity", "no problem found", None, None, None, "PASS" if ok else "FAIL", explanation)


def _check_same_problems(models: Mapping[str, Sequence[Graded]]) -> GateCheck:
    """A paired comparison means something only on the same problems, each sampled once under each index."""
    faults: list[str] = []
    keys = {name: Counter((row.problem_id, row.source, row.sample_index) for row in rows) for name, rows in models.items()}
    for name, counts in keys.items():
        repeated = sum(count > 1 for count in counts.values())
        if not counts:
            faults.append(f"{name} has no graded completion")
        if repeated:
            faults.append(f"{name} has {repeated} completions twice")
    reference = keys["checkpoint"].keys()
    for name, counts in keys.items():
        missing, extra = len(reference - counts.keys()), len(counts.keys() - reference)
        if counts and reference and (missing or extra):
            faults.append(f"{name} lacks {missing} of the checkpoint's completions and has {extra} others")
    num = len({problem for problem, _, _ in reference})
    explanation = "; ".join(faults) or f"{num} problems, answered by all {len(models)} models"
    outcome = "FAIL" if faults else "PASS"
    return GateCheck("same problems", "the same problems and samples for each model", None, None, None, outcome, explanation)


def _by_interval(name: str, interval: Interval | None, floor: float, what: str, note: str = "") -> GateCheck:
    signed = "−" in what
    expected = f"{what} ≥ {_percent(floor, signed)}"
    if interval is None:
        return GateCheck(name, expected, None, None, None, "FAIL", "not measured; what is not measured fails")
    low, high = _percent(interval.low, signed), _percent(interval.high, signed)
    if interval.low >= floor:
        outcome, reason = "PASS", f"the 95 % interval, {low} to {high}, lies above the floor"
    elif interval.high < floor:
        outcome, reason = "FAIL", f"the 95 % interval, {low} to {high}, lies below the floor"
    else:
        needed = items_to_decide(interval, floor)
        more = "no number of items decides at this estimate" if needed is None else f"about {needed:,} items would decide"
        outcome, reason = (
            "INCONCLUSIVE",
            f"the floor is inside the 95 % interval, {low} to {high}, of {interval.n:,} items; {more}",
        )
    return GateCheck(name, expected, interval.value, interval.low, interval.high, outcome, reason + note)


def _by_point(name: str, interval: Interval | None, floor: float, what: str) -> GateCheck:
    expected = f"{what} ≥ {_percent(floor)} (point estimate)"
    if interval is None:
        return GateCheck(name, expected, None, None, None, "FAIL", "not measured; what is not measured fails")
    passed = interval.value >= floor
    explanation = f"{_percent(interval.value)} on {interval.n:,} items is {'at or above' if passed else 'below'} the floor"
    return GateCheck(name, expected, interval.value, interval.low, interval.high, "PASS" if passed else "FAIL", explanation)


def _check_ratio(checkpoint: Interval | None, student: Interval | None, floor: float) -> GateCheck:
    name, expected = "share of 16-bit student kept", f"checkpoint / student ≥ {floor:.3g} (point estimates)"
    if checkpoint is None or student is None:
        return GateCheck(name, expected, None, None, None, "FAIL", "not measured; what is not measured fails")
    if student.value == 0:
        return GateCheck(
            name, expected, None, None, None, "FAIL", "the student got nothing right, so there is no share to keep"
        )
    ratio = checkpoint.value / student.value
    passed = ratio >= floor
    shown = f"{_percent(checkpoint.value)} / {_percent(student.value)} = {ratio:.3f}"
    explanation = f"{shown} is {'at or above' if passed else 'below'} the floor"
    return GateCheck(name, expected, ratio, None, None, "PASS" if passed else "FAIL", explanation)


def _check_kernels(
    kernels: Sequence[Graded], checkpoint: Sequence[Graded], margin: float | None, min_same: float | None
) -> list[GateCheck]:
    """Does the checkpoint answer on our kernels as it does where a user loads it?"""
    found = agreement(kernels, checkpoint)
    checks = []
    if margin is not None:
        checks.append(
            _equivalent("difference on our kernels", found and found.difference, margin, _discordance(kernels, checkpoint))
        )
    if min_same is not None:
        ours = _by_sample(kernels)
        same: dict[str, list[bool]] = defaultdict(list)
        if found is not None:
            for key, row in _by_sample(checkpoint).items():
                same[row.problem_id].append(row.correct == ours[key].correct)
        share = clustered(same) if same else None
        checks.append(_by_interval("same verdict on our kernels", share, min_same, "share of completions"))
    return checks


def _equivalent(name: str, difference: Interval | None, margin: float, note: str) -> GateCheck:
    expected = f"within ±{_percent(margin)}, 0 in the interval"
    if difference is None:
        return GateCheck(name, expected, None, None, None, "FAIL", "not measured; what is not measured fails")
    low, high = difference.low, difference.high
    shown = f"the 95 % interval, {_percent(low, True)} to {_percent(high, True)},"
    if low > 0 or high < 0:
        outcome, reason = "FAIL", f"{shown} leaves out 0: the two paths do not compute the same model"
    elif -margin <= low and high <= margin:
        outcome, reason = "PASS", f"{shown} lies within the margin"
    else:
        edge = math.copysign(margin, difference.value or 1.0)
        needed = items_to_decide(difference, edge)
        more = "no number of items decides at this estimate" if needed is None else f"about {needed:,} items would decide"
        outcome, reason = "INCONCLUSIVE", f"{shown} reaches over the margin, with {difference.n:,} items; {more}"
    return GateCheck(name, expected, difference.value, low, high, outcome, reason + note)


def _discordance(a: Sequence[Graded], b: Sequence[Graded]) -> str:
    """McNemar's counts and p value as a half-sentence, where every problem has one sample on both sides."""
    first, second = _correct_by_item(a), _correct_by_item(b)
    if first.keys() != second.keys() or any(len(samples) > 1 for samples in (*first.values(), *second.values())):
        return ""
    only_first = sum(first[item][0] and not second[item][0] for item in first)
    only_second = sum(second[item][0] and not first[item][0] for item in first)
    p = mcnemar_exact(only_first, only_second)
    shown = "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
    return f"; {only_first} items won, {only_second} lost, exact McNemar {shown}"
