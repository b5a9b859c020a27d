"""What decides a verdict besides the answer and its problem: part of the fingerprint of every stage that judges."""

from __future__ import annotations

from typing import Any

from stillhouse.jobs.own_code import own_code
from stillhouse.jobs.recipe import Recipe
from stillhouse.pipeline.sandbox.packages import shown_packages
from stillhouse.pipeline.verification import VERIFIER_VERSION


def judged_by(recipe: Recipe) -> dict[str, Any]:
    """The verifiers' version, the recipe's own modules by content and, for code, the packages that programs may import.

    Raises:
        SandboxUnavailable: a package is to be shown that is not installed.
    """
    sources = (*recipe.problems.train, *recipe.problems.validation, *recipe.problems.test)
    kinds = {getattr(source, "kind", "") for source in sources} | {getattr(recipe.teacher, "problem_kind", "")}
    identity: dict[str, Any] = {"verifier": VERIFIER_VERSION, "own_code": own_code(recipe)}
    if "code" in kinds:
        identity["packages"] = dict(shown_packages().versions)
    return identity
