"""Where programs are run when nobody says so in code: what the environment variable ``STILLHOUSE_SANDBOX`` names."""

from __future__ import annotations

import os
from typing import get_args

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.sandbox.records import Tier
from stillhouse.pipeline.sandbox.service import SandboxService

VARIABLE = "STILLHOUSE_SANDBOX"


def chosen_sandbox() -> Tier | SandboxService:
    """The sandbox that ``STILLHOUSE_SANDBOX`` asks for: a tier by name, or the http(s) address of a service; strict without it.

    A variable and not a recipe's key: what protects a machine is its owner's decision, and no recipe from elsewhere can take
    it away.

    Raises:
        RecipeError: it names neither.
    """
    named = os.environ.get(VARIABLE, "").strip() or "strict"
    if named.startswith(("http://", "https://")):
        return SandboxService(named)
    if named not in get_args(Tier):
        tiers = ", ".join(get_args(Tier))
        raise RecipeError(f"{VARIABLE}={named!r} is no sandbox; it is one of {tiers}, or the http(s) address of a service")
    return named
