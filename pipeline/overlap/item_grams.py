"""Which items share runs of words with a text: a table of the items' n-grams, and which n-grams are a template's.

Words are numbered and n-grams hashed by `stillhouse.pipeline.overlap.ngrams.window_hashes`, so that a hundred thousand items of
a hundred words take some 200 MB.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from stillhouse.pipeline.overlap.ngrams import mixed, window_hashes

_WIDE = 12
_LOOK_UPS = (4, _WIDE)  # words of the n-grams by which items are found, the second for those whose first are too common
_MIN_RARE = 0.3  # share of an item's n-grams
_LOOK_UP_ITEMS = 8  # an n-gram that more items have proposes none
_TELLING = 3
_CONTEXT = 8
Words = tuple[str, ...]


class ItemGrams:
    """The n-grams of items.

    Args:
        items: each its words, at least eight.
        origins: for each the number of the prompt that it is a form of; the forms of one prompt count once.
        max_items: of how many prompts' items an n-gram may be and still tell something.
    """

    def __init__(self, items: Sequence[Words], origins: Sequence[int], *, max_items: int) -> None:
        self._number: dict[str, int] = {}
        number = self._number
        ids = np.array([number.setdefault(word, len(number) + 1) for words in items for word in words], np.uint64)
        sizes = np.array([len(words) for words in items], np.int64)
        hashes, item_of = mixed(ids), np.repeat(np.arange(len(items), dtype=np.int32), sizes)
        starts, origin = np.concatenate(([0], np.cumsum(sizes))), np.array(origins, np.int32)
        self._tables: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.num_proposing = np.zeros(len(items), np.int64)
        wanted = np.ones(len(items), bool)
        for n in _LOOK_UPS:
            grams, owners, counts = _counted(hashes, item_of, origin, n)
            rows = np.flatnonzero((counts <= _LOOK_UP_ITEMS) & wanted[owners])
            rows = rows[np.argsort(grams[rows], kind="stable")]
            self._tables[n] = (grams[rows], owners[rows], (rows - starts[owners[rows]]).astype(np.int32))
            self.num_proposing += np.bincount(owners[rows], minlength=len(items))
            wanted = self.num_proposing < _MIN_RARE * sizes
        # A run of eight words in many items is a template's, and so is all in it. A run of three in many items is, unless there
        # are so many items that they share it by chance.
        by_chance = max(max_items, len(items) // 1000)
        limits = ((_TELLING, max_items), (-_TELLING, by_chance), (_CONTEXT, max_items), (_WIDE, max_items))
        self._template = {n: _common(hashes, item_of, origin, abs(n), limit) for n, limit in limits}

    def propose(self, words: Words) -> dict[int, list[tuple[int, int]]]:
        """(place in the text, place in the item) of every n-gram in common, by item, in the order of the text."""
        found: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for n, (grams, items, places) in self._tables.items():
            hashes = self._hashes(words, n)
            first, last = (np.searchsorted(grams, hashes, side=side) for side in ("left", "right"))
            for start in np.flatnonzero(last > first).tolist():
                for row in range(int(first[start]), int(last[start])):
                    found[int(items[row])].append((start, int(places[row])))
        for pairs in found.values():
            pairs.sort()
        return found

    def common(self, words: Words) -> np.ndarray:
        """Shape (words - 2,), bool: whether a run of three words is a template's, more items than ``max_items`` having it."""
        return _among(self._hashes(words, _TELLING), self._template[_TELLING])

    def own(self, words: Words) -> tuple[np.ndarray, np.ndarray]:
        """What of an item is no template's.

        Returns:
            shape (words - 2,), bool, for each run of three words; and shape (words,), bool, for each word whether it stands in
            no run of eight that more items have, or, where no word would be, in a run of twelve that few have.
        """
        runs, contexts = self._hashes(words, _TELLING), self._hashes(words, _CONTEXT)
        rare = ~self.common(words)
        by_chance = ~_among(runs, self._template[-_TELLING])
        own_words = np.ones(len(words), bool)
        for start in np.flatnonzero(_among(contexts, self._template[_CONTEXT])).tolist():
            by_chance[start : start + _CONTEXT - _TELLING + 1] = False
            own_words[start : start + _CONTEXT] = False
        own_runs = rare | by_chance
        if not own_runs.any():  # a board of few kinds of cells, of which any three are in many others
            wide = self._hashes(words, _WIDE)
            for start in np.flatnonzero(~_among(wide, self._template[_WIDE])).tolist():
                own_runs[start : start + _WIDE - _TELLING + 1] = True
                own_words[start : start + _WIDE] = True
        return own_runs, own_words

    def _hashes(self, words: Words, n: int) -> np.ndarray:
        # a word that no item has is 0, and no n-gram of the items has a 0
        return window_hashes(mixed(np.array([self._number.get(word, 0) for word in words], np.uint64)), n)


def _counted(hashes: np.ndarray, item_of: np.ndarray, origin: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n-gram at each place, its item, and of how many prompts it is: more than any limit where it crosses two items."""
    grams = window_hashes(hashes, n)
    owners = item_of[: len(grams)]
    crossing = owners != item_of[n - 1 :] if len(grams) else np.zeros(0, bool)
    prompts = origin[owners]
    order = np.lexsort((prompts, grams))
    sorted_grams, sorted_prompts = grams[order], prompts[order]
    new_gram = np.diff(sorted_grams, prepend=sorted_grams[:1] + np.uint64(1)) != 0
    new_pair = new_gram | (np.diff(sorted_prompts, prepend=-1) != 0)
    group = np.cumsum(new_gram) - 1
    counts = np.empty(len(grams), np.int64)
    counts[order] = np.bincount(group, weights=new_pair)[group] if len(grams) else 0
    counts[crossing] = np.iinfo(np.int64).max
    return grams, owners, counts


def _common(hashes: np.ndarray, item_of: np.ndarray, origin: np.ndarray, n: int, limit: int) -> np.ndarray:
    """The sorted n-grams that the items of more than ``limit`` prompts have."""
    grams, _, counts = _counted(hashes, item_of, origin, n)
    return np.unique(grams[(counts > limit) & (counts < np.iinfo(np.int64).max)])


def _among(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    if not len(table):
        return np.zeros(len(values), bool)
    return table[np.minimum(np.searchsorted(table, values), len(table) - 1)] == values
