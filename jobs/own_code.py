"""A team's own functions in a recipe: where ``python:module:function`` verifiers and ``module:function`` filters are found.

They are importable where they are installed, and from the recipe's folder and the working folder. Those two come last on the
path, so that no file beside a recipe takes the place of a library.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from stillhouse.pipeline.store import output_hash
from stillhouse.pipeline.verifiers.structured import PYTHON_PREFIX

if TYPE_CHECKING:
    from stillhouse.jobs.recipe import Recipe


def search_in(folders: Iterable[str | Path]) -> None:
    """Put folders at the end of this process's module path; the processes that judge take the path over."""
    for folder in map(str, folders):
        if folder not in sys.path:
            sys.path.append(folder)


def top_module(name: str) -> str:
    """``package`` of ``package.module:function``, also behind ``python:``."""
    return name.removeprefix(PYTHON_PREFIX).partition(":")[0].partition(".")[0]


def own_modules(recipe: Recipe) -> list[Path]:
    """The files and packages of the recipe's own functions that are not installed: what has to travel with it."""
    sources = (*recipe.problems.train, *recipe.problems.validation, *recipe.problems.test)
    names = [getattr(source, "kind", "") for source in sources]
    names += [getattr(recipe.teacher, "problem_kind", ""), *(step.name for step in recipe.filters.list)]
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
    found: dict[Path, None] = {}
    for name in (name for name in names if ":" in name):
        spec = importlib.util.find_spec(top_module(name))
        if spec is None or spec.origin in ("built-in", "frozen"):
            continue
        # A package is its folder, also one without __init__.py, which has no origin.
        path = Path(next(iter(spec.submodule_search_locations or ()), spec.origin)).resolve()
        if path.parent not in installed:
            found[path] = None
    return list(found)


def own_code(recipe: Recipe) -> dict[str, str]:
    """Content hashes of the own modules' files: a verifier or filter that was corrected is another one."""
    files = [file for path in own_modules(recipe) for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
    return {f"{file.parent.name}/{file.name}": output_hash(file) for file in files}


def own_folders(recipe: Recipe) -> list[str]:
    """The folders that the recipe's own modules lie in, for processes that have another module path."""
    return list(dict.fromkeys(str(path.parent) for path in own_modules(recipe)))
