"""From problems to traces: what is asked, under which key, and what came back.

A request's key is known before anything is generated, so a run can tell which of its planned traces are already paid
for. The key covers all that the completion depends on; the same key never needs generating twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stillhouse.pipeline.extraction import split_reasoning
from stillhouse.pipeline.prompts import chat_messages, opens_think_block, render_prompt
from stillhouse.pipeline.records import KEY_VERSION, Completion, Problem, Sampling, Trace, content_key
from stillhouse.pipeline.trace_store.ledger import Intent

_TEXT_FILES = frozenset({".json", ".jinja", ".txt", ".model"})
_WEIGHT_FILES = frozenset({".safetensors", ".bin"})
_END_BYTES = 1 << 20
TEMPLATE_TOKENS = 256
"""Reserved beside a prompt's own text for what a chat template puts around it."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One completion to ask for: the rendered prompt, its sample index, its seed and the key it will be stored under."""

    key: str
    problem_id: str
    rendered_prompt: str
    sample_index: int
    seed: int


def trace_requests(
    problems: Iterable[Problem],
    rendered_prompts: Sequence[str],
    *,
    teacher: str,
    teacher_revision: str,
    served: str,
    sampling: Sampling,
    samples_per_problem: int,
    seed: int,
) -> list[TraceRequest]:
    """Every completion that a run plans, in a fixed order, with keys and seeds.

    Args:
        rendered_prompts: one a problem, as the model will continue it.
        served: what else decides a completion: the precision, or the endpoint that serves the model.
        seed: the recipe's seed; with problem and sample index it decides each row's own.
    """
    requests = []
    extras = sampling.extras()
    for problem, prompt in zip(problems, rendered_prompts, strict=True):
        for index in range(samples_per_problem):
            # 63 bits: what an Arrow int64 column holds.
            row_seed = int(content_key("seed", seed, prompt, index)[:16], 16) >> 1
            key = content_key(
                "trace",
                KEY_VERSION,
                prompt,
                teacher,
                teacher_revision,
                served,
                [sampling.temperature, sampling.top_p, sampling.max_new_tokens, *([extras] if extras else [])],
                index,
                row_seed,
            )
            requests.append(TraceRequest(key, problem.id, prompt, index, row_seed))
    return requests


def intent_of(request: TraceRequest, sampling: Sampling, context: bytes, endpoint: str = "") -> Intent:
    """What the ledger reserves for one request: the most tokens that it can come to.

    No tokenizer makes more tokens than there are bytes, and a chat template adds a few of its own.

    Args:
        context: what the answer is turned into a trace with, see `stillhouse.teachers.chat_response.call_context`.
        endpoint: whom it goes to, for the ledger.
    """
    prompt_tokens = len(request.rendered_prompt.encode()) + TEMPLATE_TOKENS
    return Intent(request.key, request.problem_id, context, prompt_tokens, sampling.max_new_tokens, endpoint)


def make_trace(
    request: TraceRequest, completion: Completion, *, teacher: str, teacher_revision: str, sampling: Sampling, seconds: float
) -> Trace:
    """Join a request with what came back for it; reasoning and answer are split off, the raw completion is kept."""
    parsed = split_reasoning(completion.text, prompt_opens_think=opens_think_block(request.rendered_prompt))
    return Trace(
        key=request.key,
        problem_id=request.problem_id,
        teacher=teacher,
        teacher_revision=teacher_revision,
        rendered_prompt=request.rendered_prompt,
        completion=completion.text,
        reasoning=parsed.reasoning,
        answer_text=parsed.answer_text,
        finish_reason=completion.finish_reason,
        num_prompt_tokens=completion.num_prompt_tokens,
        num_completion_tokens=completion.num_completion_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_new_tokens=sampling.max_new_tokens,
        sample_index=request.sample_index,
        seed=completion.seed,
        seconds=seconds,
        usage_counted=completion.usage_counted,
        sampling_extras=json.dumps(extras, sort_keys=True) if (extras := sampling.extras()) else "",
        response_id=completion.response_id,
        served_model=completion.served_model,
        logprobs=completion.logprobs,
    )


def folder_revision(folder: Path) -> str:
    """A local model's revision: hash of its config, template and tokenizer, and of its weights' sizes, headers and ends.

    Reads at most 2 MiB of each weights file, so that naming a model of 60 GB costs nothing; everything else whole.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in _TEXT_FILES | _WEIGHT_FILES:
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if path.suffix in _TEXT_FILES or size <= 2 * _END_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(_END_BYTES))
                file.seek(-_END_BYTES, 2)
                digest.update(file.read())
    return digest.hexdigest()[:16]


def render_for_teacher(
    problem_prompts: Sequence[str],
    *,
    kind: str,
    model: str,
    revision: str | None,
    system_prompt: str | None,
    prompt_suffix: str,
    opens_think: bool,
) -> list[str]:
    """What the teacher is asked, one text a problem.

    A model that we run gets text rendered by its own chat template. An endpoint renders by itself, so its text is the
    messages as JSON.

    Raises:
        TeacherError: the model's tokenizer cannot be loaded.
        RecipeError: it has no chat template.
    """
    if kind == "endpoint":
        return [
            json.dumps(chat_messages(prompt, system_prompt=system_prompt, prompt_suffix=prompt_suffix), ensure_ascii=False)
            for prompt in problem_prompts
        ]
    from stillhouse.teachers.local import load_tokenizer

    tokenizer = load_tokenizer(model, revision=revision)
    return [
        render_prompt(tokenizer, prompt, system_prompt=system_prompt, prompt_suffix=prompt_suffix, opens_think=opens_think)
        for prompt in problem_prompts
    ]
