"""Judge JSON text by a schema and an expected value; numbers exactly as they are written.

Loaded by the checking process (judge_worker.py), and like it importing nothing of stillhouse. Python's own reader turns
numbers into floats, to which ``1e400`` and ``1e500`` are the same, and 0.3 no multiple of 0.1: here they stay decimal.
The formats of JSON schema that have one meaning (``FORMATS``) are asserted; all others are remarks, as in the specification.
"""

from __future__ import annotations

import datetime
import decimal
import ipaddress
import json
import re
from collections.abc import Callable
from typing import Any

_MAX_INTEGER_CHARS = 4000
_DEEP = "it is nested too deeply to be checked"
_LARGE = "a number in it is too large to be checked"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOSTNAME = rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)"
_URI_CHARS = r"(?:[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})"


class _Number(decimal.Decimal):
    """A JSON number with a point or an exponent, shown in messages as it was written."""

    def __repr__(self) -> str:
        return str(self)


def judge_json(answer: str, schema: Any, gold: str | None) -> tuple[str, str]:
    """Judge JSON text by a schema and an expected value, where there are such: (outcome, reason)."""
    try:
        expected = None if gold is None else _strict_json(gold)
    except RecursionError:
        return "undecided", f"the gold: {_DEEP}"
    except decimal.InvalidOperation:
        return "undecided", f"the gold: {_LARGE}"
    except ValueError as error:
        return "undecided", f"the gold is not JSON: {error}"
    try:
        value = _strict_json(answer)
    except RecursionError:
        return "undecided" if gold is None else "wrong", _DEEP
    except decimal.InvalidOperation:
        return "undecided", _LARGE
    except ValueError as error:
        return "wrong", f"not JSON: {error}"
    try:
        if schema is not None and (said := _judge_by_schema(value, schema)) is not None:
            return said
        if gold is not None and not _same_json(expected, value):
            return "wrong", "another value than the gold's"
    except (decimal.InvalidOperation, OverflowError):  # OverflowError: of a regular expression, a{99999999999999999999}
        return "undecided", f"{_LARGE}, or one of the schema"
    except RecursionError:
        return "undecided", f"{_DEEP}, or the schema refers to itself without end"
    return "correct", "the schema holds" if gold is None else "same value"


def _judge_by_schema(value: Any, schema: Any) -> tuple[str, str] | None:
    """None where a value is valid."""
    import jsonschema
    from referencing.exceptions import Unresolvable

    try:
        schema = _strict_json(schema if isinstance(schema, str) else json.dumps(schema), for_schema=True)
    except ValueError as error:
        hint = "; a schema with numbers beyond 1e308 has to be given as text" if "Infinity" in str(error) else ""
        return "undecided", f"the schema is no JSON: {error}{hint}"
    if not isinstance(schema, dict | bool):
        return "undecided", f"the schema must be an object, or true or false; it is {schema!r:.60}"
    known = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    whole_is_integer = known.TYPE_CHECKER.is_type(1.0, "integer")  # not so in draft 4
    types = known.TYPE_CHECKER.redefine(
        "integer",
        lambda _, number: (
            (isinstance(number, int) and not isinstance(number, bool))
            or (whole_is_integer and isinstance(number, _Number) and number == number.to_integral_value())
        ),
    )
    validator = jsonschema.validators.extend(known, type_checker=types)
    formats = jsonschema.FormatChecker(formats=())
    for name, holds in FORMATS.items():
        formats.checks(name, raises=(ValueError, re.error))(_on_text(holds))
    try:
        known.check_schema(schema)
        with decimal.localcontext(prec=_MAX_INTEGER_CHARS, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX):
            # A registry of the drafts alone: no reference is ever fetched.
            checker = validator(schema, registry=jsonschema.validators.SPECIFICATIONS, format_checker=formats)
            _require_targets(schema)
            first = next(checker.iter_errors(value), None)
    except jsonschema.SchemaError as error:
        return "undecided", f"the schema is no schema: {error.message[:160]}"
    except Unresolvable as error:
        return "undecided", f"the schema's $ref {error.ref!r:.80} leads nowhere; none is followed out of the schema"
    return None if first is None else ("wrong", f"{first.json_path}: {first.message[:160]}")


def _require_targets(schema: Any) -> None:
    """Raise Unresolvable where a $ref anywhere in a schema leads nowhere, so that no answer has to come upon it."""
    from jsonschema.validators import SPECIFICATIONS
    from referencing import Resource
    from referencing.jsonschema import DRAFT202012

    root = Resource.from_contents(schema, default_specification=DRAFT202012)
    todo = [(SPECIFICATIONS.resolver_with_root(root), root)]
    while todo:
        resolver, part = todo.pop()
        if isinstance(part.contents, dict) and isinstance(ref := part.contents.get("$ref"), str):
            resolver.lookup(ref)
        todo += [(resolver.in_subresource(each), each) for each in part.subresources()]


def _strict_json(text: str, *, for_schema: bool = False) -> Any:
    """Read JSON with numbers kept exactly; the whole decimals of a schema become integers (``minLength: 3.0``).

    Raises:
        ValueError: no JSON, a key twice, NaN or Infinity.
        decimal.InvalidOperation: a number beyond ten to the power of 10**18.
        RecursionError: nested too deeply.
    """

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs) and not for_schema:
            raise ValueError("a key stands there twice")
        return dict(pairs)

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    def decimal_number(digits: str) -> Any:
        number = _Number(digits)
        is_short = number.adjusted() < _MAX_INTEGER_CHARS
        return int(number) if for_schema and is_short and number == number.to_integral_value() else number

    def integer(digits: str) -> Any:
        return int(digits) if len(digits) <= _MAX_INTEGER_CHARS else _Number(digits)

    return json.loads(
        text, object_pairs_hook=without_repeats, parse_constant=refuse, parse_float=decimal_number, parse_int=integer
    )


def _same_json(left: Any, right: Any) -> bool:
    pairs = [(left, right)]
    while pairs:
        left, right = pairs.pop()
        if isinstance(left, bool) or isinstance(right, bool):
            same = left is right
        elif isinstance(left, dict) and isinstance(right, dict):
            same = left.keys() == right.keys()
            pairs += [(left[key], right[key]) for key in left] if same else []
        elif isinstance(left, list) and isinstance(right, list):
            same = len(left) == len(right)
            pairs += zip(left, right) if same else []
        else:
            same = bool(left == right)
        if not same:
            return False
    return True


def _matches(pattern: str) -> Callable[[str], object]:
    return re.compile(pattern, re.ASCII).fullmatch


def _is_date(text: str) -> bool:
    return bool(re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII)) and bool(datetime.date.fromisoformat(text))


def _is_date_time(text: str) -> bool:
    return text[10:11] in ("T", "t") and _is_date(text[:10]) and bool(FORMATS["time"](text[11:]))


FORMATS: dict[str, Callable[[str], object]] = {
    "date": _is_date,
    "time": _matches(_TIME),
    "date-time": _is_date_time,
    "duration": _matches(r"P(?=.)(?:\d+W|(?:\d+Y)?(?:\d+M)?(?:\d+D)?(?:T(?=.)(?:\d+H)?(?:\d+M)?(?:\d+(?:\.\d+)?S)?)?)"),
    "email": _matches(rf"(?:{_ATOM}(?:\.{_ATOM})*|\"[^\"]+\")@(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])"),
    "hostname": _matches(_HOSTNAME),
    "ipv4": ipaddress.IPv4Address,
    "ipv6": lambda text: "%" not in text and ipaddress.IPv6Address(text),
    "uri": _matches(rf"[A-Za-z][A-Za-z0-9+.-]*:{_URI_CHARS}*"),
    "uri-reference": _matches(rf"{_URI_CHARS}*"),
    "uuid": _matches(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"),
    "regex": lambda text: re.compile(text) is not None,
    "json-pointer": _matches(r"(?:/(?:[^~/]|~[01])*)*"),
}
"""What is asserted of ``format``: true of a text, or neither a ValueError nor a re.error from it."""


def _on_text(holds: Callable[[str], object]) -> Callable[[object], bool]:
    return lambda value: not isinstance(value, str) or bool(holds(value))
