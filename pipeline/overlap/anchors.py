"""Tell quickly which texts cannot hold any of many items: a table of n-grams that few items have, looked up batch by batch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from stillhouse.pipeline.overlap.ngrams import run_hashes, window_hashes
from stillhouse.pipeline.overlap.words import plain_text

_LENGTHS = (4, 3, 2, 1)
_WORDS_PER_ANCHOR = 3
_MAX_ANCHORS = 40
_PLAIN = re.compile(r"[^\W\d_]+|\d+")
_SENTENCE_END = re.compile(r"[.?!。](?!\d)|\n\s*\n")
_SHORT_WORDS = 3.5  # letters of a word, on average
_BATCH_CHARS = 200_000
_BATCH_ITEMS = 2_000
Gram = tuple[str, ...]


class Anchors:
    """For each item some of its n-grams, of four words where it has so many: those that the fewest items have.

    Args:
        items: each the words of `to_words`, and what stands before each.
    """

    def __init__(self, items: Sequence[tuple[Gram, Sequence[str]]]) -> None:
        by_length: dict[int, list[tuple[list[str], list[bool]]]] = defaultdict(list)
        for words, gaps in items:
            plain = [(part, i) for i, word in enumerate(words) for part in _PLAIN.findall(word)]
            ends = [bool(_SENTENCE_END.search(gaps[i])) for _, i in plain]
            by_length[next((n for n in _LENGTHS if n <= len(plain)), 0)].append(([part for part, _ in plain], ends))
        self._tables = {n: _table(_anchors(group, n)) for n, group in by_length.items() if n}

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


def _anchors(items: Sequence[tuple[list[str], list[bool]]], n: int) -> np.ndarray:
    """The hashes of the items' anchors, each one of several in every few words within a sentence."""
    texts = [" ".join(words) for words, _ in items]
    parts = [run_hashes(texts[i : i + _BATCH_ITEMS])[0] for i in range(0, len(texts), _BATCH_ITEMS)]
    starts = np.cumsum([0] + [len(words) for words, _ in items])
    hashes = window_hashes(np.concatenate(parts), n)
    _, gram, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    chosen: list[int] = []
    for (words, ends), start in zip(items, starts.tolist()):
        num_grams = len(words) - n + 1
        ranked = []
        for i, count in enumerate(counts[gram[start : start + num_grams]].tolist()):
            text, num_digits = "".join(words[i : i + n]), sum(word[0].isdigit() for word in words[i : i + n])
            crosses = any(ends[i + 1 : i + n])
            ranked.append((count, crosses, _is_common(text, n), num_digits == n, -num_digits, -len(text), text, i))
        # so many that one is left whatever is cut, changed, or quoted in parts
        num = min(_MAX_ANCHORS, max(3, num_grams // _WORDS_PER_ANCHOR))
        stretches = [ranked[num_grams * k // num : num_grams * (k + 1) // num] for k in range(num)]
        rarest = min(ranked)
        best = (min(rows) for rows in stretches if rows)
        chosen += [start + rarest[-1], *(start + row[-1] for row in best if row[0] <= max(2, rarest[0]) and not row[2])]
    return np.unique(hashes[chosen])


def _is_common(text: str, n: int) -> bool:
    """Whether the words of an n-gram are short English ones, as any text may have them ("if the length of")."""
    return len(text) < _SHORT_WORDS * n and text.isascii() and text.isalpha()


def _table(hashes: np.ndarray) -> tuple[np.ndarray, np.uint64, np.ndarray]:
    """A bitmap over the top bits of the hashes, at most one in sixteen set, and the sorted hashes themselves."""
    bits = max(16, (16 * len(hashes)).bit_length())
    shift = np.uint64(64 - bits)
    bitmap = np.zeros(1 << bits, bool)
    bitmap[(hashes >> shift).astype(np.int64)] = True
    return bitmap, shift, hashes
