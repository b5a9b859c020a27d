"""Installed packages that programs may import inside: those that the environment's ``STILLHOUSE_SANDBOX_PACKAGES`` names.

Like the tier a matter of the machine's owner, not of a recipe. Each named package, with what it requires, is bound read-only
into a folder of its own, ``/packages``; nothing else of the environment that it is installed in can be seen. Their code runs
inside, as the program does, and gains nothing there.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from stillhouse.pipeline.sandbox.records import SandboxUnavailable

VARIABLE = "STILLHOUSE_SANDBOX_PACKAGES"
PLACE = "/packages"
# A thread for each core of the machine, with the memory that each reserves, would not fit into a program's limits.
_ONE_THREAD = {name: "1" for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class ShownPackages:
    """What is shown to programs beside the standard library.

    Args:
        imports: the modules that the variable names, as they are imported.
        versions: each distribution that is seen, what the named ones require among them, and its version.
        read_only: pairs (path outside, path inside) of files and folders.
    """

    imports: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    read_only: tuple[tuple[str, str], ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a program gets for them."""
        return {"PYTHONPATH": PLACE} | _ONE_THREAD if self.read_only else {}

    def __str__(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self.versions)


def shown_packages() -> ShownPackages:
    """What ``STILLHOUSE_SANDBOX_PACKAGES`` asks for: names as in ``import``, or of distributions, with commas between them.

    ``versions`` belong to whatever makes a verdict reusable: with other packages a program may end otherwise.

    Raises:
        SandboxUnavailable: a named package is not installed here, or cannot be shown alone.
    """
    return _shown(os.environ.get(VARIABLE, ""))


@functools.cache
def _shown(named: str) -> ShownPackages:
    names = [name for name in re.split(r"[,\s]+", named) if name]
    if not names:
        return ShownPackages()
    owners = metadata.packages_distributions()
    found: dict[str, metadata.Distribution] = {}
    wanted_by: dict[str, str] = {}
    imports = []
    for name in names:
        distributions = [_distribution(each) for each in owners.get(name, [name])]
        if None in distributions:
            raise SandboxUnavailable(
                f"{VARIABLE} names {name!r}, which is not installed beside stillhouse: install it, or leave it out"
            )
        for distribution in filter(None, distributions):
            _with_required(distribution, found)
        wanted_by |= dict.fromkeys(found.keys() - wanted_by.keys(), name)
        own = [module for module, by in owners.items() if _normalised(name) in map(_normalised, by)]
        imports += [name] if name in owners else [module for module in own if not module.startswith("_")]
    read_only = [pair for key, distribution in found.items() for pair in _parts(distribution, owners, wanted_by[key])]
    versions = tuple(sorted((d.metadata["Name"], d.version) for d in found.values()))
    return ShownPackages(tuple(dict.fromkeys(imports)), versions, tuple(dict.fromkeys(read_only)))


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _with_required(distribution: metadata.Distribution, found: dict[str, metadata.Distribution]) -> None:
    """Add a distribution and, of what it requires, what is installed: the rest is for other systems or optional."""
    key = _normalised(distribution.metadata["Name"])
    if key in found:
        return
    found[key] = distribution
    for requirement in distribution.requires or ():
        name, _, marker = requirement.partition(";")
        required = None if "extra" in marker else _distribution(_NAME.match(name.strip())[0])
        if required is not None:
            _with_required(required, found)


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _parts(distribution: metadata.Distribution, owners: dict[str, list[str]], wanted_by: str) -> list[tuple[str, str]]:
    """The files and folders of a distribution that stand directly in its site-packages, and their places inside."""
    name = distribution.metadata["Name"]
    whose = name if _normalised(wanted_by) == _normalised(name) else f"{name}, which {wanted_by} needs,"
    tops = {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}
    tops = {top for top in tops if not top.endswith(".pth") and not os.path.isabs(top)}
    pairs = [(str(Path(distribution.locate_file(top)).resolve()), f"{PLACE}/{top}") for top in sorted(tops)]
    if not any(target.endswith(".py") or (os.path.isdir(source) and not target.endswith("-info")) for source, target in pairs):
        raise SandboxUnavailable(
            f"{VARIABLE}: {whose} is installed without its own files (editable?), and cannot be shown alone"
        )
    for top in tops & set(owners):
        if len(set(map(_normalised, owners[top]))) > 1:
            raise SandboxUnavailable(
                f"{VARIABLE}: {whose} shares its folder {top!r} with {', '.join(owners[top])}, and cannot be shown alone"
            )
    return pairs
