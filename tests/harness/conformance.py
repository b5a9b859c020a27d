"""Judge other people's tables of gold, prediction and verdict, beside math-verify alone.

    python -m tests.harness.conformance

The tables of `tests/conformance/` with lenient extraction; rows that are left out, each with its reason, stand in
`left_out.jsonl`. Rows that are bare answers are also judged wrapped in dollars and in a box, and rows marked symmetric in the
other direction. math-verify is called as its README shows it, `verify(parse(gold), parse(pred))`. Exit code 1 where ours
disagrees with a row that is not left out, or more than 5 % of a table are.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from stillhouse.pipeline.verifiers.rows import judge_row
from tests.harness.side_by_side import parser_of

FOLDER = Path(__file__).parents[1] / "conformance"
TABLES = ("lighteval_extractive_match", "math_verify_tests", "nemo_skills_math_equal")
BARE = "nemo_skills_math_equal"
MAX_LEFT_OUT = 0.05
Row = dict[str, Any]


def rows(name: str) -> list[Row]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def kept(name: str) -> list[Row]:
    left_out = {(row["table"], row["id"]) for row in rows("left_out")}
    return [row for row in rows(name) if (f"{name}.jsonl", row["id"]) not in left_out]


def wrapped(row: Row) -> list[Row]:
    """The row with its answer in dollars, in a box and in both, for the gold bare and in dollars."""
    preds = [f"${row['pred']}$", f"\\boxed{{{row['pred']}}}", f"$\\boxed{{{row['pred']}}}$"]
    return [{**row, "gold": gold, "pred": pred} for pred in preds for gold in (row["gold"], f"${row['gold']}$")]


def parts() -> dict[str, list[Row]]:
    """The rows to agree with, by where they come from."""
    found = {name: kept(name) for name in TABLES}
    answered = [row for row in found[BARE] if row["pred"]]
    found[f"{BARE}, wrapped"] = [one for row in answered for one in wrapped(row)]
    found[f"{BARE}, other direction"] = [
        {**row, "gold": row["pred"], "pred": row["gold"]} for row in answered if row["symmetric"]
    ]
    return found


def as_expected(row: Row) -> bool:
    return (judge_row("math", row, extract="lenient")["verdict"] == "correct") == bool(row["expected"])


def math_verify_says(row: Row) -> bool:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # Its plain-expression reader hands text to sympy.parse_expr, which executes it: these tables are known text.
    return verify(parse(row["gold"]), parse(row["pred"]))


def main() -> int:
    parser_of(__doc__).parse_args()
    missed = False
    print(f"{'rows judged as the table expects':40} {'rows':>6} {'ours':>6} {'math-verify':>12} {'left out':>9}")
    for name, of_part in parts().items():
        agree = [as_expected(row) for row in of_part]
        peer = sum(math_verify_says(row) == bool(row["expected"]) for row in of_part)
        num_left_out = len(rows(name)) - len(of_part) if name in TABLES else 0
        print(f"{name:40} {len(of_part):6} {sum(agree):6} {peer:12} {num_left_out:9}")
        for row, good in zip(of_part, agree):
            if not good:
                print(f"  otherwise: gold {row['gold']!r}, pred {row['pred']!r}, expected {row['expected']}")
        missed |= not all(agree) or num_left_out > MAX_LEFT_OUT * (len(of_part) + num_left_out)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
