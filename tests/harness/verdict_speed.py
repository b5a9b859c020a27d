"""Measure math verdicts a second on the conformance tables' own mix, lenient, one process, one thread.

    python -m tests.harness.verdict_speed [--rounds 10]

The first round starts the second opinion's process and is not counted. Cached readings of golds are dropped before each round,
so every row is read anew. "Slow" rows are those that went to the second opinion; its own process's time is not in the CPU
figure, but in the wall time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from stillhouse.pipeline.verifiers import math_answer
from stillhouse.pipeline.verifiers.rows import judge_row

FOLDER = Path(__file__).parents[1] / "conformance"
TABLES = ("lighteval_extractive_match", "math_verify_tests", "nemo_skills_math_equal")


def run(num_rounds: int) -> dict[str, float]:
    rows = [json.loads(line) for name in TABLES for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]
    said = [judge_row("math", row, extract="lenient") for row in rows]
    num_slow = sum("math-verify" in verdict["reason"] or "killed" in verdict["reason"] for verdict in said)
    walls, cpus = [], []
    for _ in range(num_rounds):
        math_answer.readings.cache_clear()
        wall, cpu = time.perf_counter(), time.process_time()
        for row in rows:
            judge_row("math", row, extract="lenient")
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {
        "num_rows": len(rows),
        "num_slow": num_slow,
        "verdicts_per_s": round(len(rows) / min(walls)),
        "verdicts_per_s_median": round(len(rows) / sorted(walls)[len(walls) // 2]),
        "verdicts_per_cpu_s": round(len(rows) / min(cpus)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    print(json.dumps(run(parser.parse_args().rounds), indent=2))


if __name__ == "__main__":
    main()
