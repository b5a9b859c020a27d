"""Keep test problems out of the training traces, and keep problems that merely look like them.

Text is brought to words first: NFKC, case folded, LaTeX spacing, markup and punctuation stripped; numbers and the operators
between them are kept, so ``4 - 1`` and ``4 + 1`` differ. A trace is dropped for one of three reasons:

1. *whole*: a test item of at least eight words stands in the prompt or in the trace as one run of words that begins and ends
   where a clause does ("... if you have 3 dogs?" is not inside "... if you have 3 dogs, 2 cats?").
2. *short*: a test item of fewer than eight words is the whole prompt, or (from three words up) a clause of the prompt. Traces
   are not searched for short items: "Calculate 5 - 3." is a step of many a trace.
3. *near*: prompt and test item have the same numbers in the same order, and the prompt holds at least ``min_share`` of the
   item's telling 8-grams. An 8-gram tells something when it is in at most ``max_items`` test items and, in an item with
   numbers, has a number in it: a template's boilerplate is in many items or in no number, and so never removes anything.

A problem whose only numbers differ from a test item's therefore stays.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from stillhouse.pipeline.filters import EVIDENCE_CHARS, Drop

DECONTAMINATION_VERSION = 1
NGRAM = 8

_SUPERSCRIPTS = str.maketrans({c: f"^{i}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")})
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dtc]?frac\s*\{\s*(-?[\w.]+)\s*\}\s*\{\s*(-?[\w.]+)\s*\}", r" \1/\2 "),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname|emph)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\(?:times|cdot|ast)(?![a-z])|[×·⋅∙]", "*"),
        (r"\\div(?![a-z])|÷", "/"),
        (r"\\(?:left|right|displaystyle|quad|qquad|thinspace|begin\{\w+\}|end\{\w+\})(?![a-z])|\\[,;:!> ]|~", " "),
        (r"\$", ""),
        (r"[\u2010-\u2015\u2212]", "-"),
        (r"(?<=\d)(?:,|\{,\})(?=\d{3}(?!\d))", ""),
    )
)
_WORD = re.compile(
    r"\d+(?:\.\d+)?"
    r"|[^\W\d_]+"
    r"|(?<=[\d)a-z])\s*[+/^]|(?<=[\d)])\s*\*(?=\s*[\d(-])|-(?=\s*[\d(])"  # operators, not bullets or bold
    r"|\((?=\s*[\d(-])|(?<=[\d)])\s*\)"
)
# What may stand between a test item and the text around it when the item is there as a whole.
_CLAUSE_END = re.compile(r"[.?!\n\"'”“`)\]};:=*]")


@dataclass(frozen=True, slots=True)
class _Words:
    text: str
    words: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def numbers(self) -> tuple[str, ...]:
        return tuple(word for word in self.words if word[0].isdigit())

    def ngrams(self) -> list[tuple[str, ...]]:
        return [self.words[i : i + NGRAM] for i in range(len(self.words) - NGRAM + 1)]

    def excerpt(self, first: int, last: int) -> str:
        return self.text[self.spans[first][0] : self.spans[last][1]][:EVIDENCE_CHARS]


def _to_words(text: str) -> _Words:
    text = unicodedata.normalize("NFKC", text.translate(_SUPERSCRIPTS)).casefold()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    words, spans = [], []
    for match in _WORD.finditer(text):
        words.append(match[0].strip())
        spans.append(match.span())
    return _Words(text, tuple(words), tuple(spans))


class Decontaminator:
    """Compare training prompts and traces with the test prompts.

    Args:
        test_prompts: the prompts of the problems that the student will be judged on.
        min_share: how many of a test item's telling 8-grams a prompt must hold to be called a near copy.
        max_items: in how many test items an 8-gram may be and still tell something.
    """

    def __init__(self, test_prompts: Iterable[str], *, min_share: float = 0.8, max_items: int = 2) -> None:
        self.min_share = min_share
        items = {words.words: words for words in map(_to_words, test_prompts) if words.words}
        self._short = {words for words in items if len(words) < NGRAM}
        self._starts: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
        self._by_numbers: dict[tuple[str, ...], list[frozenset[tuple[str, ...]]]] = defaultdict(list)
        long_items = [item for item in items.values() if len(item.words) >= NGRAM]
        num_items = Counter(ngram for item in long_items for ngram in set(item.ngrams()))
        for item in long_items:
            self._starts[item.words[:NGRAM]].append(item.words)
            telling = frozenset(
                ngram
                for ngram in item.ngrams()
                if num_items[ngram] <= max_items and (not item.numbers or any(word[0].isdigit() for word in ngram))
            )
            if telling:
                self._by_numbers[item.numbers].append(telling)

    def check(self, problem_prompt: str, trace_text: str) -> Drop | None:
        """Look for test items in a training prompt and in a trace; the evidence is the matched span, normalized."""
        prompt = _to_words(problem_prompt)
        if prompt.words in self._short:
            return Drop("the prompt is a test problem", prompt.text[:EVIDENCE_CHARS])
        if span := self._whole(prompt) or self._clause(prompt):
            return Drop("the prompt holds a test problem", span)
        if span := self._near(prompt):
            return Drop("the prompt is a near copy of a test problem", span)
        if span := self._whole(_to_words(trace_text)):
            return Drop("the trace holds a test problem", span)
        return None

    def _whole(self, candidate: _Words) -> str | None:
        words = candidate.words
        for start in range(len(words) - NGRAM + 1):
            for item in self._starts.get(words[start : start + NGRAM], ()):
                end = start + len(item)
                if words[start:end] == item and _at_clause_ends(candidate, start, end):
                    return candidate.excerpt(start, end - 1)
        return None

    def _clause(self, candidate: _Words) -> str | None:
        for length in range(3, NGRAM):
            for start in range(len(candidate.words) - length + 1):
                end = start + length
                if candidate.words[start:end] in self._short and _at_clause_ends(candidate, start, end):
                    return candidate.excerpt(start, end - 1)
        return None

    def _near(self, candidate: _Words) -> str | None:
        for telling in self._by_numbers.get(candidate.numbers, ()):
            places = [i for i, ngram in enumerate(candidate.ngrams()) if ngram in telling]
            if len({candidate.words[i : i + NGRAM] for i in places}) >= self.min_share * len(telling):
                return candidate.excerpt(places[0], places[-1] + NGRAM - 1)
        return None


def _at_clause_ends(candidate: _Words, start: int, end: int) -> bool:
    before = candidate.text[candidate.spans[start - 1][1] : candidate.spans[start][0]] if start else "\n"
    after = candidate.text[candidate.spans[end - 1][1] : candidate.spans[end][0]] if end < len(candidate.words) else "\n"
    return bool(_CLAUSE_END.search(before) and _CLAUSE_END.search(after))
