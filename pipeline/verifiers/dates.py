"""Read a date: ``March 3``, ``3 March``, ``March 3rd, 2005``, ``3rd of March``; no number and no product of letters."""

from __future__ import annotations

import re

from stillhouse.pipeline.verifiers.latex import plain_words
from stillhouse.pipeline.verifiers.tree import Tree

_MAX_CHARS = 80
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DAY = r"(?:the )?(?P<day>[0-3]?\d) ?(?:\^ ?\{? ?)?(?:st|nd|rd|th)?(?: ?\})?"
_YEAR = r"(?P<year>\d{4})"
_MENTIONS_MONTH = re.compile("(?:" + "|".join(_MONTHS) + ")", re.IGNORECASE)
_DATES = [
    re.compile(pattern)
    for pattern in (
        rf"{_MONTH} {_DAY}(?:,? {_YEAR})?",
        rf"{_DAY}(?: of)? {_MONTH}(?:,? {_YEAR})?",
        rf"{_YEAR},? {_MONTH} {_DAY}",
    )
]


def date_of(text: str) -> Tree | None:
    """Return ``("date", month, day, year or "")``, None for all else."""
    if len(text) > _MAX_CHARS or not _MENTIONS_MONTH.search(text):
        return None
    words = plain_words(text).rstrip(".")
    for pattern in _DATES:
        if date := pattern.fullmatch(words):
            return ("date", _MONTHS.index(date["month"][:3]) + 1, int(date["day"]), date["year"] or "")
    return None
