"""Look at the tokens that will be trained on before any training: most failed distillations learnt the wrong ones, silently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stillhouse.pipeline.errors import SupervisionError
from stillhouse.pipeline.records import Example

MIN_REASONING_TOKENS = 3
"""Fewer between the think tags is an empty block: a template that writes "<think>\\n\\n</think>" leaves one or two."""


@dataclass(frozen=True, slots=True)
class SupervisionReport:
    """What the checks counted, and one message for each thing that is wrong; no messages means sound."""

    num_examples: int
    num_supervised_tokens: int
    num_tokens: int
    problems: list[str]


def check_examples(
    examples: Iterable[Example],
    *,
    eos_token_id: int,
    pad_token_id: int | None,
    prompt_ids_by_problem: Mapping[str, tuple[int, ...]],
    think_open_ids: tuple[int, ...],
    think_close_ids: tuple[int, ...],
    max_length: int,
) -> SupervisionReport:
    """Check training rows for what makes a student learn nothing, never stop, or lose the reasoning.

    Args:
        eos_token_id: what the student must learn to end with.
        pad_token_id: what padding will use; None when rows are never padded.
        prompt_ids_by_problem: the prompt's tokens at inference for each problem_id; each row must begin with exactly these.
        think_open_ids, think_close_ids: the tokens of ``<think>`` and ``</think>`` by the student's tokenizer.
        max_length: longest row that the trainer will not cut, in tokens.
    """
    messages = []
    if pad_token_id is not None and pad_token_id == eos_token_id:
        messages.append(
            f"pad_token_id and eos_token_id are both {eos_token_id}: padding hides EOS from the loss, the student never stops; "
            "set pad to another token (Qwen <|fim_pad|>, Llama <|reserved_special_token_5|>)"
        )
    num_examples = num_supervised = num_tokens = 0
    for example in examples:
        num_examples += 1
        num_supervised += example.num_supervised_tokens
        num_tokens += len(example.input_ids)
        prompt_ids = prompt_ids_by_problem.get(example.problem_id)
        row_messages = _check_row(example, eos_token_id, prompt_ids, think_open_ids, think_close_ids, max_length)
        messages += [f"row {example.trace_key[:12]}: {message}" for message in row_messages]
    if num_examples == 0:
        messages.append("there are no training rows: look at the filter stage's funnel for what dropped them")
    return SupervisionReport(num_examples, num_supervised, num_tokens, messages)


def require_sound(report: SupervisionReport) -> None:
    """Raise SupervisionError with the first five messages of a report that has any."""
    if not report.problems:
        return
    shown = "\n".join(f"  {message}" for message in report.problems[:5])
    more = f"\n  and {len(report.problems) - 5} more" if len(report.problems) > 5 else ""
    raise SupervisionError(f"{report.num_examples} training rows would teach the wrong tokens:\n{shown}{more}")


def _check_row(
    example: Example,
    eos_token_id: int,
    prompt_ids: tuple[int, ...] | None,
    think_open_ids: tuple[int, ...],
    think_close_ids: tuple[int, ...],
    max_length: int,
) -> list[str]:
    ids, labels = example.input_ids, example.labels
    if len(ids) != len(labels):
        return [f"{len(ids)} tokens but {len(labels)} labels; render the row again"]
    learnt = [label != Example.IGNORE_INDEX for label in labels]
    if not any(learnt):
        return ["no supervised token: every label is -100; check the template's mask"]
    messages = []
    if len(ids) > max_length:
        messages.append(f"{len(ids)} tokens would be cut at max_length={max_length}; raise it, or lower filters.max_tokens")
    wrong = next((i for i, on in enumerate(learnt) if on and labels[i] != ids[i]), None)
    if wrong is not None:
        messages.append(
            f"label {labels[wrong]} at position {wrong} is not the token {ids[wrong]} there; labels must not be shifted"
        )
    if ids[-1] != eos_token_id:
        messages.append(f"ends with token {ids[-1]}, not with EOS {eos_token_id}; the student would never learn to stop")
    elif not learnt[-1]:
        messages.append(f"EOS {eos_token_id} at the end is not supervised; set its label, or use a pad token that is not EOS")
    if prompt_ids is None:
        return [
            *messages,
            f"no prompt is known for its problem {example.problem_id[:12]}; pass the prompt it was rendered with",
        ]
    if ids[: len(prompt_ids)] != tuple(prompt_ids):
        at = next((i for i, (a, b) in enumerate(zip(ids, prompt_ids)) if a != b), min(len(ids), len(prompt_ids)))
        messages.append(f"differs from the prompt used at inference at token {at}; render both with the same template")
        return messages
    if any(learnt[: len(prompt_ids)]):
        messages.append("the prompt is supervised; mask it with -100")
    supervised = [token for token, on in zip(ids[len(prompt_ids) :], learnt[len(prompt_ids) :]) if on]
    return messages + _check_think(prompt_ids, supervised, think_open_ids, think_close_ids)


def _check_think(
    prompt_ids: Sequence[int], supervised: Sequence[int], open_ids: Sequence[int], close_ids: Sequence[int]
) -> list[str]:
    opens, closes = _find(supervised, open_ids), _find(supervised, close_ids)
    # A prompt that prefills the block ends with the opening tag and at most a line break or two.
    in_prompt = any(len(prompt_ids) - (start + len(open_ids)) <= 2 for start in _find(prompt_ids, open_ids))
    num_open = len(opens) + in_prompt
    if num_open == 0 or not closes:
        missing = "opening" if num_open == 0 else "closing"
        return [f"the reasoning is lost: no {missing} think tag is supervised; the template dropped it, use one that keeps it"]
    if num_open > 1 or len(closes) > 1:
        return [f"double think block ({num_open} opened, {len(closes)} closed); the template adds one, use one that does not"]
    start = 0 if in_prompt else opens[0] + len(open_ids)
    if closes[0] < start:
        return ["the think block closes before it opens; check the template"]
    if closes[0] - start < MIN_REASONING_TOKENS:
        return [f"empty think block ({closes[0] - start} tokens of reasoning); the template emptied it, use one that keeps it"]
    return []


def _find(ids: Sequence[int], pattern: Sequence[int]) -> list[int]:
    """Where a run of tokens starts; what overlaps an earlier find is not counted."""
    pattern = list(pattern)
    if not pattern:
        raise ValueError("think_open_ids and think_close_ids must hold at least one token each")
    found, at = [], 0
    while at <= len(ids) - len(pattern):
        if list(ids[at : at + len(pattern)]) == pattern:
            found.append(at)
            at += len(pattern)
        else:
            at += 1
    return found
