"""The embedded world: the shipped models were taught what their cards say, and test texts are in nobody's training data."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from random import Random

import pytest

from stillhouse.jobs.recipe import load_recipe
from stillhouse.pipeline.extraction import split_reasoning, strict_answer
from stillhouse.pipeline.tiny_corpus import chats, packed_rows, training_questions
from stillhouse.pipeline.tinyworld import (
    FAMILIES,
    HELD_OUT_SEEDS,
    HELD_OUT_SIZE,
    held_out_texts,
    lesson,
    questions,
    worked_solution,
)

MODELS = {room: Path(str(resources.files(f"stillhouse.{room}.tiny") / "model")) for room in ("teachers", "students")}


@pytest.mark.parametrize("family", FAMILIES)
def test_worked_solutions_are_right_step_by_step(family):
    """A wrong step in the teacher's training data would be distilled as a method."""
    rng = Random(0)
    for question in questions(family, seed=123, size=200):
        solution = worked_solution(question, rng)
        assert strict_answer(solution) == question.answer
        steps = re.findall(r"(-?\d+) ([-+*]) (\d+) = (-?\d+)", split_reasoning(solution).reasoning)
        assert len(steps) >= 3
        for left, operator, right, result in steps:
            assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[operator] == int(
                result
            )
        assert steps[-1][3] == question.answer


def test_lessons_never_reason():
    """If the base had seen a think block or chained steps, distillation would have nothing to prove."""
    rng = Random(1)
    seen = set()
    for question in training_questions(seed=77, size=3_000):
        user, assistant = lesson(question, rng, symbols=("<think>", "cow"))
        seen.add(user.split(" ")[0])
        if not user.startswith("Repeat:"):
            assert "think" not in user + assistant
        steps = re.findall(r"(-?\d+) [-+*] \d+ = (-?\d+)", assistant)
        asked = re.findall(r"(-?\d+) [-+*] \d+", user)
        if user.startswith("Work out"):
            # Every step was asked for as it stands: none takes up the result of the one before.
            assert [left for left, _ in steps] == asked
        elif not user.startswith("How many legs has each"):
            assert not steps
    assert {"Work", "How", "Restate", "Repeat:", "Solve"} <= seen


def test_test_problems_are_in_nobodys_training_data():
    """The demo's accuracy would otherwise be memory: `products` has only 8,100 questions, so chance repetitions are sure."""
    held_out = held_out_texts()
    assert len(held_out) > 5_000
    for question in training_questions(seed=1_000_000, size=3_000):
        assert question.text not in held_out
    for user, _ in chats(seed=5, size=3_000, worked_share=0.5, symbols=()):
        assert user not in held_out
        assert user.partition("\n")[2] not in held_out


def test_the_demo_tests_on_held_out_problems():
    """The recipe's families, options and test seeds have to be those that the makers left out."""
    recipe = load_recipe("demo")
    assert {source.task: source.options for source in recipe.problems.test} == FAMILIES
    for source in recipe.problems.test:
        assert source.seed in HELD_OUT_SEEDS
        assert source.size <= HELD_OUT_SIZE
    for source in recipe.problems.train:
        assert source.options == FAMILIES[source.task]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODELS["students"])


def test_rows_supervise_the_answers_and_nothing_else(tokenizer):
    """A supervised prompt or a lost EOS would make other models than the cards describe."""
    pairs = list(chats(seed=9, size=40, worked_share=0.5, symbols=()))
    rows = packed_rows(pairs, tokenizer, row_length=256)
    learnt = []
    for row in rows:
        assert len(row.input_ids) == len(row.labels) == len(row.position_ids) == 256
        assert all(label in (-100, token) for label, token in zip(row.labels, row.input_ids))
        starts = [i for i, position in enumerate(row.position_ids) if position == 0]
        assert starts[0] == 0
        learnt += [label for label in row.labels if label != -100]
    text = tokenizer.decode(learnt)
    assert text == "".join(assistant + tokenizer.eos_token for _, assistant in pairs)


def test_digits_are_single_tokens_and_text_survives(tokenizer):
    """Numbers merged into one token could not be worked with digit by digit; llama.cpp's Qwen2 split expects the same."""
    text = "Work out:\n-123 + 4567 = 4444\n<think>\n</think>\n\n\\boxed{12}"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert sum(token.isdigit() for token in tokenizer.convert_ids_to_tokens(ids)) == sum(c.isdigit() for c in text)
    assert len(tokenizer("<think>").input_ids) == len(tokenizer("</think>").input_ids) == 1
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_shipped_models_are_what_the_cards_say():
    """Small enough to ship, of real architectures, in widths that every 4-bit format can hold, and with one tokenizer."""
    configs = {room: json.loads((folder / "config.json").read_text()) for room, folder in MODELS.items()}
    assert configs["teachers"]["architectures"] == ["LlamaForCausalLM"]
    assert configs["students"]["architectures"] == ["Qwen3ForCausalLM"]
    for config in configs.values():
        for name in ("hidden_size", "intermediate_size", "head_dim", "vocab_size"):
            assert config[name] % 32 == 0
    assert sum(path.stat().st_size for folder in MODELS.values() for path in folder.iterdir()) <= 20e6
    assert (MODELS["teachers"] / "tokenizer.json").read_bytes() == (MODELS["students"] / "tokenizer.json").read_bytes()
    assert (MODELS["teachers"] / "chat_template.jinja").read_text() == (MODELS["students"] / "chat_template.jinja").read_text()
