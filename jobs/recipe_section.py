"""What every part of a recipe has in common: its base model and the types of its values."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from stillhouse.jobs.own_code import top_module
from stillhouse.pipeline.verification import KINDS, is_entry_point

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """A part of a recipe: frozen, no unknown key, no silent conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


def _a_verifier(kind: str) -> str:
    if kind == "reasoning_gym" or not (kind in KINDS or is_entry_point(kind)):
        known = ", ".join(repr(name) for name in KINDS if name != "reasoning_gym")
        raise ValueError(f"has no verifier {kind!r}; there are {known} and 'python:package.module:function'")
    if is_entry_point(kind) and top_module(kind) == "__main__":
        raise ValueError(f"names {kind!r}: no other process can import what stands in the running program; give it a module")
    if is_entry_point(kind) and importlib.util.find_spec(top_module(kind)) is None:
        raise ValueError(
            f"names {kind!r}, and no such module is installed, in the recipe's folder or in the working folder, {Path.cwd()}"
        )
    return kind


VerifierKind = Annotated[Text, AfterValidator(_a_verifier)]
