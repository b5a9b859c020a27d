"""Rows of gold and prediction: what `stillhouse verify` judges."""

import json

import pytest

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.problems import reasoning_gym_problems
from stillhouse.pipeline.verifiers.in_order import in_order
from stillhouse.pipeline.verifiers.lenient import last_boxes, lenient_answer, lenient_letter
from stillhouse.pipeline.verifiers.rows import judge_row, judge_rows


@pytest.mark.parametrize(
    ("pred", "strict", "lenient"),
    [
        ("42", "correct", "correct"),
        ("$42$", "correct", "correct"),
        (r"\boxed{42}", "correct", "correct"),
        (r"<think>7?</think>It is \boxed{42}.", "correct", "correct"),
        (r"<think>\boxed{42}", "wrong", "correct"),  # never stopped thinking
        (r"<think>\boxed{42}</think>I give up", "wrong", "wrong"),
        ("<think>so</think>The answer is 42.", "wrong", "correct"),
        ("The answer is 42.", "wrong", "correct"),
        ("First 7, then 42", "wrong", "correct"),
        ("I cannot solve it, maybe 42", "wrong", "wrong"),
        ("I do not know. 42", "wrong", "wrong"),
        ("The final answer is $42$. I hope it is correct. Note: 7 was my first thought.", "wrong", "correct"),
        (r"\boxed{7} Final Answer: The final answer is $42$.", "wrong", "correct"),
        ("6 * 7 = 42\n#### 42", "wrong", "correct"),
        ("So it is\n```\n42\n```", "wrong", "correct"),
        ("", "wrong", "wrong"),
        (None, "wrong", "wrong"),
    ],
)
def test_strict_takes_what_is_given_and_lenient_what_is_meant(pred, strict, lenient):
    """A label must never come from a number in prose; a score of somebody else's model must not depend on a box."""
    row = {"gold": "42", "pred": pred}
    assert judge_row("math", row)["verdict"] != "correct" or strict == "correct"
    assert judge_row("math", row, extract="strict")["verdict"] in ((strict,) if strict == "correct" else ("wrong", "undecided"))
    assert judge_row("math", row, extract="lenient")["verdict"] == lenient


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"\boxed{3} is wrong. After a while I found: \boxed{1}, \boxed{2}", "1, 2"),
        (r"\boxed{5} \boxed{5}", "5"),
        (r"so $\boxed{28 pct}", "28 pct"),
        (r"so \boxed{x = \frac{1", r"x = \frac{1"),
        ("there are 12 ways", "12"),
        ("Answer: we have 3 + 4 = 7 apples. Each costs 9.", "7"),
        ("réponse: encore 220 $ en 12 mois", "220"),
        ("一共有**99颗**", "99"),
        ("It is 28 percent", "28 percent"),
        ("AB2CD", None),
        ("so x = 3 + 3 = 2", "2"),
        (r"$x = 3 + 3 = 2$", "$x = 2$"),
        ("", None),
    ],
)
def test_the_answer_that_prose_means(text, answer):
    """Read otherwise, the model that we compare with is marked down for its style."""
    assert lenient_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("I think the answer is C", "C"),
        ("It's not A because of B; the answer is D, it can't be A", "D"),
        ("B) since A is odd", "B"),
        ("Let me think. (A) is odd, so (C)", "C"),
        (r"\boxed{\text{(B)}}", "B"),
        ("no idea", None),
        ("A, C", None),
    ],
)
def test_the_letter_that_prose_means(text, letter):
    """A letter that is only mentioned must not win over the one that is announced."""
    assert lenient_letter(text) == letter


def test_a_long_degenerate_completion_is_read_in_time():
    """The scan is linear: a megabyte of opened boxes, dollars or digits would otherwise stall the stage."""
    for text in ("\\boxed{", "$", "1", "\\[", "answer is ", "(1+", "\\(1 ", "a,"):
        assert len(lenient_answer(text * (1_000_000 // len(text))) or "") <= 20_000
        assert last_boxes(text * 20_000)[0] is None


def test_verdicts_come_in_the_order_of_the_rows():
    """A verdict beside another row's text would label the wrong completion."""
    rows = [{"gold": str(number), "pred": str(number if number % 3 else number + 1)} for number in range(500)]
    verdicts = [said["verdict"] for said in judge_rows("math", iter(rows), num_workers=4)]
    assert verdicts == ["correct" if number % 3 else "wrong" for number in range(500)]


def test_every_kind_has_its_row():
    """Each kind that a recipe knows can be tried on the command line first."""
    (problem,) = reasoning_gym_problems("chain_sum", split="test", size=1, seed=7, options={})
    rows = [
        ("choice", {"gold": "B", "pred": "<think>A?</think>\\boxed{B}"}),
        ("exact", {"gold": "New York", "pred": "\\boxed{New York}"}),
        ("number", {"gold": "1800 L", "pred": "\\boxed{1.8 m^3}", "rel_tol": 0.01}),
        ("json", {"schema": {"type": "array"}, "pred": "<think>a</think>\n```json\n[1]\n```"}),
        ("json", {"gold": {"a": 1}, "pred": '{"a": 1}'}),
        ("regex", {"gold": "[ab]+", "pred": "abba"}),
        ("reasoning_gym", {"gold": None, "pred": f"\\boxed{{{problem.answer}}}", "entry": json.loads(problem.entry)}),
    ]
    for kind, row in rows:
        assert judge_row(kind, row)["verdict"] == "correct", (kind, row)
    assert judge_row("json", {"schema": {"type": "array"}, "pred": "{}"})["verdict"] == "wrong"


GYM_ITEM = {"question": "4 + 3 = ?", "answer": "7", "metadata": {"source_dataset": "chain_sum"}}


@pytest.mark.parametrize(
    ("entry", "pred", "outcome"),
    [
        (GYM_ITEM, r"\boxed{7}", "correct"),
        (json.dumps(GYM_ITEM), r"\boxed{\text{7}}", "correct"),
        (GYM_ITEM, r"\boxed{8}", "wrong"),
        ({"answer": "1234567", "metadata": {"source_dataset": "chain_sum"}}, r"\boxed{1{,}234{,}567}", "correct"),
        ({"answer": "yes", "metadata": {"source_dataset": "syllogism"}}, r"\boxed{\text{yes}}", "correct"),
        (
            {"answer": "2 days", "metadata": {"source_dataset": "time_intervals", "task_type": "date"}},
            "2 days, 9 days",
            "wrong",
        ),
        ({"answer": "a, b", "metadata": {"source_dataset": "word_sorting", "sorted_words": ["a", "b"]}}, "a, b, c", "wrong"),
        (
            {"answer": "x + C", "metadata": {"source_dataset": "simple_integration", "variable": "x", "integrand": "1"}},
            "x + C or 2*x",
            "wrong",
        ),
    ],
)
def test_an_item_of_reasoning_gym_is_a_row(entry, pred, outcome):
    """Whoever has the items alone could not score a model; and "this or that" must not count as this."""
    assert judge_row("reasoning_gym", {"entry": entry, "pred": pred})["verdict"] == outcome


@pytest.mark.parametrize(
    "row",
    [
        {"entry": "x"},
        {"entry": {"answer": "7"}},
        {"entry": {"answer": "7", "metadata": {"source_dataset": "no_such_task"}}},
        {"entry": GYM_ITEM, "options": {"no_such_option": 1}},
        {"entry": GYM_ITEM, "task": 5},
    ],
)
def test_an_item_that_is_none_is_said(row):
    """One broken row would end a scoring run with a traceback."""
    with pytest.raises(RecipeError, match=r"reasoning|entry"):
        judge_row("reasoning_gym", {"pred": "7", **row})


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("json", {"pred": "1"}),
        ("regex", {"pred": "1"}),
        ("code", {"pred": "1"}),
        ("number", {"gold": "1", "pred": "1", "entry": [1]}),
    ],
)
def test_a_row_that_nothing_can_judge_is_refused(kind, row):
    """A misspelt column would make every row undecided, with an exit code that says all is well."""
    with pytest.raises(RecipeError, match=r"needs|must be"):
        judge_row(kind, row)


def test_a_column_that_a_kind_does_not_read_is_left_alone():
    """A data set with an ``entry`` of its own could not be judged at all."""
    assert judge_row("math", {"gold": "1", "pred": "1", "entry": "aardvark"})["verdict"] == "correct"


def test_a_long_text_is_matched_by_its_pattern():
    """An essay that has to hold no comma is longer than any formula."""
    row = {"pattern": "[^,]*", "pred": "no comma here " * 1000}
    assert judge_row("regex", row)["verdict"] == "correct"
    assert judge_row("regex", {**row, "pred": row["pred"] + ","})["verdict"] == "wrong"


def test_a_row_without_its_fields_is_named():
    """A misspelt column would be judged as no answer, 10,000 times."""
    with pytest.raises(RecipeError, match=r"'gold' and 'pred'.*'answer'"):
        judge_row("math", {"gold": "1", "answer": "1"})
    with pytest.raises(RecipeError, match="kind='maths'"):
        judge_row("maths", {"gold": "1", "pred": "1"})


def test_an_endless_source_is_read_a_little_ahead():
    """A stream that is longer than memory would end the process that judges it."""
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield {"gold": "1", "pred": "1"}

    verdicts = judge_rows("math", endless(), num_workers=2)
    assert [next(verdicts)["verdict"] for _ in range(5)] == ["correct"] * 5
    verdicts.close()
    assert len(read) < 1_000


def test_a_row_that_raises_costs_none_before_it():
    """The verdicts of all rows that were read before a broken one would be lost with it."""
    said = judge_rows("math", [{"gold": "1", "pred": "1"}] * 40 + [{"gold": "1"}])
    before = [next(said)["verdict"] for _ in range(32)]  # a chunk is lost as a whole
    assert before == ["correct"] * 32
    with pytest.raises(RecipeError, match="needs 'gold' and 'pred'"):
        list(said)


def test_what_was_judged_before_a_failure_comes_first():
    """A defect in one row would take the verdicts of fifteen others with it."""

    def function(item):
        if item == 3:
            raise OSError("no")
        return item

    results = in_order(function, [[0, 1, 2, 3, 4]], num_workers=1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="no"):
        next(results)
