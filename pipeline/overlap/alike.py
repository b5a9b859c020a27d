"""Find items that a prompt rewords: MinHash over 3-grams proposes, exact counting decides."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from stillhouse.pipeline.overlap.alignment import Origin
from stillhouse.pipeline.overlap.item_grams import ItemGrams
from stillhouse.pipeline.overlap.minhash import sketches

_N = 3
_NUM_PERM = 64
_MIN_ALIKE = 0.5
_MIN_ALIKE_OF_FEW_SIGNS = 0.8
_FEW_SIGNS = 4  # fewer numbers and operators than this do not tell two problems of a template apart
_MIN_ALIKE_AT_NUMBERS = 0.6
_MIN_GRAMS = 8
_BATCH = 5_000  # items that are sketched at a time
Gram = tuple[str, ...]


class AlikeItems:
    """Items by their MinHash bands, under the sequence of their numbers and operators.

    Args:
        items: (words, which item of which set). Those under ten words are left to other means.
        grams: of the items; a 3-gram that is a template's counts for nothing in items of few numbers.
    """

    def __init__(self, items: Sequence[tuple[Gram, Origin]], grams: ItemGrams) -> None:
        self._items = [(words, origin) for words, origin in items if len(words) >= _MIN_GRAMS + _N - 1]
        self._grams = grams
        parts = [_band_keys([words for words, _ in self._items[i : i + _BATCH]]) for i in range(0, len(self._items), _BATCH)]
        keys = np.concatenate(parts) if parts else np.zeros((0, 1), np.uint64)
        order = np.argsort(keys, axis=None, kind="stable")
        self._keys, self._item_of_key = keys.ravel()[order], (order // keys.shape[1]).astype(np.int32)

    def find(self, words: Gram, signs: Gram) -> tuple[Origin, float] | None:
        """(which item, Jaccard similarity) of the one that a prompt's words are most alike to; None where none is.

        Args:
            signs: the numbers and operators among the words; only items with the same are looked at.
        """
        if not self._items or len(words) < _MIN_GRAMS + _N - 1:
            return None
        keys = _band_keys([words])[0]
        ranges = zip(np.searchsorted(self._keys, keys, "left"), np.searchsorted(self._keys, keys, "right"))
        proposed = {i for first, last in ranges for i in self._item_of_key[first:last].tolist()}
        grams, telling = frozenset(_grams(words)), self._telling(words) if proposed else frozenset()
        best: tuple[float, Origin] | None = None
        for i in sorted(proposed):
            of_item, origin = self._items[i]
            alike = _jaccard(grams, frozenset(_grams(of_item)))
            few = len(signs) < _FEW_SIGNS
            at_numbers = _jaccard(telling, self._telling(of_item))
            needed = _MIN_ALIKE_OF_FEW_SIGNS if few else _MIN_ALIKE
            if alike >= needed and at_numbers >= _MIN_ALIKE_AT_NUMBERS and (best is None or alike > best[0]):
                best = (alike, origin)
        return best and (best[1], best[0])

    def _telling(self, words: Gram) -> frozenset[Gram]:
        """The 3-grams that are no template's: those at the numbers and operators, if any are."""
        own = frozenset(gram for gram, common in zip(_grams(words), self._grams.common(words).tolist()) if not common)
        return frozenset(gram for gram in own if not all(word[0].isalpha() for word in gram)) or own


def _grams(words: Gram) -> list[Gram]:
    return [words[i : i + _N] for i in range(len(words) - _N + 1)]


def _jaccard(one: frozenset[Gram], other: frozenset[Gram]) -> float:
    union = len(one | other)
    return len(one & other) / union if union else 0.0


def _band_keys(texts: Sequence[Gram]) -> np.ndarray:
    signs = [" ".join(word for word in words if not word[0].isalpha()) for words in texts]
    groups = np.array([int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") for text in signs], np.uint64)
    joined = [" ".join("".join(word.split()) for word in words) for words in texts]
    return sketches(joined, groups, threshold=_MIN_ALIKE, num_words=_N, num_perm=_NUM_PERM).band_keys
