"""Ten million traces through one writer, and what a resume over them costs.

    python -m tests.chaos.scale --traces 10000000 --folder scratch/scale

Texts of 2 kB and more in the mean are put together from a pool of sentences, so that the maker is not the bottleneck and
zstd compresses them about as it does real ones. Up to 1,000 calls are in flight. Then a fresh process opens the same run,
reads its keys and finds which of the planned traces are missing; another counts the rows with pyarrow. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.writer import Intent, TraceWriter
from tests.chaos.synthetic import make_answer, parse_answer

GROUP, MOST_IN_FLIGHT = 250, 1_000
NUM_MISSING = 1_000
REPORT_EVERY = 100_000
_NUM_WORDS, _NUM_SENTENCES, _SENTENCES_PER_TRACE = 8_000, 20_000, 24


def planned_keys(start: int, stop: int) -> list[str]:
    """Keys of the planned traces, by their number."""
    return [hashlib.sha256(b"scale/%d" % index).hexdigest() for index in range(start, stop)]


def make_sentences(draw: np.random.Generator) -> np.ndarray:
    """Sentences of about 90 characters whose words are drawn as often as in a language (Zipf)."""
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(draw.choice(letters, draw.integers(2, 9))) for _ in range(_NUM_WORDS)]
    weights = 1.0 / np.arange(1, _NUM_WORDS + 1)
    chosen = draw.choice(_NUM_WORDS, (_NUM_SENTENCES, 14), p=weights / weights.sum())
    return np.array([" ".join(words[word] for word in row) + f" = {row[0] * 17 % 9973}.\n" for row in chosen], dtype=object)


def write(folder: Path, num_traces: int, shard_bytes: int) -> dict[str, object]:
    """Begin and answer ``num_traces`` calls; traces a second as the median over each 100,000 that were answered durably."""
    draw = np.random.default_rng(0)
    sentences = make_sentences(draw)
    rates, num_characters = [], 0
    under_way: deque = deque()
    done, mark, marked = 0, time.perf_counter(), 0
    started, processor = time.perf_counter(), time.process_time()
    with TraceWriter(TraceStore(folder / "traces"), folder / "spool", parse=parse_answer, shard_bytes=shard_bytes) as writer:
        for keys in _groups(num_traces):
            choice = draw.integers(0, _NUM_SENTENCES, (len(keys), _SENTENCES_PER_TRACE))
            texts = ["".join(row) for row in sentences[choice]]
            num_characters += sum(map(len, texts))
            intents = [Intent(k, k[:32], json.dumps({"key": k, "problem_id": k[:32]}).encode(), 200, 1200) for k in keys]
            under_way.append((writer.begin(intents), texts, None))
            while len(under_way) * GROUP >= MOST_IN_FLIGHT:
                done += _advance(writer, under_way)
            if done - marked >= REPORT_EVERY:
                now = time.perf_counter()
                rates.append((done - marked) / (now - mark))
                mark, marked = now, done
                print(f"{done:,} traces, {rates[-1]:,.0f}/s, {_peak_rss_mb():,.0f} MB at most", file=sys.stderr, flush=True)
        while under_way:
            done += _advance(writer, under_way)
        answered_s = time.perf_counter() - started
    closed_s = time.perf_counter() - started
    return {
        "num_traces": done,
        "mean_characters": round(num_characters / num_traces),
        "traces_per_s": round(done / closed_s),
        "traces_per_s_median_of_100k": round(statistics.median(rates)) if rates else round(done / answered_s),
        "traces_per_s_lowest_of_100k": round(min(rates)) if rates else None,
        "cpu_ms_per_trace": round((time.process_time() - processor) / done * 1e3, 3),
        "seconds": round(closed_s, 1),
        "seconds_to_close": round(closed_s - answered_s, 1),
        "peak_rss_mb": round(_peak_rss_mb()),
    }


def _groups(num_traces: int) -> Iterator[list[str]]:
    for start in range(0, num_traces, GROUP):
        yield planned_keys(start, min(start + GROUP, num_traces))


def _advance(writer: TraceWriter, under_way: deque) -> int:
    """Take the oldest group a step further: its calls are answered, or its answers are durable. Gives the number of those."""
    begun, texts, answered = under_way.popleft()
    if answered is not None:
        return len(answered.result())
    items = [(call, make_answer(text, 200, len(text) // 4)) for call, text in zip(begun.result(), texts)]
    under_way.append((begun, texts, writer.answered_many(items)))
    return 0


def resume(folder: Path, num_traces: int) -> dict[str, object]:
    """Open the run again and find what is missing of the plan: seconds, and the memory that it took."""
    started = time.perf_counter()
    with TraceWriter(TraceStore(folder / "traces"), folder / "spool", parse=parse_answer) as writer:
        known = writer.keys()
        opened_s = time.perf_counter() - started
        missing = []
        for start in range(0, num_traces + NUM_MISSING, 100_000):
            keys = planned_keys(start, min(start + 100_000, num_traces + NUM_MISSING))
            missing += [start + int(row) for row in np.flatnonzero(~known.contains(keys))]
        seconds = time.perf_counter() - started
    assert missing == list(range(num_traces, num_traces + NUM_MISSING)), f"{len(missing)} are missing, the first {missing[:3]}"
    return {
        "num_keys": len(known),
        "seconds_to_keys": round(opened_s, 2),
        "seconds": round(seconds, 2),
        "peak_rss_mb": round(_peak_rss_mb()),
    }


def count(folder: Path) -> dict[str, object]:
    """The rows as any Parquet reader sees them, and the room they take."""
    import pyarrow.dataset as ds

    root = folder / "traces"
    shards = sorted((root / "shards").glob("*.parquet"))
    num_bytes = sum(path.stat().st_size for path in shards)
    return {
        "num_rows_by_pyarrow": ds.dataset([str(path) for path in shards], format="parquet").count_rows(),
        "num_shards": len(shards),
        "shards_mb": round(num_bytes / 1e6),
        "calls_mb": round(sum(path.stat().st_size for path in (root / "calls").glob("*.parquet")) / 1e6),
        "spool_mb": round(sum(path.stat().st_size for path in (folder / "spool").glob("*")) / 1e6),
    }


def _peak_rss_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_fresh_process(step: str, folder: Path, num_traces: int, shard_mb: int) -> dict[str, object]:
    command = [sys.executable, "-m", "tests.chaos.scale", "--only", step, "--folder", str(folder)]
    command += ["--traces", str(num_traces), "--shard-mb", str(shard_mb)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=int, default=10_000_000)
    parser.add_argument(
        "--folder", type=Path, required=True, help="a new folder on a local disk; 10 million traces take about 10 GB"
    )
    parser.add_argument("--shard-mb", type=int, default=128)
    parser.add_argument(
        "--only", choices=["write", "resume", "count"], help="one step, in this process, over the folder as it is"
    )
    options = parser.parse_args()
    if options.only == "write":
        print(json.dumps(write(options.folder, options.traces, options.shard_mb << 20)))
    elif options.only == "resume":
        print(json.dumps(resume(options.folder, options.traces)))
    elif options.only == "count":
        print(json.dumps(count(options.folder)))
    else:
        options.folder.mkdir(parents=True)
        result = {}
        for step in ("write", "resume", "count"):
            result[step] = in_a_fresh_process(step, options.folder, options.traces, options.shard_mb)
            print(json.dumps({step: result[step]}), file=sys.stderr, flush=True)
        assert result["count"]["num_rows_by_pyarrow"] == options.traces
        characters = result["write"]["mean_characters"] * options.traces
        print(json.dumps(result | {"compression": round(characters / 1e6 / max(1, result["count"]["shards_mb"]), 2)}, indent=2))


if __name__ == "__main__":
    main()
