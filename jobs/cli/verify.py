"""``stillhouse verify``: judge rows of gold and prediction from stdin, or let the verifiers prove themselves on a recipe."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

import typer

from stillhouse.jobs.cli.say import JsonOption, say
from stillhouse.pipeline.errors import ExitCode, RecipeError
from stillhouse.pipeline.sandbox.choice import VARIABLE, chosen_sandbox

_READ_BYTES = 1 << 20
_CHUNK_LINES = 16
_FAILURES_SHOWN = 3


class Extract(StrEnum):
    """How an answer is taken from a prediction."""

    strict = "strict"
    lenient = "lenient"


def verify(
    kind: Annotated[
        str,
        typer.Option(
            "--kind", help="math, choice, exact, number, json, regex, code, reasoning_gym, or python:module:function."
        ),
    ] = "math",
    extract: Annotated[
        Extract,
        typer.Option("--extract", help="strict: the last box after </think>; lenient: also the answer that prose announces."),
    ] = Extract.strict,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds for one row; past it: undecided.")] = 5.0,
    sandbox: Annotated[
        str | None,
        typer.Option(
            "--sandbox",
            metavar="WHERE",
            envvar=VARIABLE,
            help="Where programs run: strict (the default; no verdict where this machine cannot give it), unsafe-confined, "
            "unsafe-limits, or the http(s) address of a sandbox service.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Rows judged side by side.")] = 2,
    self_test: Annotated[
        str | None, typer.Option("--self-test", metavar="RECIPE", help="Instead: prove the verifiers on a recipe's problems.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="With --self-test: override a recipe's key.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Judge rows of gold and prediction.

    JSONL on stdin, one verdict a row on stdout, in order and as soon as it is known; blank lines are passed over. A row has
    "gold" and "pred" (a whole completion or a bare answer), and what its kind needs besides: number "rel_tol", "abs_tol",
    "unit"; json "schema"; regex "pattern"; code "tests", "entry_point", "setup"; reasoning_gym "entry", an item as it makes
    them. A verdict is correct, wrong or undecided, with a reason; a row's "id" is repeated beside it. A row that cannot be
    read is undecided, says its line, and makes the exit code 2.
    """
    if sandbox is not None:
        os.environ[VARIABLE] = sandbox  # the stages of a run go by the variable as well
        chosen_sandbox()
    if self_test is not None:
        return _self_test(self_test, overrides, as_json)
    if overrides:
        raise RecipeError("--set overrides a recipe's key, and goes with --self-test RECIPE alone")
    from stillhouse.pipeline.verification import require_known_kind
    from stillhouse.pipeline.verifiers.in_order import in_order
    from stillhouse.pipeline.verifiers.rows import judge_row

    require_known_kind(kind, where="--kind")

    def judged(line: tuple[int, bytes]) -> tuple[dict[str, object], str | None]:
        """A line's verdict, and what is wrong with the line if it is no row."""
        number, text = line
        identity: dict[str, object] = {}
        try:
            row = _row(number, text)
            identity = {"id": row["id"]} if "id" in row else {}
            return {**identity, **judge_row(kind, row, extract=extract.value, timeout_s=timeout_s)}, None
        except RecipeError as error:
            reason = str(error) if str(error).startswith("line ") else f"line {number} of stdin: {error}"
            return {**identity, "verdict": "undecided", "reason": reason}, reason

    num_rows = num_unread = 0
    for verdict, reason in in_order(judged, _lines(sys.stdin.fileno()), num_workers=workers):
        num_rows += 1
        if reason is not None:
            num_unread += 1
            if num_unread == 1:
                print(f"stillhouse: {reason}; it is undecided, and the rows after it are judged", file=sys.stderr)
        try:
            print(json.dumps(verdict), flush=True)
        except BrokenPipeError:  # `| head` has what it wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return int(ExitCode.PASS)
    if num_unread:
        print(f"stillhouse: {num_unread} of {num_rows} rows could not be read and are undecided", file=sys.stderr)
    return int(ExitCode.USAGE if num_unread else ExitCode.PASS)


def _lines(stdin: int) -> Iterator[list[tuple[int, bytes]]]:
    """Read numbered lines as they come, in short chunks; blank ones are left out.

    From the descriptor, not from ``sys.stdin``: whoever types one row at a time gets its verdict before typing the next.
    """
    number, parts = 1, []
    while block := os.read(stdin, _READ_BYTES):
        *ended, rest = block.split(b"\n")
        if ended:
            lines = [b"".join([*parts, ended[0]]), *ended[1:]]
            numbered = [(at, line) for at, line in enumerate(lines, number) if line.strip()]
            yield from (numbered[at : at + _CHUNK_LINES] for at in range(0, len(numbered), _CHUNK_LINES))
            number += len(lines)
            parts = []
        parts.append(rest)
    if (last := b"".join(parts)).strip():
        yield [(number, last)]


def _row(number: int, line: bytes) -> dict[str, object]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"line {number} of stdin is not UTF-8 ({error.reason} at byte {error.start + 1})") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"line {number} of stdin is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise RecipeError(f"line {number} of stdin is a {type(row).__name__}, and a row is an object with gold and pred")
    return row


def _self_test(recipe: str, overrides: list[str] | None, as_json: bool) -> int:
    from stillhouse.jobs.recipe import load_recipe
    from stillhouse.jobs.sources import self_test

    found = self_test(load_recipe(recipe, overrides or ()))
    if as_json:
        say(json.dumps({name: check.as_json() for name, check in found.items()}, indent=2))
    else:
        width = max(map(len, found))
        for name, check in found.items():
            say(f"{name:{width}}  {check.line()}")
            for failure in check.failures[:_FAILURES_SHOWN]:
                say(f"{'':{width}}  {failure}")
            if (num_more := len(check.failures) - _FAILURES_SHOWN) > 0:
                say(f"{'':{width}}  and {num_more:,} more; --json has them all")
    return int(ExitCode.PASS if all(check.sound for check in found.values()) else ExitCode.GATE_FAILED)
