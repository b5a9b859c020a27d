"""``stillhouse verify``: judge rows of gold and prediction from stdin, or let the verifiers prove themselves on a recipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

import typer

from stillhouse.jobs.cli.say import JsonOption, say
from stillhouse.pipeline.errors import ExitCode, RecipeError


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
    workers: Annotated[int, typer.Option("--workers", min=1, help="Rows judged side by side.")] = 2,
    self_test: Annotated[
        str | None, typer.Option("--self-test", metavar="RECIPE", help="Instead: prove the verifiers on a recipe's problems.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="With --self-test: override a recipe's key.")] = None,
    as_json: JsonOption = False,
) -> int:
    """Judge rows of gold and prediction.

    JSONL on stdin, one verdict a row on stdout, in order. A row has "gold" and "pred" (a whole completion or a bare answer),
    and what its kind needs besides: number "rel_tol", "abs_tol", "unit"; json "schema"; regex "pattern"; code "tests" and
    "entry_point". A verdict is correct, wrong or undecided, with a reason.
    """
    if self_test is not None:
        return _self_test(self_test, overrides, as_json)
    from stillhouse.pipeline.verifiers.rows import judge_rows

    for verdict in judge_rows(kind, _rows(), extract=extract.value, timeout_s=timeout_s, num_workers=workers):
        say(json.dumps(verdict, ensure_ascii=False))
    return int(ExitCode.PASS)


def _rows() -> Iterator[dict[str, Any]]:
    for number, line in enumerate(sys.stdin, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RecipeError(f"line {number} of stdin is not JSON ({error}); the rows before it are judged") from error
        if not isinstance(row, dict):
            raise RecipeError(f"line {number} of stdin is a {type(row).__name__}, and a row is an object with gold and pred")
        yield row


def _self_test(recipe: str, overrides: list[str] | None, as_json: bool) -> int:
    from dataclasses import asdict

    from stillhouse.jobs.recipe import load_recipe
    from stillhouse.jobs.sources import self_test

    found = self_test(load_recipe(recipe, overrides or ()))
    if as_json:
        say(json.dumps({name: asdict(check) for name, check in found.items()}, indent=2))
    else:
        width = max(map(len, found))
        for name, check in found.items():
            say(
                f"{name:{width}}  {check.gold_accepted} of {check.num_problems} golds accepted, "
                f"{check.mutated_rejected} of {check.num_mutated} altered ones refused"
            )
            for failure in check.failures[:3]:
                say(f"{'':{width}}  {failure}")
    sound = all(c.gold_accepted == c.num_problems and c.mutated_rejected == c.num_mutated for c in found.values())
    return int(ExitCode.PASS if sound else ExitCode.GATE_FAILED)
