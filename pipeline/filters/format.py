"""Filters on a completion's form: finished, one think block, an answer, a length within bounds, no control tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stillhouse.pipeline.extraction import THINK_CLOSE, THINK_OPEN, split_reasoning, strict_answer, strict_answer_of
from stillhouse.pipeline.filters.drop import EVIDENCE_CHARS, Drop
from stillhouse.pipeline.prompts import opens_think_block
from stillhouse.pipeline.records import Trace

_STOPPED = {
    "length": "not finished",
    "truncated": "cut off on its way to us",
    "loop": "stopped because it went in circles",
    "content_filter": "stopped by the server's content filter",
}


@dataclass(frozen=True)
class Finished:
    """Drop a completion that did not end by itself: its finish_reason is not ``stop``."""

    def __call__(self, trace: Trace) -> Drop | None:
        if trace.finish_reason == "stop":
            return None
        reason = _STOPPED.get(trace.finish_reason, "not finished")
        return Drop(reason, f"finish_reason={trace.finish_reason} after {trace.num_completion_tokens} tokens")


@dataclass(frozen=True)
class ThinkBlock:
    """Drop a completion without exactly one think block that opens it, is closed and is not empty.

    Where the rendered prompt already ends with ``<think>``, the completion must have the closing tag only.
    """

    def __call__(self, trace: Trace) -> Drop | None:
        text = trace.completion
        in_prompt = opens_think_block(trace.rendered_prompt)
        num_open, num_close = text.count(THINK_OPEN) + in_prompt, text.count(THINK_CLOSE)
        if num_open == 0:
            return Drop("no think block", text[:EVIDENCE_CHARS])
        if num_close == 0:
            return Drop("think block not closed", text[-EVIDENCE_CHARS:])
        if num_open > 1 or num_close > 1:
            return Drop("more than one think block", f"{num_open} opened, {num_close} closed")
        parsed = split_reasoning(text, prompt_opens_think=in_prompt)
        if parsed.reasoning is None:
            return Drop("text before the think block", text[:EVIDENCE_CHARS])
        if not parsed.reasoning:
            return Drop("think block empty", text[:EVIDENCE_CHARS])
        return None


@dataclass(frozen=True)
class AnswerPresent:
    """Drop a completion with no answer after the think block: no box and, for kinds that write one, no fenced block."""

    def __call__(self, trace: Trace) -> Drop | None:
        if strict_answer(trace.completion) is not None or strict_answer_of("json", trace.completion) is not None:
            return None
        _, _, after = trace.completion.rpartition(THINK_CLOSE)
        if after.count("```") >= 2:
            return None
        return Drop("no boxed answer after the think block", trace.completion[-EVIDENCE_CHARS:])


@dataclass(frozen=True)
class Length:
    """Drop a completion shorter than ``min_tokens`` or longer than ``max_tokens`` (teacher's tokens, both bounds allowed).

    Args:
        min_tokens, max_tokens: None sets no bound.
        min_percentile, max_percentile: bounds by the lengths of all finished traces of the run, 0 to 100; `with_percentiles`
            turns them into tokens before any trace is judged. Where both kinds are given, both hold.
    """

    min_tokens: int | None = None
    max_tokens: int | None = None
    min_percentile: float | None = None
    max_percentile: float | None = None

    def __post_init__(self) -> None:
        for name in ("min_percentile", "max_percentile"):
            if not 0 <= (getattr(self, name) or 0) <= 100:
                raise ValueError(f"{name} is from 0 to 100, got {getattr(self, name)}")

    def __call__(self, trace: Trace) -> Drop | None:
        if self.min_percentile is not None or self.max_percentile is not None:
            raise ValueError("length bounds by percentile need the lengths of all traces first: with_percentiles")
        if self.min_tokens is not None and trace.num_completion_tokens < self.min_tokens:
            return Drop("too short", f"{trace.num_completion_tokens} tokens, at least {self.min_tokens} wanted")
        if self.max_tokens is not None and trace.num_completion_tokens > self.max_tokens:
            return Drop("too long", f"{trace.num_completion_tokens} tokens, at most {self.max_tokens} wanted")
        return None


_BRACKETED = re.compile(
    r"<(?:\|/?[\w.▁]{2,40}\|>"  # ChatML, Llama 3, Qwen; <|v|> is a mean of |v|
    r"|｜[^｜<>]{1,40}｜>"  # DeepSeek
    r"|/s>|(?<!\w<)(?:s|mask)>"  # (?P<s>…) and bitset<mask> are code
    r"|(?:bos|eos|pad|unk|start_of_turn|end_of_turn|start_of_image|end_of_text)>"
    r"|unused\d{1,4}>|extra_id_\d{1,3}>|/?tool_calls?>|/?tool_response>|</?SYS>>)"
)
_SQUARE = re.compile(r"\[(?:/?INST|TOOL_CALLS|/?AVAILABLE_TOOLS|/?TOOL_RESULTS|gMASK|/?SYSTEM_PROMPT)\]")


@dataclass(frozen=True)
class ControlTokens:
    """Drop a completion whose content holds a chat template's control token, which a student would read as one.

    Args:
        also: further token texts to refuse, for example the teacher's own.
    """

    also: tuple[str, ...] = ()

    def __call__(self, trace: Trace) -> Drop | None:
        text = trace.completion
        found = _BRACKETED.search(text) or _SQUARE.search(text)
        token = found[0] if found else next((t for t in self.also if t in text), None)
        return None if token is None else Drop("control token in the content", token)
