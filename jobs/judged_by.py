"""What decides a verdict besides the answer and its problem: part of the fingerprint of every stage that judges."""

from __future__ import annotations

from typing import Any

from stillhouse.jobs.own_code import own_code, verifier_kinds
from stillhouse.jobs.recipe import Recipe
from stillhouse.pipeline.sandbox.choice import chosen_sandbox
from stillhouse.pipeline.sandbox.packages import shown_packages
from stillhouse.pipeline.verification import VERIFIER_VERSION


def judged_by(recipe: Recipe) -> dict[str, Any]:
    """The verifiers' version, the recipe's own verifiers by content and, for code, the sandbox and the packages in it.

    Raises:
        RecipeError: the environment names no sandbox.
        SandboxUnavailable: a package is to be shown that is not installed.
    """
    kinds = verifier_kinds(recipe)
    identity: dict[str, Any] = {"verifier": VERIFIER_VERSION, "own_code": own_code(kinds)}
    if "code" in kinds:
        identity["sandbox"] = str(chosen_sandbox())
        identity["packages"] = dict(shown_packages().versions)
    return identity
