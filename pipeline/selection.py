"""Choose which correct traces to learn from: k of N for each problem, seeded and the same whatever the input order."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from stillhouse.pipeline.records import Trace, Verdict

SELECTION_VERSION = 1
Strategy = Literal["shortest", "random"]


def best_of_n(
    candidates: Sequence[Trace], *, per_problem: int, seed: int, strategy: Strategy = "shortest"
) -> tuple[list[Trace], list[Verdict]]:
    """Keep the ``per_problem`` best traces of each problem.

    Args:
        candidates: traces already judged correct.
        seed: breaks ties of ``shortest`` and decides everything of ``random``.
        strategy: ``shortest`` keeps those with the fewest completion tokens; ``random`` draws without looking.

    Returns:
        (kept, sorted by problem_id and sample_index; one dropping Verdict for each of the rest).

    Raises:
        ValueError: per_problem is under 1, or no such strategy.
    """
    if per_problem < 1:
        raise ValueError(f"per_problem must be at least 1, got {per_problem}")
    if strategy not in ("shortest", "random"):
        raise ValueError(f"strategy must be 'shortest' or 'random', got {strategy!r}")

    def draw(trace: Trace) -> str:
        return hashlib.sha256(f"{seed}:{trace.key}".encode()).hexdigest()

    def rank(trace: Trace) -> tuple[int, str]:
        return (trace.num_completion_tokens if strategy == "shortest" else 0, draw(trace))

    of_problem: dict[str, list[Trace]] = defaultdict(list)
    for trace in candidates:
        of_problem[trace.problem_id].append(trace)
    kept, verdicts = [], []
    for problem_id in sorted(of_problem):
        ranked = sorted(of_problem[problem_id], key=rank)
        kept += sorted(ranked[:per_problem], key=lambda trace: (trace.sample_index, trace.key))
        for place, trace in enumerate(ranked[per_problem:], per_problem + 1):
            evidence = f"place {place} of {len(ranked)} by {strategy}, {trace.num_completion_tokens} tokens"
            verdicts.append(Verdict(trace.key, "best_of_n", SELECTION_VERSION, False, "not among the k best", evidence))
    return kept, verdicts
