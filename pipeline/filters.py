"""Filters that look at a trace alone: each is one pure call from a trace to None (keep) or a Drop with reason and evidence."""

from __future__ import annotations

import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from stillhouse.pipeline.extraction import THINK_CLOSE, THINK_OPEN, split_reasoning, strict_answer
from stillhouse.pipeline.prompts import opens_think_block
from stillhouse.pipeline.records import Trace, Verdict

FILTERS_VERSION = 1
EVIDENCE_CHARS = 200


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a trace is dropped: a reason the funnel counts by, and what was seen."""

    reason: str
    evidence: str = ""


class TraceFilter(Protocol):
    """What ``run_filters`` calls: ``check`` names it in verdicts."""

    check: ClassVar[str]

    def __call__(self, trace: Trace) -> Drop | None: ...


@dataclass(frozen=True)
class Finished:
    """Drop a completion that was cut off: its finish_reason is not ``stop``."""

    check: ClassVar[str] = "finished"

    def __call__(self, trace: Trace) -> Drop | None:
        if trace.finish_reason == "stop":
            return None
        return Drop("not finished", f"finish_reason={trace.finish_reason} after {trace.num_completion_tokens} tokens")


@dataclass(frozen=True)
class ThinkBlock:
    """Drop a completion without exactly one think block that opens it, is closed and is not empty.

    Where the rendered prompt already ends with ``<think>``, the completion must have the closing tag only.
    """

    check: ClassVar[str] = "think_block"

    def __call__(self, trace: Trace) -> Drop | None:
        text = trace.completion
        in_prompt = opens_think_block(trace.rendered_prompt)
        num_open, num_close = text.count(THINK_OPEN) + in_prompt, text.count(THINK_CLOSE)
        counts = f"{num_open} opened, {num_close} closed"
        if num_open == 0:
            return Drop("no think block", text[:EVIDENCE_CHARS])
        if num_close == 0:
            return Drop("think block not closed", text[-EVIDENCE_CHARS:])
        if num_open > 1 or num_close > 1:
            return Drop("more than one think block", counts)
        parsed = split_reasoning(text, prompt_opens_think=in_prompt)
        if parsed.reasoning is None:
            return Drop("text before the think block", text[:EVIDENCE_CHARS])
        if not parsed.reasoning:
            return Drop("think block empty", text[:EVIDENCE_CHARS])
        return None


@dataclass(frozen=True)
class AnswerPresent:
    """Drop a completion without a boxed answer after the think block."""

    check: ClassVar[str] = "answer_present"

    def __call__(self, trace: Trace) -> Drop | None:
        if strict_answer(trace.completion) is not None:
            return None
        return Drop("no boxed answer after the think block", trace.completion[-EVIDENCE_CHARS:])


@dataclass(frozen=True)
class Length:
    """Drop a completion shorter than ``min_tokens`` or longer than ``max_tokens`` (teacher's tokens, both bounds allowed)."""

    min_tokens: int
    max_tokens: int
    check: ClassVar[str] = "length"

    def __call__(self, trace: Trace) -> Drop | None:
        if trace.num_completion_tokens < self.min_tokens:
            return Drop("too short", f"{trace.num_completion_tokens} tokens, at least {self.min_tokens} wanted")
        if trace.num_completion_tokens > self.max_tokens:
            return Drop("too long", f"{trace.num_completion_tokens} tokens, at most {self.max_tokens} wanted")
        return None


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")


@dataclass(frozen=True)
class Repetition:
    """Drop a completion that goes in circles.

    Args:
        max_same_line: the same non-blank line this many times in a row.
        max_same_sentence: the same sentence (of at least 20 characters) this many times in a row.
        max_sentence_in_all: the same such sentence this many times anywhere.
        ngram, max_same_ngram: the same run of ``ngram`` words this many times anywhere.
        min_compressed_share: zlib-compressed size over size, for texts from ``compress_from_bytes`` up; worked prose is near
            0.3, a loop under 0.05.
    """

    max_same_line: int = 8
    max_same_sentence: int = 4
    max_sentence_in_all: int = 40
    ngram: int = 16
    max_same_ngram: int = 8
    min_compressed_share: float = 0.06
    compress_from_bytes: int = 4_000
    check: ClassVar[str] = "repetition"

    def __call__(self, trace: Trace) -> Drop | None:
        text = trace.completion
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        line, times = _longest_run(lines)
        if times >= self.max_same_line:
            return Drop("same line repeated", f"{times} times in a row: {line}")
        sentences = [s for s in (part.strip() for part in _SENTENCE_END.split(text)) if len(s) >= 20]
        sentence, times = _longest_run(sentences)
        if times >= self.max_same_sentence:
            return Drop("same sentence repeated", f"{times} times in a row: {sentence}")
        sentence, times = _most_frequent(sentences)
        if times >= self.max_sentence_in_all:
            return Drop("same sentence repeated", f"{times} times in all: {sentence}")
        words = text.split()
        ngram, times = _most_frequent(zip(*(words[i:] for i in range(self.ngram))))
        if times >= self.max_same_ngram:
            return Drop("same words in a loop", f"{times} times: {' '.join(ngram)}")
        raw = text.encode()
        if len(raw) >= self.compress_from_bytes:
            share = len(zlib.compress(raw, 6)) / len(raw)
            if share < self.min_compressed_share:
                return Drop(
                    "compresses like a loop", f"to {share:.3f} of its {len(raw)} bytes, under {self.min_compressed_share}"
                )
        return None


def _longest_run(items: Sequence[str]) -> tuple[str, int]:
    runs = ((item, sum(1 for _ in group)) for item, group in itertools.groupby(items))
    return max(runs, key=lambda run: run[1], default=("", 0))


def _most_frequent(items: Iterable) -> tuple:
    counted = Counter(items).most_common(1)
    return counted[0] if counted else ("", 0)


_CONTROL_TOKENS = re.compile(
    r"<\|[^|<>\s]{1,40}\|>"  # ChatML, Llama 3, Qwen
    r"|<｜[^｜<>]{1,40}｜>"  # DeepSeek
    r"|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]|<</?SYS>>"
)


@dataclass(frozen=True)
class ControlTokens:
    """Drop a completion whose content holds a chat template's control token, which a student would read as one.

    Args:
        also: further token texts to refuse, for example the teacher's own.
    """

    also: tuple[str, ...] = ()
    check: ClassVar[str] = "control_tokens"

    def __call__(self, trace: Trace) -> Drop | None:
        found = _CONTROL_TOKENS.search(trace.completion)
        token = found[0] if found else next((t for t in self.also if t in trace.completion), None)
        return None if token is None else Drop("control token in the content", token)


def format_filters(*, min_tokens: int, max_tokens: int) -> tuple[TraceFilter, ...]:
    """The filters of the filter stage, in their order: the cheapest and most telling reason first."""
    return (Finished(), ThinkBlock(), AnswerPresent(), Length(min_tokens, max_tokens), ControlTokens(), Repetition())


def run_filters(traces: Iterable[Trace], filters: Sequence[TraceFilter]) -> list[Verdict]:
    """Give each trace one Verdict: of the first filter that drops it, or a keeping one (check ``format``).

    One verdict a trace, in the order of the traces, so that counting by (check, reason) adds up to the number of traces.
    """
    verdicts = []
    for trace in traces:
        for trace_filter in filters:
            if drop := trace_filter(trace):
                evidence = drop.evidence[:EVIDENCE_CHARS]
                verdicts.append(Verdict(trace.key, trace_filter.check, FILTERS_VERSION, False, drop.reason, evidence))
                break
        else:
            verdicts.append(Verdict(trace.key, "format", FILTERS_VERSION, True, "passed every filter"))
    return verdicts
