"""Deduplicate a million short documents beside datasketch and datatrove: time, memory and what is found, on one core.

    python -m tests.harness.minhash [--documents 1000000] [--sample 100000] [--rounds 3] [--routes ours datasketch datatrove]

First the sample, each route in turn and in a fresh process, medians of the rounds; then all documents once, for time and
memory. A fifth of the documents are copies of an earlier one with up to seven words of about fifty replaced; what is found is
counted by how alike the copies truly are. Making the documents is in no time.

Not equal work. Ours estimates each pair's similarity from 128 permutations and keeps the earlier one. datasketch runs as its
documentation shows it, `MinHash.bulk`, then query and insert; it takes what its buckets give. datatrove runs as its pipeline
does, over files, and takes what its 14 buckets of 8 hashes give; most of its time is spaCy's, which cuts the words.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stillhouse.pipeline.dedup import group_numbers, normalized_text
from stillhouse.pipeline.overlap import minhash
from tests.harness.side_by_side import Cost, keep_to_one_core, median_cost, missing, parser_of, table

THRESHOLD = 0.8
BATCH = 10_000
NUM_WORDS = 5


class TimedTexts:
    """Batches of documents, and what making them took, which is no route's doing."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.made = Cost(0.0, 0.0)

    def __iter__(self) -> Iterator[list[str]]:
        batches = documents(self.num)
        while True:
            wall, cpu = time.perf_counter(), time.process_time()
            batch = next(batches, None)
            self.made = Cost(self.made.wall_s + time.perf_counter() - wall, self.made.cpu_s + time.process_time() - cpu)
            if batch is None:
                return
            yield batch[0]


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


def ours(batches: TimedTexts) -> set[int]:
    parts = []
    for texts in batches:
        groups = group_numbers([""] * len(texts))
        parts.append(minhash.sketches([normalized_text(t) for t in texts], groups, threshold=THRESHOLD, num_words=NUM_WORDS))
    sketched = minhash.concatenated(parts)
    parts.clear()
    kept_as, _ = minhash.near_duplicates(sketched, threshold=THRESHOLD)
    return set(np.flatnonzero(kept_as != np.arange(batches.num)).tolist())


def datasketch_route(batches: TimedTexts) -> set[int]:
    from datasketch import MinHash, MinHashLSH

    index, found, row = MinHashLSH(threshold=THRESHOLD, num_perm=minhash.NUM_PERM), set(), 0
    for texts in batches:
        grams = []
        for text in texts:
            words = normalized_text(text).split()
            grams.append([" ".join(words[i : i + NUM_WORDS]).encode() for i in range(max(1, len(words) - NUM_WORDS + 1))])
        for one in MinHash.bulk(grams, num_perm=minhash.NUM_PERM):
            if index.query(one):
                found.add(row)
            else:
                index.insert(row, one)
            row += 1
    return found


def datatrove_route(batches: TimedTexts) -> set[int]:
    from tests.harness import datatrove_routes

    with tempfile.TemporaryDirectory(prefix="minhash-") as folder:
        return datatrove_routes.minhash_removed((text for texts in batches for text in texts), Path(folder))


ROUTES: dict[str, Callable[[TimedTexts], set[int]]] = {
    "ours": ours,
    "datasketch": datasketch_route,
    "datatrove": datatrove_route,
}
NEEDS = {
    "ours": (),
    "datasketch": ("datasketch",),
    "datatrove": ("datatrove", "spacy", "tests.harness.datatrove_routes"),
}


@dataclass(frozen=True)
class Measured:
    """One route's run: its time, GiB at its peak above what the process held before, and the rows that it takes for copies."""

    cost: Cost
    gigabytes: float
    found: set[int]


def measured(route: str, num: int) -> Measured:
    """Run one route in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure_here, route, num).result()


def _measure_here(route: str, num: int) -> Measured:
    missing(*NEEDS[route])  # imports them, which is in no figure
    before, batches = _memory_kib("VmRSS"), TimedTexts(num)
    wall, cpu = time.perf_counter(), time.process_time()
    found = ROUTES[route](batches)
    cost = Cost(time.perf_counter() - wall - batches.made.wall_s, time.process_time() - cpu - batches.made.cpu_s)
    return Measured(cost, (_memory_kib("VmHWM") - before) / 2**20, found)


def _memory_kib(field: str) -> int:
    """Resident memory now (VmRSS) or at its peak (VmHWM); getrusage's peak would be the parent's where that is higher."""
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def what_was_found(num: int, found: dict[str, set[int]]) -> list[str]:
    """Lines of how many copies each route found, by how alike they truly are, and how many others it took for copies.

    A copy is found where it or its original is gone: datatrove keeps either.
    """
    limits = (0.9, 0.8, 0.6, 0.0)
    names = ("0.90 and more", "0.80 to 0.90", "0.60 to 0.80", "under 0.60")
    pairs: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    row = 0
    for texts, original, similarity in documents(num):
        for i in range(len(texts)):
            if original[i] >= 0:
                name = next(name for name, limit in zip(names, limits) if similarity[i] >= limit)
                pairs[name].append((row + i, original[i]))
        row += len(texts)
    concerned = {one for rows in pairs.values() for pair in rows for one in pair}
    lines = [f"  {'found':24} {'there are':>10}" + "".join(f"{route:>12}" for route in found)]
    for name, rows in pairs.items():
        counts = [sum(copy in gone or source in gone for copy, source in rows) for gone in found.values()]
        lines.append(f"  {'copies, ' + name:24} {len(rows):10,}" + "".join(f"{count:12,}" for count in counts))
    others = "".join(f"{len(gone - concerned):12,}" for gone in found.values())
    return [*lines, f"  {'neither copy nor copied':24} {num - len(concerned):10,}{others}"]


def compare(num: int, routes: Sequence[str], num_rounds: int) -> list[str]:
    """Run the routes in turn, and say in lines what each took and found."""
    runs: dict[str, list[Measured]] = {route: [] for route in routes}
    for _ in range(num_rounds):
        for route in routes:
            runs[route].append(measured(route, num))
            print(f"{num:,} documents, {route}: {runs[route][-1].cost.cpu_s:.1f} CPU s", file=sys.stderr)
    costs = {route: median_cost([run.cost for run in of_route]) for route, of_route in runs.items()}
    lines = [f"{num:,} documents, rounds: {num_rounds}; threshold {THRESHOLD}", *table(costs, num, "documents")]
    for route, of_route in runs.items():
        peak = max(run.gigabytes for run in of_route)
        lines.append(
            f"  {route:12} {costs[route].cpu_s:8.1f} CPU s, {costs[route].wall_s:8.1f} s, {peak:.2f} GiB more at its peak"
        )
    return [*lines, *what_was_found(num, {route: of_route[-1].found for route, of_route in runs.items()})]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--documents", type=int, default=1_000_000, help="for the one long run; 0 leaves it out")
    parser.add_argument("--sample", type=int, default=100_000, help="for the rounds; 0 leaves them out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--routes", nargs="+", choices=list(ROUTES), default=list(ROUTES))
    arguments = parser.parse_args()
    keep_to_one_core()
    routes = []
    for route in arguments.routes:
        if why := missing(*NEEDS[route]):
            print(f"{route}: not measured, {why}")
        else:
            routes.append(route)
    for num, num_rounds in ((arguments.sample, arguments.rounds), (arguments.documents, 1)):
        if num:
            print("\n".join(compare(num, routes, num_rounds)), flush=True)


if __name__ == "__main__":
    main()
