"""The filter that finds completions going in circles."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stillhouse.pipeline.filters.drop import Drop
from stillhouse.pipeline.overlap.ngrams import ngram_hashes_of, single_blanks
from stillhouse.pipeline.records import Trace

SHARE_NGRAM = 8
_MIN_SENTENCE_CHARS = 20
_BLOCK_BYTES = 4_096
_BOARD_FACTOR = 16  # a board has many equal rows, and is drawn again at every step


@dataclass(frozen=True)
class Repetition:
    """Drop a completion that goes in circles.

    What comes again anywhere, and not in a row, speaks only where such copies make up much of the completion: a check of forty
    cases may end in "Not greater than 100." thirty times. Rows of a board (no letters and no equation, or of one or two
    characters) may come sixteen times as often as other lines and words.

    Args:
        max_same_line: the same non-blank line this many times in a row.
        max_same_sentence: the same sentence (of at least 20 characters) this many times in a row.
        max_sentence_in_all: the same such sentence this many times anywhere.
        max_same_paragraph: the same paragraph (of at least 20 characters) this many times anywhere.
        ngram, max_same_ngram: the same run of ``ngram`` words this many times anywhere.
        min_share: how much of the completion these copies have to be: what its sentences repeat of earlier ones, or the words
            in such runs. In 3,600 traces of Sky-T1 (AIME, AMC, MATH-500) what is no circle stays under 0.18 and 0.27, and
            circles begin at 0.37 and 0.32.
        min_compressed_share: zlib-compressed size over size, for texts from ``compress_from_bytes`` up; worked prose is near
            0.3, a loop under 0.05.
    """

    max_same_line: int = 8
    max_same_sentence: int = 4
    max_sentence_in_all: int = 40
    max_same_paragraph: int = 10
    ngram: int = 16
    max_same_ngram: int = 8
    min_share: float = 0.3
    min_compressed_share: float = 0.06
    compress_from_bytes: int = 4_000

    def __post_init__(self) -> None:
        counts = ("max_same_line", "max_same_sentence", "max_sentence_in_all", "max_same_paragraph", "ngram", "max_same_ngram")
        for name in counts:
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        if not 0 <= self.min_share <= 1:
            raise ValueError(f"min_share is from 0 to 1, got {self.min_share}")

    def __call__(self, trace: Trace) -> Drop | None:
        text = trace.completion
        if drop := self._lines(text) or self._sentences(text):
            return drop
        words = single_blanks(text)
        hashes = ngram_hashes_of(words, self.ngram)
        in_order = np.sort(hashes)
        return self._ngrams(words, hashes, in_order) or self._size(text, in_order)

    def _lines(self, text: str) -> Drop | None:
        lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
        line, times = _longest_run(lines, self.max_same_line)
        return Drop("same line repeated", f"{times} times in a row: {line}") if line else None

    def _sentences(self, text: str) -> Drop | None:
        paragraphs = [paragraph for part in text.split("\n\n") if (paragraph := part.strip())]
        for mark in (". ", "! ", "? "):
            text = text.replace(mark, mark[0] + "\n")
        if not text.isascii():
            for mark in "。！？":
                text = text.replace(mark, mark + "\n")
        sentences = [sentence for part in text.splitlines() if (sentence := part.strip())]
        sentence, times = _longest_run(sentences, self.max_same_sentence, min_chars=_MIN_SENTENCE_CHARS)
        if sentence:
            return Drop("same sentence repeated", f"{times} times in a row: {sentence}")
        sentence, times = _most_frequent(sentences, self.max_sentence_in_all, min_chars=_MIN_SENTENCE_CHARS)
        if sentence and _share_of_copies(sentences) >= self.min_share:
            return Drop("same sentence repeated", f"{times} times in all: {sentence}")
        paragraph, times = _most_frequent(paragraphs, self.max_same_paragraph, min_chars=_MIN_SENTENCE_CHARS)
        if paragraph and _share_of_copies(sentences) >= self.min_share:
            return Drop("same paragraph repeated", f"{times} times in all: {paragraph}")
        return None

    def _ngrams(self, words: str, hashes: np.ndarray, in_order: np.ndarray) -> Drop | None:
        step = self.max_same_ngram - 1
        if len(in_order) <= step or not (in_order[step:] == in_order[:-step]).any():
            return None
        parts = words.split(" ")
        _, gram, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        times = counts[gram]
        num_wordy = np.convolve([any(map(str.isalpha, word)) for word in parts], np.ones(self.ngram, int), "valid")
        loops = np.flatnonzero(times >= self.max_same_ngram * np.where(2 * num_wordy < self.ngram, _BOARD_FACTOR, 1))
        in_loop = np.zeros(len(parts) + 1, np.int64)
        np.add.at(in_loop, loops, 1)
        np.add.at(in_loop, loops + self.ngram, -1)
        if not len(loops) or (np.cumsum(in_loop)[:-1] > 0).mean() < self.min_share:
            return None
        at = int(loops[times[loops].argmax()])
        return Drop("same words in a loop", f"{times[at]} times: {' '.join(parts[at : at + self.ngram])}")

    def _size(self, text: str, in_order: np.ndarray) -> Drop | None:
        raw = text.encode() if len(text) * 4 >= self.compress_from_bytes else b""
        if len(raw) < self.compress_from_bytes:
            return None
        # A block of a loop compresses well, unless the loop is longer than the block; its n-grams then come again word by word.
        block = raw[len(raw) // 2 :][:_BLOCK_BYTES]
        num_repeated = int((in_order[1:] == in_order[:-1]).sum())
        if 2 * num_repeated < len(in_order) and len(zlib.compress(block, 1)) > 4 * self.min_compressed_share * len(block):
            return None
        share = len(zlib.compress(raw, 6)) / len(raw)
        if share >= self.min_compressed_share:
            return None
        return Drop("compresses like a loop", f"to {share:.3f} of its {len(raw)} bytes, under {self.min_compressed_share}")


def repeated_share(text: str) -> float:
    """How repetitive a text is: the share of its runs of 8 words that stood in it before; 0 for one of fewer words."""
    hashes = ngram_hashes_of(single_blanks(text), SHARE_NGRAM)
    return 1 - len(np.unique(hashes)) / len(hashes) if len(hashes) else 0.0


def _longest_run(items: Sequence[str], limit: int, min_chars: int = 1) -> tuple[str, int]:
    """The item that comes most often in a row and how often, ("", 0) where that is under ``limit``."""
    if not _may_repeat([item for item in items if len(item) >= min_chars], limit):
        return "", 0
    runs = ((item, sum(1 for _ in group)) for item, group in itertools.groupby(items))
    return max((run for run in runs if _is_loop(*run, limit, min_chars)), key=lambda run: run[1], default=("", 0))


def _most_frequent(items: Sequence[str], limit: int, min_chars: int) -> tuple[str, int]:
    """The item that comes most often and how often, ("", 0) where that is under ``limit``."""
    if not _may_repeat([item for item in items if len(item) >= min_chars], limit):
        return "", 0
    return next((found for found in Counter(items).most_common() if _is_loop(*found, limit, min_chars)), ("", 0))


def _may_repeat(items: Sequence[str], limit: int) -> bool:
    return len(items) >= limit and len(items) - len(set(items)) >= limit - 1


def _is_loop(item: str, times: int, limit: int, min_chars: int) -> bool:
    return times >= limit and len(item) >= min_chars and (times >= _BOARD_FACTOR * limit or not _is_board_row(item))


def _is_board_row(text: str) -> bool:
    return "=" not in text and (len({c for c in text if c.isalnum()}) <= 2 or not any(map(str.isalpha, text)))


def _share_of_copies(sentences: Sequence[str]) -> float:
    """How much of the characters of sentences stands in those that came before."""
    counts = Counter(sentences)
    size = sum(len(sentence) * times for sentence, times in counts.items())
    return 1 - sum(map(len, counts)) / size
