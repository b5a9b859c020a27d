"""Other people's tables of gold, prediction and verdict, judged with lenient extraction.

``tests/conformance/`` holds the tables as they stand in the tests of Math-Verify, lighteval and NeMo-Skills, each row with the
test it comes from. Rows that are left out stand in ``left_out.jsonl``, each with its reason. Beside them two tables of our own:
``writings.jsonl`` (one value in many notations, and what only looks like it) and ``completions.jsonl`` (whole completions).
"""

import json
import random
from pathlib import Path

import pytest

from stillhouse.pipeline.records import Problem
from stillhouse.pipeline.verification import self_check
from stillhouse.pipeline.verifiers.rows import judge_row, judge_rows

FOLDER = Path(__file__).parents[1] / "conformance"
TABLES = ("lighteval_extractive_match", "math_verify_tests", "nemo_skills_math_equal")


def rows(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


LEFT_OUT = {(row["table"], row["id"]) for row in rows("left_out")}


def kept(name):
    return [row for row in rows(name) if (f"{name}.jsonl", row["id"]) not in LEFT_OUT]


def disagreements(cases):
    """(gold, pred, expected) of each case that is judged otherwise, with what was said."""
    judged = judge_rows("math", [{"gold": gold, "pred": pred} for gold, pred, _ in cases], extract="lenient")
    return [(*case, said) for case, said in zip(cases, judged) if (said["verdict"] == "correct") != bool(case[2])]


@pytest.mark.parametrize("table", TABLES)
def test_every_row_of_the_table_is_judged_as_expected(table):
    """A row judged otherwise is an answer that another evaluation of the same model counts the other way."""
    cases = [(row["gold"], row["pred"], row["expected"]) for row in kept(table)]
    assert len(cases) >= 30
    assert disagreements(cases) == []


def test_bare_answers_are_judged_the_same_when_wrapped():
    """A model that writes $5$ or \\boxed{5} where the table has 5 would be marked down for its dollars."""
    cases = []
    for row in kept("nemo_skills_math_equal"):
        if row["pred"]:
            wrapped = [f"${row['pred']}$", f"\\boxed{{{row['pred']}}}", f"$\\boxed{{{row['pred']}}}$"]
            cases += [(gold, pred, row["expected"]) for pred in wrapped for gold in (row["gold"], f"${row['gold']}$")]
    assert disagreements(cases) == []


def test_symmetric_rows_hold_in_both_directions():
    """Which of two equal answers the data set calls gold is chance, and must not decide the score."""
    cases = [
        (row["pred"], row["gold"], row["expected"])
        for row in rows("nemo_skills_math_equal")
        if row["symmetric"] and row["pred"]
    ]
    assert len(cases) == 29
    assert disagreements(cases) == []


def test_bare_answers_need_no_leniency():
    """Training labels are strict; a bare right answer that only lenient extraction finds would be thrown away."""
    for row in kept("nemo_skills_math_equal"):
        said = judge_row("math", row)
        assert (said["verdict"] == "correct") == bool(row["expected"]), (row, said)


def test_few_rows_are_left_out_and_each_says_why():
    """Leaving out what fails would make any verifier pass."""
    ids = {f"{table}.jsonl": {row["id"] for row in rows(table)} for table in TABLES}
    for row in rows("left_out"):
        assert row["id"] in ids[row["table"]]
        assert len(row["reason"]) > 20
    for table, all_ids in ids.items():
        assert sum(left[0] == table for left in LEFT_OUT) <= 0.05 * len(all_ids)


def test_the_same_value_in_another_writing_and_another_value_in_the_same():
    """A right answer in a notation that the other tables lack would be thrown away, or its look-alike be learnt."""
    table = rows("writings")
    judged = judge_rows(
        "math", [{"gold": row["gold"], "pred": f"<think></think>So \\boxed{{{row['pred']}}}."} for row in table]
    )
    wrong = [(row, said) for row, said in zip(table, judged) if (said["verdict"] == "correct") != bool(row["expected"])]
    assert len(table) > 1_100
    assert wrong == []


@pytest.mark.parametrize("extract", ["strict", "lenient"])
def test_the_answer_is_found_in_whole_completions(extract):
    """A box in the think block, a second box, a fence or a "final answer" line, misread, turns the verdict."""
    table = rows("completions")
    judged = judge_rows("math", table, extract=extract)
    wrong = [(row, said) for row, said in zip(table, judged) if (said["verdict"] == "correct") != bool(row[extract])]
    assert len(table) > 130
    assert wrong == []


def test_letter_golds_are_proved_sound():
    """A multiple-choice file under kind math could not run: letters would fail the check before the first token is spent."""
    golds = ["A", "C", "J", "(B)", "(C) Paris", "\\text{D}"]
    found = self_check([Problem("Which?", gold, "math", "test", "train") for gold in golds])
    assert found.failures == []
    assert (found.gold_accepted, found.mutated_rejected) == (len(golds), len(golds))


WRAPPERS = ("${}$", "\\({}\\)", "\\[{}\\]", " {} ", "\\boxed{{{}}}", "\\displaystyle {}", "{}\\\\", "{}\\,")


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_is_only_typography_does_not_change_the_verdict(wrapper):
    """The same answer would count for a model that writes dollars, and not for one that does not."""
    table = rows("writings")[WRAPPERS.index(wrapper) :: 4]
    cases = [(row["gold"], f"<think></think>\\boxed{{{wrapper.format(row['pred'])}}}", row["expected"]) for row in table]
    judged = judge_rows("math", [{"gold": gold, "pred": pred} for gold, pred, _ in cases])
    assert [case for case, said in zip(cases, judged) if (said["verdict"] == "correct") != bool(case[2])] == []


OF_ANSWERS = r"""
1 2 0.5 x n + - * / ^ _ = < \le ( ) [ ] { } \{ \} , ; | ! % \frac \frac{1}{2} \sqrt \pi \infty \ln \pm \cup \in \text{~cm}
\text{or} \begin{pmatrix} \end{pmatrix} \begin{pmatrix}1\\2\end{pmatrix} \begin{cases} \end{cases} & \\ ^\circ \circ \binom
\sum \to \pmod{3} \bmod \cap \overline{3} \ldots x=1 y=2 (1,2) (x,y) \lfloor \max C(5,2) _5C_2 March 3rd 10:30 pm km/h 个 和
A. not minus
"""
PIECES = OF_ANSWERS.split()
SOME_GOLDS = (
    "5",
    "(1,2)",
    "x=1, y=2",
    "x>3",
    "|x|<2",
    "\\text{even}",
    "5\\text{ cm}",
    "March 3",
    "3:30",
    "\\lfloor x\\rfloor",
    "2:3",
)
LONG = [
    f"5{piece * (3_990 // len(piece))}"
    for piece in (*PIECES, "\\bmod 7", "B\\(\\circ*", "/\\circsq", "^2", "/2", "A. ", "\\cap x")
]


def test_nothing_that_a_model_may_write_raises():
    """One garbled answer would end the verification of the whole file."""
    draw = random.Random(4)
    for _ in range(2_500):
        text = draw.choice(["", " "]).join(draw.choice(PIECES) for _ in range(draw.randint(1, 8)))
        gold, pred = draw.sample([draw.choice(SOME_GOLDS), text], 2)
        assert judge_row("math", {"gold": gold, "pred": pred}, timeout_s=1.0)["verdict"] in ("correct", "wrong", "undecided")


@pytest.mark.parametrize("kind", ["math", "number"])
def test_one_piece_a_thousand_times_over_raises_nothing(kind):
    """A model that repeats itself would end the verification of the whole file: trees grow deep without brackets too."""
    for text in LONG:
        for gold, pred in (("5", text), ("A", text.replace("5", "A. ", 1)), (text, "5")):
            assert judge_row(kind, {"gold": gold, "pred": pred}, timeout_s=1.0)["verdict"] in ("correct", "wrong", "undecided")
