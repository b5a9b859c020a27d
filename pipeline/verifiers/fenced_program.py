"""Find the program in a completion: which of its fenced blocks is the answer (``program_of``)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from stillhouse.pipeline.extraction import THINK_CLOSE, THINK_OPEN

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})([^`]*)")
# What a fence may open with: python, py, Python3, python3.11, {.python}, {python}, and attributes behind it.
_PYTHON = re.compile(r"\{?\.?i?(?:python|py|pypy|cpython)[\d.]*(?:[\s{},:].*)?", re.IGNORECASE)
# A call, an import or a definition: what a block without a language needs to be a program and not a sample of output.
_PROGRAM = re.compile(r"[\w\])]\(|^[ \t]*(?:import|from|def|class)\b", re.MULTILINE)


def program_of(completion: str) -> str | None:
    """Return the program after the think block, None where there is none.

    That is the last closed block marked as Python (```` ```python ````, ``py``, ``~~~python``, indented as in a list); where no
    block is marked at all, the last one that calls, imports or defines something; where there is no fence, the whole text
    (after a think block only if it looks like a program). A text whose think block is not closed has no program.
    """
    _, closed, after = completion.rpartition(THINK_CLOSE)
    if not closed and THINK_OPEN in completion:
        return None
    if "```" not in after and "~~~" not in after:
        return after if after.strip() and (not closed or _PROGRAM.search(after)) else None
    blocks = [(language, body) for language, body in _blocks(after) if body.strip()]
    marked = [body for language, body in blocks if _PYTHON.fullmatch(language)]
    found = marked or [body for language, body in blocks if not language and _PROGRAM.search(body)]
    return found[-1] if found else None


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """The closed fenced blocks of a Markdown text: what each opens with, and its lines without the fence's indentation."""
    opened = None
    lines: list[str] = []
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line.rstrip())
        if opened is None:
            if fence:
                opened, lines = fence, []
        elif fence and _closes(fence, opened):
            yield opened[3].strip(), "".join(lines)
            opened = None
        else:
            lines.append(re.sub(f"^[ \t]{{0,{len(opened[1])}}}", "", line) + "\n")


def _closes(fence: re.Match[str], opened: re.Match[str]) -> bool:
    return fence[2].startswith(opened[2]) and not fence[3] and len(fence[1]) <= len(opened[1]) + 3
