"""MinHash signatures and near-duplicate search on a whole batch of texts at a time.

The method is datasketch's: the hashes of a text's word n-grams, put through ``num_perm`` bijections a * h + b (mod 2**32, a
odd), and the smallest value of each kept; the share of equal values estimates the Jaccard similarity of two texts' sets of
n-grams (standard error at most 0.045 for 128). What differs is that no Python runs per word, and that what is kept of a text
is small: one byte a permutation (two unlike values agree in it once in 256, which the estimate takes out again) and one 64-bit
key a band.

``tests/harness/minhash.py`` measures it beside datasketch.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stillhouse.pipeline.overlap.ngrams import mixed, ngram_hashes

NUM_PERM = 128
NUM_WORDS = 5
_CHUNK_CHARS = 400_000
_EMPTY = np.uint32(0xFFFFFFFF)


@dataclass(frozen=True)
class Sketches:
    """What near-duplicate search needs of texts, row i for text i.

    Args:
        bytes_: shape (texts, permutations), uint8, the low byte of each minimum.
        band_keys: shape (texts, bands), uint64; texts that share one are compared. The group of a text is part of its keys, so
            texts of different groups never are.
    """

    bytes_: np.ndarray
    band_keys: np.ndarray

    def __len__(self) -> int:
        return len(self.band_keys)

    def take(self, rows: Sequence[int] | np.ndarray) -> Sketches:
        rows = np.asarray(rows, np.int64)
        return Sketches(self.bytes_[rows], self.band_keys[rows])


def concatenated(parts: Sequence[Sketches]) -> Sketches:
    """Put the sketches of several batches one after the other; they must have been made with the same arguments."""
    if not parts:
        return Sketches(np.zeros((0, NUM_PERM), np.uint8), np.zeros((0, 1), np.uint64))
    return Sketches(np.concatenate([part.bytes_ for part in parts]), np.concatenate([part.band_keys for part in parts]))


def signatures(texts: Sequence[str], *, num_words: int = NUM_WORDS, num_perm: int = NUM_PERM, seed: int = 1) -> np.ndarray:
    """MinHash signatures of normalized texts, shape (len(texts), num_perm), uint32; the largest value where a text is empty.

    Args:
        texts: words separated by single blanks, no newlines.
        num_words: words in an n-gram. A text of fewer words is one n-gram.
    """
    out = np.full((len(texts), num_perm), _EMPTY, np.uint32)
    begin, size = 0, 0
    for i, text in enumerate(texts):
        size += len(text)
        if size >= _CHUNK_CHARS or i + 1 == len(texts):
            _sign(texts[begin : i + 1], out[begin : i + 1], num_words, seed)
            begin, size = i + 1, 0
    return out


def _sign(texts: Sequence[str], out: np.ndarray, num_words: int, seed: int) -> None:
    hashes, starts = ngram_hashes(texts, num_words)
    rows = np.flatnonzero(np.diff(starts))  # texts that have an n-gram
    if not len(rows):
        return
    short = (hashes >> np.uint64(32)).astype(np.uint32)
    values, first = np.empty_like(short), starts[rows]
    minima = np.empty((out.shape[1], len(rows)), np.uint32)
    for k, (a, b) in enumerate(_permutations(out.shape[1], seed)):
        np.multiply(short, a, out=values)
        np.add(values, b, out=values)
        np.minimum.reduceat(values, first, out=minima[k])
    out[rows] = minima.T


@functools.lru_cache(maxsize=8)
def _permutations(num_perm: int, seed: int) -> list[tuple[np.uint32, np.uint32]]:
    draw = np.random.default_rng(seed)
    a = draw.integers(0, 2**31, num_perm, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return list(zip(a, draw.integers(0, 2**32, num_perm, dtype=np.uint32)))


def bands_for(threshold: float, num_perm: int = NUM_PERM, *, recall: float = 0.95) -> tuple[int, int]:
    """(bands, rows a band): the most rows at which a pair just at ``threshold`` still shares a band with odds ``recall``."""
    for rows in range(num_perm // 4, 0, -1):
        bands = num_perm // rows
        if 1 - (1 - threshold**rows) ** bands >= recall:
            return bands, rows
    return num_perm, 1


def sketches(
    texts: Sequence[str], groups: np.ndarray, *, threshold: float, num_words: int = NUM_WORDS, num_perm: int = NUM_PERM
) -> Sketches:
    """Sketch normalized texts for `near_duplicates` at a threshold.

    Args:
        groups: shape (len(texts),), uint64; texts of different groups are never duplicates.
        threshold: the Jaccard similarity from which two texts count as near duplicates, over 0 and at most 1.

    Raises:
        ValueError: the threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"a similarity threshold is over 0 and at most 1, got {threshold}")
    signed = signatures(texts, num_words=num_words, num_perm=num_perm)
    bands, rows = bands_for(threshold, num_perm)
    keys = np.empty((len(texts), bands), np.uint64)
    for band in range(bands):
        key = groups
        for column in range(band * rows, (band + 1) * rows):
            key = mixed(key ^ signed[:, column])
        keys[:, band] = key
    return Sketches((signed & np.uint32(0xFF)).astype(np.uint8), keys)


def near_duplicates(sketched: Sketches, *, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Find the texts that nearly repeat an earlier one, in one pass in the order given.

    A text is a duplicate where an earlier text that is itself kept shares a band with it and is estimated at least
    ``threshold`` similar; it is put to the most similar one. So every duplicate is like the text that stands for it, chains
    (a like b like c, a unlike c) do not swallow what differs, and a second pass over the kept ones finds nothing.

    Returns:
        kept_as, shape (texts,), int64: the row that stands for each text, itself where it is kept; and similarity, shape
        (texts,), float32: the estimate to that row, 1 for itself.
    """
    kept_as = np.arange(len(sketched))
    similarity = np.ones(len(sketched), np.float32)
    rows, buckets = _shared_buckets(sketched.band_keys)
    kept_in: dict[int, list[int]] = defaultdict(list)
    bounds = np.flatnonzero(np.diff(rows, prepend=-1, append=-1)) if len(rows) else rows
    buckets_of = buckets.tolist()
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist()):
        row = int(rows[begin])
        candidates = {other for bucket in buckets_of[begin:end] for other in kept_in.get(bucket, ())}
        if candidates:
            others = np.array(sorted(candidates))
            estimates = _similarity(sketched.bytes_[others], sketched.bytes_[row])
            best = int(estimates.argmax())
            if estimates[best] >= threshold:
                kept_as[row], similarity[row] = others[best], estimates[best]
                continue
        for bucket in buckets_of[begin:end]:
            kept_in[bucket].append(row)
    return kept_as, similarity


def _shared_buckets(band_keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, bucket) of every band key that more than one text has, sorted by row; most texts have none."""
    all_rows, all_buckets, num_buckets = [], [], 0
    for band in range(band_keys.shape[1]):
        order = np.argsort(band_keys[:, band])
        keys = band_keys[order, band]
        like_next = keys[1:] == keys[:-1]
        shared = np.zeros(len(keys), bool)
        shared[1:] |= like_next
        shared[:-1] |= like_next
        bucket = np.cumsum(np.concatenate(([True], ~like_next)))[shared] if len(keys) else np.zeros(0, np.int64)
        all_rows.append(order[shared])
        all_buckets.append(bucket + num_buckets)
        num_buckets += len(keys) + 1
    rows, buckets = np.concatenate(all_rows), np.concatenate(all_buckets)
    by_row = np.argsort(rows, kind="stable")
    return rows[by_row], buckets[by_row]


def _similarity(many: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Estimated Jaccard similarity from low bytes: unlike minima agree in their low byte once in 256."""
    return np.maximum(((many == one).mean(axis=1) - 1 / 256) / (1 - 1 / 256), 0)
