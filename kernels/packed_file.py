"""One packed weight in one safetensors file, the same bytes whenever the same weight is saved.

The file holds the weight's tensors by their names in ``PackedWeight``, and one metadata entry, ``stillhouse_packed_weight``:
JSON with sorted keys, ``{"block_size": null, "format": "int4", "group_size": 32, "layout": 1, "shape": [N, K]}``. It is one
entry because safetensors (0.8) writes several in a random order. ``layout`` counts versions of what the tensors' bytes mean.

For whole models use a checkpoint that others read: ``compressed_tensors.py``, ``gptq.py``, ``gguf.py``, ``bitsandbytes.py``.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from stillhouse.kernels.formats import READABLE_FORMATS, TENSOR_NAMES, PackedWeight

METADATA_KEY = "stillhouse_packed_weight"
LAYOUT_VERSION = 1
_FIELDS = ("block_size", "format", "group_size", "layout", "shape")


def save_packed(packed: PackedWeight, path: str | os.PathLike[str]) -> None:
    """Write a packed weight to a safetensors file: whole, or not at all, also when the machine stops in between.

    Args:
        packed: on any device.
        path: the file; its folder must exist, and an older file is replaced.
    """
    from safetensors.torch import save_file

    path = Path(path)
    settings = {
        "block_size": packed.block_size,
        "format": packed.format,
        "group_size": packed.group_size,
        "layout": LAYOUT_VERSION,
        "shape": list(packed.shape),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in packed.tensors().items()}
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"cannot save a packed weight as {str(path)!r}: there is no folder {str(path.parent)!r}; make it first"
        )
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    try:
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(settings, sort_keys=True)})
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp and safetensors leave 0600, which another user cannot read
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_packed(path: str | os.PathLike[str]) -> PackedWeight:
    """Read what :func:`save_packed` wrote, onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not safetensors, not a packed weight, of a later layout, or its tensors do not belong together.
    """
    from safetensors import SafetensorError, safe_open

    where = f"packed weight {str(Path(path))!r}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}: there is no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if METADATA_KEY in metadata else {}  # noqa: SIM118
            found = sorted(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{where}: not a whole safetensors file ({error}); save the weight again") from error
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{where}: a file of PackedWeight.save has the metadata entry {METADATA_KEY!r}, this one has {sorted(metadata)} "
            f"and the tensors {found[:8]}. For other libraries' checkpoints there are stillhouse.kernels.compressed_tensors, "
            "gptq, gguf and bitsandbytes"
        )
    settings = _settings(metadata[METADATA_KEY], where)
    unknown = sorted(set(tensors) - set(TENSOR_NAMES))
    if unknown or "codes" not in tensors:
        raise ValueError(f"{where}: the tensors must be codes and some of {TENSOR_NAMES[1:]}, found {found}")
    try:
        packed = PackedWeight(
            settings["format"],
            tuple(settings["shape"]),
            group_size=settings["group_size"],
            block_size=settings["block_size"],
            **tensors,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if packed.zero_points is not None and bool((packed.zero_points > 15).any()):
        raise ValueError(f"{where}: zero_points must be 0…15, the largest is {int(packed.zero_points.max())}")
    return packed


def _settings(text: str, where: str) -> dict:
    """Parse and check the metadata entry."""
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: the metadata entry {METADATA_KEY!r} is not JSON: {text[:80]!r}") from error
    if isinstance(settings, dict) and settings.get("layout") != LAYOUT_VERSION:
        raise ValueError(
            f"{where}: layout {settings.get('layout')!r}, this version of stillhouse reads {LAYOUT_VERSION}; update "
            "stillhouse, or save the weight with this version"
        )

    def size(value: object) -> bool:
        return type(value) is int and value >= 1

    well_formed = (
        isinstance(settings, dict)
        and sorted(settings) == list(_FIELDS)
        and settings["format"] in READABLE_FORMATS
        and isinstance(settings["shape"], list)
        and len(settings["shape"]) == 2
        and all(map(size, settings["shape"]))
        and all(settings[name] is None or size(settings[name]) for name in ("group_size", "block_size"))
    )
    if not well_formed:
        raise ValueError(
            f"{where}: {METADATA_KEY!r} must have {list(_FIELDS)}, a format of {READABLE_FORMATS} and two sizes as shape; "
            f"it is {text[:200]}"
        )
    return settings


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _fsync(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
