# ruff: noqa: E501  (one text a line)
"""Families of problems that decontamination was not tuned on: many kinds of text, any number of items of each.

The seen families were looked at while the method was made to hold on them. The held-out ones were only counted at first; later
what was missed of them was looked at too, so that neither part says what families quite unknown would give. They have some
ninety reasoning-gym tasks between them, and problems written here: school and contest mathematics, code, multiple choice, tables, sudoku grids,
Chinese, Spanish, and questions of few words.
"""

from __future__ import annotations

import random
import re

import reasoning_gym
from reasoning_gym.factory import DATASETS

_IN_THE_MAIN_PART = {
    *("chain_sum", "basic_arithmetic", "leg_counting", "simple_equations", "fraction_simplification", "gcd", "lcm"),
    *("calendar_arithmetic", "time_intervals", "number_sorting", "gsm_symbolic"),
}
_LEFT_OUT = {"composite", "zebra_puzzles", "codeio", "figlet_font", "sokoban"}  # of others; slow; pictures
_BLANKS_COUNT = {"rectangle_count"}  # pictures that differ in blanks alone, which are no words: the same item to this method
_TASKS = [name for name in sorted(DATASETS) if name not in _IN_THE_MAIN_PART | _LEFT_OUT]

NAMES = ("Ana", "Bela", "Chidi", "Dora", "Emil", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Keiko", "Liam", "Mara", "Nils")
THINGS = ("marbles", "stamps", "pears", "tickets", "bricks", "candles", "shells", "buttons", "coins", "postcards", "ribbons")
PLACES = ("harbour", "library", "school", "market", "station", "museum", "workshop", "bakery", "garden", "theatre")
CN_NAMES = ("小明", "小红", "李雷", "王芳", "张伟", "陈静", "刘洋", "赵敏")
CN_THINGS = ("苹果", "铅笔", "气球", "书本", "糖果", "邮票", "橘子")
ES_NAMES = ("Lucía", "Mateo", "Sofía", "Andrés", "Begoña", "Íñigo", "Rocío")
ES_THINGS = ("manzanas", "lápices", "globos", "canicas", "sellos", "naranjas")

_SEEN_TEXTS = {
    "school": (
        "{name} has {a} {thing} and buys {b} more at the {place}. On the way home {name} gives {c} of them to {other}. How many "
        "{thing} does {name} have left?",
        "The {place} sells {thing} in boxes of {a}. On Monday {b} boxes were sold and on Tuesday {c} boxes. {name} then returned "
        "{d} single {thing}. What is the total number of {thing} sold?",
        "{name} reads {a} pages a day for {b} days, while {other} reads {c} pages a day for {d} days. Who has read more, and by "
        "how many pages?",
    ),
    "contest": (
        r"Let $x$ and $y$ be positive real numbers such that $\frac{{x}}{{{a}}} + \frac{{y}}{{{b}}} = {c}$. Find the largest "
        r"possible value of $x^{{{e}}} \cdot y$. Express your answer as a common fraction.",
        r"In triangle $ABC$, $AB = {a}$, $BC = {b}$, and $\angle B = {c}^\circ$. Point $D$ lies on side $\overline{{AC}}$ with "
        r"$AD : DC = {e} : {f}$. Find the remainder when the area of triangle $ABD$ is divided by $1000$.",
        r"How many ordered pairs $(m, n)$ of integers with $1 \le m \le {a}$ and $1 \le n \le {b}$ satisfy "
        r"$$m^2 + n^2 \equiv {e} \pmod{{{c}}}?$$",
    ),
    "code": (
        "Write a function `{word}_{word2}(values: list[int], k: int) -> int` that returns the number of pairs whose sum is "
        "divisible by k plus {e}.\n\n>>> {word}_{word2}([{a}, {b}, {c}], {e})\n{f}\n",
        "You are given n {thing} in a row ({e} <= n <= {a}00). In one move you may swap two neighbours whose weights differ by "
        "at most {f}. Print the smallest number of moves.\n\nInput\nThe first line has n. The second line has n integers.\n\n"
        "Output\nOne integer.\n\nExample\n{e}\n{a} {b} {c}\n\n{d}",
    ),
    "choice": (
        "Which of the following is closest to the share of {thing} in the {place} of {name} in the year {y}?\nA) {a} percent\n"
        "B) {b} percent\nC) {c} percent\nD) {d} percent",
        "{name} drops a ball from a height of {a} m beside the {place}. With which speed does it hit the ground?\n(A) {b} m/s "
        "(B) {c} m/s (C) {d} m/s (D) none of these",
    ),
    "table": (
        "Use the table to answer.\n\n| person | {thing} | {thing2} |\n|---|---|---|\n| {name} | {a} | {b} |\n| {other} | {c} | {d} |"
        "\n| {third} | {e} | {f} |\n\nHow many {thing} and {thing2} do {name} and {third} have together?",
    ),
    "sudoku": ("{dots}", "Solve this sudoku:\n{rows_of_dots}"),
    "Chinese": (
        "{cn}有{a}个{cnthing}，{cn2}比{cn}多{b}个。后来{cn}又买了{c}个{cnthing}，请问两人现在一共有多少个{cnthing}？",
        "一辆汽车以每小时{a}千米的速度从甲地开往乙地，{e}小时后，另一辆汽车以每小时{b}千米的速度追赶，几小时后可以追上？",
    ),
    "Spanish": (
        "{es} tiene {a} {esthing} y su hermana tiene {b} más. Si entre las dos regalan {c} {esthing}, ¿cuántas les quedan?",
        "¿Cuál es el área de un rectángulo cuyo perímetro mide {a} metros, si uno de sus lados mide {e} metros más que el otro?",
    ),
    "words only": (
        "Explain why the {word} in the {place} was {word2} by {name} after {other} had left, although {third} said that no one "
        "would ever touch the {thing} there.",
    ),
    "few words": (
        "What is {a}% of {b}?",
        "Factor x^2 - {a}x + {b}.",
        "Who found {word}{word2} island?",
        "{a} + {b} = ?",
        "求{a}和{b}的和。",
    ),
}
_HELD_OUT_TEXTS = {
    "school": (
        "A train leaves the {place} at {e}:{a} with {b} people. At the first stop {c} get off and {d} get on. At the second stop, "
        "half of the people leave. How many are on the train after that?",
        "{name} and {other} share the cost of {a} {thing} at ${e}.{b} each. {name} pays {c} dollars. How much must {other} pay?",
        "There are {a} rows of seats in the {place}, each with {b} seats. If {c} seats are broken and {d} are kept for guests, "
        "how many tickets can {name} sell for the evening?",
        "Twice as many {thing} as {thing2} are in a bag. {name} takes out {e} {thing} and puts in {a} {thing2}; now there are {b} "
        "of each kind. How many {thing} were there at first?",
    ),
    "contest": (
        r"The polynomial $P(x) = x^3 - {a}x^2 + {b}x - {c}$ has three distinct positive roots $r, s, t$. Compute "
        r"\[\frac{{1}}{{r + {e}}} + \frac{{1}}{{s + {e}}} + \frac{{1}}{{t + {e}}}.\]",
        r"A fair {a}-sided die is rolled {e} times. The probability that the product of the rolls is divisible by {b} can be "
        r"written as $\tfrac{{m}}{{n}}$, where $m$ and $n$ are relatively prime positive integers. Find $m + n$.",
        r"Evaluate $\int_{{{e}}}^{{{a}}} \left( {b}x^{{{f}}} + \sqrt{{{c}x}} \right) \, dx$.",
        r"Let $a_1 = {a}$ and $a_{{n+1}} = {e} a_n - {b}$ for all $n \geq 1$. What is the smallest $n$ for which $a_n > 10^{{{f}}}$?",
    ),
    "code": (
        "def {word}(s: str) -> str:\n    \"\"\" Return s with every {e}th letter replaced by its successor, and {a} added to digits.\n"
        "    >>> {word}('{word2}')\n    '{word2}{b}'\n    \"\"\"\n",
        "Alice and Bob play a game with {a} piles of {thing}. A move takes between {e} and {b} {thing} from one pile. Alice moves "
        "first.\n\nConstraints:\n- 1 <= t <= {c}00\n- 1 <= p_i <= {d}\n\nWrite a program that prints the winner of each of t games.",
        "Given a table `{word}` (id INT, {word2} TEXT, price INT), write a SQL query that returns the {e} rows with the highest "
        "price above {a}, leaving out those with id over {b}.",
    ),
    "choice": (
        "A patient of {a} years comes to the clinic near the {place} with a heart rate of {b} per minute and a temperature of "
        "3{e}.{f} degrees. Which drug is the best next step?\nA. {word}in\nB. {word2}ol\nC. {word}{word2}ate\nD. no drug",
        "Question: What happens to the {thing} when {name} moves {a} of them from the {place} to the sun?\nChoices:\n(1) they melt\n"
        "(2) they {word}\n(3) nothing\n(4) they grow by {b} percent",
    ),
    "table": (
        "{name} counts {thing} at the {place}:\n\nDay  Count  Price\nMon  {a}  {e}\nTue  {b}  {f}\nWed  {c}  {e}\nThu  {d}  {f}\n\n"
        "On which day was the income the highest?",
        "x,y\n{a},{b}\n{c},{d}\n{e},{f}\n\nFit a line to the points of this CSV file and give its slope to two decimals.",
    ),
    "sudoku": ("{zeros}", "Complete the grid so that each row, column and box has the digits 1 to 9.\n\n{rows_of_blanks}"),
    "Chinese": (
        "某商店原有{a}箱{cnthing}，上午卖出{b}箱，下午又运来{c}箱，每箱{e}元。现在商店里的{cnthing}一共值多少元？",
        "已知数列的首项为{e}，公差为{f}，求前{a}项的和，并判断{b}是不是这个数列中的一项。",
        "{cn}和{cn2}从相距{a}千米的两地同时出发，相向而行。{cn}每小时走{e}千米，{cn2}每小时走{f}千米，几小时后相遇？",
    ),
    "Spanish": (
        "En una granja hay {a} gallinas y {b} conejos. {es} vende {c} gallinas y compra {e} conejos. ¿Cuántas patas hay ahora?",
        "Un depósito de {a} litros se llena con dos grifos: el primero da {e} litros por minuto y el segundo {f}. ¿Cuánto tarda en "
        "llenarse si {es} abre los dos a la vez y ya había {b} litros?",
    ),
    "words only": (
        "If every {word} is a {word2}, and {name} owns a {word} but {other} does not own any {word2} at the {place}, can {third} "
        "conclude that {other} has never been given a {word} by {name}?",
    ),
    "few words": ("Is {a}{b} divisible by {e}?", "Solve {e}x - {a} = {b}.", "Define {word} {word2}.", "¿Cuánto es {a} por {b}?", "计算{a}除以{e}。"),
}  # fmt: skip


def families(held_out: bool, *, size: int, seed: int) -> dict[str, list[str]]:
    """Items by the name of their family, ``size`` at most of each, distinct; another seed gives other items."""
    found = {}
    for i, name in enumerate(_TASKS):
        if (i % 3 != 0) == held_out and name not in _BLANKS_COUNT:
            entries = reasoning_gym.create_dataset(name, size=size, seed=seed)
            found[name] = list(dict.fromkeys(entry["question"].strip() for entry in entries))
    for name, texts in (_HELD_OUT_TEXTS if held_out else _SEEN_TEXTS).items():
        draw = random.Random(f"{name} {seed}")
        found[name] = list(dict.fromkeys(_filled(text, draw).strip() for text in texts for _ in range(size)))
    return found


def _filled(text: str, draw: random.Random) -> str:
    name, other, third = draw.sample(NAMES, 3)
    thing, thing2 = draw.sample(THINGS, 2)
    cn, cn2 = draw.sample(CN_NAMES, 2)
    a, b, c, d = draw.sample(range(11, 100), 4)
    e, f = draw.sample(range(2, 10), 2)
    grid = "".join(str(draw.randint(1, 9)) if draw.random() < 0.35 else "." for _ in range(81))
    rows = [grid[i : i + 9] for i in range(0, 81, 9)]
    return text.format(
        name=name, other=other, third=third, thing=thing, thing2=thing2, place=draw.choice(PLACES), a=a, b=b, c=c, d=d, e=e, f=f,
        y=draw.randint(1900, 2020), word=_word(draw), word2=_word(draw), cn=cn, cn2=cn2, cnthing=draw.choice(CN_THINGS),
        es=draw.choice(ES_NAMES), esthing=draw.choice(ES_THINGS), dots=grid, zeros=grid.replace(".", "0"),
        rows_of_dots="\n".join(" ".join(row) for row in rows),
        rows_of_blanks="\n".join(" ".join(row).replace(".", "_") for row in rows),
    )  # fmt: skip


def _word(draw: random.Random) -> str:
    return "".join(draw.choice(part) for part in ("bdfgklmnprst", "aeiou", "lmnrst", "aeiou", "dklmnt"))


def sentences(text: str) -> list[str]:
    """A text cut where sentences and paragraphs end, with what stands between them left on the sentence before."""
    return [
        part for part in re.split(r"(?<=[.?!。？！])(?=\s+[^\W\d_]|[^\W\d_\x00-\x7f])|(?<=\n\n)(?=\S)", text) if part.strip()
    ]
