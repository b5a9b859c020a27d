"""From problems and selected traces to training rows that passed the supervision checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stillhouse.pipeline.errors import SupervisionError
from stillhouse.pipeline.extraction import THINK_CLOSE
from stillhouse.pipeline.records import Example, Problem, Trace
from stillhouse.pipeline.supervision import SupervisionReport, check_examples, require_sound
from stillhouse.students.rendering import (
    choose_pad_token,
    end_of_turn_token_id,
    render_example,
    render_prompt,
    think_open_ids,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_examples(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    traces: Sequence[Trace],
    *,
    system_prompt: str | None,
    prompt_suffix: str,
    opens_think: bool,
    max_length: int,
) -> list[Example]:
    """Render every trace into a training row and refuse the lot if one of them would teach the wrong tokens.

    Rows are in the order of their problems' ids and sample indices, whatever order the traces come in: a store has them in the
    order in which a teacher's workers happened to finish, and the same traces have to train the same student.

    Args:
        problems: at least those that the traces answer.
        traces: the selected ones, in any order.
        system_prompt, prompt_suffix, opens_think: of the student's prompt, the same at inference.
        max_length: tokens; a longer row is refused, never cut.

    Raises:
        SupervisionError: a trace without its problem or without a closed think block, or a row that fails a check of
            ``stillhouse.pipeline.supervision``.
    """
    by_id = {problem.id: problem for problem in problems}
    examples = []
    for trace in sorted(traces, key=lambda trace: (trace.problem_id, trace.sample_index, trace.key)):
        problem = by_id.get(trace.problem_id)
        if problem is None:
            raise SupervisionError(f"trace {trace.key} answers problem {trace.problem_id}, which is not among the problems")
        examples.append(
            render_example(
                tokenizer,
                problem,
                trace,
                system_prompt=system_prompt,
                prompt_suffix=prompt_suffix,
                opens_think=opens_think,
            )
        )
    report = check_supervision(
        tokenizer,
        problems,
        examples,
        system_prompt=system_prompt,
        prompt_suffix=prompt_suffix,
        opens_think=opens_think,
        max_length=max_length,
    )
    require_sound(report)
    return examples


def check_supervision(
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    examples: Sequence[Example],
    *,
    system_prompt: str | None,
    prompt_suffix: str,
    opens_think: bool,
    max_length: int,
) -> SupervisionReport:
    """Check rows against the prompts that inference will send, rendered and tokenized here once more."""
    used = {example.problem_id for example in examples}
    prompts = {
        problem.id: render_prompt(
            tokenizer, problem.prompt, system_prompt=system_prompt, prompt_suffix=prompt_suffix, opens_think=opens_think
        )
        for problem in problems
        if problem.id in used
    }
    return check_examples(
        examples,
        eos_token_id=end_of_turn_token_id(tokenizer),
        pad_token_id=choose_pad_token(tokenizer),
        prompt_ids_by_problem={problem_id: tokenize(tokenizer, prompt) for problem_id, prompt in prompts.items()},
        # Every prompt of a student ends alike, so the first one shows how the block is opened.
        think_open_ids=think_open_ids(tokenizer, next(iter(prompts.values()), "")),
        think_close_ids=tokenize(tokenizer, THINK_CLOSE),
        max_length=max_length,
    )
