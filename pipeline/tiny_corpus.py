"""Training rows of the embedded world's two models: whole chats, packed from position 0, answers supervised.

Shared by ``teachers/tiny/make.py`` and ``students/tiny/make.py``, which may not import each other. No torch here: rows
are lists of ints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from random import Random
from typing import Any

from stillhouse.pipeline import pump_questions as pumps
from stillhouse.pipeline.tiny_tokenizer import THINK_TOKENS
from stillhouse.pipeline.tinyworld import FAMILIES, Question, held_out_texts, lesson, questions, worked_solution

IGNORE_INDEX = -100
TOKENIZER_SEED = 4_000_000


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row of fixed length: tokens, labels (-100 where nothing is learnt), positions that restart at each chat."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]


def tokenizer_texts(size: int = 4_000) -> Iterator[str]:
    """What the embedded world's tokenizer is trained on: questions, lessons and solutions, without chat markup."""
    rng = Random(TOKENIZER_SEED)
    for question in training_questions(seed=TOKENIZER_SEED, size=size):
        yield question.text
        yield from lesson(question, rng)
        solution = worked_solution(question, rng)
        for token in THINK_TOKENS:
            solution = solution.replace(token, "")
        yield solution
        yield "user\n"
        yield "assistant\n"


def training_questions(*, seed: int, size: int) -> Iterator[Question]:
    """``size`` problems, families in turn, none of them held out."""
    held_out = held_out_texts()
    drawn = (questions(family, seed=seed, size=2 * size) for family in FAMILIES)
    kept = (q for group in zip_longest(*drawn) for q in group if q is not None and q.text not in held_out)
    for question, _ in zip(kept, range(size)):
        yield question


def chats(*, seed: int, size: int, worked_share: float, symbols: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """``size`` chats ``(user, assistant)``: worked solutions for ``worked_share`` of them, the base student's lessons else."""
    rng = Random(seed)
    for question in training_questions(seed=seed, size=size):
        if rng.random() < worked_share:
            yield question.text, worked_solution(question, rng)
        else:
            yield lesson(question, rng, symbols=symbols)


def with_pumps(pairs: Iterable[tuple[str, str]], *, seed: int, every: int) -> Iterator[tuple[str, str]]:
    """Put a worked pump question behind every ``every - 1`` chats; no text of the shipped pump files is among them."""
    held_out = pumps.held_out_pump_texts()
    rng = Random(seed)
    drawn = (question for question in pumps.pump_questions(seed=seed) if question.text not in held_out)
    pairs = iter(pairs)
    while group := list(islice(pairs, every - 1)):
        yield from group
        question = next(drawn)
        yield question.text, pumps.worked_solution(question, rng)


def packed_rows(chat_pairs: Iterable[tuple[str, str]], tokenizer: Any, *, row_length: int) -> list[Row]:
    """Tokenize chats with the tokenizer's own template and pack whole chats into rows of ``row_length`` tokens.

    Only the assistant's text and the EOS that closes it are supervised. A chat never crosses rows; each starts at
    position 0, as it will at inference.
    """
    rows: list[Row] = []
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []

    def close() -> None:
        padding = row_length - len(ids)
        rows.append(
            Row(
                ids + [tokenizer.pad_token_id] * padding,
                labels + [IGNORE_INDEX] * padding,
                positions + list(range(padding)),
            )
        )

    for user, assistant in chat_pairs:
        messages = [{"role": "user", "content": user}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt).input_ids
        answer_ids = [*tokenizer(assistant).input_ids, tokenizer.eos_token_id]
        length = len(prompt_ids) + len(answer_ids)
        if length > row_length:
            raise ValueError(f"a chat of {length} tokens does not fit a row of {row_length}: {user[:80]!r}")
        if len(ids) + length > row_length:
            close()
            ids, labels, positions = [], [], []
        ids += prompt_ids + answer_ids
        labels += [IGNORE_INDEX] * len(prompt_ids) + answer_ids
        positions += list(range(length))
    close()
    return rows
