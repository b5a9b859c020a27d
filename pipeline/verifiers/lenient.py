r"""Find the answer that somebody else's model meant: the last box, "the answer is …", else the last formula or number in prose.

For scoring others' outputs only. Training labels go by ``strict_answer``: what is harvested here can be a number that the text
merely mentions. Every pass is linear in the length of the text, of which the last 20,000 characters are read.
"""

from __future__ import annotations

import re

from stillhouse.pipeline.extraction import THINK_CLOSE, THINK_OPEN
from stillhouse.pipeline.verifiers.dates import date_of
from stillhouse.pipeline.verifiers.latex import GLUED_CONJUNCTION, with_powers
from stillhouse.pipeline.verifiers.units import is_known

MAX_CHARS = 20_000
_MAX_BARE_CHARS = 400
_MAX_GAP_CHARS = 80
_MAX_GAP_WORDS = 4

_SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>\s*(?:user|assistant|system)?")
_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\\\|\\.|[{}]", re.DOTALL)
_MATH = (
    r"(?<!\\)\$\$(?P<display>[^$]{1,2000})\$\$|\\\[(?P<bracket>.{1,1000}?)\\\]|\\\((?P<inline>.{1,1000}?)\\\)"
    r"|(?<![\\\d])\$(?P<dollar>(?:\\\$|[^$]){1,1000}?)(?<!\\)\$"
)
_FRACTION = r"(?P<fraction>-?\\[dtc]?frac\s*\{[^{}]{1,40}\}\s*\{[^{}]{1,40}\})"
_DIGITS = r"(?:\d{1,3}(?:[ ,]\d{3})+(?:\.\d+)?(?!\d)|\d+(?:[.,]\d+)?|\.\d+)"
_NUMBER = (
    r"(?P<number>(?<![A-Za-z\d_.])(?<!\^\{)(?<!\^)"
    rf"[-+]?\(?[-+]?{_DIGITS}(?:\s*[-+*×/÷^]\s*\(?[-+]?{_DIGITS}\)?)*(?:\s?(?:\\?%|percent|pct))?)"
)
_END = r"\s*[-+]?(?:\d+(?:[./]\d+)?|∞|inf(?:inity)?)\s*"
_BRACKET = rf"(?P<pair>(?<![A-Za-z\d\\])[A-Z]?[(\[]{_END}(?:[,;]{_END}){{1,9}}[)\]])"  # a point or an interval without dollars
_CANDIDATE = re.compile(f"(?:{_MATH}|{_FRACTION}|{_BRACKET}|{_NUMBER})", re.DOTALL)
_LONE_NAME = re.compile(r"[$\s]*[A-Za-z](?:_\{?\w+\}?)?\s*")
_EQUALS = re.compile(r"(?<![<>!=:\\])=(?![=])")
_JOINT = re.compile(r"\s*(?:,\s*and|,\s*or|and|or|,)\s*")
_FINAL = re.compile(r"final answer|^####", re.IGNORECASE | re.MULTILINE)
_ANSWER = re.compile(
    r"(?:\banswer|\bréponse|\brespuesta|\bantwort|\brisposta|\bresposta|答案)"
    r"(?:\s*(?:is(?=n't)|(?:is|est|es|ist|è|é|should be)\b)|\s*[:：是]|\s+\w{1,20} is\b)",
    re.IGNORECASE,
)
_DENIED = re.compile(r"n't\b|\s+(?:not|never)\b")
# What stands beside a number and makes it another. "12!" in prose may be a shout: as "12 factorial" it stays undecided.
_MAX_WORD_CHARS = 24
_NOT = re.compile(r"(?:\bnot|n't|\bnever)\s+(?:equal to\s+)?[$(]*\Z", re.IGNORECASE)
_BEFORE = re.compile(
    r"(?P<relation>(?<![A-Za-z</])[A-Za-z]\s*(?:≠|≤|≥|!=|<=|>=|<|>|\\(?:ne|le|ge)q?))\s*\Z"
    r"|\b(?P<bound>(?:at (?:least|most)|(?:more|less|fewer|greater) than))\s+\Z"
    r"|(?:\A|[^\w\s)}$]|[^\W\d]{2})\s*\b(?:minus|negative)\s+\Z",
    re.IGNORECASE,
)
_BEHIND = re.compile(
    r"\s*(?:!(?![=!])|(?:\\text\s*\{\s*)?((?:dozen|hundred|thousand|million|billion|trillion|squared|cubed|factorial|doubled|tripled|halved|halves"
    r"|thirds|tenths|or more|or less)\b)\s*\}?)"
)
_SENTENCE_END = re.compile(r"I hope|\.\s|\n\n|。")
_REFUSAL = re.compile(
    r"\b(?:cannot|can't|can not|could not|couldn't|unable to|not able to)\s+(?:\w+\s+)?(?:solve|answer|determine|find|compute)"
    r"|\bdo(?:n't| not) know|\bno idea\b|\bnot sure\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"(?<![\\A-Za-z])[^\W\d_]{2,}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_BASED = re.compile(r"\(?\b[0-9A-F]+\)?_\s*\{?\d{1,2}\}?")
_FENCE = re.compile(r"^[ \t]*```[^\n]*$", re.MULTILINE)
_RATIO = re.compile(r"\d+(?:\.\d+)? to \d+(?:\.\d+)?")
_MARKUP = re.compile(r"\\[()\[\]]|\\(?:text\w*|mbox|quad|qquad|left|right)(?![A-Za-z])|\$")
_NOT_PROSE = {
    "and", "or", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "pi", "inf", "infty", "infinity",
    "arcsin", "arccos", "arctan",
}  # fmt: skip


def lenient_answer(completion: str) -> str | None:
    """Return the answer that a completion, or a bare answer, most likely means; None where there is nothing or it refuses."""
    _, closed, text = completion.rpartition(THINK_CLOSE)
    if THINK_OPEN in text and not closed:
        return last_boxes(text)[0]  # cut off in the middle of a thought: its last number is no answer
    text = text if text.isascii() else with_powers(text).replace("−", "-")
    text = _FENCE.sub(" ", text)
    text = GLUED_CONJUNCTION.sub(r" \1 ", _SPECIAL.sub(" ", text[-MAX_CHARS:])).strip()
    if not text:
        return None
    found = _found(text)
    return None if found is None else _end_of_chain(found)


def _end_of_chain(text: str) -> str:
    """``x = 3 + 3 = 2`` means ``x = 2``, however the sum came out."""
    exact, about, _ = text.partition("\\approx")
    if about and not re.fullmatch(
        r"[$\s]*[A-Za-z](?:_\{?\w+\}?)?\s*", exact
    ):  # x \approx 11 is an answer, 1/3 \approx 0.3 is 1/3
        text = exact.rstrip() + ("$" if exact.startswith("$") else "") if exact.strip("$ ") else text
    if "=" not in text:
        return text
    sides = _EQUALS.split(text)
    if any(side.count("{") != side.count("}") for side in sides):  # an equals sign inside a sum's bound
        return text
    if len(sides) < 2 or any(mark in text for mark in (",", ";", " and ", " or ", "&", "\\begin")):
        return text
    dollars = "$" if text.startswith("$") and text.endswith("$") else ""
    first, last = sides[0].strip("$ "), sides[-1].strip()
    if len(sides) > 2 and _LONE_NAME.fullmatch(last):  # a = b = c
        return text
    if len(sides) > 2 and re.fullmatch(r"[A-Za-z]\w*(?:_\{?\w+\}?)?(?:\(\w+\))?", first):
        return f"{dollars}{first} = {last}"
    if len(sides) > 2 or not re.search(r"[A-Za-z]", _COMMAND.sub("", text)):
        return dollars + last
    return text


def _found(text: str) -> str | None:
    boxes, end_of_boxes = last_boxes(text)
    for anchor in reversed(list(_FINAL.finditer(text, end_of_boxes))):
        found = _in_segment(text[anchor.end() : anchor.end() + 600], last=True)
        if found is not None:
            return found
    if boxes is not None:
        return boxes
    if _is_bare(text):
        return text
    if _REFUSAL.search(text[-400:]):
        return None
    for anchor in reversed(list(_ANSWER.finditer(text))):
        if _DENIED.match(text, anchor.end()):
            return None
        found = _in_segment(text[anchor.end() : anchor.end() + 200], last=False)
        if found is not None:
            return found
    return _candidate(text, last=True)


def last_boxes(text: str) -> tuple[str | None, int]:
    r"""Return the last box, or the last run of boxes with "and" or a comma between them, and where it ends.

    ``\boxed{1} and \boxed{2}`` is ``1, 2``. A last box that is not closed goes to the end of its line.
    """
    text = text.replace("\\\\boxed", "\\boxed")
    boxes: list[tuple[int, int, str]] = []
    open_braces: list[int | None] = []
    for token in _BOX_TOKENS.finditer(text):
        if token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                boxes.append((start, token.end(), text[start : token.start()].strip()))
        elif token[0].endswith("{") and len(token[0]) > 2:
            open_braces.append(token.end())
    unclosed = [start for start in open_braces if start is not None]
    if unclosed and (not boxes or unclosed[-1] > boxes[-1][0]):
        start = unclosed[-1]
        content = text[start:].partition("\n")[0].strip().rstrip("$").strip()
        return (content, len(text)) if content and not boxes else _run(boxes, text)
    return _run(boxes, text)


def _run(boxes: list[tuple[int, int, str]], text: str) -> tuple[str | None, int]:
    boxes = [box for box in sorted(boxes) if box[2]]
    boxes = [
        box for box, following in zip(boxes, [*boxes[1:], None]) if following is None or following[0] >= box[1]
    ]  # innermost
    if not boxes:
        return None, 0
    run = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if not _joins(text[box[1] : run[0][0]]):
            break
        run.insert(0, box)
    contents = list(dict.fromkeys(box[2] for box in run))
    return ", ".join(contents), boxes[-1][1]


def _joins(gap: str) -> bool:
    """Whether what stands between two boxes makes them one answer."""
    gap = _MARKUP.sub(" ", gap.replace("\\boxed", " ").replace("\\fbox", " "))
    words = [word.casefold() for word in _WORD.findall(gap)]
    return len(gap) <= _MAX_GAP_CHARS and len(words) <= _MAX_GAP_WORDS and (not words or bool({"and", "or"} & set(words)))


def _is_bare(text: str) -> bool:
    """Whether a text is an answer and nothing else: no word before the formula, at most a unit behind it."""
    if len(text) > _MAX_BARE_CHARS:
        return False
    if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text.strip("$"):
        return True
    if _RATIO.fullmatch(text) or date_of(text) is not None:
        return True
    rest = _BASED.sub(" 0 ", text)
    rest = _CANDIDATE.sub(lambda m: " 0 " if m["number"] or m["fraction"] or m["pair"] or not _has_prose(m[0]) else m[0], rest)
    rest = re.sub(r"\\(?:text\w*|mbox|mathrm|mathbf|operatorname)\s*\{[^{}]*\}|\\(?:begin|end)\{\w+\}", " 0 ", rest)
    words = [m for m in _WORD.finditer(rest) if m[0].casefold() not in _NOT_PROSE and not is_known(m[0])]
    if not words:
        return True
    if not any(c.isdigit() for c in rest):
        return len(words) <= 6 and not re.search(r"[.:!?]\s", rest)
    last_digit = max(i for i, c in enumerate(rest) if c.isdigit())
    return len(words) <= 3 and words[0].start() > last_digit and rest.isascii()


def _has_prose(text: str) -> bool:
    words = _WORD.findall(re.sub(r"\\(?:text\w*|mbox|mathrm|begin|end)\s*\{[^{}]*\}", " ", text))
    return any(len(word) >= 3 and word.casefold() not in _NOT_PROSE and not word.isupper() for word in words)


def _in_segment(segment: str, *, last: bool) -> str | None:
    cut = _SENTENCE_END.search(segment, 1)
    return _candidate(segment[: cut.start()] if cut else segment, last=last)


def _candidate(text: str, *, last: bool) -> str | None:
    found: list[tuple[int, int, str]] = []
    at = 0
    while match := _CANDIDATE.search(text, at):
        content = next(value for value in match.groups() if value is not None)
        is_number = any(match[kind] is not None for kind in ("number", "fraction", "pair"))
        if not is_number and (_has_prose(content) or not content.strip()):
            at = match.start() + 1
            continue
        at = match.end()
        if not is_number and (percent := re.compile(r"\s*(?:\\?%|percent|pct)").match(text, at)):
            content, at = content + "\\%", percent.end()
        if is_number and content.count("(") > content.count(")"):  # six (6)
            content = content.replace("(", "", 1)
        if _NOT.search(text, max(0, match.start() - _MAX_WORD_CHARS), match.start()):
            continue
        if (following := _BEHIND.match(text, at)) and (is_number or following[1]):
            content, at = f"{content} {following[1] or 'factorial'}", following.end()
        if is_number and (before := _BEFORE.search(text[max(0, match.start() - _MAX_WORD_CHARS) : match.start()])):
            content = _with_word(content.strip(), before)
        found.append((match.start(), at, content.strip()))
    if not found:
        return None
    run = [found[-1] if last else found[0]]
    others = reversed(found[:-1]) if last else found[1:]
    for other in others:
        gap = text[other[1] : run[0][0]] if last else text[run[-1][1] : other[0]]
        equals = re.fullmatch(r"\s*=\s*", gap)
        if equals and not last:
            run = [other]
        elif _JOINT.fullmatch(gap):
            run.insert(0 if last else len(run), other)
        else:
            break
    return ", ".join(item[2] for item in run)


def _with_word(number: str, before: re.Match[str]) -> str:
    """A number with the word before it: ``minus 12`` is -12, ``x > 2`` itself, ``at least 12`` no number."""
    if before["relation"]:
        return f"{before['relation']} {number}"
    return f"{number} {before['bound']}" if before["bound"] else f"-{number}"


_FIRST_WORD = re.compile(r"\W*(yes|no|true|false)\b(?=\s*[,.:;!*]|\s*$)", re.IGNORECASE)
_SECOND_WORD = re.compile(r"\b(?:wait|actually|correction|scratch that|I mean)\W{1,3}(yes|no|true|false)\b", re.IGNORECASE)


def lenient_words(completion: str) -> list[str]:
    """Return the words that a completion may mean where the gold is a word: what follows "the answer is", a first yes or no."""
    text = completion.rpartition(THINK_CLOSE)[2] if THINK_CLOSE in completion else completion
    text = text[-MAX_CHARS:]
    found = [text[anchor.end() :] for anchor in list(_ANSWER.finditer(text))[-1:]]
    cuts = [_SENTENCE_END.search(segment, 1) for segment in found]
    announced = [(segment[: cut.start()] if cut else segment[:200]) for segment, cut in zip(found, cuts)]
    first = _FIRST_WORD.match(text)
    if first and (seconds := list(_SECOND_WORD.finditer(text))):  # No, wait: yes
        first = seconds[-1]
    return [words.strip(" \n*_`'\".:") for words in announced] or ([first[1]] if first else [])


_LETTER_AFTER = re.compile(
    r"(?:answer|réponse|respuesta|antwort|option|choice|答案)\s*(?:\w{1,20}\s+){0,3}?(?:is|est|es|ist|:|：|是)"
    r"\s*(?:for sure\s+)?[*(\[]*([A-J])(?![A-Za-z'])",
    re.IGNORECASE,
)
_LETTER_FIRST = re.compile(r"[*(\[]*([A-J])[*)\]]*(?:[.,:;。，：]|\s|$|(?![\x00-\x7f]))")
_LETTERS = re.compile(r"\W*[A-J]\W*(?:(?:,|/|&|\band\b|\bor\b)\W*[A-J]\W*)+")  # two choices are none
_LETTER_IN_BRACKETS = re.compile(r"\(([A-J])\)")
_LETTER_ALONE = re.compile(r"(?<![A-Za-z'’])([A-HJ])(?![A-Za-z'’])")


def announces_letter(completion: str) -> bool:
    """Whether a completion says that the answer is a letter: ``The answer is **(B) 12**``."""
    return any(match[1].isupper() for match in _LETTER_AFTER.finditer(completion[-MAX_CHARS:]))


def lenient_letter(completion: str) -> str | None:
    """Return the letter that a multiple-choice answer means: boxed, announced, standing first, in brackets, else the last."""
    text = completion.rpartition(THINK_CLOSE)[2] if THINK_CLOSE in completion else completion
    text = text[-MAX_CHARS:].strip()
    boxed, _ = last_boxes(text)
    if boxed is not None:
        text = re.sub(r"\\(?:text\w*|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", boxed).strip()
    if len(text) < _MAX_GAP_CHARS and _LETTERS.fullmatch(text):
        return None
    if announced := [m for m in _LETTER_AFTER.finditer(text) if m[1].isupper()]:
        return announced[-1][1]
    if first := _LETTER_FIRST.match(text):
        return first[1]
    for pattern in (_LETTER_IN_BRACKETS, _LETTER_ALONE):
        if found := pattern.findall(text):
            return found[-1]
    return None
