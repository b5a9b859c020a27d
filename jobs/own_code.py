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

from stillhouse.pipeline.errors import RecipeError
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


def verifier_kinds(recipe: Recipe) -> list[str]:
    """The verifiers that judge the recipe's problems, by name."""
    sources = (*recipe.problems.train, *recipe.problems.validation, *recipe.problems.test)
    kinds = [getattr(source, "kind", "") for source in sources] + [getattr(recipe.teacher, "problem_kind", "")]
    return list(dict.fromkeys(filter(None, kinds)))


def filter_names(recipe: Recipe) -> list[str]:
    """The recipe's filters, by name."""
    return [step.name for step in recipe.filters.list]


def judging_names(recipe: Recipe) -> list[str]:
    """All verifiers and filters of a recipe, by name."""
    return [*verifier_kinds(recipe), *filter_names(recipe)]


def _modules(names: Iterable[str]) -> list[str]:
    """The top modules of those names that are functions of a user's own."""
    return list(dict.fromkeys(top_module(name) for name in names if ":" in name))


def _place(module: str) -> Path | None:
    """The file or folder that ``import module`` reads, or has read in this process; None for none."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin in ("built-in", "frozen"):
        return None
    # A package is its folder, also one without __init__.py, which has no origin.
    return Path(next(iter(spec.submodule_search_locations or ()), spec.origin)).resolve()


def refuse_shadowed(recipe: Recipe, folders: Iterable[Path]) -> None:
    """Make sure that an own module which lies in one of the folders, the first one that has it, is the one that is imported.

    Raises:
        RecipeError: another one would be: an installed one, or one that this process imported for another recipe.
    """
    folders = list(folders)
    for module in _modules(judging_names(recipe)):
        beside = [
            path.resolve() for folder in folders for path in (folder / f"{module}.py", folder / module) if _is_module(path)
        ]
        place = _place(module)
        # A package of a project may lie in the project's folder, which has its name.
        if beside and place != beside[0] and not (place and beside[0] in place.parents):
            raise RecipeError(
                f"the recipe's own module {module!r} lies at {beside[0]}, but Python takes that name for "
                f"{place or 'a module of its own'}, which comes first on the path or was imported for another recipe in this "
                "process; rename yours, or run each recipe in a process of its own"
            )


def _is_module(path: Path) -> bool:
    """Whether a file or folder can be meant by an import: no folder of data that happens to have the name."""
    return path.is_file() or (path.is_dir() and any(path.glob("*.py")))


def own_modules(names: Iterable[str]) -> list[Path]:
    """The files and packages of those verifiers and filters that are a user's own and not installed."""
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")}
    found = [path for path in map(_place, _modules(names)) if path and path.parent not in installed]
    return list(dict.fromkeys(found))


def own_code(names: Iterable[str]) -> dict[str, str]:
    """Content hashes of the own modules' files: a verifier or filter that was corrected is another one."""
    files = [file for path in own_modules(names) for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
    return {f"{file.parent.name}/{file.name}": output_hash(file) for file in files}


def modules_of(recipe: Recipe) -> list[Path]:
    """All own modules of a recipe that are not installed: what has to travel with it."""
    return own_modules(judging_names(recipe))


def own_folders(recipe: Recipe) -> list[str]:
    """The folders that the recipe's own modules lie in, for processes that have another module path."""
    return list(dict.fromkeys(str(path.parent) for path in modules_of(recipe)))
