"""Synthetic calls for the harnesses: keys, answers of a made-up vendor, and the function that reads them into traces."""

from __future__ import annotations

import json
import random

from stillhouse.pipeline.records import Trace, content_key
from stillhouse.pipeline.trace_store.writer import Intent

_WORDS = [
    f"{a}{b}{c}" for a in ("ta", "rem", "so", "quil", "ve") for b in ("n", "sto", "li", "ra") for c in ("der", "ma", "x", "ing")
]
RESERVED_TOKENS = 600
"""Prompt tokens, and completion tokens, that a call reserves unless it says otherwise."""


def planned_key(plan: str, index: int) -> str:
    return content_key("chaos", plan, index)


def make_intent(key: str, prompt_tokens: int = RESERVED_TOKENS, completion_tokens: int = RESERVED_TOKENS) -> Intent:
    """A call about to go out, which reserves so many tokens."""
    request = json.dumps({"key": key, "problem_id": "p"}).encode()
    return Intent(key, "p", request, prompt_tokens, completion_tokens, endpoint="vendor")


def make_text(identity: str, num_words: int = 180) -> str:
    """About six characters a word, decided by ``identity``, which is its first word."""
    return " ".join([identity, *random.Random(identity).choices(_WORDS, k=num_words)])


def make_answer(text: str, prompt_tokens: int, completion_tokens: int) -> bytes:
    return json.dumps({"text": text, "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}).encode()


def parse_answer(request: bytes, raw: bytes) -> Trace:
    """Read the made-up vendor's answer.

    Raises:
        ValueError: it is no answer.
    """
    asked, answer = json.loads(request), json.loads(raw)
    if not isinstance(answer, dict) or "text" not in answer:
        raise ValueError(f"an answer is an object with text; this is {raw[:40]!r}")
    return Trace(
        key=asked["key"],
        problem_id=asked["problem_id"],
        teacher="synthetic",
        teacher_revision="1",
        rendered_prompt="prompt",
        completion=answer["text"],
        reasoning=None,
        answer_text=None,
        finish_reason="stop",
        num_prompt_tokens=answer["prompt_tokens"],
        num_completion_tokens=answer["completion_tokens"],
        temperature=0.6,
        top_p=0.95,
        max_new_tokens=RESERVED_TOKENS,
        sample_index=0,
        seed=0,
        seconds=0.01,
    )
