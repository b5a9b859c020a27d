"""Ask a model the test problems and grade what it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from stillhouse.pipeline.extraction import graded_answer_of, split_reasoning
from stillhouse.pipeline.prompts import opens_think_block
from stillhouse.pipeline.records import Completion, Graded, Outcome, Problem, content_key


class Judged(Protocol):
    """What a verifier answers: ``correct``, ``wrong`` or ``undecided``, and why."""

    @property
    def outcome(self) -> Outcome: ...
    @property
    def reason(self) -> str: ...


def evaluate(
    generate: Callable[[list[str], list[int]], list[Completion]],
    problems: Sequence[Problem],
    *,
    model_name: str,
    rendered_prompts: Sequence[str],
    num_samples: int = 1,
    seed: int,
    verify: Callable[[Problem, str | None], Judged],
) -> list[Graded]:
    """Grade ``num_samples`` completions of every problem.

    A completion counts as correct only when the verifier says so of its answer (`graded_answer_of`): an undecided one
    is not correct, and neither is a right answer in prose or inside a think block.

    Args:
        generate: takes prompts and one seed each, returns one completion each, in that order.
        rendered_prompts: one a problem, exactly as the model was trained to meet it.
        seed: of the evaluation; every (problem, sample) gets its own, which depends on nothing else, so that models
            compared on the same problems meet the same draws and a batch's order does not matter.
        verify: judges one answer to one problem (``stillhouse.pipeline.verification.verify``).

    Returns:
        one record a completion: all samples of the first problem, then of the second, and so on.

    Raises:
        ValueError: the lengths do not belong together.
    """
    if len(problems) != len(rendered_prompts):
        raise ValueError(
            f"{len(problems)} problems and {len(rendered_prompts)} rendered prompts; expected one prompt a problem"
        )
    asked = [
        (problem, prompt, sample_index)
        for problem, prompt in zip(problems, rendered_prompts)
        for sample_index in range(num_samples)
    ]
    seeds = [evaluation_seed(seed, problem.id, sample_index) for problem, _, sample_index in asked]
    completions = generate([prompt for _, prompt, _ in asked], seeds)
    if len(completions) != len(asked):
        raise ValueError(f"generate returned {len(completions)} completions for {len(asked)} prompts")
    return [
        grade(completion, problem, prompt, model_name=model_name, sample_index=sample_index, verify=verify)
        for completion, (problem, prompt, sample_index) in zip(completions, asked)
    ]


def grade(
    completion: Completion,
    problem: Problem,
    rendered_prompt: str,
    *,
    model_name: str,
    sample_index: int,
    verify: Callable[[Problem, str | None], Judged],
) -> Graded:
    """Grade one completion: extract the answer as its kind is written, let the verifier judge it, note how the text ended."""
    answer = graded_answer_of(problem.kind, completion.text)
    judgement = verify(problem, answer)
    parsed = split_reasoning(completion.text, prompt_opens_think=opens_think_block(rendered_prompt))
    return Graded(
        model=model_name,
        problem_id=problem.id,
        source=problem.source,
        sample_index=sample_index,
        correct=judgement.outcome == "correct",
        outcome=judgement.outcome,
        reason=judgement.reason,
        completion=completion.text,
        finish_reason=completion.finish_reason,
        num_completion_tokens=completion.num_completion_tokens,
        think_closed=parsed.reasoning is not None,
        answer_found=answer is not None,
    )


def evaluation_seed(seed: int, problem_id: str, sample_index: int) -> int:
    """The 63-bit seed of one evaluated completion."""
    return int(content_key("evaluation", seed, problem_id, sample_index)[:16], 16) >> 1
