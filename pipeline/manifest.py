"""The manifest of a folder: the sha256 of every file in it, written last, so that a folder without one is unfinished.

The manifest also hashes itself (``seal``), so that a bit flipped in its provenance shows. It proves that nothing changed by
accident; against someone who rewrites files and manifest together, compare the sha256 that ``write_manifest`` returned.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.pipeline.errors import IntegrityError
from stillhouse.pipeline.records import content_key
from stillhouse.pipeline.store import sha256_of, write_atomic

MANIFEST_NAME = "manifest.json"
MANIFEST_SCHEMA_VERSION = 1


def strict_json(raw: bytes) -> Any:
    """Parse JSON that has one reading only: UTF-8, no key twice in a mapping, no NaN or Infinity.

    Raises:
        ValueError: it is not that, or is nested too deep to read.
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def json_type(value: Any) -> str:
    """Name what a parsed JSON value is, in the words of JSON: an object, a list, a string, a number, true, false or null."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return {dict: "an object", list: "a list", str: "a string"}.get(type(value), "a number")


def write_manifest(folder: Path | str, *, kind: str, extra: Mapping[str, Any]) -> str:
    """Seal a folder: hash every file in it, also in nested folders, and write ``manifest.json`` last.

    Same files and same ``extra`` give the same bytes: nothing of the clock or the machine goes in unless ``extra`` says it.

    Args:
        kind: what the folder is, for example ``checkpoint``.
        extra: provenance as JSON values (recipe, commits, versions, seeds); it is kept under ``provenance``.

    Returns:
        sha256 of the manifest, hexadecimal: the name of this exact content.

    Raises:
        ValueError: a symbolic link or a device is in the folder, or ``extra`` is not JSON.
    """
    root = Path(folder)
    for left_over in root.glob(f".{MANIFEST_NAME}.*.tmp"):  # by a writer that was killed
        left_over.unlink()
    files = {}
    for name, path in sorted(_files(root).items()):
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path} is not a regular file; a sealed folder holds regular files only, copy it in")
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what the manifest vouches for is on disk before the manifest is
        files[name] = {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
    content = {"schema_version": MANIFEST_SCHEMA_VERSION, "kind": kind, "files": files, "provenance": dict(extra)}
    try:
        content = json.loads(json.dumps(content, allow_nan=False))  # as a reader will see it: tuples are lists, keys text
    except (TypeError, ValueError) as error:
        raise ValueError(f"the provenance of {root / MANIFEST_NAME} has to be JSON values: {error}") from error
    text = json.dumps(content | {"seal": content_key(content)}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomic(root / MANIFEST_NAME, text.encode())
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """Read a folder's manifest: ``schema_version``, ``kind``, ``files`` (name → sha256, size_bytes), ``provenance``.

    Raises:
        IntegrityError: it is missing, is not JSON, lacks one of these fields, or was changed after it was written.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        content = strict_json(path.read_bytes())
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is missing: the folder was never finished, or is not one of ours") from error
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{path}: expected a JSON object, got {json_type(content)}")
    if content.get("schema_version") != MANIFEST_SCHEMA_VERSION:
        found = content.get("schema_version")
        raise IntegrityError(f"{path} has schema_version {found!r}; this version reads {MANIFEST_SCHEMA_VERSION}")
    if not isinstance(content.get("kind"), str) or not isinstance(content.get("provenance"), dict):
        raise IntegrityError(f"{path} needs the text 'kind' and the mapping 'provenance'")
    files = content.get("files")
    if not isinstance(files, dict):
        raise IntegrityError(f"{path} needs the mapping 'files'; got {json_type(files) if 'files' in content else 'none'}")
    for name, entry in files.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str) or type(entry.get("size_bytes")) is not int:
            raise IntegrityError(f"{path}: the entry of {name!r} needs sha256 and size_bytes; got {entry!r}")
    if content.pop("seal", None) != content_key(content):
        raise IntegrityError(f"{path} was changed after it was written: its own hash does not fit")
    return content


def verify_manifest(folder: Path | str) -> list[str]:
    """Compare a folder with its manifest and say in words what differs; an empty list means nothing does.

    Raises:
        IntegrityError: the manifest itself cannot be read.
    """
    root = Path(folder)
    expected, present = read_manifest(root)["files"], _files(root)
    problems = [f"{name}: the manifest lists it and the folder lacks it" for name in sorted(expected.keys() - present.keys())]
    problems += [f"{name}: in the folder and not in the manifest" for name in sorted(present.keys() - expected.keys())]
    for name in sorted(expected.keys() & present.keys()):
        path, entry = present[name], expected[name]
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name}: not a regular file")
            continue
        if (size := path.stat().st_size) != entry["size_bytes"]:
            problems.append(f"{name}: changed, {entry['size_bytes']} bytes by the manifest, {size} on disk")
            continue
        if (digest := sha256_of(path)) != entry["sha256"]:
            problems.append(f"{name}: changed, sha256 {entry['sha256']} by the manifest, {digest} on disk")
    return problems


def _files(root: Path) -> dict[str, Path]:
    """Everything under the folder that is not a folder, but the manifest, by its path with forward slashes."""
    return {
        name: path
        for path in root.rglob("*")
        if (path.is_symlink() or not path.is_dir()) and (name := path.relative_to(root).as_posix()) != MANIFEST_NAME
    }


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} occurs twice")
        content[key] = value
    return content


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
