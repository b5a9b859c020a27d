"""Write a test item into prompts and traces as items get into training data, and write what only looks like it."""

from __future__ import annotations

import functools
import random
import re
import textwrap
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from string import ascii_letters

from stillhouse.pipeline.decontamination import NGRAM
from stillhouse.pipeline.overlap.words import to_words
from tests.harness.long_traces import long_traces
from tests.harness.unseen_items import sentences

Case = tuple[str, str, str, bool]
"""(kind, prompt, trace, whether the trace has to go)."""

_WIDE = {i: i + 0xFEE0 for i in range(0x21, 0x7F) if chr(i).isalnum()}
FORMATS: dict[str, Callable[[str], str]] = {
    "upper case": str.upper,
    "full width": lambda s: s.translate(_WIDE),
    "decomposed accents": lambda s: unicodedata.normalize("NFD", s),
    "no-break blanks": lambda s: s.replace(" ", "\u00a0"),
    "bold": lambda s: f"**{s}**",
    "heading": lambda s: f"### {s}",
    "quoted lines": lambda s: "\n".join("> " + line for line in s.splitlines()),
    "code fence": lambda s: f"```text\n{s}\n```",
    "narrow lines": lambda s: _narrow(s),
    "one line": lambda s: " ".join(s.split()),
    "line breaks for blanks": lambda s: s.replace(" ", "\r\n"),
    "markdown escapes": lambda s: re.sub(r"([*_#])", r"\\\1", s),
    "paragraph tags": lambda s: "".join(f"<p>{line}</p>" for line in s.splitlines()),
    "entities": lambda s: s.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;"),
    "zero-width blanks": lambda s: s.replace(" ", " \u200b"),
    "curly quotes, dashes": lambda s: s.replace("'", "’").replace('"', "”").replace(" - ", " – "),
    "no closing mark": lambda s: re.sub(r"[.?!:=\s。？]+$", "", s),
    "no punctuation": lambda s: re.sub(r"(?<=[^\W\d_])[,.;:!?](?=\s|$)", "", s),
    "blanks at marks": lambda s: re.sub(r"(?<=[^\W\d_])([,.;:!?])(?=\s|$)", r" \1", s),
    "dollars to brackets": lambda s: re.sub(r"\$([^$\n]+)\$", r"\\(\1\\)", s),
    "dollars dropped": lambda s: s.replace("$", ""),
    "display brackets": lambda s: re.sub(r"\$\$([^$]+)\$\$", r"\\[\1\\]", s),
    "dfrac": lambda s: re.sub(r"\\t?frac", r"\\dfrac", s),
    "LaTeX spacing": lambda s: re.sub(r"(?<=[=+,]) ", r"\\; ", s) if "\\" in s else s,
    "LaTeX brackets": lambda s: re.sub(r"(?<!left)\((.*?)(?<!right)\)", r"\\left(\1\\right)", s) if "\\" in s else s,
    "other LaTeX names": lambda s: s.replace(r"\cdot", r"\times").replace(r"\le ", r"\leq ").replace(r"\geq", r"\ge"),
    "numbers in dollars": lambda s: re.sub(r"(?<![\w.{^_$])(\d+)(?![\w.}$])", r"$\1$", s) if "\\" not in s else s,
}  # fmt: skip


def _narrow(text: str) -> str:
    return "\n".join(textwrap.fill(line, 30, break_long_words=False, break_on_hyphens=False) for line in text.splitlines())


AROUND = (
    "Question: {} Answer:",
    "Here is a task.\n{}\nShow your 2 best attempts.",
    'The user asks: "{}" Let me think.',
    "[Problem 12] {} (AIME 2019)",
    "<|user|>\n{}\n<|assistant|>\nSure.",
    '{{"id": 7, "question": "{}", "answer": "4"}}',
    "Okay, so I have this problem here: {} Let me try to figure this out. First, 3 times 4 is 12.",
    "Solve this. {} Please reason step by step, and put your final answer within \\boxed{{}}.",
    "1. What is 2 + 2?\n2. {}\n3. Name 5 rivers.",
    "{}\n\nOkay, let me think. There are 3 things to find, and then 7 * 2 = 14.",
)
REMARKS = (
    " Okay.", " (So far so good.)", " Hmm, that gives 12 of them, I think.", "\nLet me write that down: x = 3.\n",
    " I should keep that in mind, since it matters below.", " Right, so 4 + 3 = 7 here.", "\n\nWait, let me read on.\n\n",
)  # fmt: skip


def to_remove(item: str, others: set[tuple[str, ...]], draw: random.Random) -> Iterator[Case]:
    """The item in every way; in the prompt, and from eight words up in a trace.

    Args:
        others: the 3-grams of other items of its family. A cut by which much of what else the item has is lost, or of its
            words, or one of its numbers, operators or single letters, is a "harder" one: what is left may be another problem's.
    """
    short = len(to_words(item).words) < NGRAM
    yield "verbatim in the prompt", item, "<think>2</think>", True
    for name, write in FORMATS.items():
        if write(item) != item:
            yield f"format: {name}", write(item), "", True
            if not short and draw.random() < 0.2:
                yield "format, in a trace", "What?", _in_trace(write(item), draw), True
    yield f"{'short, ' if short else ''}embedded", draw.choice(AROUND).format(item), "", True
    if short:
        return
    yield "verbatim in a trace", "What?", _in_trace(item, draw), True
    yield "embedded, in a trace", "What?", _in_trace(draw.choice(AROUND).format(item), draw), True
    for name, write in EMBEDDED.items():
        written = write(item, draw)
        if written is not None:
            kind = "harder" if "cut" in name and not _most_is_left(item, written, others) else "embedded"
            yield f"{kind}: {name}", draw.choice((written, draw.choice(AROUND).format(written))), "", True
            yield f"{kind}: {name}, in a trace", "What?", _in_trace(written, draw), True


def to_keep(item: str, fresh: str, known: set[tuple[str, ...]], draw: random.Random) -> Iterator[Case]:
    """A fresh item of the item's family, and what `other_numbers` writes; each alone, with text around it, and in traces."""
    for kind, text in {"fresh": fresh, **other_numbers(item, fresh, draw)}.items():
        if to_words(text).words not in known:
            yield from _kept(kind, text, draw, item)


def other_numbers(item: str, fresh: str, draw: random.Random) -> dict[str, str]:
    """By kind, problems that are like an item with numbers, and are others: not all of their numbers are the item's.

    Args:
        fresh: another item of the family, or of the same template.
    """
    numbers, theirs = (re.findall(r"\d+", text) for text in (item, fresh))
    if not numbers:
        return {}
    others = [str(int(number) + draw.randint(1, 9)) for number in numbers]
    one = draw.randrange(len(numbers))
    some = [number if draw.random() < 0.5 else other for number, other in zip(numbers, theirs)] + theirs[len(numbers) :]
    found = {
        "number-swapped": _with_numbers(item, others),
        "one number changed": _with_numbers(item, numbers[:one] + others[one : one + 1] + numbers[one + 1 :]),
        "one number kept": _with_numbers(item, others[:one] + numbers[one : one + 1] + others[one + 1 :]),
        "some numbers equal": _with_numbers(fresh, some),
    }
    # by chance all of them, in what may be the same words; or it has one number only
    return {kind: text for kind, text in found.items() if re.findall(r"\d+", text) != numbers}


def _with_numbers(text: str, numbers: list[str]) -> str:
    left = iter(numbers)
    return re.sub(r"\d+", lambda _: next(left), text)


def _kept(kind: str, text: str, draw: random.Random, item: str) -> Iterator[Case]:
    yield f"{kind}, in the prompt", text, "", False
    yield f"{kind}, embedded", draw.choice(AROUND).format(text), "", False
    yield f"{kind}, in a trace", "What?", _in_trace(draw.choice(AROUND).format(text), draw), False
    written = draw.choice(list(EMBEDDED.values()))(text, draw)
    if written is not None and " ".join(to_words(written).words) not in " ".join(to_words(item).words):  # the number is left
        yield f"{kind}, cut or quoted in parts", written, _in_trace(written, draw), False


def _cut(item: str, draw: random.Random, *, front: bool) -> str | None:
    words = re.findall(r"\S+\s*", item)
    if len(words) < 16:
        return None
    num = draw.randint(1, max(1, len(words) // 8))
    return "".join(words[num:] if front else words[:-num])


def _interleaved(item: str, draw: random.Random) -> str | None:
    parts = sentences(item)
    if len(parts) < 2 or len(parts) > 12 or min(len(to_words(part).words) for part in parts) < 4:
        return None
    return "".join(part + (draw.choice(REMARKS) if i + 1 < len(parts) else "") + " " for i, part in enumerate(parts)).strip()


def _over_a_line(item: str, draw: random.Random) -> str | None:
    places = [m.start() for m in re.finditer(r"(?<=[a-z]) (?=[a-z])", item)]
    if not places:
        return None
    place = draw.choice(places)
    return item[:place] + draw.choice(("\n\n", "\n> ", "\n    ", " \\\\\n", "<br>", "\n| ")) + item[place + 1 :]


def _hyphenated(item: str, draw: random.Random) -> str | None:
    places = [m.start() for m in re.finditer(r"(?<=[a-z]{3})(?=[a-z]{3})", item)]
    if not places:
        return None
    place = draw.choice(places)
    return f"{item[:place]}-\n{item[place:]}"


def _quoted_in_parts(item: str, draw: random.Random) -> str | None:
    parts = [part for part in re.split(r"(?<=[,.;:?!，。？])\s*(?=[^\W\d_])", item) if part]
    merged: list[str] = []
    for part in parts:  # no part of under six words
        if merged and len(to_words(merged[-1]).words) < 6:
            merged[-1] += " " + part
        else:
            merged.append(part)
    if len(merged) > 1 and len(to_words(merged[-1]).words) < 6:
        merged[-2:] = [" ".join(merged[-2:])]
    if not 2 <= len(merged) <= 8:
        return None
    links = (" and then it says ", ". It goes on: ", ", which I read as a rule; further ", " (step 2) ")
    return "We are told " + "".join(
        f'"{part.strip()}"' + (draw.choice(links) if i + 1 < len(merged) else ".") for i, part in enumerate(merged)
    )


EMBEDDED: dict[str, Callable[[str, random.Random], str | None]] = {
    "cut in front": lambda item, draw: _cut(item, draw, front=True),
    "cut behind": lambda item, draw: _cut(item, draw, front=False),
    "text between its sentences": _interleaved,
    "over a line": _over_a_line,
    "hyphenated": _hyphenated,
    "quoted in parts": _quoted_in_parts,
}


def _in_trace(text: str, draw: random.Random) -> str:
    long = _long_trace(draw.choice((1_000, 4_000)), draw.randrange(50))
    middle = long.index("\n", len(long) // 2)
    return f"{long[:middle]}\n{text}\n{long[middle:]}"


@functools.cache
def _long_trace(num_chars: int, seed: int) -> str:
    return long_traces(1, num_chars=num_chars, seed=seed)[0].completion


def grams(text: str) -> set[tuple[str, ...]]:
    """The 3-grams of a text, letter by letter where a language sets no blanks, symbols as they are."""
    words = re.findall(r"[a-z]+|\d+(?:\.\d+)?|\S", text.lower())
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def _most_is_left(item: str, written: str, others: set[tuple[str, ...]]) -> bool:
    """Whether 70 % of an item's words are left, all its numbers, operators and single letters, and most of what is its own."""
    words, left = (Counter(to_words(text).words) for text in (item, written))
    own = grams(item) - others
    signs = [word for word in words if word in ascii_letters or not word[0].isalpha()]
    return (
        sum((words & left).values()) >= 0.7 * sum(words.values())
        and all(words[sign] <= left[sign] for sign in signs)
        and len(own & grams(written)) >= 0.75 * max(1, len(own))
    )
