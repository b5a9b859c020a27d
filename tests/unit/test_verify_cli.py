"""``stillhouse verify``: rows in, verdicts out, in order; and the verifiers' proof on a recipe's own problems."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

ROWS = [
    {"gold": "\\frac{1}{2}", "pred": "<think>half</think>\n\n\\boxed{0.5}"},
    {"gold": "2", "pred": "<think>2</think> It is 2."},
    {"gold": "2", "pred": "3"},
    {"gold": "5", "pred": None},
]


COMMAND = [sys.executable, "-m", "stillhouse.jobs.cli.main", "verify"]


def verify_bytes(given: bytes, *flags: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *flags], input=given, capture_output=True, timeout=120, check=False)


def verify(*flags: str, rows: object = ROWS) -> subprocess.CompletedProcess[str]:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return subprocess.run([*COMMAND, *flags], input=text, capture_output=True, text=True, timeout=120, check=False)


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
    ("line", "expected"),
    [
        (b"nonsense", "line 2 of stdin is not JSON"),
        (b"[1]", "line 2 of stdin is a list"),
        (b'{"pred": "1"}', "needs 'gold' and 'pred'"),
        (b'{"gold": "1", "pred": "\xff"}', "line 2 of stdin is not UTF-8"),
        (b'{"gold": "1", "pred": "\x00"}', "line 2 of stdin is not JSON"),
    ],
)
def test_a_row_that_cannot_be_read_is_said_and_costs_no_other(line, expected):
    """A typing error in a file of a million rows would end in a traceback, or lose the verdicts of all the others."""
    done = verify_bytes(b'{"gold": "1", "pred": "1"}\n' + line + b'\n{"gold": "1", "pred": "2", "id": 3}\n')
    said = [json.loads(row) for row in done.stdout.splitlines()]
    assert [row["verdict"] for row in said] == ["correct", "undecided", "wrong"]
    assert expected in said[1]["reason"]
    assert expected in done.stderr.decode()
    assert (done.returncode, said[2]["id"]) == (2, 3)
    assert b"Traceback" not in done.stderr


def test_a_broken_item_of_reasoning_gym_costs_no_other():
    """One row without its task would end in a traceback, and take the verdicts of all rows after it."""
    item = {"question": "4 + 3 = ?", "answer": "7", "metadata": {"source_dataset": "chain_sum"}}
    rows = [
        {"entry": "x", "pred": "7"},
        {"entry": {**item, "metadata": {}}, "pred": "7"},
        {"entry": item, "pred": "7", "id": "c"},
    ]
    done = verify("--kind", "reasoning_gym", rows=rows)
    said = [json.loads(row) for row in done.stdout.splitlines()]
    assert [row["verdict"] for row in said] == ["undecided", "undecided", "correct"]
    assert (done.returncode, said[2]["id"]) == (2, "c")
    assert "Traceback" not in done.stderr


def test_an_override_without_a_recipe_is_refused():
    """A setting would be passed over in silence."""
    done = verify("--set", "problems.test=[]")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--self-test" in done.stderr


def test_an_unknown_kind_is_refused():
    """A misspelt kind would be found after a file was read."""
    done = verify("--kind", "poetry")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no verifier for kind='poetry'" in done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (b"", []),
        (b"\n  \n", []),
        (b'\xef\xbb\xbf{"gold": "1", "pred": "1"}\r\n\r\n{"gold": "1", "pred": "2"}', ["correct", "wrong"]),
        (b'{"gold": 1, "pred": 1.0, "more": [1]}\n', ["correct"]),
        (b'{"gold": null, "pred": "1"}\n{"gold": "1", "pred": null}\n', ["undecided", "wrong"]),
        (b'{"gold": "yes", "pred": "\\udc00"}\n', ["wrong"]),
        (b'{"gold": "1", "pred": "' + b"9" * 3_000_000 + b'"}\n{"gold": "1", "pred": "1"}\n', ["undecided", "correct"]),
    ],
)
def test_what_files_look_like_is_taken(given, expected):
    """An editor's byte-order mark, Windows line ends, numbers for texts or one huge row would stop a scoring run."""
    done = verify_bytes(given)
    assert done.returncode == 0, done.stderr
    assert [json.loads(row)["verdict"] for row in done.stdout.splitlines()] == expected


def test_a_verdict_comes_before_the_next_row_is_sent():
    """A program that asks for one verdict at a time would wait for ever."""
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    # A suite that a shell started in the background ignores SIGINT, and so would its children.
    with subprocess.Popen(COMMAND, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        for pred, verdict in (("1", "correct"), ("2", "wrong")):
            process.stdin.write(json.dumps({"gold": "1", "pred": pred}).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["verdict"] == verdict
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert b"Traceback" not in process.stderr.read()


def test_a_reader_that_has_enough_ends_it():
    """``| head`` would otherwise wait until the last of a million rows is judged."""
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b'{"gold": "1", "pred": "1"}\n')
        process.stdin.flush()
        assert process.stdout.readline()
        process.stdout.close()
        process.stdin.write(b'{"gold": "1", "pred": "1"}\n')
        process.stdin.flush()
        assert process.wait(60) == 0  # with its stdin still open
        assert b"Traceback" not in process.stderr.read()


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
