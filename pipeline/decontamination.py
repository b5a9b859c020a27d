"""Keep test items out of the training traces, and keep problems that merely look like them.

What counts: a test item that stands in a training prompt or trace as it is, in other typography, with text around it or between
its sentences, cut at an end, or with a few words changed, so long as its own numbers and operators are there in their order and
none stands in place of another. What does not: a problem of the same template with other numbers or names, even where all but
one are equal; a longer list that begins like the item; a part that could be any of several items, or has lost a number and too
many words; instructions around problems; an item of few words that is a step in a trace; and what a trace repeats of its own
prompt, which was judged already.

A question with choices (a), (b), (c) is an item with and without these letters; and, from twelve words up, without its choices,
or with them in another order.

Text is brought to words first (`stillhouse.pipeline.overlap.words`): NFKC, case folded, LaTeX spacing, markup and punctuation
stripped, numbers and the operators between them kept. Phrases that stand around many problems (`BOILERPLATE`) are taken off the
items' ends. A trace is dropped for one of four reasons:

1. *whole*: an item of at least eight words stands in the prompt or in the trace as one run of words that begins and ends where
   a clause does ("... if you have 3 dogs?" is not inside "... if you have 3 dogs, 2 cats?"), or with words around it in its
   sentence and no number or operator among them.
2. *short*: an item of fewer than eight words is the whole prompt, or (from three words or twenty characters up) a clause of the
   prompt. Traces are searched only for short items of forty characters (a sudoku grid of 81 digits is one word).
3. *in pieces*: most of the item stands there in its order (`stillhouse.pipeline.overlap.alignment`): ``min_share`` of its
   telling 3-grams, those that at most ``max_items`` items have and, in an item that has such ones, those with a number.
4. *alike*: prompt and item have the same numbers and operators in the same order, share most of their 3-grams (found by
   MinHash, then counted exactly), and most of those around the numbers. With few numbers, nearly all of what no template has.

Prompts are compared word by word. A trace is compared so only where it shares an n-gram with an item that few items have; that
is looked up for a whole batch at once (`stillhouse.pipeline.overlap.anchors`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from stillhouse.pipeline.filters.drop import EVIDENCE_CHARS, Drop
from stillhouse.pipeline.overlap.alignment import Item, Origin, Own, at_clause_ends, copy_in, is_sign, stands_whole
from stillhouse.pipeline.overlap.alike import AlikeItems
from stillhouse.pipeline.overlap.anchors import Anchors
from stillhouse.pipeline.overlap.boilerplate import BOILERPLATE
from stillhouse.pipeline.overlap.item_forms import item_forms
from stillhouse.pipeline.overlap.item_grams import ItemGrams
from stillhouse.pipeline.overlap.words import Words, to_words
from stillhouse.pipeline.row_files import ROW_FILES

DECONTAMINATION_VERSION = 4
NGRAM = 8
TEST_SPLIT = ""
"""The name of the set that is the run's own test split."""

_CLAUSE_CHARS = 20  # a short item of so many characters is looked for in prompts however few its words are
_DENSE_CHARS = 40  # and one of so many in traces too
_MIN_PROPOSED = 0.15  # share of an item's 4-grams from which its words are aligned with the text's
_MOST_ALIGNED = 12  # items that are aligned with a text, those with the most 4-grams in it
_REACH_IN_TRACE = 8  # words beyond a cut copy in which a trace may not have another number
_REACH = 60  # words around the 4-grams in common that are aligned too

Gram = tuple[str, ...]


class Decontaminator:
    """An index of test items, built once, picklable, that training prompts and traces are compared with.

    Args:
        sets: the items' prompts by the name of their evaluation set, or the prompts of the run's own test split.
        min_share: how many of a test item's telling 3-grams a text must hold to be called a copy in pieces.
        max_items: in how many test items an n-gram may be and still tell something.
        boilerplate: phrases that are no part of an item.
    """

    def __init__(
        self,
        sets: Mapping[str, Iterable[str]] | Iterable[str],
        *,
        min_share: float = 0.7,
        max_items: int = 2,
        boilerplate: Sequence[str] = BOILERPLATE,
    ) -> None:
        self.min_share = min_share
        by_set = sets if isinstance(sets, Mapping) else {TEST_SPLIT: sets}
        phrases = sorted({to_words(phrase).words for phrase in boilerplate}, key=lambda phrase: (-len(phrase), phrase))
        bare, shared = dict[Gram, Item](), set[Gram]()
        for set_name, prompts in by_set.items():
            for number, prompt in enumerate(prompts, 1):
                for item in item_forms(Origin(set_name, number), to_words(prompt), phrases):
                    stored = bare.setdefault(item.words, item)
                    if stored.choices is not None and stored.origin != item.origin and set_name == stored.origin.set_name:
                        shared.add(item.words)
        for words in shared:
            del bare[words]  # a question that stands before several sets of choices is none by itself
        self._short = {words: item.origin for words, item in bare.items() if len(words) < NGRAM}
        self._dense = {words: name for words, name in self._short.items() if len("".join(words)) >= _DENSE_CHARS}
        self._items = [item for words, item in bare.items() if len(words) >= NGRAM]
        self._starts: dict[Gram, list[Item]] = defaultdict(list)
        for item in self._items:
            self._starts[item.words[:NGRAM]].append(item)
        prompts_of: dict[Origin, int] = {}
        numbers = [prompts_of.setdefault(item.origin, len(prompts_of)) for item in self._items]
        self._grams = ItemGrams([item.words for item in self._items], numbers, max_items=max_items)
        self._boilerplate = {phrase[i : i + 3] for phrase in phrases for i in range(len(phrase) - 2)}
        self._alike = AlikeItems([(item.words, item.origin) for item in self._items if item.choices is None], self._grams)
        self._anchors = Anchors(
            [(item.words, item.gaps) for item in self._items] + [(words, [""] * len(words)) for words in self._dense]
        )

    def __len__(self) -> int:
        """How many distinct items there are to compare with."""
        return len(self._short) + len(self._items)

    def check(self, problem_prompt: str, trace_text: str) -> Drop | None:
        """Look for test items in a training prompt and in a trace; the evidence is the item's number and the matched span."""
        return self.check_batch([(problem_prompt, trace_text)])[0]

    def check_batch(self, pairs: Sequence[tuple[str, str]]) -> list[Drop | None]:
        """`check` for a batch of (prompt, trace): a prompt that comes several times is compared once."""
        of_prompt = {prompt: self.check_prompt(prompt) for prompt, _ in pairs}
        clean = [i for i, (prompt, _) in enumerate(pairs) if of_prompt[prompt] is None]
        suspects = self._anchors.may_hold([pairs[i][1] for i in clean])
        drops = [of_prompt[prompt] for prompt, _ in pairs]
        for i, suspect in zip(clean, suspects):
            if suspect:
                drops[i] = self._check_trace(*pairs[i])
        return drops

    def check_prompt(self, problem_prompt: str) -> Drop | None:
        """Look for test items in a training prompt alone."""
        prompt = to_words(problem_prompt)
        if (origin := self._short.get(prompt.words)) is not None:
            return _drop("the prompt is", origin, prompt.text)
        if found := self._whole(prompt) or self._clause(prompt, self._short):
            return _drop("the prompt holds", *found)
        if found := self._in_pieces(prompt, known=frozenset(), reach=len(prompt.words)):
            return _drop("the prompt is a near copy of", *found)
        if found := self._alike.find(prompt.words, prompt.signs):
            origin, similarity = found
            return _drop("the prompt is a near copy of", origin, f"{similarity:.2f} alike: {prompt.text}")
        return None

    def _check_trace(self, problem_prompt: str, text: str) -> Drop | None:
        trace = to_words(text)
        if found := self._whole(trace) or self._clause(trace, self._dense):
            return _drop("the trace holds", *found)
        if found := self._in_pieces(trace, known=frozenset(to_words(problem_prompt).ngrams(3)), reach=_REACH_IN_TRACE):
            return _drop("the trace holds a near copy of", *found)
        return None

    def _whole(self, text: Words) -> tuple[Origin, str] | None:
        words = text.words
        for start in range(len(words) - NGRAM + 1):
            for item in self._starts.get(words[start : start + NGRAM], ()):
                end = start + len(item.words)
                if words[start:end] == item.words and stands_whole(text, item, start):
                    return item.origin, text.excerpt(start, end - 1)
        return None

    def _clause(self, text: Words, short: Mapping[Gram, Origin]) -> tuple[Origin, str] | None:
        if not short:
            return None
        for length in range(1, NGRAM):
            for start in range(len(text.words) - length + 1):
                words = text.words[start : start + length]
                origin = short.get(words)
                if origin is None or (length < 3 and len("".join(words)) < _CLAUSE_CHARS):
                    continue
                if words in self._dense or at_clause_ends(text, start, start + length):
                    return origin, text.excerpt(start, start + length - 1)
        return None

    def _in_pieces(self, text: Words, *, known: frozenset[Gram], reach: int) -> tuple[Origin, str] | None:
        """An item that stands here in pieces; 3-grams that are ``known`` (the trace's own prompt has them) tell nothing."""
        proposed = self._grams.propose(text.words)
        likely = sorted(proposed, key=lambda i: (-len({place for _, place in proposed[i]}), i))
        for i in likely[:_MOST_ALIGNED]:
            item, needed = self._items[i], _MIN_PROPOSED * self._grams.num_proposing[i]
            if item.choices is not None:
                continue
            own = None
            for window in _windows(proposed[i], 2 * len(item.words) + _REACH):
                if len({place for _, place in window}) < needed:
                    continue
                own = self._own(item, known) if own is None else own
                if not own.telling.any():
                    break
                (first, first_place), (last, last_place) = window[0], window[-1]
                begin = max(0, first - first_place - _REACH)
                end = min(len(text.words), last + len(item.words) - last_place + _REACH)
                if found := copy_in(text, item, own, begin, end, min_share=self.min_share, reach=reach):
                    return item.origin, text.excerpt(found[0], found[1] - 1)
        return None

    def _own(self, item: Item, known: frozenset[Gram]) -> Own:
        """What is the item's own; of its 3-grams those count that have a number, where there are any."""
        runs, words = self._grams.own(item.words)
        grams = [item.words[i : i + 3] for i in range(len(item.words) - 2)]
        runs &= np.array([gram not in self._boilerplate and gram not in known for gram in grams])
        at_signs = runs & np.array([any(map(is_sign, gram)) for gram in grams])
        return Own(runs, at_signs if at_signs.any() else runs, words)


def _windows(found: list[tuple[int, int]], num_words: int) -> list[list[tuple[int, int]]]:
    """Split the places where an item's grams stand into stretches of at most so many words."""
    windows, window = [], [found[0]]
    for place in found[1:]:
        if place[0] - window[0][0] > num_words:
            windows.append(window)
            window = []
        window.append(place)
    return [*windows, window]


def _drop(how: str, origin: Origin, span: str) -> Drop:
    set_name = origin.set_name
    if set_name.endswith(ROW_FILES):
        set_name = set_name.rpartition("/")[2]
    what = f"an item of {set_name}" if set_name else "a test problem"
    return Drop(f"{how} {what}", f"item {origin.number}: {span}"[:EVIDENCE_CHARS])
