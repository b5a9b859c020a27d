"""Deduplicate a million short documents: our MinHash beside datasketch's own, time and memory of each in a process of its own.

    python -m tests.harness.minhash [--documents 1000000] [--skip-datasketch]

A fifth of the documents are copies of an earlier one with up to seven words of about fifty replaced; what is found is counted
by how alike the copies truly are. datasketch runs as its documentation shows it: `MinHash.bulk`, then query and insert.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np

from stillhouse.pipeline.dedup import group_numbers, normalized_text
from stillhouse.pipeline.overlap import minhash

THRESHOLD = 0.8
BATCH = 10_000
NUM_WORDS = 5


def documents(num: int) -> Iterator[tuple[list[str], list[int], list[float]]]:
    """Batches of (texts, row of each one's original or -1, true Jaccard similarity to it)."""
    vocabulary = np.array([f"w{i:x}" for i in range(30_000)])
    for begin in range(0, num, BATCH):
        draw = np.random.default_rng(begin)
        size = min(BATCH, num - begin)
        words = [np.minimum(draw.zipf(1.3, n) - 1, 29_999) for n in draw.integers(30, 70, size)]
        original, similarity = [-1] * size, [0.0] * size
        for i in np.flatnonzero(draw.random(size) < 0.2)[1:].tolist():
            source = int(draw.integers(0, i))
            if original[source] >= 0:
                continue
            words[i] = words[source].copy()
            places = draw.integers(0, len(words[i]), draw.integers(0, 8))
            words[i][places] = draw.integers(0, 30_000, len(places))
            original[i], similarity[i] = begin + source, _jaccard(words[source], words[i])
        yield [" ".join(vocabulary[row]) for row in words], original, similarity


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    grams = [
        {tuple(words[i : i + NUM_WORDS]) for i in range(len(words) - NUM_WORDS + 1)} for words in (one.tolist(), other.tolist())
    ]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def ours(num: int, seconds: Counter[str]) -> set[int]:
    parts = []
    for texts, _, _ in documents(num):
        begin = time.process_time()
        groups = group_numbers([""] * len(texts))
        parts.append(minhash.sketches([normalized_text(t) for t in texts], groups, threshold=THRESHOLD, num_words=NUM_WORDS))
        seconds["sketches"] += time.process_time() - begin
    begin = time.process_time()
    sketched = minhash.concatenated(parts)
    parts.clear()
    kept_as, _ = minhash.near_duplicates(sketched, threshold=THRESHOLD)
    seconds["search"] += time.process_time() - begin
    return set(np.flatnonzero(kept_as != np.arange(num)).tolist())


def datasketch_route(num: int, seconds: Counter[str]) -> set[int]:
    from datasketch import MinHash, MinHashLSH

    index, found, row = MinHashLSH(threshold=THRESHOLD, num_perm=minhash.NUM_PERM), set(), 0
    for texts, _, _ in documents(num):
        begin = time.process_time()
        grams = []
        for text in texts:
            words = normalized_text(text).split()
            grams.append([" ".join(words[i : i + NUM_WORDS]).encode() for i in range(max(1, len(words) - NUM_WORDS + 1))])
        signed = MinHash.bulk(grams, num_perm=minhash.NUM_PERM)
        seconds["sketches"] += time.process_time() - begin
        begin = time.process_time()
        for one in signed:
            if index.query(one):
                found.add(row)
            else:
                index.insert(row, one)
            row += 1
        seconds["search"] += time.process_time() - begin
    return found


def _measured(route: str, num: int) -> tuple[dict[str, float], float, set[int]]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds: Counter[str] = Counter()
    found = (ours if route == "ours" else datasketch_route)(num, seconds)
    return dict(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--skip-datasketch", action="store_true")
    arguments = parser.parse_args()
    num = arguments.documents
    by_likeness: dict[str, list[int]] = {"0.90 and more": [], "0.80 to 0.90": [], "0.60 to 0.80": [], "under 0.60": []}
    copies = set()
    row = 0
    for texts, original, similarity in documents(num):
        for i in range(len(texts)):
            if original[i] >= 0:
                copies.add(row + i)
                names = list(by_likeness)
                by_likeness[names[sum(similarity[i] < limit for limit in (0.9, 0.8, 0.6))]].append(row + i)
        row += len(texts)
    print(f"{num:,} documents, {len(copies):,} of them copies; threshold {THRESHOLD}, {minhash.NUM_PERM} permutations")
    for route in ("ours",) if arguments.skip_datasketch else ("ours", "datasketch"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, gigabytes, found = pool.apply(_measured, (route, num))
        total = sum(seconds.values())
        print(
            f"\n{route}: {total:.1f} s of one core ({seconds}), {gigabytes:.2f} GiB more at its peak, {len(found):,} duplicates"
        )
        for name, rows in by_likeness.items():
            print(f"  copies {name:14} {len(found.intersection(rows)):8,} of {len(rows):8,} found")
        print(f"  no copies              {len(found - copies):8,} of {num - len(copies):8,} found")


if __name__ == "__main__":
    main()
