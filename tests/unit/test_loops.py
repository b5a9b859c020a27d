"""The loop detector: what it stops, what it must not stop, and how soon."""

from __future__ import annotations

import itertools
import random

import pytest

from stillhouse.teachers.loops import TAIL_CHARACTERS, LoopDetector

looks_like_a_loop = LoopDetector()
WORDS = [
    line.split() for line in ("the sum of both sides is", "we add three and carry", "so x equals", "let me check", "again")
]


def _prose(num_characters: int, seed: int = 0) -> str:
    """Sentences of a small vocabulary in an order that does not repeat."""
    rng = random.Random(seed)
    sentences = (" ".join(itertools.chain(*rng.sample(WORDS, 3))) + f" {rng.randrange(10**6)}.\n" for _ in itertools.count())
    text = ""
    while len(text) < num_characters:
        text += next(sentences)
    return text[:num_characters]


@pytest.mark.parametrize("period", [20, 33, 160, 1000, 2500])
@pytest.mark.parametrize("cut", [0, 7])
def test_a_passage_over_and_over_is_a_loop(period, cut):
    """If it failed, a model that goes in circles would be paid up to its token limit."""
    passage = _prose(period, seed=1).replace("\n", " ")
    repeats = max(7, 1000 // period + 2)
    text = _prose(3000) + passage * repeats + passage[:cut]
    found = looks_like_a_loop(text)
    assert found is not None
    assert f"are {period} characters over and over" in found


def test_the_loop_is_seen_soon_after_it_is_long_enough():
    """If it failed, the saving would be promised and not made."""
    passage = " Wait, let me check that again. The sum is 12, so the answer is 12."
    text = _prose(5000)
    first = next(n for n in range(1, 100) if looks_like_a_loop(text + passage * n))
    assert first * len(passage) <= 1000 + 2 * len(passage)


def test_what_repeats_is_named_by_its_shortest_period():
    """If it failed, a passage of 19 characters would count as one of 38 and be stopped after 1,000 characters."""
    assert looks_like_a_loop("ab" * 1000) is None
    assert looks_like_a_loop("carry the one over " * 100) is None
    assert "2 characters over and over" in looks_like_a_loop("ab" * 2000)


@pytest.mark.parametrize("between", ["\n", "\n\n", "  \n", "\r\n\r\n"])
def test_the_same_line_again_and_again_is_a_loop(between):
    """If it failed, "Wait." to the token limit would go through, because its lines are short."""
    assert looks_like_a_loop("So.\n" + f"Wait.{between}" * 21) == "the last 20 lines are the same"
    assert looks_like_a_loop("So.\n" + f"Wait.{between}" * 18) is None


def test_a_loop_that_was_left_is_none():
    """If it failed, an answer that found its way out would be thrown away."""
    assert looks_like_a_loop("Let me check the sum once more. " * 60 + "No: it is 12, because 5 and 7 make 12.") is None


def _pi(num_digits: int) -> str:
    """Digits of π, by Gibbons' spigot."""
    q, r, t, k, n, m, digits = 1, 0, 1, 1, 3, 3, []
    while len(digits) < num_digits:
        if 4 * q + r - t < n * t:
            digits.append(str(n))
            q, r, n = 10 * q, 10 * (r - n * t), (10 * (3 * q + r)) // t - 10 * n
        else:
            q, r, t, k, n, m = q * k, (2 * q + r) * m, t * m, k + 1, (q * (7 * k + 2) + r * m) // (t * m), m + 2
    return "".join(digits)


@pytest.mark.parametrize(
    "text",
    [
        _prose(120_000),
        "\n".join(f"{number}. Step {number}: take the next case" for number in range(1, 3000)),
        "\n".join(f"{number}." for number in range(1, 3000)),
        "\n".join(f"| {a} | {b} | {a * b} |" for a in range(60) for b in range(60)),
        "\n".join(f"| {number} | {number % 7} | {number % 5} | no |" for number in range(1000)),
        "\n".join(["| 0 | 0 |"] * 19 + ["| 0 | 1 |"]) + "\n",
        "".join(str(number) for number in range(20_000)),
        _pi(3000),
        "1/7 = 0." + "142857" * 500,
        "\n".join(["0"] * 200),
        "\n" * 3000,
        " " * 3000,
        "-" * 3000,
        "\n".join(["    {", "    },"] * 60),
        "",
        "x",
    ],
    ids=[
        "prose",
        "enumeration",
        "bare numbers",
        "multiplication table",
        "table of residues",
        "nearly equal rows",
        "counting without blanks",
        "pi",
        "one seventh",
        "a column of digits",
        "blank lines",
        "blanks",
        "a ruler",
        "brackets",
        "nothing",
        "a letter",
    ],
)
def test_what_only_looks_like_a_loop_goes_on(text):
    """If it failed, good and paid reasoning would be broken off: counting, tables and digit strings repeat a lot."""
    stopped = [end for end in range(500, len(text) + 500, 500) if looks_like_a_loop(text[:end])]
    assert stopped == []


def test_only_the_tail_counts():
    """If it failed, the client, which hands over the tail alone, would see other loops than the detector's tests do."""
    text = _prose(30_000) + "so that makes twelve and not eleven, " * 60
    assert looks_like_a_loop(text) == looks_like_a_loop(text[-TAIL_CHARACTERS:])
