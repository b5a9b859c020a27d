"""Take a completion apart: the reasoning inside the think block, the text after it, and the boxed answer.

Strict on purpose: training labels come from here, so nothing is harvested from prose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)

# Escaped characters first, so that \{ and \} of a set are not counted as braces.
_BOX_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ParsedCompletion:
    """A completion in two parts, both stripped; both None without exactly one closed think block."""

    reasoning: str | None
    answer_text: str | None


def split_reasoning(completion: str, *, prompt_opens_think: bool = False) -> ParsedCompletion:
    """Split a completion into its reasoning and what follows it.

    Args:
        completion: what the model wrote, special tokens kept.
        prompt_opens_think: the prompt itself ended with ``<think>``, so that the completion has only the closing tag.

    Returns:
        both parts, or ``ParsedCompletion(None, None)`` where the block is missing, not closed, there twice, or has text
        before it.
    """
    nothing = ParsedCompletion(None, None)
    if completion.count(THINK_CLOSE) != 1 or completion.count(THINK_OPEN) != (0 if prompt_opens_think else 1):
        return nothing
    head, answer_text = completion.split(THINK_CLOSE)
    if not prompt_opens_think:
        before, opened, head = head.partition(THINK_OPEN)
        if not opened or before.strip():
            return nothing
    return ParsedCompletion(head.strip(), answer_text.strip())


def boxed_answer(text: str) -> str | None:
    r"""Return the content of the last balanced ``\boxed{...}`` in a text, stripped; None where there is none or it is blank.

    "Last" is by where the box starts, so of nested boxes the inner one counts. One pass, linear in the text's length.
    """
    open_braces: list[int | None] = []  # for each open brace, where the content starts if it is a box's
    last: tuple[int, int] | None = None
    for token in _BOX_TOKENS.finditer(text):
        if token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
        elif token[0].endswith("{") and token[0] != "\\{":
            open_braces.append(token.end())
    if last is None:
        return None
    return text[slice(*last)].strip() or None


def strict_answer(completion: str) -> str | None:
    r"""Return the last balanced ``\boxed{...}`` after the last ``</think>``; None without a ``</think>`` or a box after it."""
    _, closed, after = completion.rpartition(THINK_CLOSE)
    return boxed_answer(after) if closed else None


def fenced_block(text: str, language: str) -> str | None:
    """Return the content of the last closed ``` block of a language (or of none named) in a text, None where there is none."""
    blocks = [match[2] for match in _FENCE.finditer(text) if match[1].casefold() in ("", language)]
    return blocks[-1].strip() or None if blocks else None


def strict_answer_of(kind: str, completion: str) -> str | None:
    """Return the answer of a completion as its kind writes it: code in a fenced block, JSON in one, alone or in a box, all
    else in a box.

    None without a ``</think>``, as in `strict_answer`. Training labels go by it.
    """
    _, closed, after = completion.rpartition(THINK_CLOSE)
    if not closed:
        return None
    return _answer_in(kind, completion if kind == "code" else after)


def graded_answer_of(kind: str, completion: str) -> str | None:
    """Return the answer that a score counts: the one after the think block, or of the whole where there is no block.

    A model that never learnt to think (the base student) is so measured by what it answers, and a think block that was
    opened and not closed still counts as no answer.
    """
    if THINK_OPEN in completion or THINK_CLOSE in completion:
        return strict_answer_of(kind, completion)
    return _answer_in(kind, completion)


def _answer_in(kind: str, text: str) -> str | None:
    if kind == "code":
        from stillhouse.pipeline.verifiers.code import program_of

        return program_of(text)
    if kind == "json":
        whole = text.strip() if text.strip()[:1] in ("{", "[") else None  # JSON and nothing else
        return fenced_block(text, "json") or whole or boxed_answer(text)
    return boxed_answer(text)
