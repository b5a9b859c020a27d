"""Keep test items out of the training traces, and keep problems that merely look like them.

Text is brought to words first (`stillhouse.pipeline.overlap.words`): NFKC, case folded, LaTeX spacing, markup and punctuation
stripped; numbers and the operators between them are kept, so ``4 - 1`` and ``4 + 1`` differ. Phrases that stand around many
problems (`BOILERPLATE`) are taken off the items' ends. A trace is dropped for one of four reasons:

1. *whole*: an item of at least eight words stands in the prompt or in the trace as one run of words that begins and ends where
   a clause does ("... if you have 3 dogs?" is not inside "... if you have 3 dogs, 2 cats?").
2. *short*: an item of fewer than eight words is the whole prompt, or (from three words up) a clause of the prompt. Traces are
   not searched for short items: "Calculate 5 - 3." is a step of many a trace.
3. *near*: at least ``min_share`` of the item's telling 8-grams stand in the prompt or in the trace, and the numbers there are
   the item's, in its order, with its operators. An 8-gram tells something when it is in at most ``max_items`` items, is not
   boilerplate and, in an item with numbers, has a number in it.
4. *alike*: prompt and item have the same numbers and operators in the same order, share most of their 3-grams (found by
   MinHash, then counted exactly), and most of those around the numbers. With few numbers, nearly all of what no template has.

A problem whose only numbers differ from a test item's therefore stays.

Prompts are compared word by word. A trace is compared so only where it shares an n-gram with an item that few items have; that
is looked up for a whole batch at once (`stillhouse.pipeline.overlap.anchors`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stillhouse.pipeline.filters.drop import EVIDENCE_CHARS, Drop
from stillhouse.pipeline.overlap.alike import AlikeItems
from stillhouse.pipeline.overlap.anchors import Anchors
from stillhouse.pipeline.overlap.boilerplate import BOILERPLATE
from stillhouse.pipeline.overlap.words import Words, to_words

DECONTAMINATION_VERSION = 2
NGRAM = 8
TEST_SPLIT = ""
"""The name of the set that is the run's own test split."""

# What may stand between a test item and the text around it when the item is there as a whole.
_CLAUSE_END = re.compile(r"[.?!\n\"'”“`)\]};:=*]")
_MAX_SLIP = 3  # words that an edit may have moved an item's ends by

Gram = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Item:
    """A test item: its set, its words, its numbers and operators, and where each of its telling 8-grams stands in it."""

    set_name: str
    words: Gram
    signs: Gram
    telling: dict[Gram, int]


class Decontaminator:
    """An index of test items, built once, picklable, that training prompts and traces are compared with.

    Args:
        sets: the items' prompts by the name of their evaluation set, or the prompts of the run's own test split.
        min_share: how many of a test item's telling 8-grams a text must hold to be called a near copy.
        max_items: in how many test items an 8-gram may be and still tell something.
        boilerplate: phrases that are no part of an item.
    """

    def __init__(
        self,
        sets: Mapping[str, Iterable[str]] | Iterable[str],
        *,
        min_share: float = 0.8,
        max_items: int = 2,
        boilerplate: Sequence[str] = BOILERPLATE,
    ) -> None:
        self.min_share = min_share
        by_set = sets if isinstance(sets, Mapping) else {TEST_SPLIT: sets}
        phrases = sorted({to_words(phrase).words for phrase in boilerplate}, key=lambda phrase: (-len(phrase), phrase))
        bare: dict[Gram, str] = {}
        for set_name, prompts in by_set.items():
            for prompt in prompts:
                for words in {to_words(prompt).words, _without_boilerplate(to_words(prompt).words, phrases)}:
                    if words:
                        bare.setdefault(words, set_name)
        self._short = {words: name for words, name in bare.items() if len(words) < NGRAM}
        self._starts: dict[Gram, list[_Item]] = defaultdict(list)
        self._holding: dict[Gram, list[_Item]] = defaultdict(list)
        said_often = {gram for phrase in phrases for gram in _ngrams(phrase)}
        num_items = Counter(gram for words in bare for gram in set(_ngrams(words)))
        items = [_item(words, name, num_items, said_often, max_items) for words, name in bare.items() if len(words) >= NGRAM]
        for item in items:
            self._starts[item.words[:NGRAM]].append(item)
            for gram in item.telling:
                self._holding[gram].append(item)
        self._alike = AlikeItems([(item.words, item.set_name) for item in items], max_items=max_items)
        self._anchors = Anchors([item.words for item in items])

    def __len__(self) -> int:
        """How many distinct items there are to compare with."""
        return len(self._short) + len({item.words for found in self._starts.values() for item in found})

    def check(self, problem_prompt: str, trace_text: str) -> Drop | None:
        """Look for test items in a training prompt and in a trace; the evidence is the matched span, normalized."""
        return self.check_batch([(problem_prompt, trace_text)])[0]

    def check_batch(self, pairs: Sequence[tuple[str, str]]) -> list[Drop | None]:
        """`check` for a batch of (prompt, trace): a prompt that comes several times is compared once."""
        of_prompt = {prompt: self.check_prompt(prompt) for prompt, _ in pairs}
        clean = [i for i, (prompt, _) in enumerate(pairs) if of_prompt[prompt] is None]
        suspects = self._anchors.may_hold([pairs[i][1] for i in clean])
        drops = [of_prompt[prompt] for prompt, _ in pairs]
        for i, suspect in zip(clean, suspects):
            if suspect:
                drops[i] = self._check_trace(pairs[i][1])
        return drops

    def check_prompt(self, problem_prompt: str) -> Drop | None:
        """Look for test items in a training prompt alone."""
        prompt = to_words(problem_prompt)
        if (set_name := self._short.get(prompt.words)) is not None:
            return _drop("the prompt is", set_name, prompt.text)
        if found := self._whole(prompt) or self._clause(prompt):
            return _drop("the prompt holds", *found)
        if found := self._near(prompt, same_signs_suffice=True):
            return _drop("the prompt is a near copy of", *found)
        if found := self._alike.find(prompt.words, prompt.signs):
            set_name, similarity = found
            return _drop("the prompt is a near copy of", set_name, f"{similarity:.2f} alike: {prompt.text}")
        return None

    def _check_trace(self, text: str) -> Drop | None:
        trace = to_words(text)
        if found := self._whole(trace):
            return _drop("the trace holds", *found)
        if found := self._near(trace, same_signs_suffice=False):
            return _drop("the trace holds a near copy of", *found)
        return None

    def _whole(self, text: Words) -> tuple[str, str] | None:
        words = text.words
        for start in range(len(words) - NGRAM + 1):
            for item in self._starts.get(words[start : start + NGRAM], ()):
                end = start + len(item.words)
                if words[start:end] == item.words and _at_clause_ends(text, start, end):
                    return item.set_name, text.excerpt(start, end - 1)
        return None

    def _clause(self, text: Words) -> tuple[str, str] | None:
        for length in range(3, NGRAM):
            for start in range(len(text.words) - length + 1):
                end = start + length
                set_name = self._short.get(text.words[start:end])
                if set_name is not None and _at_clause_ends(text, start, end):
                    return set_name, text.excerpt(start, end - 1)
        return None

    def _near(self, text: Words, *, same_signs_suffice: bool) -> tuple[str, str] | None:
        """An item of whose telling 8-grams most stand here, close together, with the item's numbers and no others.

        Args:
            same_signs_suffice: the text need not hold the item at clause ends where all its numbers and operators are the
                item's.
        """
        places: dict[int, list[tuple[int, int]]] = defaultdict(list)  # item -> (place here, place in the item)
        items: dict[int, _Item] = {}
        for start, gram in enumerate(text.ngrams(NGRAM)):
            for item in self._holding.get(gram, ()):
                items[id(item)] = item
                places[id(item)].append((start, item.telling[gram]))
        for name, found in places.items():
            item = items[name]
            for window in _windows(found, len(item.words)):
                if len({place for _, place in window}) < self.min_share * len(item.telling):
                    continue
                (first, first_place), (last, last_place) = window[0], window[-1]
                start = max(0, first - first_place)
                end = min(len(text.words), last + len(item.words) - last_place)
                whole_text = same_signs_suffice and text.signs == item.signs
                if whole_text or (_signs(text.words[start:end]) == item.signs and _near_clause_ends(text, start, end)):
                    return item.set_name, text.excerpt(first, last + NGRAM - 1)
        return None


def _ngrams(words: Gram) -> list[Gram]:
    return [words[i : i + NGRAM] for i in range(len(words) - NGRAM + 1)]


def _signs(words: Gram) -> Gram:
    return tuple(word for word in words if not word[0].isalpha())


def _has_number(words: Gram) -> bool:
    return any(word[0].isdigit() for word in words)


def _item(words: Gram, set_name: str, num_items: Counter[Gram], said_often: set[Gram], max_items: int) -> _Item:
    with_number = _has_number(words)
    telling: dict[Gram, int] = {}
    for place, gram in enumerate(_ngrams(words)):
        if num_items[gram] <= max_items and gram not in said_often and (not with_number or _has_number(gram)):
            telling.setdefault(gram, place)
    return _Item(set_name, words, _signs(words), telling)


def _without_boilerplate(words: Gram, phrases: Sequence[Gram]) -> Gram:
    """Take boilerplate off both ends; an item that is nothing else is no item."""
    shorter = True
    while shorter:
        shorter = False
        for phrase in phrases:
            if words[: len(phrase)] == phrase:
                words, shorter = words[len(phrase) :], True
            elif words[-len(phrase) :] == phrase:
                words, shorter = words[: -len(phrase)], True
    return words


def _windows(found: list[tuple[int, int]], num_words: int) -> list[list[tuple[int, int]]]:
    """Split the places where an item's grams stand into stretches no longer than the item and a quarter."""
    windows, window = [], [found[0]]
    for place in found[1:]:
        if place[0] - window[0][0] > num_words * 1.25:
            windows.append(window)
            window = []
        window.append(place)
    return [*windows, window]


def _at_clause_ends(text: Words, start: int, end: int) -> bool:
    # an item that ends in a bracket ends there, unless an operator or a number goes on
    closed = text.words[end - 1] == ")" and end < len(text.words) and text.words[end][0].isalpha()
    return bool(_CLAUSE_END.search(_gap(text, start)) and (closed or _CLAUSE_END.search(_gap(text, end))))


def _near_clause_ends(text: Words, start: int, end: int) -> bool:
    """As `_at_clause_ends`, up to a few words off, of which none may be a number."""

    def clause_end(at: int, step: int) -> bool:
        for gap in range(at, at + step * (_MAX_SLIP + 1), step):
            if not 0 <= gap <= len(text.words):
                return False
            if _CLAUSE_END.search(_gap(text, gap)):
                return True
            crossed = gap - 1 if step < 0 else gap
            if 0 <= crossed < len(text.words) and text.words[crossed][0].isdigit():
                return False
        return False

    return clause_end(start, -1) and clause_end(end, 1)


def _gap(text: Words, at: int) -> str:
    """What stands between word ``at - 1`` and word ``at``; a line break at both ends of the text."""
    if at in (0, len(text.words)):
        return "\n"
    return text.text[text.spans[at - 1][1] : text.spans[at][0]]


def _drop(how: str, set_name: str, span: str) -> Drop:
    return Drop(f"{how} {f'an item of {set_name}' if set_name else 'a test problem'}", span[:EVIDENCE_CHARS])
