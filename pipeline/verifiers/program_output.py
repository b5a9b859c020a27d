"""What of a program's output counts, and where it differs from what was expected."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

_INTEGER = re.compile(rb"[+-]?\d{1,4000}")  # Python reads no more than 4,300 digits
_NUMBER = re.compile(rb"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


def normalised(output: bytes) -> list[bytes]:
    """What of an output counts: its lines without white space at their ends, and without empty lines at the end of all."""
    lines = [line.rstrip() for line in output.split(b"\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def first_difference(got: Sequence[bytes], wanted: Sequence[bytes], rel_tol: float, abs_tol: float) -> int | None:
    """The number of the first line, from 0, that is not as wanted; None where all are.

    With a tolerance a line may also consist of the same words, numbers within the larger of the two: ``rel_tol`` times the
    wanted number, and ``abs_tol``.
    """
    for number, (a, b) in enumerate(zip(got, wanted)):
        if a != b and not ((rel_tol or abs_tol) and _near(a.split(), b.split(), rel_tol, abs_tol)):
            return number
    return None if len(got) == len(wanted) else min(len(got), len(wanted))


def _near(got: list[bytes], wanted: list[bytes], rel_tol: float, abs_tol: float) -> bool:
    return len(got) == len(wanted) and all(a == b or _close(a, b, rel_tol, abs_tol) for a, b in zip(got, wanted))


def _close(got: bytes, wanted: bytes, rel_tol: float, abs_tol: float) -> bool:
    if not (_NUMBER.fullmatch(got) and _NUMBER.fullmatch(wanted)):
        return False
    if _INTEGER.fullmatch(got) and _INTEGER.fullmatch(wanted):  # which may be larger than a float is exact
        return abs(int(got) - int(wanted)) <= max(Fraction(str(rel_tol)) * abs(int(wanted)), Fraction(str(abs_tol)))
    a, b = float(got), float(wanted)
    return math.isfinite(a) and math.isfinite(b) and abs(a - b) <= max(rel_tol * abs(b), abs_tol)
