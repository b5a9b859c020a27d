"""Measure math verdicts a second on the conformance tables' own mix, beside math-verify alone, on one core.

    python -m tests.harness.verdict_speed [--rounds 10]

The 530 rows are judged leniently, one after another in one process, and read anew each round (the cached readings of golds are
dropped). "Slow" rows are those that went to the second opinion, math-verify in a process of its own: its time is in both
figures. The peer is math-verify as its README shows it, `verify(parse(gold), parse(pred))`, time limits by signals. Not equal
work: it takes any answer that it finds in the text and has no process to kill, so it only runs on the main thread.
"""

from __future__ import annotations

from typing import Any

from stillhouse.pipeline.verifiers import math_answer
from stillhouse.pipeline.verifiers.rows import judge_row
from tests.harness.conformance import TABLES, math_verify_says, rows
from tests.harness.side_by_side import interleaved, keep_to_one_core, parser_of, table


def run(num_rounds: int) -> dict[str, Any]:
    of_tables = [row for name in TABLES for row in rows(name)]
    # The first pass starts the second opinion's process and imports sympy; it is not timed.
    said = [judge_row("math", row, extract="lenient") for row in of_tables]
    peer_said = [math_verify_says(row) for row in of_tables]

    def ours() -> None:
        math_answer.readings.cache_clear()
        for row in of_tables:
            judge_row("math", row, extract="lenient")

    def peer() -> None:
        for row in of_tables:
            math_verify_says(row)

    return {
        "num_rows": len(of_tables),
        "num_slow": sum("math-verify" in verdict["reason"] or "killed" in verdict["reason"] for verdict in said),
        "num_as_expected": sum((v["verdict"] == "correct") == bool(row["expected"]) for v, row in zip(said, of_tables)),
        "num_as_expected_peer": sum(one == bool(row["expected"]) for one, row in zip(peer_said, of_tables)),
        "costs": interleaved({"ours": ours, "math-verify": peer}, num_rounds),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    keep_to_one_core()
    report = run(arguments.rounds)
    num = report["num_rows"]
    print(f"{num} rows, {arguments.rounds} rounds in turn, medians, one core; {report['num_slow']} rows took the slow path")
    print("\n".join(table(report["costs"], num, "verdicts")))
    print(f"as the tables expect: ours {report['num_as_expected']}, math-verify {report['num_as_expected_peer']} of {num}")


if __name__ == "__main__":
    main()
