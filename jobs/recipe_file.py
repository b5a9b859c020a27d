"""Reading a recipe file: where it is, its YAML, overrides, and one sentence for what is wrong with it.

Nothing here knows what a recipe says; the schema is in ``stillhouse.jobs.recipe``.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from stillhouse.pipeline.errors import RecipeError


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-4 as a number (YAML 1.1 would read it as text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if key_node.value in seen and not isinstance(key_node.value, list):
            raise RecipeError(
                f"the key {key_node.value!r} stands twice, in lines {seen[key_node.value]} and {line}; remove one of them"
            )
        if not isinstance(key_node.value, list):
            seen[key_node.value] = line
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def _parse_yaml(text: str, where: str) -> Any:
    """Parse YAML to plain JSON values; dates become text, anchors become copies."""
    try:
        return json.loads(json.dumps(yaml.load(text, Loader=_Loader), default=str))
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "cannot be read"
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{where}: not valid YAML{place}: {problem}") from error
    except (RecursionError, ValueError, TypeError) as error:
        raise RecipeError(f"{where}: not a tree of keys and values: {error}") from error


def shipped_files() -> dict[str, Path]:
    """The recipes in the package, by name."""
    folder = resources.files("stillhouse.jobs.recipes")
    files = [Path(str(entry)) for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {path.stem: path for path in sorted(files)}


def find_recipe(path_or_name: str | Path) -> Path:
    """The file behind a path (it ends in .yaml or .yml, or holds a slash) or a shipped name.

    Raises:
        RecipeError: there is no such file or name.
    """
    text = str(path_or_name)
    if isinstance(path_or_name, Path) or "/" in text or text.endswith((".yaml", ".yml")):
        path = Path(text).expanduser()
        if not path.is_file():
            what = "is a folder, not a recipe file" if path.is_dir() else "does not exist"
            raise RecipeError(f"the recipe file {text} {what}; `stillhouse recipes` lists the shipped ones")
        return path
    shipped = shipped_files()
    if text not in shipped:
        nearest = difflib.get_close_matches(text, shipped, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]}?" if nearest else f"shipped are {', '.join(shipped)}; a file ends in .yaml"
        raise RecipeError(f"{text!r} is not a shipped recipe; {hint}")
    return shipped[text]


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is keys and values.

    Raises:
        RecipeError: the file cannot be read, is not YAML, gives a key twice, or is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe file {path} cannot be read: {error}") from error
    data = _parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: expected keys and values at the top level (name, problems, …), got {_describe(data)}")
    return data


_PATHS = ("path", "store", "spool", "api_key_file")
_DATA_FILES = (".jsonl", ".parquet")
_NAMES_OR_PATHS = ("model", "base_model", "name", "engine_python")


def anchor_paths(value: Any, folder: Path, key: str = "") -> Any:
    """Make relative paths absolute: keys that are always one, data files, and models or data sets named with a dot or ``~``."""
    if isinstance(value, dict):
        return {k: v if k in ("options", "extra_body") else anchor_paths(v, folder, k) for k, v in value.items()}
    if isinstance(value, list):
        return [anchor_paths(item, folder, key) for item in value]
    is_path = (
        key in _PATHS
        or (key == "name" and str(value).endswith(_DATA_FILES))
        or (key in _NAMES_OR_PATHS and isinstance(value, str) and value[:1] in (".", "~"))
    )
    if isinstance(value, str) and value and is_path and "://" not in value:
        return str((folder / Path(value).expanduser()).resolve())
    return value


def with_override(data: dict[str, Any], override: str, folder: Path) -> dict[str, Any]:
    """Set one value, given as ``key.path=value`` with a YAML value; relative paths in it start at ``folder``.

    Raises:
        RecipeError: there is no ``=``, the value is not YAML, or the path leads into something that has no keys.
    """
    dotted, equals, text = override.partition("=")
    parts = dotted.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {override}: expected key.path=value, for example train.num_steps=20")
    value = anchor_paths(_parse_yaml(text, f"--set {dotted}"), folder, parts[-1])
    data = json.loads(json.dumps(data))
    here: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(here, list):
            if not part.isdecimal() or int(part) >= len(here):
                at = ".".join(parts[:depth])
                raise RecipeError(f"--set {dotted}: {at} is a list of {len(here)}, numbered from 0; there is no item {part!r}")
            part = int(part)
        elif not isinstance(here, dict):
            raise RecipeError(f"--set {dotted}: {'.'.join(parts[:depth])} is {_describe(here)} and has no keys")
        elif here.get(part) is None and not last:
            here[part] = {}
        if last:
            here[part] = value
        else:
            here = here[part]
    return data


def sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """Say in one sentence what a recipe got wrong first: unknown keys, then missing ones, then wrong values."""
    found = [(_place(entry["loc"], model), entry) for entry in error.errors(include_url=False)]
    for (path, owner), entry in found:
        if entry["type"] == "extra_forbidden":
            return _unknown_key(path, owner)
    missing = [".".join(path) for (path, _), entry in found if entry["type"] == "missing"]
    missing += [".".join([*path, _tag_name(entry)]) for (path, _), entry in found if entry["type"] == "union_tag_not_found"]
    if missing:
        return (
            f"the required key {missing[0]} is missing"
            if len(missing) == 1
            else f"required keys are missing: {', '.join(missing)}"
        )
    (path, _), entry = found[0]
    dotted = ".".join(path)
    if entry["type"] == "value_error":
        return f"{dotted} {entry['ctx']['error']}".strip()
    if entry["type"] == "union_tag_invalid":
        expected, got = f"one of {entry['ctx']['expected_tags']}", repr(entry["ctx"]["tag"])
        return f"{dotted}.{_tag_name(entry)}: expected {expected}, got {got}"
    # A key that takes more than one type fails once for each of them.
    arms = [_expected(other) for (place, _), other in found if place == path]
    arms += [f"a list of {_expected(other)}" for (place, _), other in found if len(place) > len(path) and place[:-1] == path]
    expected = " or ".join(dict.fromkeys(arms))
    return f"{dotted}: expected {expected}, got {_describe(entry['input'])}"


def _unknown_key(path: list[str], owner: type[BaseModel] | None) -> str:
    known = list(owner.model_fields) if owner else []
    section = ".".join(path[:-1])
    nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.6)
    if nearest:
        hint = f"did you mean {'.'.join([*path[:-1], nearest[0]])}?"
    else:
        hint = f"{section or 'a recipe'} has the keys {', '.join(known)}"
    return f"{'.'.join(path)} is not a recipe key; {hint}"


def _tag_name(entry: Any) -> str:
    return entry["ctx"]["discriminator"].strip("'")


def _place(loc: tuple[str | int, ...], model: type[BaseModel]) -> tuple[list[str], type[BaseModel] | None]:
    """Turn pydantic's location into the path a user wrote, and the model that owns its last key.

    Pydantic puts the tag of a union, or the name of one of its arms, among the keys; they are left out here.
    """
    path: list[str] = []
    owner: type[BaseModel] | None = model
    here: Any = model
    for part in loc:
        models = list(_models(here))
        tagged = [m for m in models if part in _tags(m)]
        if isinstance(part, int):
            path.append(str(part))
        elif len(models) > 1 and tagged:
            here = owner = tagged[0]
        elif len(models) == 1:
            owner = models[0]
            path.append(part)
            here = owner.model_fields[part].annotation if part in owner.model_fields else None
        elif here is not None and typing.get_origin(here) is dict:
            path.append(part)
    return path, owner


def _models(hint: Any) -> Iterator[type[BaseModel]]:
    """The models inside a type hint: itself, a list's items, the arms of a union."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint
    elif typing.get_origin(hint) in (tuple, typing.Annotated, typing.Union, types.UnionType):
        for argument in typing.get_args(hint):
            yield from _models(argument)


def _tags(model: type[BaseModel]) -> set[str]:
    """Values of the model's first one-word key, which tells it from the others in its union."""
    hints = (field.annotation for field in model.model_fields.values())
    return {value for hint in hints if typing.get_origin(hint) is typing.Literal for value in typing.get_args(hint)}


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "letters, digits, dots and dashes",
}
_BOUND = {
    "greater_than": ("a number above", "gt"),
    "greater_than_equal": ("a number of at least", "ge"),
    "less_than": ("a number below", "lt"),
    "less_than_equal": ("a number of at most", "le"),
}


def _expected(entry: Any) -> str:
    kind = entry["type"]
    if kind in _BOUND:
        words, name = _BOUND[kind]
        return f"{words} {entry['ctx'][name]:g}"
    if kind == "literal_error":
        return entry["ctx"]["expected"]
    if kind == "too_short":
        return "a list with at least one item"
    return _EXPECTED.get(kind) or entry["msg"]


def _describe(value: Any) -> str:
    """A value in a few words: nothing, true, 'text', 3, a list of 2, the keys a and b."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"the keys {', '.join(map(str, value))}" if value else "no keys"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
