"""Which filters run, in which order, with which options: plain data that a recipe can list, made into callables here."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.filters.content import Contradiction, Refusal, SystemPromptLeak
from stillhouse.pipeline.filters.drop import Drop
from stillhouse.pipeline.filters.format import AnswerPresent, ControlTokens, Finished, Length, ThinkBlock
from stillhouse.pipeline.filters.language import Language
from stillhouse.pipeline.filters.repetition import Repetition
from stillhouse.pipeline.records import Trace

Mode = Literal["drop", "shadow", "off"]
TraceFilter = Callable[[Trace], Drop | tuple[str, str] | None]

FILTERS: dict[str, Callable[..., TraceFilter]] = {
    "finished": Finished,
    "think_block": ThinkBlock,
    "answer_present": AnswerPresent,
    "length": Length,
    "control_tokens": ControlTokens,
    "repetition": Repetition,
    "refusal": Refusal,
    "system_prompt_leak": SystemPromptLeak,
    "language": Language,
    "contradiction": Contradiction,
}
"""The filters that ship, by the name that recipes and verdicts know them by."""


@dataclass(frozen=True)
class FilterSetting:
    """One filter of a recipe's list.

    Args:
        name: one of ``FILTERS``, or ``package.module:function`` for the user's own: a function of a Trace that returns None to
            keep it, or (reason, evidence).
        mode: ``drop``; ``shadow`` runs it and says what it would do; ``off``.
        options: the filter's own, by name; none for a function.
    """

    name: str
    mode: Mode = "drop"
    options: Mapping[str, Any] = field(default_factory=dict)


def default_filters(*, min_tokens: int | None = None, max_tokens: int | None = None) -> tuple[FilterSetting, ...]:
    """The filters of a recipe that lists none: the cheapest and most telling reason first; contradiction only watches."""
    return (
        FilterSetting("finished"),
        FilterSetting("think_block"),
        FilterSetting("answer_present"),
        FilterSetting("length", options={"min_tokens": min_tokens, "max_tokens": max_tokens}),
        FilterSetting("control_tokens"),
        FilterSetting("repetition"),
        FilterSetting("refusal"),
        FilterSetting("system_prompt_leak"),
        FilterSetting("language"),
        FilterSetting("contradiction", mode="shadow"),
    )


def make_filter(setting: FilterSetting) -> TraceFilter:
    """The callable of a setting.

    Raises:
        RecipeError: no such filter, function, mode or option, or an option that its filter refuses.
    """
    where = f"filter {setting.name!r}"
    if setting.mode not in get_args(Mode):
        raise RecipeError(f"{where}: mode must be one of {', '.join(get_args(Mode))}, got {setting.mode!r}")
    if ":" in setting.name:
        if setting.options:
            raise RecipeError(f"{where}: a function of your own takes no options, got {', '.join(setting.options)}")
        return _entry_point(setting.name)
    if setting.name not in FILTERS:
        near = difflib.get_close_matches(setting.name, FILTERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"{where}: none is called so{hint}. The filters are {', '.join(FILTERS)}, and package.module:function"
        )
    factory = FILTERS[setting.name]
    known = [f.name for f in dataclasses.fields(factory)]  # type: ignore[arg-type]
    if unknown := [name for name in setting.options if name not in known]:
        raise RecipeError(f"{where} has no option {unknown[0]!r}; it takes {', '.join(known) or 'none'}")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in setting.options.items()}
    try:
        return factory(**options)
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{where} refuses its options: {error}") from error


def _entry_point(name: str) -> TraceFilter:
    module_name, _, function_name = name.partition(":")
    if module_name == "__main__":
        raise RecipeError(f"filter {name!r}: no other process can import what stands in the running program; give it a module")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RecipeError(f"filter {name!r} cannot be imported: {error}; write package.module:function") from error
    function = getattr(module, function_name, None)
    if function is None:
        place = getattr(module, "__file__", None) or module_name
        raise RecipeError(f"filter {name!r}: there is no {function_name!r} in {place}; write package.module:function")
    if not callable(function):
        raise RecipeError(f"filter {name!r} is a {type(function).__name__}, not a function of a trace")
    return function


def needs_percentiles(settings: Iterable[FilterSetting]) -> bool:
    """True where a length bound is a percentile, so that all lengths have to be known before a trace is judged."""
    return any(_percentiles(setting) for setting in settings)


def with_percentiles(settings: Sequence[FilterSetting], num_tokens: Sequence[int] | np.ndarray) -> tuple[FilterSetting, ...]:
    """Turn percentile length bounds into token counts.

    Args:
        num_tokens: the lengths of all finished traces, in any order; integers only, so millions fit. Cut-off traces would put
            their own limit into the percentiles.
    """
    done = []
    for setting in settings:
        if not _percentiles(setting):
            done.append(setting)
            continue
        make_filter(setting)  # refuses what is no percentile
        options = dict(setting.options)
        low, high = options.pop("min_percentile", None), options.pop("max_percentile", None)
        if len(num_tokens):
            if low is not None:
                at_least = math.ceil(np.percentile(num_tokens, low))
                options["min_tokens"] = max(at_least, options.get("min_tokens") or 0)
            if high is not None:
                at_most = math.floor(np.percentile(num_tokens, high))
                options["max_tokens"] = min(at_most, options.get("max_tokens") or at_most)
        done.append(dataclasses.replace(setting, options=options))
    return tuple(done)


def _percentiles(setting: FilterSetting) -> bool:
    options = setting.options
    named = options.get("min_percentile") is not None or options.get("max_percentile") is not None
    return setting.name == "length" and setting.mode != "off" and named
