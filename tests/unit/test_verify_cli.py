"""``stillhouse verify``: rows in, verdicts out, in order; and the verifiers' proof on a recipe's own problems."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

ROWS = [
    {"gold": "\\frac{1}{2}", "pred": "<think>half</think>\n\n\\boxed{0.5}"},
    {"gold": "2", "pred": "<think>2</think> It is 2."},
    {"gold": "2", "pred": "3"},
    {"gold": "5", "pred": None},
]


def verify(*flags: str, rows: object = ROWS) -> subprocess.CompletedProcess[str]:
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    command = [sys.executable, "-m", "stillhouse.jobs.cli.main", "verify", *flags]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)


def verdicts(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(set(row) == {"verdict", "reason"} and row["reason"] for row in rows)
    return [row["verdict"] for row in rows]


def test_rows_are_judged_in_order():
    """A pipeline that zips verdicts with its rows would judge the wrong ones."""
    assert verdicts(verify("--kind", "math")) == ["correct", "wrong", "wrong", "wrong"]
    many = [{"gold": str(n), "pred": str(n if n % 3 else n + 1)} for n in range(200)]
    assert verdicts(verify("--kind", "math", "--workers", "3", rows=many)) == [
        "correct" if n % 3 else "wrong" for n in range(200)
    ]


def test_prose_counts_only_where_it_is_asked_for():
    """Training labels would be harvested from sentences, or others' outputs could not be scored."""
    assert verdicts(verify("--extract", "lenient"))[1] == "correct"


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("number", {"gold": "1800", "unit": "L", "pred": "\\boxed{1.8 m^3}"}, "correct"),
        ("number", {"gold": "5 cm", "pred": "5 m"}, "wrong"),
        ("choice", {"gold": "B", "pred": "<think>x</think> \\boxed{B}"}, "correct"),
        ("regex", {"pattern": "a+b", "pred": "aab"}, "correct"),
        ("json", {"schema": {"type": "object", "required": ["x"]}, "pred": '```json\n{"x": 1}\n```'}, "correct"),
    ],
)
def test_each_kind_takes_what_it_needs_from_the_row(kind, row, expected):
    """A team could not use the verifier of its own domain from the command line."""
    assert verdicts(verify("--kind", kind, rows=[row])) == [expected]


@pytest.mark.parametrize(
    ("flags", "rows", "expected"),
    [
        ((), '{"gold": "1", "pred": "1"}\nnonsense\n', "line 2 of stdin is not JSON"),
        ((), "[1]\n", "line 1 of stdin is a list"),
        ((), [{"pred": "1"}], "needs 'gold' and 'pred'"),
        (("--kind", "poetry"), ROWS, "no verifier for kind='poetry'"),
    ],
)
def test_what_is_not_understood_is_said_in_a_sentence(flags, rows, expected):
    """A typing error in a file of a million rows would end in a traceback."""
    done = verify(*flags, rows=rows)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipes_own_golds_prove_the_verifier(tmp_path):
    """Wrong golds would be found after the teacher was paid."""
    rows = [{"prompt": f"{n} litres in m³?", "answer": f"{n / 1000:g}", "unit": "m^3"} for n in (1, 20, 500)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"[{{source: file, path: {tmp_path / 'p.jsonl'}, kind: number}}]"
    flags = ("--self-test", "demo", "--set", f"problems.train={source}", "--set", "problems.validation=[]", "--json")
    done = verify(
        *flags, "--set", "problems.test.0.size=4", "--set", "problems.test.1.size=4", "--set", "problems.test.2.size=4"
    )
    found = json.loads(done.stdout)
    assert (done.returncode, found["train: p.jsonl"]["gold_accepted"]) == (0, 3)
    rows.append({"prompt": "broken", "answer": "not a number"})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    broken = verify(*flags[:-1])
    assert broken.returncode == 1
    assert "3 of 4 golds accepted" in broken.stdout
    assert "not a number" in broken.stdout
