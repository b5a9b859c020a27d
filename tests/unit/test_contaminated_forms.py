"""Test items as other people's files have them: other LaTeX, escapes, choices with letters and without, text around them."""

import json
import re

import pytest

from stillhouse.pipeline.decontamination import Decontaminator
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.overlap.evaluation_sets import evaluation_prompts

CONTEST = (
    r"Let $\theta = 40^\circ$ and $x_{1} \leq \frac{\pi}{3}$ be real, and let $f(x) = x^{4}+4x^{2}$. For how many integers "
    r"$k \neq 5^7 \cdot 2^8$ does $\angle ABC = \sqrt{7} \times k$ hold, if $\infty$ is no number?"
)
STORY = "Carla’s 20 hens lay 3 eggs each on Monday. She sells 14 of them at 2 euros apiece. How many eggs are left over?"


@pytest.mark.parametrize(
    "copy",
    [
        CONTEST.replace("{4}", "4").replace("{2}", "2").replace("{1}", "1"),
        CONTEST.replace("^7", "^{7}").replace("^8", "^{8}").replace(r"^\circ", r"^{\circ}"),
        CONTEST.replace("^{4}", "⁴").replace("^{2}", "²").replace("_{1}", "₁"),
        CONTEST.replace(r"\theta", "θ")
        .replace(r"\leq", "≤")
        .replace(r"\pi", "π")
        .replace(r"\neq", "≠")
        .replace(r"^\circ", "°"),
        CONTEST.replace(r"\angle", "∠").replace(r"\sqrt{7}", "√7").replace(r"\infty", "∞").replace(r"\times", "×"),
        json.dumps(CONTEST),
        repr(f"Problem:\n{CONTEST}\nAnswer:"),
        json.dumps(CONTEST.replace(" Let", " \\\\\nLet").replace(" For", " \\\\\nFor")),
        CONTEST.replace("$", "").replace(" ", "\n", 9),
    ],
)
def test_other_latex_is_no_other_problem(copy):
    """Data sets pass through converters that brace, unbrace, escape and spell signs; each is the same leaked item."""
    decontaminator = Decontaminator([CONTEST])
    for prompt, trace in ((copy, ""), ("What?", f"<think>Take this one:\n{copy}\nWell.</think>4")):
        assert decontaminator.check(prompt, trace) is not None
    assert decontaminator.check(re.sub(r"\b5", "6", copy), "") is None


@pytest.mark.parametrize("around", ["Q7) {} [5 marks]", "A friend asked me, {} And I did not know.", "[Q 3] {}", "(12) {}"])
def test_what_stands_around_an_item_does_not_hide_it(around):
    """Exam sheets number their questions and say what they are worth."""
    assert Decontaminator([STORY]).check(around.format(STORY), "").reason == "the prompt holds a test problem"
    assert Decontaminator([STORY]).check(around.format(STORY.replace("14", "15")), "") is None


@pytest.mark.parametrize(
    "around", ["A student asked me, {} and I was not sure.", "For homework last week they gave us {} to do at home."]
)
def test_words_around_an_item_in_its_sentence_do_not_hide_it_and_numbers_make_another(around):
    """Whoever retells a test item does not end his sentence before it; a list that goes on is another problem."""
    item = "Find the number of legs of 3 dogs, 4 hens and 2 cows"
    decontaminator = Decontaminator([item])
    for text, found in ((around.format(item), True), (around.format(f"{item}, 7 cats"), False)):
        assert bool(decontaminator.check_prompt(text)) is found
        assert bool(decontaminator.check("What?", f"<think>\nWell, so.\n{text}\nHm.</think>4")) is found
    assert decontaminator.check_prompt(around.format(f"7 cats and then {item}")) is None


def test_escaped_letters_are_letters():
    """A Chinese item in a JSON string is all \\u escapes."""
    item = "小明有15个苹果，他给了小红7个，又买了9个，现在小明有多少个苹果？"
    assert Decontaminator([item]).check(json.dumps({"question": item}), "") is not None
    assert Decontaminator([item]).check(json.dumps({"question": item.replace("15", "16")}), "") is None


QUESTION = "A tank of 300 litres is filled by two pumps of 12 and 18 litres a minute. After how many minutes is it full?"
CHOICES = ["8 minutes", "10 minutes", "12 minutes", "25 minutes"]


def as_written(form, choices=CHOICES):
    return "\n".join([QUESTION, *(form.format(letter, choice) for letter, choice in zip("ABCD", choices))])


@pytest.mark.parametrize(
    "form", ["{}. {}", "({}) {}", "{}) {}", "{}: {}", "**{}.** {}", r"$\textbf{{({})}}$ {}", "- {1}", "{1}"]
)
def test_choices_are_written_in_many_ways(tmp_path, form):
    """The set has its choices in a list, a prompt behind letters: the same question all the same."""
    (tmp_path / "set.jsonl").write_text(json.dumps({"question": QUESTION, "choices": CHOICES}) + "\n")
    prompts = evaluation_prompts(str(tmp_path / "set.jsonl"), field=("question", "choices"))
    decontaminator = Decontaminator({"quiz": prompts})
    for prompt, trace in ((as_written(form), ""), ("What?", f"<think>Look:\n{as_written(form)}\nSo B.</think>B")):
        assert decontaminator.check(prompt, trace).reason.endswith("holds an item of quiz")
    assert decontaminator.check(as_written(form, CHOICES[::-1]), "") is not None
    assert decontaminator.check(QUESTION, "") is not None
    others = ["9 minutes", *CHOICES[1:]]
    assert decontaminator.check(as_written(form, others), "") is None
    assert decontaminator.check(as_written(form).replace("300", "420"), "") is None


def test_a_short_item_is_not_the_words_it_begins_with():
    """One "Find the derivative of the function" in a test set must not take all exercises of a calculus course along."""
    decontaminator = Decontaminator(["Find the derivative of the function: $\\sqrt{x}$", STORY])
    assert decontaminator.check("Find the derivative of the function: √x.", "") is not None
    for other in ("\\ln(\\cos(x))", "3^{x^2}", "-4 x^{5}+3 x^{2}"):
        assert decontaminator.check(f"Find the derivative of the function: ${other}$", "") is None


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ({"Question": "How many?", "Body": "Ana has 3 pears."}, None, "Ana has 3 pears.\nHow many?"),
        ({"question": "How many?", "context": None}, None, "How many?"),
        ({"question": "Which?", "options": {"A": "x", "B": "y"}}, ["question", "options"], "Which?\nA. x\nB. y"),
        (
            {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}},
            ["question", "choices"],
            "Which?\nA. x\nB. y",
        ),
        ({"question": "Which?", "options": ["A) 1", "B) 2"]}, ["question", "options"], "Which?\nA) 1\nB) 2"),
        ({"question": "Which?", "options": [1, 2.5]}, ["question", "options"], "Which?\nA. 1\nB. 2.5"),
        ({"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]}, None, "Why?"),
    ],
)
def test_the_layouts_of_sets_on_the_hub(tmp_path, row, field, expected):
    """Half an item (the question without its story) would match other problems and miss its own."""
    (tmp_path / "set.jsonl").write_text(json.dumps(row) + "\n")
    assert evaluation_prompts(str(tmp_path / "set.jsonl"), field=field) == [expected]


def test_choices_that_are_no_text_are_refused(tmp_path):
    """Joined as Python prints them, they would match nothing."""
    (tmp_path / "set.jsonl").write_text(json.dumps({"question": "Which?", "choices": [["x"], ["y"]]}) + "\n")
    with pytest.raises(RecipeError, match="row 1: field 'choices' holds a list, not text"):
        evaluation_prompts(str(tmp_path / "set.jsonl"), field=["question", "choices"])
