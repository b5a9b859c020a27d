"""Replay: traces that exist already, from a public data set or one's own file, read with their provenance.

What comes out is verified and filtered like anything else; a data set's own marks of correctness are kept as text and
decide nothing. Nothing is skipped unseen: every generation becomes a trace or is counted with a reason.

Layouts, as their data sets' cards have them
    open_r1       open-r1/OpenR1-Math-220k: problem, answer, uuid, generations and, beside each generation,
                  is_reasoning_complete, correctness_math_verify, correctness_llama, finish_reasons. DeepSeek-R1.
    openthoughts  open-thoughts/OpenThoughts-114k, OpenThoughts2-1M (DeepSeek-R1) and OpenThoughts3-1.2M (QwQ-32B, known by
                  its columns difficulty and domain): conversations of one question and one answer, marked with
                  <|begin_of_thought|> in the first and <think> in the others. No gold answer, but in open-r1's
                  OpenThoughts-114k-math, whose ``solution`` has it boxed.
    sky_t1        NovaSky-AI/Sky-T1_data_17k: the same conversations, marked with <|begin_of_thought|>. QwQ-32B-Preview.
    jsonl         one's own: prompt; completion, or reasoning and answer; and, where known, gold (``answer`` is taken beside
                  a completion), finish_reason, teacher, tokens, id, topic, and what its verifier needs beside the answer
                  (unit, tests, schema …).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.extraction import THINK_CLOSE, THINK_OPEN, boxed_answer, split_reasoning
from stillhouse.pipeline.problems import entry_text
from stillhouse.pipeline.prompts import chat_messages
from stillhouse.pipeline.records import KEY_VERSION, FinishReason, Problem, Split, Trace, content_key
from stillhouse.pipeline.verification import ENTRY_FIELDS

Layout = Literal["open_r1", "openthoughts", "sky_t1", "jsonl"]
CHARACTERS_PER_TOKEN = 4
"""For token counts that a data set does not give: they are estimates."""
NO_GOLD = frozenset({"", "proof", "notfound"})
"""What stands in NuminaMath's answer column, and so in OpenR1's, where there is no answer to compare with."""


@dataclass(frozen=True, slots=True)
class ReplayedTrace:
    """One generation of a data set.

    Args:
        prompt: what the teacher was asked, as the data set has it; ``system`` the system prompt it was asked under, or "".
        answer: the gold answer, or "" where the data set has none.
        completion: in our form, ``<think>\\n…\\n</think>\\n\\n…``; without the closing tag where it was cut off before it.
        finish_reason: the data set's where it says, else ``length`` for reasoning that does not end, else ``stop``.
        teacher: who wrote it.
        origin: ``data set@revision#row``, for OpenR1 ``data set@revision#uuid/generation``.
        dataset: name of the data set or file.
        sample_index: which of the row's generations it is.
        claimed: the data set's own verdicts, for example ``correctness_math_verify=true``; nothing is decided by them.
        num_completion_tokens: the data set's count; None where it has none.
        row: of one's own file, the columns that its verifier may need beside the answer, and the problem's topic.
    """

    prompt: str
    answer: str
    completion: str
    finish_reason: FinishReason
    teacher: str
    origin: str
    dataset: str
    system: str = ""
    sample_index: int = 0
    claimed: str = ""
    num_completion_tokens: int | None = None
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class ReplayCounts:
    """What became of the rows: ``num_traces`` and all that is ``unusable`` add up to the generations there were."""

    num_rows: int = 0
    num_traces: int = 0
    num_without_gold: int = 0
    """Traces that no verifier can judge, because the data set has no answer for them."""
    unusable: Counter[str] = field(default_factory=Counter)
    """Reason → generations, or whole rows that could not be opened."""


def replay_rows(
    layout: Layout,
    rows: Iterable[Mapping[str, Any]],
    *,
    dataset: str,
    revision: str,
    counts: ReplayCounts,
    teacher: str = "unknown",
) -> Iterator[ReplayedTrace]:
    """Read a data set's rows as traces, one generation after another.

    Args:
        dataset: its name, for the provenance.
        revision: commit or tag it was read at; "" where there is none.
        counts: filled while the traces are taken.
        teacher: who wrote them, where layout and rows do not say (``jsonl``).

    Raises:
        RecipeError: no such layout, or the first row does not have its columns.
    """
    if layout not in _READERS:
        raise RecipeError(f"replay knows no layout {layout!r}; the layouts are {', '.join(get_args(Layout))}")
    source = f"{dataset}@{revision}" if revision else dataset
    for number, row in enumerate(rows, 1):
        if number == 1:
            _require_columns(layout, row, dataset)
        counts.num_rows += 1
        for found in _READERS[layout](row, str(number)):
            if isinstance(found, str):
                counts.unusable[found] += 1
                continue
            counts.num_traces += 1
            counts.num_without_gold += not found.answer
            yield replace(found, dataset=dataset, origin=f"{source}#{found.origin}", teacher=found.teacher or teacher)


def to_problem_and_trace(replayed: ReplayedTrace, *, kind: str = "math", split: Split = "train") -> tuple[Problem, Trace]:
    """Turn a replayed generation into the records that the rest of a run works on.

    Nobody knows any more how it was sampled: ``top_p`` and ``max_new_tokens`` are 0, which no sampler takes, and so is
    the temperature. Token counts that the data set does not give are estimates, and ``usage_counted`` says so.

    Args:
        kind: the verifier that will judge it.
    """
    topic = replayed.row.get("topic")
    problem = Problem(
        replayed.prompt,
        replayed.answer,
        kind,
        replayed.dataset,
        split,
        entry_text(kind, replayed.row),
        topic if isinstance(topic, str) else "",
    )
    messages = chat_messages(replayed.prompt, system_prompt=replayed.system, prompt_suffix="")
    rendered = json.dumps(messages, ensure_ascii=False)
    parsed = split_reasoning(replayed.completion)
    trace = Trace(
        key=content_key("replay", KEY_VERSION, replayed.prompt, replayed.completion, replayed.origin),
        problem_id=problem.id,
        teacher=replayed.teacher,
        teacher_revision="",
        rendered_prompt=rendered,
        completion=replayed.completion,
        reasoning=parsed.reasoning,
        answer_text=parsed.answer_text,
        finish_reason=replayed.finish_reason,
        num_prompt_tokens=_estimated_tokens(replayed.system + replayed.prompt),
        num_completion_tokens=replayed.num_completion_tokens or _estimated_tokens(replayed.completion),
        temperature=0.0,
        top_p=0.0,
        max_new_tokens=0,
        sample_index=replayed.sample_index,
        seed=0,
        seconds=0.0,
        usage_counted=False,
        origin=replayed.origin,
    )
    return problem, trace


def our_form(text: str) -> tuple[str, bool]:
    """Bring a completion into our form, and say whether it ends where its marks say it should.

    Understands ``<think>`` blocks, also without the opening tag that the prompt had, and the marks of OpenThoughts and
    Sky-T1. Text in neither form, or with several blocks, is left as it is, for the filters to judge.
    """
    before, opened, rest = text.partition("<|begin_of_thought|>")
    if opened and not before.strip():
        thought, closed, rest = rest.partition("<|end_of_thought|>")
        _, opened, solution = rest.partition("<|begin_of_solution|>")
        answer, ended, _ = solution.partition("<|end_of_solution|>") if opened else (rest, "", "")
        text = f"{THINK_OPEN}{thought}{THINK_CLOSE}{answer}" if closed else f"{THINK_OPEN}\n{thought.strip()}"
        whole = bool(closed and (ended or not opened))
    else:
        whole = THINK_OPEN not in text or THINK_CLOSE in text
    parsed = split_reasoning(text, prompt_opens_think=THINK_OPEN not in text)
    if parsed.reasoning is None:
        return text.strip(), whole
    return f"{THINK_OPEN}\n{parsed.reasoning}\n{THINK_CLOSE}\n\n{parsed.answer_text}", whole


def _found(
    prompt: Any,
    completion: Any,
    gold: Any,
    *,
    finish_reason: Any,
    teacher: str,
    row_name: str,
    complete: bool = True,
    system: str = "",
    sample_index: int = 0,
    claimed: str = "",
    num_completion_tokens: int | None = None,
    row: Mapping[str, Any] | None = None,
) -> ReplayedTrace | str:
    """One generation, or the reason why it is none.

    Args:
        complete: False where the data set says that the reasoning does not end.
        row_name: goes into ``origin``, before which `replay_rows` puts the data set.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        return "no prompt"
    if not isinstance(completion, str) or not completion.strip():
        return "no completion"
    if isinstance(gold, bool) or not isinstance(gold, str | int | float | None):
        return "the gold answer is not text"
    text, whole = our_form(completion)
    if finish_reason is None:
        finish_reason = "stop" if whole and complete else "length"
    elif finish_reason not in get_args(FinishReason):
        finish_reason = "truncated"  # an end that we do not know is none that training may rely on
    answer = "" if gold is None else str(gold).strip()
    return ReplayedTrace(
        prompt=prompt.strip(),
        answer="" if answer.lower() in NO_GOLD else answer,
        completion=text,
        finish_reason=finish_reason,
        teacher=teacher,
        origin=row_name,
        dataset="",
        system=system,
        sample_index=sample_index,
        claimed=claimed,
        num_completion_tokens=num_completion_tokens,
        row=row or {},
    )


def _open_r1(row: Mapping[str, Any], row_name: str) -> Iterator[ReplayedTrace | str]:
    generations = row.get("generations")
    if not isinstance(generations, list) or not generations:
        yield "no generations"
        return
    marks = ("correctness_math_verify", "correctness_llama", "is_reasoning_complete")
    for index, generation in enumerate(generations):
        beside = {name: _beside(row, name, index) for name in (*marks, "finish_reasons")}
        yield _found(
            row.get("problem"),
            generation,
            row.get("answer"),
            finish_reason=beside["finish_reasons"],
            complete=beside["is_reasoning_complete"] is not False,
            teacher="deepseek-ai/DeepSeek-R1",
            row_name=f"{row.get('uuid') or row_name}/{index}",
            sample_index=index,
            claimed=_claims({name: beside[name] for name in marks}),
        )


def _beside(row: Mapping[str, Any], column: str, index: int) -> Any:
    """The entry of a column that runs beside the generations; None where the column is empty, as OpenR1's often are."""
    values = row.get(column)
    return values[index] if isinstance(values, list) and index < len(values) else None


def _claims(marks: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in marks.items() if value is not None)


_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


def _conversation(row: Mapping[str, Any], row_name: str, teacher: str) -> Iterator[ReplayedTrace | str]:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        yield "conversations are not a list of turns"
        return
    said = [(_ROLES.get(turn.get("from")), turn.get("value")) for turn in turns]
    system = next((text for role, text in said if role == "system"), None) or row.get("system") or ""
    said = [(role, text) for role, text in said if role != "system"]
    if [role for role, _ in said] != ["user", "assistant"]:
        yield "not one question and one answer"
        return
    solution = row.get("solution")
    tokens = row.get("generated_token_count")
    yield _found(
        said[0][1],
        said[1][1],
        boxed_answer(solution) if isinstance(solution, str) else None,
        finish_reason=None,
        teacher=teacher,
        row_name=row_name,
        system=system,
        claimed=_claims({"correct": row.get("correct")}),
        num_completion_tokens=None if tokens is None else int(tokens),
    )


def _openthoughts(row: Mapping[str, Any], row_name: str) -> Iterator[ReplayedTrace | str]:
    third = "difficulty" in row and "domain" in row
    return _conversation(row, row_name, "Qwen/QwQ-32B" if third else "deepseek-ai/DeepSeek-R1")


def _sky_t1(row: Mapping[str, Any], row_name: str) -> Iterator[ReplayedTrace | str]:
    return _conversation(row, row_name, "Qwen/QwQ-32B-Preview")


def _plain(row: Mapping[str, Any], row_name: str) -> Iterator[ReplayedTrace | str]:
    completion, gold, answer = row.get("completion"), row.get("gold"), row.get("answer")
    if completion is None and isinstance(row.get("reasoning"), str):
        completion = f"{THINK_OPEN}\n{row['reasoning']}" + (f"{THINK_CLOSE}{answer}" if answer is not None else "")
    elif gold is None:
        gold = answer
    tokens = row.get("tokens")
    needed = ("topic", "entry", *itertools.chain.from_iterable(ENTRY_FIELDS.values()))
    try:
        tokens = None if tokens is None else int(tokens)
    except (TypeError, ValueError):
        yield "tokens is not a number"
        return
    yield _found(
        row.get("prompt"),
        completion,
        gold,
        finish_reason=row.get("finish_reason"),
        teacher=str(row.get("teacher") or ""),
        row_name=str(row.get("id") or row_name),
        num_completion_tokens=tokens,
        row={name: row[name] for name in needed if name in row},
    )


_READERS = {"open_r1": _open_r1, "openthoughts": _openthoughts, "sky_t1": _sky_t1, "jsonl": _plain}
_COLUMNS = {
    "open_r1": ("problem", "answer", "uuid", "generations"),
    "openthoughts": ("conversations",),
    "sky_t1": ("conversations",),
    "jsonl": ("prompt",),
}


def _require_columns(layout: Layout, row: Mapping[str, Any], dataset: str) -> None:
    missing = [column for column in _COLUMNS[layout] if column not in row]
    if layout == "jsonl" and not {"completion", "reasoning"} & row.keys():
        missing.append("completion (or reasoning)")
    if missing:
        fits = [name for name, columns in _COLUMNS.items() if set(columns) <= row.keys()]
        hint = f"; its rows look like {' or '.join(fits)}" if fits and layout not in fits else ""
        raise RecipeError(
            f"{dataset}: the layout {layout} needs the column {', '.join(missing)}; the first row has {', '.join(row)}{hint}"
        )


def _estimated_tokens(text: str) -> int:
    return -(-len(text) // CHARACTERS_PER_TOKEN)
