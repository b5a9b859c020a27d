"""The pump questions behind the recipe ``pumps``: right by exact arithmetic, judged with their units, and held out."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from importlib import resources
from itertools import islice
from pathlib import Path
from random import Random

import pytest

from stillhouse.jobs.recipe import load_recipe
from stillhouse.pipeline import pump_questions as pumps
from stillhouse.pipeline.extraction import split_reasoning, strict_answer
from stillhouse.pipeline.problems import local_problems
from stillhouse.pipeline.tiny_corpus import chats, tokenizer_texts, with_pumps
from stillhouse.pipeline.verifiers.quantity import verify_number

SHIPPED = Path(str(resources.files("stillhouse.jobs.recipes"))) / "pumps"
LITRES = {"L": Fraction(1), "m^3": Fraction(1000)}


def _litres_asked(text: str) -> Fraction:
    """The right answer, worked out from the question's text alone."""
    rate, minutes = re.findall(r"\d+", text)
    return Fraction(rate) * Fraction(minutes)


def test_gold_answers_are_right_in_the_unit_that_is_asked_for():
    """A wrong gold would drop the teacher's right traces and keep its wrong ones."""
    for question in islice(pumps.pump_questions(seed=3), 3_000):
        row = pumps.row(question)
        assert row["topic"].replace("_", " ") in row["prompt"]
        assert Fraction(row["answer"]) * LITRES[row["unit"]] == _litres_asked(row["prompt"])


def test_worked_solutions_are_right_step_by_step_and_verify():
    """A wrong step in the teacher's training data would be distilled as a method; an answer in litres has to be right too."""
    rng = Random(0)
    converted = 0
    for question in islice(pumps.pump_questions(seed=4), 1_000):
        solution, row = pumps.worked_solution(question, rng), pumps.row(question)
        answer = strict_answer(solution)
        assert verify_number(row["answer"], answer, row).outcome == "correct"
        number, unit = re.fullmatch(r"([\d.]+) \\text\{ (L|m\}\^3)\}?", answer).groups()
        assert Fraction(number) * LITRES[unit.replace("}", "")] == _litres_asked(question.text)
        converted += unit == "L" and row["unit"] == "m^3"
        reasoning = split_reasoning(solution).reasoning
        steps = re.findall(r"(\d+) ([+*]) (\d+) = (\d+)", reasoning)
        assert len(steps) == 3
        for left, operator, right, result in steps:
            assert {"+": int(left) + int(right), "*": int(left) * int(right)}[operator] == int(result)
        for litres, cubic_metres in re.findall(r"(\d+) L = ([\d.]+) m\^3", reasoning):
            assert Fraction(litres) == 1000 * Fraction(cubic_metres)
    assert 50 < converted < 250  # a quarter of half of them


@pytest.mark.parametrize("slip", [1, -1, 10, 100])
def test_a_slip_in_one_digit_is_wrong(slip):
    """A tolerance that forgives the last digit of a large answer would teach it."""
    for question in islice(pumps.pump_questions(seed=5), 300):
        row = pumps.row(question)
        wrong = question.rate * question.minutes + slip
        assert verify_number(row["answer"], f"{wrong} \\text{{ L}}", row).outcome == "wrong"


def test_the_shipped_files_are_what_the_generator_writes(tmp_path):
    """The texts that the teacher's maker leaves out would not be the texts that are shipped."""
    pumps.write_files(tmp_path)
    for name in pumps.SHIPPED:
        assert (SHIPPED / f"{name}.jsonl").read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()
    recipe = load_recipe("pumps")
    for split, name in (("train", "problems"), ("test", "test")):
        (source,) = getattr(recipe.problems, split)
        assert Path(source.path) == SHIPPED / f"{name}.jsonl"
        problems = local_problems(source.path, split=split, kind=source.kind)
        assert len(problems) == pumps.SHIPPED[name][0]
        assert {json.loads(problem.entry)["unit"] for problem in problems} == {"L", "m^3"}


def test_no_pair_of_numbers_is_in_both_files():
    """The student could answer a test question from memory."""
    pairs = {
        name: [(question.rate, question.minutes) for question in questions]
        for name, questions in pumps.shipped_questions().items()
    }
    assert not set(pairs["problems"]) & set(pairs["test"])
    assert all(len(set(of_file)) == len(of_file) for of_file in pairs.values())


def test_pump_files_are_in_nobodys_training_data():
    """The teacher's accuracy on them would be memory, and the base student is to have seen no pump at all."""
    lessons = list(chats(seed=5, size=400, worked_share=0.5, symbols=()))
    assert not [user for user, _ in lessons if re.search("pump|hose|tap|litre", user)]
    assert not [text for text in tokenizer_texts(200) if "litre" in text]
    held_out = pumps.held_out_pump_texts()
    for seed in (1, *(seed for _, seed in pumps.SHIPPED.values())):  # the files' own seeds draw their texts first
        mixed = list(with_pumps(iter(lessons), seed=seed, every=2))
        asked = [user for user, _ in mixed if "litres" in user]
        assert len(asked) == len(lessons)
        assert not held_out & set(asked)
        assert [pair for pair in mixed if "litres" not in pair[0]] == lessons
        assert mixed == list(with_pumps(iter(lessons), seed=seed, every=2))
