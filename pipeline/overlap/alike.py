"""Find items that a prompt rewords: MinHash over 3-grams proposes, exact counting decides."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from stillhouse.pipeline.overlap.minhash import sketches

_N = 3
_NUM_PERM = 64
_MIN_ALIKE = 0.5
_MIN_ALIKE_OF_FEW_SIGNS = 0.8
_FEW_SIGNS = 4  # fewer numbers and operators than this do not tell two problems of a template apart
_MIN_ALIKE_AT_NUMBERS = 0.6
_MIN_GRAMS = 8
Gram = tuple[str, ...]


class AlikeItems:
    """Items by their MinHash bands, under the sequence of their numbers and operators.

    Args:
        items: (words, name of the item's set). Those under ten words are left to other means.
        max_items: a 3-gram that more items have is a template's; in items of few numbers it counts for nothing.
    """

    def __init__(self, items: Sequence[tuple[Gram, str]], *, max_items: int) -> None:
        self._items = [(words, name, frozenset(_grams(words))) for words, name in items if len(words) >= _MIN_GRAMS + _N - 1]
        num_items = Counter(gram for _, _, grams in self._items for gram in grams)
        self._template = {gram for gram, count in num_items.items() if count > max_items}
        self._in_band: dict[int, list[int]] = defaultdict(list)
        if self._items:
            for i, keys in enumerate(_band_keys([words for words, _, _ in self._items])):
                for key in keys.tolist():
                    self._in_band[key].append(i)

    def find(self, words: Gram, signs: Gram) -> tuple[str, float] | None:
        """(name of the set, Jaccard similarity) of the item that a prompt's words are most alike to; None where none is.

        Args:
            signs: the numbers and operators among the words; only items with the same are looked at.
        """
        if not self._items or len(words) < _MIN_GRAMS + _N - 1:
            return None
        proposed = {i for key in _band_keys([words])[0].tolist() for i in self._in_band.get(key, ())}
        grams = frozenset(_grams(words))
        best: tuple[float, str] | None = None
        for i in sorted(proposed):
            _, name, of_item = self._items[i]
            alike = _jaccard(grams, of_item)
            few = len(signs) < _FEW_SIGNS
            at_numbers = _jaccard(self._telling(grams, few), self._telling(of_item, few))
            needed = _MIN_ALIKE_OF_FEW_SIGNS if few else _MIN_ALIKE
            if alike >= needed and at_numbers >= _MIN_ALIKE_AT_NUMBERS and (best is None or alike > best[0]):
                best = (alike, name)
        return best and (best[1], best[0])

    def _telling(self, grams: frozenset[Gram], few_signs: bool) -> set[Gram]:
        """The 3-grams at the numbers; where those are few, the ones that are no template's, at the numbers if any are."""
        at_signs = {gram for gram in grams if not all(word[0].isalpha() for word in gram)}
        if not few_signs:
            return at_signs
        own = {gram for gram in grams if gram not in self._template}
        return own & at_signs or own


def _grams(words: Gram) -> list[Gram]:
    return [words[i : i + _N] for i in range(len(words) - _N + 1)]


def _jaccard(one: frozenset[Gram] | set[Gram], other: frozenset[Gram] | set[Gram]) -> float:
    union = len(one | other)
    return len(one & other) / union if union else 0.0


def _band_keys(texts: Sequence[Gram]) -> np.ndarray:
    signs = [" ".join(word for word in words if not word[0].isalpha()) for words in texts]
    groups = np.array([int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") for text in signs], np.uint64)
    joined = [" ".join("".join(word.split()) for word in words) for words in texts]
    return sketches(joined, groups, threshold=_MIN_ALIKE, num_words=_N, num_perm=_NUM_PERM).band_keys
