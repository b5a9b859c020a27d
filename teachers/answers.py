"""One way back from what the ledger keeps of a call to its trace, whoever answered it.

A raw answer says by its first key where it came from: ``answer`` from a chat server, ``completion`` from a model in our own
process, ``replayed`` from a data set.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from stillhouse.pipeline.records import Completion, Sampling, Trace
from stillhouse.teachers.chat_response import parse_chat
from stillhouse.teachers.tracing import TraceRequest, make_trace

_COMPLETION, _REPLAYED = b'{"completion": ', b'{"replayed": '


def completion_bytes(completion: Completion, seconds: float) -> bytes:
    """A completion of a model in our own process as the raw answer that the ledger keeps.

    Args:
        seconds: its share of its batch's time.
    """
    return json.dumps({"completion": asdict(completion), "seconds": round(seconds, 4)}, ensure_ascii=False).encode()


def replayed_bytes(trace: Trace) -> bytes:
    """A trace of an existing data set as a raw answer; its request is empty."""
    return json.dumps({"replayed": asdict(trace)}, ensure_ascii=False).encode()


def parse_answer(request: bytes, raw: bytes) -> Trace:
    """The trace of a call: what `stillhouse.pipeline.trace_store.writer.TraceWriter` takes as ``parse``.

    Args:
        request: what `stillhouse.teachers.chat_response.call_context` made.

    Raises:
        ValueError: a chat server's answer is no chat completion.
    """
    if raw.startswith(_REPLAYED):
        return Trace(**json.loads(raw)["replayed"])
    if not raw.startswith(_COMPLETION):
        return parse_chat(request, raw)
    context, answer = json.loads(request), json.loads(raw)
    temperature, top_p, max_new_tokens, extras = context["sampling"]
    return make_trace(
        TraceRequest(*context["request"]),
        Completion(**answer["completion"]),
        teacher=context["teacher"],
        teacher_revision=context["teacher_revision"],
        sampling=Sampling(temperature, top_p, max_new_tokens, **extras),
        seconds=answer["seconds"],
    )
