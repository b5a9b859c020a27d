"""Where problems come from: a reasoning-gym task, a JSONL or Parquet file, a ``datasets`` name; and keeping splits apart."""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from stillhouse.pipeline.dedup import normalized_text
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.judge_worker import encode_entry
from stillhouse.pipeline.records import Problem, Split
from stillhouse.pipeline.row_files import rows_of_dataset, rows_of_file
from stillhouse.pipeline.verification import ENTRY_FIELDS, NEEDED_FIELDS, NO_GOLD_NEEDED, is_entry_point, require_known_kind


def reasoning_gym_problems(task: str, *, split: Split, size: int, seed: int, options: Mapping[str, Any]) -> list[Problem]:
    """Generate problems of one reasoning-gym task; its own scorer judges them later.

    Items whose gold answer is empty are replaced by further ones of the same seed. Where a task names no single gold answer,
    the example that its own solver found is the gold; the problem has none ("") where there is no example either.

    Args:
        task: a reasoning-gym data set name, for example ``chain_sum``; ``composite`` mixes several, named in its option
            ``datasets``, a list of ``{"name": …, "weight": …, "config": {…}}``.
        size: how many problems; a given (task, seed, options) always gives the same ones.
        options: the task's own settings, for example ``{"max_terms": 4}``.

    Raises:
        RecipeError: no such task, an option it does not take, or an item that cannot be stored.
    """
    if size < 1:
        raise RecipeError(f"reasoning-gym task {task!r}: size must be at least 1, got {size}")
    options = dict(options)
    made = _gym_dataset(task, seed, size, options)
    settings = {spec.name: spec.config for spec in made.config.datasets} if task == "composite" else {task: options}
    problems: list[Problem] = []
    for index in range(2 * size + 8):
        if len(problems) == size:
            break
        if index == size:  # some items had no answer
            made = _gym_dataset(task, seed, 2 * size + 8, options)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # some generators print
                entry = made[index]
        except (AssertionError, TypeError, ValueError) as error:
            raise RecipeError(
                f"reasoning-gym task {task!r} makes no item {index} with the options {options}: {error}"
            ) from error
        gold = entry["answer"]
        if gold is None:
            gold = entry["answer"] = _example_answer(made, entry)
        elif not isinstance(gold, str):
            raise RecipeError(f"reasoning-gym task {task!r}, item {index}: its answer is a {type(gold).__name__}, not text")
        elif not gold.strip():
            continue
        name = entry["metadata"]["source_dataset"] if task == "composite" else task
        try:
            stored = {"task": name, "options": encode_entry(settings[name]), "entry": encode_entry(entry)}
        except TypeError as error:
            raise RecipeError(f"reasoning-gym task {task!r}, item {index}: the entry cannot be stored: {error}") from error
        text = json.dumps(stored, sort_keys=True, ensure_ascii=False)
        problems.append(Problem(entry["question"], gold or "", "reasoning_gym", f"reasoning_gym/{name}", split, text))
    if len(problems) < size:
        raise RecipeError(f"reasoning-gym task {task!r}: only {len(problems)} of {2 * size + 8} items have a gold answer")
    return problems


def _gym_dataset(task: str, seed: int, size: int, options: Mapping[str, Any]) -> Any:
    """A reasoning-gym data set whose items are made when they are asked for."""
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.4)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise RecipeError(f"reasoning-gym has no task {task!r}{hint}")
    known = sorted(set(getattr(DATASETS[task][1], "__dataclass_fields__", {})) - {"seed", "size"})
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=2, cutoff=0.4)
            hint = f"; the nearest are {', '.join(near)}" if near else ""
            raise RecipeError(f"reasoning-gym task {task!r} has no option {name!r}{hint}; it takes {', '.join(known)}")
    if task == "composite":
        options = {**options, "datasets": _gym_parts(options.get("datasets"))}
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return create_dataset(task, seed=seed, size=size, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise RecipeError(f"reasoning-gym task {task!r} refuses the options {dict(options)}: {error}") from error


def _gym_parts(datasets: Any) -> list[Any]:
    """The parts of a composite, checked by name and option like tasks of their own."""
    from reasoning_gym.composite import DatasetSpec

    parts = datasets if isinstance(datasets, list) else []
    if not parts or not all(isinstance(part, Mapping) and isinstance(part.get("config", {}), Mapping) for part in parts):
        raise RecipeError(
            "reasoning-gym task 'composite' needs the option datasets, a list of {name: …, weight: …, config: {…}}; it got "
            f"{datasets!r:.80}"
        )
    for part in parts:
        if unknown := sorted(part.keys() - {"name", "weight", "config"}):
            raise RecipeError(f"reasoning-gym task 'composite': a data set takes name, weight and config, not {unknown[0]!r}")
        _gym_dataset(str(part.get("name")), 0, 1, dict(part.get("config", {})))
    return [DatasetSpec(part["name"], part.get("weight", 1.0), dict(part.get("config", {}))) for part in parts]


def _example_answer(dataset: Any, entry: Mapping[str, Any]) -> str | None:
    """The answer that the task's own solver found, where its scorer gives that full marks; None where there is none."""
    for name in ("possible_answer", "example_answer", "example_correct_answer"):
        example = entry["metadata"].get(name)
        if not example:
            continue
        text = example if isinstance(example, str) else json.dumps(example)
        if dataset.score_answer(text, entry) == 1.0:
            return text
    return None


def local_problems(
    path: str,
    *,
    split: Split,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    answer_after: str | None = None,
    topic_field: str | None = None,
    kind: str = "math",
    limit: int | None = None,
) -> list[Problem]:
    """Read problems from a ``.jsonl`` or ``.parquet`` file, on any path that fsspec opens.

    Numbers become text as they are written (``1.50`` stays ``1.50``). ``limit`` reads the first rows only. With
    ``answer_after``, the answer is what follows its last occurrence in the field (``"#### "`` for GSM8K). ``topic_field``
    names the column of a problem's topic; None takes a column ``topic`` where a row has one that holds text.

    Raises:
        RecipeError: no such file, another file type, a line that is not a JSON object, or a row without a prompt, an
            answer or the named topic; the message names the file, the row (from 1) and the field.
    """
    path = str(path)
    require_known_kind(kind, where=path)
    return _problems_of_rows(
        rows_of_file(path, what="problems"),
        path,
        split,
        prompt_field,
        answer_field,
        kind,
        limit,
        source=path.rsplit("/", 1)[-1],
        answer_after=answer_after,
        topic_field=topic_field,
    )


def dataset_problems(
    name: str,
    *,
    subset: str | None,
    dataset_split: str,
    split: Split,
    prompt_field: str,
    answer_field: str,
    answer_after: str | None = None,
    topic_field: str | None = None,
    kind: str,
    limit: int | None,
    revision: str | None = None,
) -> list[Problem]:
    """Read problems from a Hugging Face data set, or from a local folder that ``datasets.load_dataset`` understands.

    Raises:
        RecipeError: the data set cannot be loaded, or a row has no prompt, no answer or not the named topic.
    """
    require_known_kind(kind, where=name)
    return _problems_of_rows(
        rows_of_dataset(name, what="problems", subset=subset, split=dataset_split, revision=revision),
        f"data set {name!r}",
        split,
        prompt_field,
        answer_field,
        kind,
        limit,
        source=name,
        answer_after=answer_after,
        topic_field=topic_field,
    )


def entry_text(kind: str, row: Mapping[str, Any]) -> str:
    """What a kind is judged by beside the answer, from a row's columns, as ``Problem.entry`` holds it."""
    entry = {name: row[name] for name in ENTRY_FIELDS.get(kind, ()) if row.get(name) is not None}
    if is_entry_point(kind) and row.get("entry"):
        given = row["entry"]
        try:
            entry = json.loads(given) if isinstance(given, str) else given
        except ValueError as error:
            raise RecipeError(f"the column 'entry' of a problem of kind {kind} is not JSON ({error})") from error
        if not isinstance(entry, Mapping):
            raise RecipeError(f"the column 'entry' of a problem of kind {kind} holds {type(entry).__name__}, not an object")
    return json.dumps(entry, sort_keys=True, ensure_ascii=False) if entry else ""


def _problems_of_rows(
    rows: Iterator[tuple[int, Mapping[str, Any]]],
    where: str,
    split: Split,
    prompt_field: str,
    answer_field: str,
    kind: str,
    limit: int | None,
    *,
    source: str,
    answer_after: str | None,
    topic_field: str | None,
) -> list[Problem]:
    problems = []
    for number, row in rows:
        if limit is not None and len(problems) >= limit:
            break
        texts = []
        for field in (prompt_field, answer_field):
            value = row.get(field)
            _refuse_other_than_text(value, field, f"{where}, row {number}")
            if field == answer_field and field not in row and kind in NO_GOLD_NEEDED:
                value = ""
            elif value is None or not str(value).strip():
                has = "is empty" if field in row else _is_missing(row)
                raise RecipeError(f"{where}, row {number}: field {field!r} {has}")
            texts.append(str(value).strip())
        if answer_after is not None:
            _, marker, gold = texts[1].rpartition(answer_after)
            if not marker or not gold.strip():
                raise RecipeError(f"{where}, row {number}: field {answer_field!r} has nothing behind {answer_after!r}")
            texts[1] = gold.strip()
        if not texts[1] and not any(row.get(name) for name in NEEDED_FIELDS.get(kind, ())):
            needed = " or ".join(map(repr, (answer_field, *NEEDED_FIELDS.get(kind, ()))))
            raise RecipeError(f"{where}, row {number}: kind {kind} is judged by {needed}, and the row has {', '.join(row)}")
        if kind == "code" and not row.get("tests"):
            raise RecipeError(f"{where}, row {number}: kind code is judged by 'tests', and the row has {', '.join(row)}")
        topic = _topic(row, topic_field, f"{where}, row {number}")
        problems.append(Problem(texts[0], texts[1], kind, source, split, entry_text(kind, row), topic))
    if not problems:
        raise RecipeError(f"{where}: no rows, so no problems")
    return problems


def _refuse_other_than_text(value: Any, field: str, where: str) -> None:
    if isinstance(value, (dict, list, bool)):
        raise RecipeError(f"{where}: field {field!r} holds a {type(value).__name__}, not text")


def _is_missing(row: Mapping[str, Any]) -> str:
    return f"is missing; the row has {', '.join(map(str, row)) or 'nothing'}"


def _topic(row: Mapping[str, Any], field: str | None, where: str) -> str:
    """A row's topic; "" where the named column is empty, or where none is named and there is no text in ``topic``."""
    if field is None:
        topic = row.get("topic")
        return topic.strip() if isinstance(topic, str) else ""
    if field not in row:
        raise RecipeError(f"{where}: field {field!r} {_is_missing(row)}")
    _refuse_other_than_text(row[field], field, where)
    return "" if row[field] is None else str(row[field]).strip()


def disjoint(problems: list[Problem], against: list[Problem]) -> tuple[list[Problem], list[Problem]]:
    """Keep the problems whose text is not in ``against`` and not earlier in ``problems`` itself.

    Texts are compared normalized (NFKC, letter case, whitespace).

    Returns:
        (kept, removed), each in the order given.
    """
    seen = {normalized_text(problem.prompt) for problem in against}
    kept, removed = [], []
    for problem in problems:
        text = normalized_text(problem.prompt)
        (removed if text in seen else kept).append(problem)
        seen.add(text)
    return kept, removed
