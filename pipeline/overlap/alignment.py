"""Whether an item stands in a stretch of text in pieces: cut, split, with text between its sentences, a word changed.

The words that both have in the same order are found in runs of at least three (`difflib`). What must hold beyond how much is
found is that nothing of what makes another problem has changed: no number or operator of the item is missing where the text
has another, and none is added within a clause. An item that has lost a number at an end must be known by what is left.
"""

from __future__ import annotations

import re
from collections import Counter
from difflib import SequenceMatcher
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from stillhouse.pipeline.overlap.words import Words

_RUN = 3
_MAX_OWN = 0.8  # an item of which less is its own is a template's
_MIN_END_WORDS = 12  # without numbers and shorter, an item ends as it does: "Find the derivative of the function: ln x"
_MIN_PROSE = 3  # letters of a word of prose
_MAX_SLIP = 3  # words that an edit may have moved an item's ends by
_MAX_OPEN_SLIP = 12  # the same where the item itself ends without a mark
_MAX_BETWEEN = 80  # words of other text between two pieces
_MAX_AROUND = 30  # words of the sentence that an item is part of, on either side
_MAX_LOST = 0.25  # share of an item's words that may be cut off at its ends
_MAX_LOST_SIGNS = 0.3
_MANY_SIGNS = 8  # so many numbers and operators in a row that they are no other problem's
_MIN_SHARE_OF_RUNS = 0.65  # of all of an item's own runs of three words, those without a number too
_MIN_SHARE_WITHOUT_SIGNS = 0.7  # of an item's words, where a number is cut off
_MIN_PROSE_RUNS = 8  # the same: runs of three words that are the item's own without a number in them
_MIN_SHARE_OF_CUT = 0.4  # of the telling runs, those cut off counted
_CLAUSE_END = re.compile(r"[.?!\n\"'”“`)\]};:=*。|>…]")
_SENTENCE_END = re.compile(r"[.?!\"'”“`。…]|\n\s*\n")
_OPENS = re.compile(r"\s[(\[{]$")
_CUT = re.compile(r"[.?!\n\"'”“`。…:>|\]]")


class Origin(NamedTuple):
    """Which item of which set: its number among the set's prompts, from 1."""

    set_name: str
    number: int


class Item(NamedTuple):
    """An item's words and what stands before each and behind the last, as `Words.gaps` has them.

    Args:
        choices: of a question that was taken off its choices, their numbers: where others follow it in a text, that is another
            question. None for all other items.
    """

    origin: Origin
    words: tuple[str, ...]
    gaps: tuple[str, ...]
    choices: Counter[str] | None = None


class Own(NamedTuple):
    """What of an item is its own and not a template's.

    Args:
        runs: shape (words - 2,), bool, for each run of three words whether few items have it.
        telling: those of them that count, as ``runs``.
        words: shape (words,), bool, for each word whether it stands in no run of eight words that more items have.
    """

    runs: np.ndarray
    telling: np.ndarray
    words: np.ndarray


class _Run(NamedTuple):
    item: int
    text: int
    size: int


def is_sign(word: str) -> bool:
    """Numbers, operators and the cells of boards are what makes two problems of one template different."""
    return not word[0].isalpha()


def at_clause_ends(text: Words, start: int, end: int) -> bool:
    """Whether words ``start`` to ``end`` begin and end where a clause does."""
    opened = start and text.words[start - 1] == ")"  # the bracket of "7)" is a word
    # an item that ends in a bracket ends there, unless an operator or a number goes on
    closed = text.words[end - 1] == ")" and end < len(text.words) and not is_sign(text.words[end])
    return bool((opened or _CLAUSE_END.search(text.gap(start))) and (closed or _CLAUSE_END.search(text.gap(end))))


def stands_whole(text: Words, item: Item, start: int) -> bool:
    """Whether an item whose words stand at ``start`` begins and ends there as a whole, and is no part of a longer problem."""
    end = start + len(item.words)
    if item.choices is not None:
        numbers = Counter(word for word in text.words[end : end + _MAX_BETWEEN] if word[0].isdigit())
        if numbers and numbers != item.choices:
            return False
    if at_clause_ends(text, start, end):
        return True
    if "," in text.gap(start) and _SENTENCE_END.search(text.gap(end)):
        return True  # "She asked, how many ... have left? And I ..."
    open_end = not _CLAUSE_END.search(item.gaps[-1].rstrip())
    goes_on = end < len(text.words) and not is_sign(text.words[end])
    ends = open_end and goes_on and (_OPENS.search(text.gap(end)) or _near_clause_end(text, end, 1, _MAX_OPEN_SLIP))
    if _CLAUSE_END.search(text.gap(start)) and ends:
        return True
    telling = len(item.words) >= _MIN_END_WORDS or any(map(is_sign, item.words))
    return telling and _alone_in_its_clause(text, start, -1) and _alone_in_its_clause(text, end, 1)


def copy_in(text: Words, item: Item, own: Own, begin: int, end: int, *, min_share: float, reach: int) -> tuple[int, int] | None:
    """Find an item's copy among words ``begin`` to ``end`` of a text.

    Args:
        min_share: how many of the item's telling runs of three words must be there.
        reach: how many words beyond the copy another number means another problem, where one of the item's is cut off.

    Returns:
        the first word of the copy and the one behind its last; None where there is no copy.
    """
    runs = _runs(item.words, text.words[begin:end], begin)
    if not runs:
        return None
    covered = np.zeros(len(item.words), bool)
    for run in runs:
        covered[run.item : run.item + run.size] = True
    for one, next_one in pairwise(runs):
        here, there = (one.item + one.size, next_one.item), (one.text + one.size, next_one.text)
        if "".join(item.words[slice(*here)]) == "".join(text.words[slice(*there)]):
            covered[slice(*here)] = True  # a word split at a line's end
        elif not _may_stand_between(text, item, here, there) or _changes(text, item, own, here, there):
            return None
    first, last = _to_the_start(text, item, runs[0]), _to_the_end(text, item, runs[-1])
    covered[first.item : first.item + first.size] = covered[last.item : last.item + last.size] = True
    of_three = covered[:-2] & covered[1:-1] & covered[2:]
    counted = own.words if own.words.any() else slice(None)
    # what is cut off does not count, but for a part; what is other there does
    front = first.item if _strength(text.gap(first.text)) else 0
    back = last.item + last.size - 2 if _strength(text.gap(last.text + last.size)) else len(own.telling)
    num_there, num_inside = (of_three & own.telling).sum(), own.telling[front:back].sum()
    if (
        num_there < max(min_share * num_inside, _MIN_SHARE_OF_CUT * own.telling.sum())
        or covered[counted].mean() < 1 - 2 * _MAX_LOST
    ):
        return None
    if not (_ends_there(text, item, own, first, -1, reach) and _ends_there(text, item, own, last, 1, reach)):
        return None
    signs = np.array([is_sign(word) for word in item.words])
    prose = of_three & own.runs & ~(signs[:-2] | signs[1:-1] | signs[2:])
    if not _many_signs_left(item, signs[~covered].sum()):
        if covered.mean() < 1 - 2 * _MAX_LOST:
            return None
        if signs[~covered].any() and (covered.mean() < _MIN_SHARE_WITHOUT_SIGNS or prose.sum() < _MIN_PROSE_RUNS):
            return None  # without all its numbers an item is known by words that no other item has
    if (of_three & own.runs).sum() < _MIN_SHARE_OF_RUNS * own.runs[front:back].sum():
        return None
    return first.text, last.text + last.size


def _runs(item: tuple[str, ...], text: tuple[str, ...], begin: int) -> list[_Run]:
    blocks = SequenceMatcher(None, item, text, autojunk=False).get_matching_blocks()
    return [_Run(block.a, block.b + begin, block.size) for block in blocks if block.size >= _RUN]


def _to_the_start(text: Words, item: Item, run: _Run) -> _Run:
    """An item's first run with the words before it, where one of them was split at a line's end."""
    lost = "".join(item.words[: run.item])
    for num in range(1, run.item + 2 if 0 < run.item <= _MAX_SLIP else 0):
        if num <= run.text and "".join(text.words[run.text - num : run.text]) == lost:
            return _Run(0, run.text - num, run.size + run.item)
    return run


def _to_the_end(text: Words, item: Item, run: _Run) -> _Run:
    """The same of its last run; it covers the item, and ends where the text has its last word."""
    place, end = run.item + run.size, run.text + run.size
    lost, num_lost = "".join(item.words[place:]), len(item.words) - place
    for num in range(1, num_lost + 2 if 0 < num_lost <= _MAX_SLIP else 0):
        if "".join(text.words[end : end + num]) == lost:
            return _Run(run.item, end + num - (len(item.words) - run.item), len(item.words) - run.item)
    return run


def _may_stand_between(text: Words, item: Item, here: tuple[int, int], there: tuple[int, int]) -> bool:
    """Whether words ``there`` of the text may stand where the item has words ``here``."""
    if any(is_sign(word) for word in item.words[slice(*here)]) or there[1] - there[0] > _MAX_BETWEEN:
        return False
    between = text.words[slice(*there)]
    if not any(is_sign(word) for word in between):
        return True
    if here[1] - here[0] > _MAX_SLIP:
        return False
    wordy = sum(not is_sign(word) for word in between) >= 3  # else a row more of a list is another list
    ends = _CUT if wordy else _SENTENCE_END
    return any(ends.search(text.gap(begin)) and ends.search(text.gap(end)) for begin, end in _slides(text, here, there))


def _changes(text: Words, item: Item, own: Own, here: tuple[int, int], there: tuple[int, int]) -> bool:
    """Whether a template's item has one of its own words changed, or others put among them within a clause."""
    if own.words.mean() > _MAX_OWN:
        return False
    if here[0] < here[1] and min(map(len, item.words[slice(*here)] + text.words[slice(*there)])) < _MIN_PROSE:
        return True  # a cell or a letter of what the template asks about, however often it stands in others
    if not own.words[max(0, here[0] - 1) : here[1] + 1].any():
        return False
    if here[0] < here[1]:
        return bool(own.words[slice(*here)].any())
    return not any(_CUT.search(text.gap(begin)) and _CUT.search(text.gap(end)) for begin, end in _slides(text, here, there))


def _slides(text: Words, here: tuple[int, int], there: tuple[int, int]) -> list[tuple[int, int]]:
    """The places where other text may be said to begin and end: "x 3 y" with "= 3" put in has the one 3 or the other."""
    found, (begin, end) = [there], there
    while here[0] == here[1] and end < len(text.words) and len(found) < 4 and text.words[begin] == text.words[end]:
        begin, end = begin + 1, end + 1
        found.append((begin, end))
    begin, end = there
    while here[0] == here[1] and begin > 0 and len(found) < 8 and text.words[begin - 1] == text.words[end - 1]:
        begin, end = begin - 1, end - 1
        found.append((begin, end))
    return found


def _ends_there(text: Words, item: Item, own: Own, run: _Run, step: int, reach: int) -> bool:
    """Whether the item's copy may begin (``step`` -1) or end (1) where its outermost run does."""
    back = step > 0
    place, at = (run.item + run.size, run.text + run.size) if back else (run.item, run.text)
    begin, end = (place, len(item.words)) if back else (0, place)
    lost = item.words[begin:end]
    beyond = text.words[at : at + len(lost) + reach] if back else text.words[max(0, at - len(lost) - reach) : at]
    nearest, next_lost = (beyond[:1], lost[:1]) if back else (beyond[-1:], lost[-1:])
    stronger = _strength(text.gap(at)) > _strength(item.gaps[place])
    replaced = beyond[: len(lost)] if back else beyond[max(0, len(beyond) - len(lost)) :]
    if lost and nearest and not stronger and len(item.words) < _MIN_END_WORDS and not any(map(is_sign, item.words)):
        return False
    if num_lost := sum(map(is_sign, lost)):
        signs = [word for word in beyond if is_sign(word)]
        if [word for word in replaced if is_sign(word)] == [word for word in lost if is_sign(word)]:
            return True  # words around the last numbers were changed
        if (signs and not (stronger and _many_signs_left(item, num_lost))) or not _few_lost(item, begin, end):
            return False
    if lost and nearest and is_sign(nearest[0]) and not _strength(text.gap(at)):
        return False  # a number in the place of a word
    if lost and not own.words[begin:end].any():
        return True  # all that is gone is the template's
    like = nearest and not (next_lost and is_sign(next_lost[0]) and not is_sign(nearest[0]))
    if lost and (stronger or not like) and len(lost) <= _MAX_LOST * len(item.words):
        return True
    if num_lost:
        return False
    closed = item.words[place - 1] == ")" or _OPENS.search(text.gap(at))
    if back and nearest and not is_sign(nearest[0]) and closed:
        return True
    open_end = back and (lost or not _CLAUSE_END.search(item.gaps[-1].rstrip()))
    slip = _MAX_OPEN_SLIP if open_end else _MAX_SLIP
    far = at if any(map(is_sign, replaced)) else min(max(0, at + step * len(lost)), len(text.words))
    return any(_near_clause_end(text, where, step, slip) for where in {far, at})


def _many_signs_left(item: Item, num_lost: int) -> bool:
    """Whether so many numbers stand in their order, and so few are cut off, that they are no other problem's."""
    num_signs = sum(map(is_sign, item.words))
    return num_signs - num_lost >= _MANY_SIGNS and num_lost <= _MAX_LOST_SIGNS * num_signs


def _few_lost(item: Item, begin: int, end: int) -> bool:
    """Whether these words may be cut off: of a list of numbers none, since a shorter list is another problem."""
    num_lost = sum(map(is_sign, item.words[begin:end]))
    if _many_signs_left(item, num_lost):
        return True
    edge = item.words[begin - 1] if begin else item.words[end]
    in_prose = not is_sign(edge) or not (is_sign(item.words[begin]) or item.gaps[begin].strip())
    return in_prose and num_lost < (end - begin) / 2


def _strength(gap: str) -> int:
    """How much a text breaks off in a gap: at a line's end more than at a sentence's, there more than at a clause's."""
    return 3 if "\n" in gap else 2 if _SENTENCE_END.search(gap) else 1 if _CUT.search(gap) else 0


def _near_clause_end(text: Words, at: int, step: int, slip: int = _MAX_SLIP) -> bool:
    """Whether a clause ends up to a few words off ``at``, none of them a number."""
    for gap in range(at, at + step * (slip + 1), step):
        if not 0 <= gap <= len(text.words):
            return False
        if _CLAUSE_END.search(text.gap(gap)):
            return True
        crossed = gap - 1 if step < 0 else gap
        if 0 <= crossed < len(text.words) and text.words[crossed][0].isdigit():
            return False
    return False


def _alone_in_its_clause(text: Words, at: int, step: int) -> bool:
    """Whether no number or operator stands between ``at`` and the clause's begin (``step`` -1) or end (1).

    "We got … as homework": words around an item within its sentence are nobody's problem, numbers may make it another one.
    """
    for gap in range(at, at + step * (_MAX_AROUND + 1), step):
        if gap in (0, len(text.words)) or _CLAUSE_END.search(text.gap(gap)):
            return True
        if is_sign(text.words[gap - 1 if step < 0 else gap]):
            return False
    return False
