"""Tell quickly which texts cannot hold any of many items: a table of n-grams that few items have, looked up batch by batch."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from stillhouse.pipeline.overlap.ngrams import run_hashes, window_hashes
from stillhouse.pipeline.overlap.words import plain_text

_LENGTHS = (6, 3, 2, 1)
_ANCHORS_PER_ITEM = 3
_PLAIN = re.compile(r"[^\W\d_]+|\d+")
_BATCH_CHARS = 200_000
Gram = tuple[str, ...]


class Anchors:
    """For each item up to three of its n-grams (6 words, or 3 of a shorter item): those that the fewest items have.

    Args:
        items: each the words of `to_words`.
    """

    def __init__(self, items: Sequence[Gram]) -> None:
        by_length: dict[int, list[tuple[str, ...]]] = defaultdict(list)
        plain = [tuple(_PLAIN.findall(" ".join(words))) for words in items]
        for words in plain:
            by_length[next((n for n in _LENGTHS if n <= len(words)), 0)].append(words)
        self._tables = {n: _table(_anchors(group, n), n) for n, group in by_length.items() if n}

    def may_hold(self, texts: Sequence[str]) -> np.ndarray:
        """Shape (len(texts),), bool: False where the text holds no anchor, and so no item as a whole."""
        found = np.zeros(len(texts), bool)
        if not self._tables:
            return found
        begin, size = 0, 0
        for i, text in enumerate(texts):
            size += len(text)
            if size >= _BATCH_CHARS or i + 1 == len(texts):
                self._look_up([plain_text(part) for part in texts[begin : i + 1]], found[begin : i + 1])
                begin, size = i + 1, 0
        return found

    def _look_up(self, texts: Sequence[str], found: np.ndarray) -> None:
        hashes, starts = run_hashes(texts)
        for n, (bitmap, shift, anchors) in self._tables.items():
            windows = window_hashes(hashes, n)
            maybe = np.flatnonzero(bitmap[(windows >> shift).astype(np.int64)])
            place = np.minimum(np.searchsorted(anchors, windows[maybe]), len(anchors) - 1)
            hits = maybe[anchors[place] == windows[maybe]]
            text_of_hit = np.searchsorted(starts, hits, side="right") - 1
            found[text_of_hit[hits + n <= starts[text_of_hit + 1]]] = True


def _anchors(items: Sequence[Gram], n: int) -> list[str]:
    grams_of = [[words[i : i + n] for i in range(len(words) - n + 1)] for words in items]
    num_items = Counter(gram for grams in grams_of for gram in set(grams))
    chosen = []
    for grams in grams_of:
        # a third of the item each, so that an edit in one place leaves the others
        parts = [grams[len(grams) * k // _ANCHORS_PER_ITEM : len(grams) * (k + 1) // _ANCHORS_PER_ITEM] for k in range(3)]
        best = [min(part, key=lambda gram: (num_items[gram], -_digits(gram), gram)) for part in parts if part]
        rarest = min(num_items[gram] for gram in best)
        chosen += [" ".join(gram) for gram in best if num_items[gram] <= max(2, rarest)]
    return chosen


def _digits(gram: Gram) -> int:
    return sum(word[0].isdigit() for word in gram)


def _table(anchors: Sequence[str], n: int) -> tuple[np.ndarray, np.uint64, np.ndarray]:
    """A bitmap over the top bits of the hashes, at most one in sixteen set, and the sorted hashes themselves."""
    runs, _ = run_hashes(anchors)
    hashes = np.unique(window_hashes(runs, n)[::n])  # each anchor is n runs
    bits = max(16, (16 * len(hashes)).bit_length())
    shift = np.uint64(64 - bits)
    bitmap = np.zeros(1 << bits, bool)
    bitmap[(hashes >> shift).astype(np.int64)] = True
    return bitmap, shift, hashes
