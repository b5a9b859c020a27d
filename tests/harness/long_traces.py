"""Long traces to measure speed on: English sentences of Python's own documentation, sums and LaTeX between them, seeded."""

from __future__ import annotations

import random
import re
from pydoc_data.topics import topics

from stillhouse.pipeline.records import Problem, Trace


def sentences() -> list[str]:
    """Some thousands of English sentences, each once."""
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    found = dict.fromkeys(part.strip() for part in re.split(r"(?<=[.!?])\s+", text))
    return [part for part in found if part.isascii() and 30 <= len(part) <= 300 and "<" not in part]


def long_traces(num_traces: int, *, num_chars: int = 12_000, seed: int = 0) -> list[Trace]:
    """Traces of the length and make of a reasoning model's; they pass every filter that ships.

    Every second one has an arrow and a sign beyond ASCII in it, which is what costs: Python takes other ways then.
    """
    draw, pool = random.Random(seed), sentences()
    traces = []
    for index in range(num_traces):
        parts, size = [], 0
        while size < num_chars:
            part = draw.choice(pool) if draw.random() < 0.7 else _worked_line(draw)
            parts.append(part + draw.choice((" ", " ", "\n", "\n\n")))
            size += len(parts[-1])
        if index % 2:
            parts.append(f"Since {size}² ≥ {size}, that holds → done.\n")
        answer = draw.randint(1, 999)
        text = f"<think>\n{''.join(parts)}</think>\n\nThe answer is $\\boxed{{{answer}}}$."
        problem = Problem("?", str(answer), "math", "harness", "train")
        prompt = "<|im_start|>user\nHow many are there in the end?<|im_end|>\n<|im_start|>assistant\n"
        traces.append(
            Trace(
                key=f"{seed}-{index}", problem_id=problem.id, teacher="t", teacher_revision="", rendered_prompt=prompt,
                completion=text, reasoning=None, answer_text=None, finish_reason="stop", num_prompt_tokens=20,
                num_completion_tokens=len(text) // 4, temperature=0.6, top_p=0.95, max_new_tokens=32_768, sample_index=index,
                seed=index, seconds=0.0,
            )
        )  # fmt: skip
    return traces


def _worked_line(draw: random.Random) -> str:
    a, b, c = (draw.randint(2, 999) for _ in range(3))
    return draw.choice(
        (
            f"Wait, {a} + {b} = {a + b}, and {a + b} - {c} = {a + b - c}.",
            f"So \\frac{{{a}}}{{{b}}} \\times {c} is about {a / b * c:.3f}, which is less than {a * c:,}.",
            f"Let me check: ${a} \\cdot {b} = {a * b}$, so x = {a * b - c}.",
            f"Hmm, that gives {a}^2 = {a * a} and the remainder is {a * a % b}.",
        )
    )
