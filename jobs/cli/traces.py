"""``stillhouse traces``: look at, check, tidy and hand on what a teacher wrote.

STORE is a run's folder, a store's own folder, or a URL. Data goes to stdout. Libraries are imported inside the commands.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stillhouse.jobs.cli.say import JsonOption, say
from stillhouse.pipeline.errors import ExitCode, RecipeError

if TYPE_CHECKING:
    from stillhouse.pipeline.trace_store.summary import StoreSummary

traces_app = typer.Typer(
    help="Look at, check and export the traces of a run.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)

StoreArgument = Annotated[
    str, typer.Argument(metavar="STORE", help="A run's folder, a trace store's folder, or a URL such as s3://bucket/traces.")
]
TEXT_WIDTH = 60


class Format(StrEnum):
    """How `export` writes."""

    jsonl = "jsonl"
    parquet = "parquet"
    chat = "chat"


def store_root(text: str) -> str:
    """Where the traces of a STORE argument are: a run keeps them in its sub-folder ``traces``, or where its recipe says.

    Raises:
        RecipeError: there is no such folder.
    """
    if "://" in text:
        return text
    folder = Path(text)
    if not folder.is_dir():
        raise RecipeError(f"{text} is not a folder; give a run's folder, a trace store's folder or a URL")
    if (folder / "recipe.yaml").is_file():
        from stillhouse.jobs.recipe_file import read_mapping

        elsewhere = (read_mapping(folder / "recipe.yaml").get("teacher") or {}).get("store")
        return elsewhere or str(folder / "traces")
    if (folder / "store.json").exists() or not (folder / "traces").is_dir():
        return text
    return str(folder / "traces")


@traces_app.command()
def stats(store: StoreArgument, as_json: JsonOption = False) -> int:
    """Count traces, tokens, dollars and calls, also those that a running writer has not sealed yet."""
    from dataclasses import asdict

    from stillhouse.pipeline.trace_store.summary import summarize

    summary = summarize(store_root(store))
    if as_json:
        say(json.dumps(asdict(summary) | {"calls": summary.calls.to_json()}, indent=2))
    else:
        say("\n".join(_stats_lines(summary)))
    return int(ExitCode.PASS)


@traces_app.command("ls")
def list_traces(
    store: StoreArgument,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Stop after so many.")] = None,
    finish: Annotated[str | None, typer.Option("--finish", help="Only this finish_reason: stop, length, truncated …")] = None,
    problem: Annotated[str | None, typer.Option("--problem", help="Only problems whose id begins so.")] = None,
    as_json: JsonOption = False,
) -> int:
    """List traces, one a line: key, problem, finish_reason, tokens, beginning. With --json one object a line."""
    import itertools

    _say_each(
        json.dumps(row, ensure_ascii=False)
        if as_json
        else f"{row['key'][:12]}  {row['problem_id'][:12]:12}  {row['finish_reason']:9}  {row['num_completion_tokens']:>6,}  "
        f"{_one_line(row['beginning'])}"
        for row in itertools.islice(_listed(store_root(store), finish, problem), limit)
    )
    return int(ExitCode.PASS)


@traces_app.command()
def show(
    store: StoreArgument,
    key: Annotated[str, typer.Argument(metavar="KEY_PREFIX", help="The beginning of the trace's key.")],
    as_json: JsonOption = False,
) -> int:
    """Show one trace whole, with the calls that were made for it."""
    from dataclasses import asdict

    from stillhouse.pipeline.trace_store.store import TraceStore

    opened = TraceStore.existing(store_root(store))
    whole_key = _whole_key(opened, key)
    trace = next(iter(opened.traces({whole_key})))
    calls = [row for batch in opened.calls() for row in batch.to_pylist() if row["key"] == whole_key]
    for row in calls:
        row["raw"] = row["raw"] and row["raw"].decode(errors="replace")
    if as_json:
        say(json.dumps({"trace": asdict(trace), "calls": calls}, indent=2, ensure_ascii=False))
        return int(ExitCode.PASS)
    fields = {name: value for name, value in asdict(trace).items() if value not in ("", None)}
    for name in ("reasoning", "answer_text"):  # parts of the completion
        fields.pop(name, None)
    prompt, completion = fields.pop("rendered_prompt"), fields.pop("completion")
    if trace.logprobs:
        fields["logprobs"] = f"{len(trace.logprobs):,} characters of JSON; --json shows them"
    lines = [f"{name:22} {_printable(str(value))}" for name, value in fields.items()]
    for row in calls:
        known = {name: value for name, value in row.items() if value not in ("", None) and name != "key"}
        lines.append("call                   " + ", ".join(f"{name} {_printable(str(value))}" for name, value in known.items()))
    say("\n".join([*lines, "", "── prompt", _printable(prompt), "", "── completion", _printable(completion)]))
    return int(ExitCode.PASS)


@traces_app.command()
def export(
    store: StoreArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.", dir_okay=False)],
    format: Annotated[Format, typer.Option("--format", help="jsonl: all fields; chat: messages for trainers.")] = Format.jsonl,
    only_finished: Annotated[bool, typer.Option("--only-finished", help="Only traces that ended by themselves.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Write all traces into one file."""
    from stillhouse.pipeline.trace_store.exporting import export as write

    prompts = _problem_prompts(store) if format == Format.chat else None
    num_rows = write(store_root(store), out, format=format.value, only_finished=only_finished, prompts=prompts)
    say(json.dumps({"file": str(out), "num_traces": num_rows}) if as_json else f"{out}: {num_rows:,} traces")
    return int(ExitCode.PASS)


@traces_app.command(epilog="Exit codes: 0 sound, 5 not what its commits say.")
def verify(store: StoreArgument, as_json: JsonOption = False) -> int:
    """Hash every file again and compare it with the commits."""
    from dataclasses import asdict

    from stillhouse.pipeline.trace_store.checks import verify_store

    found = verify_store(store_root(store))
    if as_json:
        say(json.dumps(asdict(found) | {"sound": found.sound}, indent=2))
    else:
        counts = f"{found.num_traces:,} traces and {found.num_calls:,} calls in {found.num_commits:,} commits"
        verdict = "sound" if found.sound else f"not sound, {len(found.problems)} problems"
        say("\n".join([*found.problems, *(f"note: {note}" for note in found.notes), f"{store}: {verdict}; {counts}"]))
    return int(ExitCode.PASS if found.sound else ExitCode.INTEGRITY)


@traces_app.command()
def gc(
    store: StoreArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
    older_than: Annotated[float, typer.Option("--older-than", min=0, help="Seconds; younger files stay.")] = 3600.0,
    as_json: JsonOption = False,
) -> int:
    """Remove files that no commit lists: what killed writers left behind."""
    from stillhouse.pipeline.trace_store.checks import collect_garbage

    names = collect_garbage(store_root(store), older_than_s=older_than, dry_run=dry_run)
    if as_json:
        say(json.dumps({"dry_run": dry_run, "files": names}, indent=2))
    else:
        say("\n".join([*names, f"{len(names):,} files {'would be removed' if dry_run else 'removed'}"]))
    return int(ExitCode.PASS)


@traces_app.command()
def migrate(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's folder, or its sub-folder traces.")],
    as_json: JsonOption = False,
) -> int:
    """Bring traces of the first layout into the store, under the same keys. Can be repeated after a stop."""
    from stillhouse.pipeline.trace_store.migration import migrate as bring_over

    root = store_root(str(folder))
    num_rows = bring_over(Path(root))
    say(json.dumps({"folder": root, "num_traces": num_rows}) if as_json else f"{root}: {num_rows:,} traces brought over")
    return int(ExitCode.PASS)


def _say_each(lines: Iterable[str]) -> None:
    """Print lines until they end or the reader goes: ``| head`` need not wait for ten million traces."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stats_lines(summary: StoreSummary) -> Iterator[str]:
    calls = summary.calls
    yield f"store       {summary.url}"
    yield f"traces      {summary.num_traces:,}" + _shares(summary.by_finish_reason)
    for teacher, count in summary.by_teacher.items():
        yield f"teacher     {count:,} by {teacher}"
    yield f"tokens      {summary.prompt_tokens:,} in prompts, {summary.completion_tokens:,} in completions"
    yield f"dollars     {calls.dollars:,.4f} for what was counted, {calls.dollars_lost:,.4f} reserved by calls of unknown cost"
    yield (
        f"calls       {calls.num_calls:,}: {calls.num_answered:,} answered, {calls.num_failed:,} failed "
        f"({calls.num_truncated:,} with a beginning kept), {calls.num_lost:,} lost in a crash"
    )
    yield (
        f"files       {summary.num_shards:,} shards, {summary.num_commits:,} commits of {summary.num_writers:,} writers, "
        f"{summary.size_bytes / 1e6:,.1f} MB"
    )
    spool = summary.spool
    if spool is not None and (spool.num_under_way or spool.num_outcomes):
        yield f"in spool    {spool.num_under_way:,} calls under way; ended and not sealed yet" + _shares(spool.num_outcomes)


def _shares(counts: dict[str, int]) -> str:
    return ": " + ", ".join(f"{count:,} {name}" for name, count in counts.items()) if counts else ""


def _listed(root: str, finish: str | None, problem: str | None) -> Iterator[dict[str, Any]]:
    import pyarrow.compute as pc

    from stillhouse.pipeline.trace_store.store import TraceStore

    columns = ["key", "problem_id", "finish_reason", "num_completion_tokens", "completion"]
    for batch in TraceStore.existing(root).batches(columns, batch_rows=1024):
        if finish is not None:
            batch = batch.filter(pc.equal(batch.column("finish_reason"), finish))
        if problem is not None:
            batch = batch.filter(pc.starts_with(batch.column("problem_id"), problem))
        beginnings = pc.utf8_slice_codeunits(batch.column("completion"), 0, 4 * TEXT_WIDTH).to_pylist()
        for row, beginning in zip(batch.select(columns[:-1]).to_pylist(), beginnings):
            yield row | {"beginning": beginning}


def _whole_key(store: Any, prefix: str) -> str:
    import pyarrow.compute as pc

    found: list[str] = []
    for batch in store.batches(["key"], batch_rows=1 << 16):
        column = batch.column("key")
        found += column.filter(pc.starts_with(column, prefix.lower())).to_pylist()
        if len(found) > 1:
            some = ", ".join(key[: len(prefix) + 8] for key in found[:3])
            raise RecipeError(f"{prefix!r} is the beginning of more than one key ({some}, …); give more of it")
    if not found:
        raise RecipeError(f"no trace has a key that begins with {prefix!r}; `stillhouse traces ls` lists them")
    return found[0]


def _problem_prompts(store: str) -> dict[str, str] | None:
    """The problems of a run's folder by id; None where STORE is not one."""
    folder = Path(store)
    for run in (folder, folder.parent):
        if "://" not in store and (run / "problems").is_dir():
            import pyarrow.dataset as ds

            table = ds.dataset(sorted((run / "problems").glob("part-*.parquet"))).to_table(columns=["id", "prompt"])
            return dict(zip(table.column("id").to_pylist(), table.column("prompt").to_pylist()))
    return None


def _one_line(text: str) -> str:
    line = " ".join(_printable(text).split())
    return line if len(line) <= TEXT_WIDTH else line[: TEXT_WIDTH - 1] + "…"


def _printable(text: str) -> str:
    """A model's text without what a terminal would obey."""
    return "".join(character if character.isprintable() or character in "\n\t" else "�" for character in text)
