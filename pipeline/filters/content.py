"""Filters on what a completion says: refusals, leaked system prompts, an answer that its own reasoning contradicts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stillhouse.pipeline.exact_numbers import exact_number
from stillhouse.pipeline.extraction import THINK_CLOSE, boxed_answer, strict_answer
from stillhouse.pipeline.filters.drop import EVIDENCE_CHARS, Drop
from stillhouse.pipeline.filters.prompt_parts import prompt_parts
from stillhouse.pipeline.records import Trace

_NOT = r"(?:can(?:no|['’])t|can not|won['’]t|will not|am unable to|['’]m unable to|am not able to|['’]m not able to)"
_REFUSAL = re.compile(
    r"\bI(?:['’]m| am) (?:sorry|afraid)\b[^.\n]{0,60}?\bI(?:['’]m| am)? (?:can(?:no|['’])t|can not|unable|won['’]t|not able)\b"
    rf"|\bI ?{_NOT} (?:be able to )?(?:\w+ ){{0,2}}?(?:(?:help|assist|comply|engage)\b(?! but\b)"
    # of a request as a whole: "I won't provide every step" and "I can't solve this by hand" refuse nothing
    r"|(?:answer|solve|provide|complete|fulfill?|continue|do)\b(?: with)?"
    r"(?: (?:\w+ ){0,3}(?:request|question|problem|task|answer|solution|information|assistance|help)\b"
    r"|(?: (?:that|this|it))?(?=\s*(?:[.,;:!?)\n]|$))))"
    r"|\bI (?:must|have to) (?:decline|refuse)\b"
    r"|\bas an AI(?: language)?(?: model| assistant)?,? I\b"
    r"|(?:抱歉|对不起|不好意思)[，,。！]?\s*(?:但是?)?我(?:无法|不能|没办法)|作为(?:一个|一名)?(?:AI|人工智能)",
    re.IGNORECASE,
)
_QUOTED = re.compile(r'"[^"\n]{1,400}"|“[^”\n]{1,400}”|「[^」\n]{1,400}」|^[ \t]*>[^\n]*|```.*?```', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Refusal:
    """Drop a completion whose answer declines the task: "I'm sorry, but I can't help with that".

    Only what follows the think block is read, and no quotation or code in it: "we cannot divide by zero" is reasoning, and a
    letter that says sorry may be what was asked for.
    """

    def __call__(self, trace: Trace) -> Drop | None:
        _, closed, answer = trace.completion.rpartition(THINK_CLOSE)
        found = _REFUSAL.search(answer)
        if found is None:
            return None
        found = _REFUSAL.search(_QUOTED.sub(lambda quoted: " " * len(quoted[0]), answer))
        if found is None:
            return None
        where = "after the think block" if closed else "in the completion"
        return Drop(f"refuses {where}", answer[found.start() : found.start() + EVIDENCE_CHARS])


_TALKS_OF_IT = re.compile(
    r"\b(?:my|the|this) system (?:prompt|message|instructions?)\b"
    r"|\bYou are (?:Qwen, created by|ChatGPT, a|"
    r"Claude, (?:made|created)|DeepSeek|Gemini, a|a helpful(?:, \w+)*(?: and \w+)? assistant)",
    re.IGNORECASE,
)
_HINTS = (
    "system prompt",
    "system message",
    "system instruction",
    "you are qwen",
    "you are chatgpt",
    "you are claude",
    "you are deepseek",
    "you are gemini",
    "you are a helpful",
)
_LETTERS = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class SystemPromptLeak:
    """Drop a completion that repeats its system prompt, or talks of one where its question does not.

    Args:
        min_words: this many words of the system prompt in a row, in any case and punctuation, are a leak.
    """

    min_words: int = 8

    def __call__(self, trace: Trace) -> Drop | None:
        text = trace.completion
        lower = text.lower()
        system, question = prompt_parts(trace.rendered_prompt)
        if any(hint in lower and hint not in question.lower() for hint in _HINTS) and (talks := _TALKS_OF_IT.search(text)):
            return Drop("talks of its system prompt", text[talks.start() : talks.start() + EVIDENCE_CHARS])
        words = _LETTERS.findall(system.lower())
        if len(words) < self.min_words:
            return None
        run = r"[\W_]+"
        first_words = {word.lower() for word in _LETTERS.findall(text)}
        for start in range(len(words) - self.min_words + 1):
            gram = words[start : start + self.min_words]
            if first_words.issuperset(gram) and (found := re.search(rf"\b{run.join(gram)}\b", text, re.IGNORECASE)):
                return Drop("repeats its system prompt", found[0])
        return None


_STATED = re.compile(
    r"\b(?:final )?answer(?: is|:| should be| must be)\s*[:=]?\s*\**\s*\$?\s*(-?\d[\d,]*(?:\.\d+)?(?:/\d+)?)"
    r"(?!\s?\\[a-z%]|[\w^/+%-]|\*(?!\*)|\.\d)",  # it goes on: 12\sqrt{2}, 50 %, 2^{10}
    re.IGNORECASE,
)
_LAST_CHARS = 1_500


@dataclass(frozen=True)
class Contradiction:
    """Drop a completion whose reasoning ends on another number than the final answer.

    Both are extracted, not judged: the last box in the reasoning, or else the last "the answer is 12" near its end, against the
    box after it. Only numbers are compared, exactly; what is not a number on both sides passes.
    """

    def __call__(self, trace: Trace) -> Drop | None:
        reasoning, closed, _ = trace.completion.rpartition(THINK_CLOSE)
        final = strict_answer(trace.completion) if closed else None
        if final is None:
            return None
        reasoned = boxed_answer(reasoning) if "\\boxed" in reasoning else None
        if reasoned is None:
            end = reasoning[-_LAST_CHARS:]
            stated = _STATED.findall(end) if "answer" in end.lower() else None
            reasoned = stated[-1] if stated else None
        if reasoned is None:
            return None
        before, after = exact_number(reasoned), exact_number(final)
        if before is None or after is None or before == after:
            return None
        return Drop("the reasoning ends on another answer", f"reasoned {reasoned}, answered {final}")
