"""The gate's verdicts: what goes out, what does not, and what needs more problems."""

import dataclasses
import random

import pytest

from stillhouse.pipeline.errors import ExitCode
from stillhouse.pipeline.gate import accuracy, accuracy_by_family, agreement, behaviour, judge
from stillhouse.pipeline.records import Graded

FLOORS = {
    "min_accuracy": 0.60,
    "min_family_accuracy": 0.40,
    "min_student_ratio": 0.95,
    "min_gain": 0.30,
    "max_drop": 0.03,
    "min_think_closed": 0.90,
    "max_kernel_difference": 0.05,
    "min_same_verdict": 0.95,
}
FAMILIES = ("sums", "words", "dates")


def graded(num_correct, n=600, model="checkpoint", num_open=0, samples=1):
    """``n`` problems in three families, the first ``num_correct`` right, the last ``num_open`` with an open think block."""
    return [
        Graded(
            model=model,
            problem_id=f"p{i:04d}",
            source=FAMILIES[i % 3],
            sample_index=sample,
            correct=i < num_correct,
            outcome="correct" if i < num_correct else "wrong",
            reason="",
            completion="<think>…</think>\\boxed{1}",
            finish_reason="stop" if i < n - num_open else "length",
            num_completion_tokens=100 + i % 7,
            think_closed=i < n - num_open,
            answer_found=i < n - num_open,
        )
        for i in range(n)
        for sample in range(samples)
    ]


def decide(base=60, student=480, checkpoint=480, checkpoint_kernels="same", integrity_ok=True, **changes):
    """Counts of right answers out of 600, or lists of graded completions; on our kernels as in transformers by default."""
    models = {"base": base, "student": student, "checkpoint": checkpoint}
    models["checkpoint_kernels"] = checkpoint if checkpoint_kernels == "same" else checkpoint_kernels
    models = {name: graded(rows, model=name) if isinstance(rows, int) else rows for name, rows in models.items()}
    return judge(**models, integrity_ok=integrity_ok, **(FLOORS | changes))


def outcome(result, name):
    (check,) = [check for check in result.checks if check.name == name]
    return check


def test_a_good_checkpoint_passes():
    """Every checkpoint would be refused."""
    result = decide()
    assert (result.verdict, result.exit_code) == ("PASS", ExitCode.PASS)
    assert {check.outcome for check in result.checks} == {"PASS"}
    assert [check.name for check in result.checks] == [
        "integrity",
        "same problems",
        "think block closed",
        "accuracy",
        *(f"accuracy in {family}" for family in sorted(FAMILIES)),
        "gain over base",
        "drop from 16-bit student",
        "share of 16-bit student kept",
        "difference on our kernels",
        "same verdict on our kernels",
    ]


def test_an_unchanged_model_passes_whatever_its_accuracy():
    """A quantization that changes nothing would be refused: the fault of rules like "lower bound ≥ 0.95 × baseline"."""
    rng = random.Random(0)
    for _ in range(20):
        rows = [dataclasses.replace(row, correct=rng.random() < 0.7) for row in graded(0, n=500)]
        result = decide(base=graded(0, n=500), student=rows, checkpoint=rows, min_accuracy=0.5)
        assert result.verdict == "PASS"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"student": 300, "checkpoint": 300}, "accuracy"),
        ({"student": 600, "checkpoint": 540}, "drop from 16-bit student"),
        ({"base": 400}, "gain over base"),
        ({"student": 600, "checkpoint": 560}, "share of 16-bit student kept"),
        ({"checkpoint": graded(480, num_open=90)}, "think block closed"),
    ],
)
def test_each_floor_refuses_on_its_own(changes, name):
    """A checkpoint that lost its quality, its reasoning or its gain would go out."""
    result = decide(**changes)
    check = outcome(result, name)
    assert (check.outcome, result.verdict, result.exit_code) == ("FAIL", "FAIL", ExitCode.GATE_FAILED)
    assert "below the floor" in check.explanation


def test_one_weak_family_fails_behind_a_good_average():
    """A checkpoint that cannot do one of the tasks at all would go out on the strength of the others."""
    rows = [dataclasses.replace(row, correct=row.source != "dates") for row in graded(600)]
    result = decide(student=rows, checkpoint=rows)
    assert outcome(result, "accuracy").outcome == "PASS"
    assert outcome(result, "accuracy in dates").outcome == "FAIL"
    assert outcome(result, "accuracy in sums").outcome == "PASS"
    assert result.exit_code == ExitCode.GATE_FAILED


def test_a_floor_inside_the_interval_is_inconclusive_and_says_what_would_decide():
    """A coin toss would be reported as a verdict."""
    result = decide(student=375, checkpoint=375)  # 62.5 %, interval 58.6 to 66.3
    check = outcome(result, "accuracy")
    assert (check.outcome, result.verdict, result.exit_code) == ("INCONCLUSIVE", "INCONCLUSIVE", ExitCode.INCONCLUSIVE)
    assert check.low < 0.60 < check.measured
    assert "about 1,4" in check.explanation  # z² · 0.6 · 0.4 / 0.025² = 1,475


def test_an_estimate_below_the_floor_is_not_yet_a_failure():
    """A sound checkpoint that had bad luck on few problems would be thrown away."""
    result = decide(student=345, checkpoint=345)  # 57.5 %, interval 53.5 to 61.4
    assert outcome(result, "accuracy").outcome == "INCONCLUSIVE"
    assert result.exit_code == ExitCode.INCONCLUSIVE


def test_a_failure_outweighs_an_open_question():
    """A failed checkpoint would come back as "measure more"."""
    result = decide(student=375, checkpoint=375, min_gain=0.9)
    assert outcome(result, "accuracy").outcome == "INCONCLUSIVE"
    assert (result.verdict, result.exit_code) == ("FAIL", ExitCode.GATE_FAILED)


def test_a_broken_folder_fails_with_its_own_exit_code():
    """A script could not tell a corrupted file from a weak model."""
    result = decide(integrity_ok=False)
    assert (result.verdict, result.exit_code) == ("FAIL", ExitCode.INTEGRITY)
    assert outcome(result, "integrity").outcome == "FAIL"


@pytest.mark.parametrize("missing", ["base", "student", "checkpoint"])
def test_an_unmeasured_model_fails_and_never_skips(missing):
    """A crashed evaluation would look like a pass."""
    result = decide(**{missing: []})
    assert (result.verdict, result.exit_code) == ("FAIL", ExitCode.INFRASTRUCTURE)
    assert f"{missing} has no graded completion" in outcome(result, "same problems").explanation
    assert outcome(result, "drop from 16-bit student").outcome == "FAIL"
    assert outcome(result, "gain over base").measured is None


def test_nothing_measured_at_all_fails_every_check_of_quality():
    """An evaluation of zero problems would pass for lack of counter-evidence."""
    result = decide(base=[], student=[], checkpoint=[])
    assert {check.outcome for check in result.checks if check.name != "integrity"} == {"FAIL"}
    assert len(result.checks) == 10


@pytest.mark.parametrize(
    "other",
    [
        graded(480, n=599),
        [dataclasses.replace(row, problem_id="q" + row.problem_id) for row in graded(480)],
        [dataclasses.replace(row, source="other") for row in graded(480)],
        graded(480, samples=2),
        graded(480) + graded(480)[:1],
    ],
    ids=["one fewer", "other problems", "other families", "more samples", "one twice"],
)
def test_models_on_different_problems_fail(other):
    """A checkpoint would be held against a student that answered easier problems."""
    result = decide(student=other)
    assert outcome(result, "same problems").outcome == "FAIL"
    assert (result.verdict, result.exit_code) == ("FAIL", ExitCode.INFRASTRUCTURE)


def test_a_student_with_nothing_right_fails_the_ratio():
    """0 / 0 would raise, or be read as "everything kept"."""
    result = decide(student=0, checkpoint=0)
    assert outcome(result, "share of 16-bit student kept").outcome == "FAIL"


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_a_threshold_that_is_not_a_number_is_refused(name):
    """NaN compares false with everything, so a check with it could never fail."""
    with pytest.raises(ValueError, match=f"{name} has to be a finite number; got nan"):
        decide(**{name: float("nan")})


def test_several_samples_a_problem_are_clustered():
    """Sampling each problem eight times would make 75 problems look like 600."""
    few = accuracy(graded(45, n=75, samples=8))
    assert (few.value, few.n) == (0.6, 75)
    assert few.high - few.low > 0.2
    result = decide(
        base=graded(6, n=75, samples=8),
        student=graded(45, n=75, samples=8),
        checkpoint=graded(45, n=75, samples=8),
        min_accuracy=0.55,
    )
    assert outcome(result, "accuracy").outcome == "INCONCLUSIVE"


def test_behaviour_counts_how_completions_end():
    """A model that never closes its think block would not be seen in the report."""
    summary = behaviour(graded(480, num_open=60))
    assert (summary.num, summary.think_closed_rate, summary.stop_rate, summary.answer_found_rate) == (600, 0.9, 0.9, 0.9)
    assert summary.mean_completion_tokens == pytest.approx(102.99, abs=0.01)
    assert behaviour([]).think_closed_rate is None


def test_families_are_measured_apart():
    """The report would give every family the overall number."""
    rows = [dataclasses.replace(row, correct=row.source == "sums") for row in graded(0, n=300)]
    assert {family: interval.value for family, interval in accuracy_by_family(rows).items()} == {
        "dates": 0,
        "sums": 1,
        "words": 0,
    }
    assert all(interval.n == 100 for interval in accuracy_by_family(rows).values())
    assert accuracy([]) is None


def test_the_difference_names_items_won_and_lost():
    """A user would not see whether a drop is two items or two hundred."""
    check = outcome(decide(student=480, checkpoint=478), "drop from 16-bit student")
    assert "0 items won, 2 lost, exact McNemar p = 0.5" in check.explanation
    assert check.expected == "checkpoint − student ≥ -3.0 %"


def test_a_threshold_of_none_asks_nothing():
    """A recipe's null must leave its check out, and the others in."""
    result = decide(min_accuracy=None, min_gain=None, max_drop=None, min_student_ratio=None, min_think_closed=None)
    names = {check.name for check in result.checks}
    assert "difference on our kernels" in names
    assert not names & {"accuracy", "gain over base", "drop from 16-bit student", "think block closed"}
    assert any(name.startswith("accuracy in") for name in names)
    assert decide(min_accuracy=0.99, min_gain=None).verdict == "FAIL"


def flipped(rows, right=0, wrong=0):
    """The first ``wrong`` right answers made wrong, the first ``right`` wrong ones made right."""
    lost = {row.problem_id for row in [row for row in rows if row.correct][:wrong]}
    won = {row.problem_id for row in [row for row in rows if not row.correct][:right]}
    return [
        dataclasses.replace(row, correct=(row.correct or row.problem_id in won) and row.problem_id not in lost) for row in rows
    ]


def test_a_few_ties_that_fall_otherwise_do_not_refuse_a_checkpoint():
    """Rounding in the last bit of a few near-ties would stop every release."""
    result = decide(checkpoint_kernels=flipped(graded(480), right=3, wrong=5))
    difference = outcome(result, "difference on our kernels")
    assert (difference.outcome, difference.measured) == ("PASS", pytest.approx(-2 / 600))
    assert "3 items won, 5 lost, exact McNemar p = 0.73" in difference.explanation
    assert outcome(result, "same verdict on our kernels").measured == pytest.approx(592 / 600)
    assert result.verdict == "PASS"


@pytest.mark.parametrize("changed", [{"wrong": 12}, {"right": 12}], ids=["worse", "better"])
def test_kernels_that_answer_otherwise_on_average_fail(changed):
    """Wrong kernels would go unseen, as long as what they spoil is less than the margin: 12 of 600 are not 5 points."""
    result = decide(checkpoint_kernels=flipped(graded(480), **changed))
    check = outcome(result, "difference on our kernels")
    assert abs(check.measured) < 0.05
    assert (check.outcome, result.exit_code) == ("FAIL", ExitCode.GATE_FAILED)
    assert "leaves out 0: the two paths do not compute the same model" in check.explanation


def test_answers_that_change_in_both_directions_fail():
    """Kernels that scramble answers evenly have the same pass@1; only the verdicts themselves show it."""
    result = decide(checkpoint_kernels=flipped(graded(480), right=40, wrong=40))
    assert outcome(result, "difference on our kernels").outcome == "PASS"
    check = outcome(result, "same verdict on our kernels")
    assert (check.outcome, check.measured) == ("FAIL", pytest.approx(520 / 600))
    assert (result.verdict, result.exit_code) == ("FAIL", ExitCode.GATE_FAILED)


def test_too_few_problems_cannot_show_that_the_paths_agree():
    """A run on eighteen problems would prove nothing and pass."""
    few = graded(14, n=18)
    result = decide(base=graded(1, n=18), student=few, checkpoint=few, min_same_verdict=None, min_accuracy=None)
    check = outcome(result, "difference on our kernels")
    assert (check.outcome, check.measured) == ("INCONCLUSIVE", 0)
    assert "18 items; about 139 items would decide" in check.explanation  # 18 · (1.96 · √2 / 20 / 0.05)²
    assert (
        outcome(
            decide(
                base=graded(1, n=18),
                student=few,
                checkpoint=few,
                min_same_verdict=None,
                min_accuracy=None,
                max_kernel_difference=0.5,
            ),
            "difference on our kernels",
        ).outcome
        == "PASS"
    )


def test_our_kernels_not_asked_for_are_not_judged_and_not_measured_fail():
    """A recipe that leaves the second evaluation out would fail, or one whose evaluation crashed would pass."""
    without = decide(checkpoint_kernels=None)
    assert without.verdict == "PASS"
    assert not [check.name for check in without.checks if "kernels" in check.name]
    crashed = decide(checkpoint_kernels=[])
    assert (crashed.verdict, crashed.exit_code) == ("FAIL", ExitCode.INFRASTRUCTURE)
    assert "checkpoint on our kernels has no graded completion" in outcome(crashed, "same problems").explanation
    assert outcome(crashed, "difference on our kernels").measured is None
    assert outcome(crashed, "same verdict on our kernels").outcome == "FAIL"


def test_agreement_counts_sample_by_sample():
    """The report would compare one sample of a problem with another, or call different texts the same."""
    rows = graded(6, n=8, samples=2)
    other = [dataclasses.replace(row, completion="else") if row.problem_id == "p0001" else row for row in reversed(rows)]
    other[0] = dataclasses.replace(other[0], correct=True)  # the second sample of the last problem
    found = agreement(other, rows)
    assert (found.num_completions, found.num_same_verdict, found.num_same_completion) == (16, 15, 14)
    assert (found.difference.value, found.difference.n) == (pytest.approx(0.5 / 8), 8)
    assert agreement(rows, rows[:-1]) is None
    assert agreement([], []) is None
