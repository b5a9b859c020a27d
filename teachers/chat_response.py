"""Read a chat completion of any OpenAI-compatible endpoint, whole or streamed, into our records.

What a ledger keeps of a call is two texts. The *context* (`call_context`) says what was asked and under which key. The
*envelope* (`envelope`) holds the answer's own bytes and what only we know: how long it took and whether it came whole.
`parse_chat` makes a trace of the two, now or after a restart.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from stillhouse.pipeline.extraction import THINK_CLOSE, THINK_OPEN
from stillhouse.pipeline.records import Completion, FinishReason, Sampling, Trace
from stillhouse.teachers.tracing import TraceRequest, make_trace

CHARACTERS_PER_TOKEN = 4
"""Only for an endpoint that sends no usage: its token counts are then estimates."""
_MAX_COUNT = 1 << 40
_FINISH_REASONS: dict[Any, FinishReason] = {
    "stop": "stop",
    "content_filter": "content_filter",
    # Cut off within the server: vLLM, OpenRouter, DeepSeek.
    "abort": "truncated",
    "error": "truncated",
    "insufficient_system_resource": "truncated",
}
"""Every other word, ``tool_calls`` among them, and none at all count as ``length``: an answer that did not come to its end."""


def call_context(request: TraceRequest, *, teacher: str, teacher_revision: str, sampling: Sampling) -> bytes:
    """What `parse_chat` has to know of a request, as JSON."""
    context = {
        "request": [request.key, request.problem_id, request.rendered_prompt, request.sample_index, request.seed],
        "teacher": teacher,
        "teacher_revision": teacher_revision,
        "sampling": [sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.extras()],
    }
    return json.dumps(context).encode()


def envelope(answer: bytes, *, seconds: float, complete: bool = True, stopped: str = "") -> bytes:
    """An answer as the ledger keeps it: the server's bytes as they came, and what we know about them.

    Args:
        seconds: from sending the request to the answer's last byte.
        complete: False for a stream that ended before its last chunk.
        stopped: why we ended the stream ourselves; "" where we did not.
    """
    ours = json.dumps({"seconds": round(seconds, 4), "stream_complete": complete, "stopped": stopped})
    return b'{"answer": ' + answer + b", " + ours[1:].encode()


def parse_chat(request: bytes, raw: bytes) -> Trace:
    """Make a trace of a call: the `Parse` of the trace store for everything that speaks the chat protocol.

    Args:
        request: what `call_context` made.
        raw: what `envelope` made.

    Raises:
        ValueError: the answer is no chat completion; quotes its beginning.
    """
    context = json.loads(request)
    temperature, top_p, max_new_tokens, extras = context["sampling"]
    asked = TraceRequest(*context["request"])
    try:
        call = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"something that is not JSON: {_beginning(raw)}") from error
    try:
        completion = read_completion(
            call["answer"],
            asked.seed,
            num_prompt_characters=sum(len(message["content"]) for message in json.loads(asked.rendered_prompt)),
        )
    except ValueError as error:
        raise ValueError(f"JSON that is no chat completion ({error}): {_beginning(raw)}") from error
    if call["stopped"]:
        completion = dataclasses.replace(completion, finish_reason="loop")
    elif not call["stream_complete"]:
        completion = dataclasses.replace(completion, finish_reason="truncated")
    return make_trace(
        asked,
        completion,
        teacher=context["teacher"],
        teacher_revision=context["teacher_revision"],
        sampling=Sampling(temperature, top_p, max_new_tokens, **extras),
        seconds=call["seconds"],
    )


def read_completion(answer: Any, seed: int, *, num_prompt_characters: int = 0) -> Completion:
    """Turn a chat completion into ours: reasoning is understood as ``reasoning``, ``reasoning_content`` or inline.

    Reasoning with no content is a completion cut at its length, also where finish_reason says ``stop``. Inline reasoning may
    lack its opening tag, which is then in the endpoint's prompt template; it is put back.

    Args:
        answer: the parsed JSON; only its first choice is read, because we ask for one.
        num_prompt_characters: to estimate the prompt's tokens where the endpoint does not count them.

    Raises:
        ValueError: the answer lacks choices or a message, or its text is no text.
    """
    choice = _first_choice(answer)
    message = choice.get("message")
    if not isinstance(message, Mapping):
        raise ValueError(f"the message is a {type(message).__name__}, not an object")
    content = message_text(message, "content")
    reasoning = message_text(message, "reasoning") or message_text(message, "reasoning_content")
    finish_reason = _finish_reason(choice)
    if reasoning.strip() and not content.strip():
        text = f"{THINK_OPEN}\n{reasoning}"
        finish_reason = "length" if finish_reason == "stop" else finish_reason
    elif reasoning.strip() and THINK_CLOSE not in content:
        text = f"{THINK_OPEN}\n{reasoning.strip()}\n{THINK_CLOSE}\n\n{content.strip()}"
    elif THINK_CLOSE in content and THINK_OPEN not in content:
        text = f"{THINK_OPEN}\n{content}"
    else:
        text = content
    text = _writable(text)
    usage = answer.get("usage")
    counts = usage if isinstance(usage, Mapping) else {}
    num_prompt_tokens, num_completion_tokens = (_count(counts.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    return Completion(
        text=text,
        finish_reason=finish_reason,
        num_prompt_tokens=_estimate(num_prompt_characters) if num_prompt_tokens is None else num_prompt_tokens,
        num_completion_tokens=_estimate(len(text)) if num_completion_tokens is None else num_completion_tokens,
        seed=seed,
        usage_counted=num_prompt_tokens is not None and num_completion_tokens is not None,
        response_id=_name(answer.get("id")),
        served_model=_name(answer.get("model")),
        logprobs=_logprobs(choice.get("logprobs")),
    )


def message_text(message: Mapping[str, Any], name: str) -> str:
    """A message's or a delta's text under ``name``; "" where it is missing or null. ValueError where it is no text."""
    text = message.get(name)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"the message's {name} is a {type(text).__name__}, not text")
    return text


def _finish_reason(choice: Mapping[str, Any]) -> FinishReason:
    """Our word for a choice's finish_reason."""
    reason = choice.get("finish_reason")
    return _FINISH_REASONS.get(reason, "length") if isinstance(reason, str) else "length"


def _first_choice(answer: Any) -> Mapping[str, Any]:
    if not isinstance(answer, Mapping):
        raise ValueError(f"it is a {type(answer).__name__}, not an object")
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise ValueError("it has no choices")
    return choices[0]


def _logprobs(logprobs: Any) -> str:
    """A choice's log probabilities as `Completion.logprobs` says; ASCII, so that half a surrogate pair does no harm."""
    tokens = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not tokens:
        return ""
    try:
        rows = [[*_pair(token), [_pair(other) for other in token.get("top_logprobs") or ()]] for token in tokens]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its logprobs are not as the protocol has them: {type(error).__name__} {error}") from error
    return json.dumps(rows, separators=(",", ":"))


def _pair(token: Mapping[str, Any]) -> list[Any]:
    return [token["token"], token["logprob"]]


def _count(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT
    return value if is_count else None


def _estimate(num_characters: int) -> int:
    return -(-num_characters // CHARACTERS_PER_TOKEN)


def _name(value: Any) -> str:
    return _writable(value) if isinstance(value, str) else ""


def _writable(text: str) -> str:
    """Without half surrogate pairs, which JSON may carry and no file can hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _beginning(raw: bytes) -> str:
    answer = raw.removeprefix(b'{"answer": ').rpartition(b', "seconds": ')[0]
    return repr(answer[:200].decode("utf-8", "replace"))
