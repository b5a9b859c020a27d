"""The forms in which a test item is looked for: without boilerplate, with its choices as other files write them."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence

from stillhouse.pipeline.overlap.alignment import Item, Origin
from stillhouse.pipeline.overlap.words import Words

_BEFORE_LETTER = re.compile(r"[\n(,;.?:]")  # of a choice; "Button A: …" is none
_MIN_CHOICES = 3
_MIN_STEM = 12  # words of a question that is an item without its choices too; under that it may be anybody's
Gram = tuple[str, ...]


def item_forms(origin: Origin, text: Words, phrases: Sequence[Gram]) -> list[Item]:
    """The item as it stands, its choices written otherwise, and each of these without the boilerplate at its ends.

    Args:
        phrases: the words of boilerplate, long phrases first.
    """
    forms = _with_choices(origin, text)
    return [item for form in forms for item in (form, *_without_boilerplate(form, phrases)) if item.words]


def _with_choices(origin: Origin, text: Words) -> list[Item]:
    """An item as it stands; a question with choices also without their letters, behind dashes, and without its choices."""
    gaps = (*(sys.intern(text.gap(at)) for at in range(len(text.words))), text.text[text.spans[-1][1] :] if text.words else "")
    whole = Item(origin, tuple(map(sys.intern, text.words)), gaps)  # a hundred thousand items share most of their words
    letters = _choice_letters(whole)
    if len(letters) < _MIN_CHOICES:
        return [whole]
    forms = [whole]
    for dash in (False, True):
        words, between = [], [""]
        for at, word in enumerate(whole.words):
            between[-1] += gaps[at]
            # "- 12" reads as a number below zero, as a dash before a word does not
            if at not in letters or (dash and whole.words[at + 1 : at + 2] and whole.words[at + 1][0] in "(0123456789"):
                words.append("-" if at in letters else word)
                between.append("")
        between[-1] += gaps[-1]
        forms.append(Item(origin, tuple(words), tuple(map(sys.intern, between))))
    if letters[0] >= _MIN_STEM:
        choices = Counter(word for word in whole.words[letters[0] :] if word[0].isdigit())
        forms.append(Item(origin, whole.words[: letters[0]], gaps[: letters[0] + 1], choices))
    return forms


def _choice_letters(item: Item) -> list[int]:
    """Where an item has the letters of its choices: the last row of a, b, c … with a mark behind each."""
    letters: list[int] = []
    for at, word in enumerate(item.words):
        if len(word) == 1 and item.gaps[at + 1][:1] in (")", ".", ":") and _BEFORE_LETTER.search(item.gaps[at]):
            if word == "a":
                letters = [at]
            elif letters and word == chr(ord("a") + len(letters)):
                letters.append(at)
    return letters


def _without_boilerplate(item: Item, phrases: Sequence[Gram]) -> list[Item]:
    """An item without the boilerplate at its ends; nothing where it has none, or is nothing else."""
    first, last, shorter = 0, len(item.words), True
    while shorter and first < last:
        shorter = False
        for phrase in phrases:
            words = item.words[first:last]
            if words[: len(phrase)] == phrase:
                first, shorter = first + len(phrase), True
            elif words[-len(phrase) :] == phrase:
                last, shorter = last - len(phrase), True
    if (first, last) == (0, len(item.words)) or first >= last:
        return []
    return [Item(item.origin, item.words[first:last], item.gaps[first : last + 1])]
