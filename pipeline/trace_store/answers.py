"""From the bytes of an answer to its trace, the same way when it arrives, after a restart and when it is sealed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace

from stillhouse.pipeline.records import Trace, content_key

Parse = Callable[[bytes, bytes], Trace]
"""(request, raw) → its trace. Raises ValueError where raw is no usable answer. The same bytes always make the same trace."""

MAX_TOKENS = 1 << 40
_TEXTS = tuple(f.name for f in dataclasses.fields(Trace) if f.type in ("str", "str | None"))


def read_answer(parse: Parse, key: str, request: bytes, raw: bytes) -> Trace:
    """The trace of a whole answer.

    Raises:
        ValueError: raw is no usable answer, or it was parsed into the trace of another call.
    """
    trace = _storable(parse(request, raw))
    if trace.key != key:
        raise ValueError(f"the answer of the call for {key} was parsed into a trace of {trace.key}")
    return trace


def read_beginning(parse: Parse, key: str, request: bytes, raw: bytes, *, writer: str, call_id: int) -> Trace:
    """The trace of what a broken call delivered, under a key of its own: nobody takes it for the answer that was planned.

    Raises:
        ValueError: nothing can be read from it.
    """
    trace = _storable(parse(request, raw))
    return replace(trace, key=content_key("partial", key, writer, call_id), finish_reason="truncated")


def priced(trace: Trace, dollars: float) -> Trace:
    """The trace with its price."""
    return trace if trace.dollars == dollars else replace(trace, dollars=dollars)


def _storable(trace: Trace) -> Trace:
    """Refuse what no file could hold where it arrives: one odd answer must not keep all others from being sealed."""
    for name in _TEXTS:
        text = getattr(trace, name)
        if text and not text.isascii():
            text.encode()  # a lone half of a surrogate pair raises a ValueError
    for name in ("num_prompt_tokens", "num_completion_tokens"):
        count = getattr(trace, name)
        if type(count) is not int or not 0 <= count <= MAX_TOKENS:
            raise ValueError(f"an answer counts its tokens from 0 to {MAX_TOKENS:,}; got {name}={count!r}")
    return trace
