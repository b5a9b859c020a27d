r"""Count false accepts on perturbed answers and false rejects on other writings of the gold.

    python -m tests.harness.perturbed [--num 12000] [--seed 0]

Golds are drawn as values (numbers, polynomials, points, sets, intervals, matrices, quantities, words) and written out. A
negative is another value of the same family, or the gold's text broken; that it differs from the gold follows from how it was
made, and is never asked of the verifier. A positive is the same value in another writing. Both are judged as a model would
write them: boxed after a think block, but for the prose kinds, which are bare. `perturbed_notations.py` has the families about
notation. Exit code 1 where more than one negative in a thousand is accepted.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction

from stillhouse.pipeline.verifiers.rows import judge_rows
from tests.harness.perturbed_notations import NOTATIONS
from tests.harness.side_by_side import parser_of

MAX_FALSE_ACCEPTS = 0.001
Case = tuple[str, str, str]
"""(kind of perturbation or writing, gold, prediction)."""


def frac(value: Fraction, command: str = "\\frac") -> str:
    sign = "-" if value < 0 else ""
    top, bottom = abs(value.numerator), value.denominator
    return f"{sign}{top}" if bottom == 1 else f"{sign}{command}{{{top}}}{{{bottom}}}"


def other(draw: random.Random, number: int) -> int:
    """Another integer, near in looks: a digit changed, dropped or added, the sign, one more or less, ten times."""
    digits = str(abs(number))
    at = draw.randrange(len(digits))
    forms = [
        digits[:at] + str((int(digits[at]) + draw.randint(1, 9)) % 10) + digits[at + 1 :],
        digits[:at] + digits[at + 1 :] or "0",
        digits + draw.choice("0123456789"),
        str(abs(number) + 1),
        digits[::-1],
    ]
    changed = int(draw.choice(forms)) * (-1 if number < 0 else 1)
    return changed if changed != number else -number if number and draw.random() < 0.5 else number + 1


def integers(draw: random.Random) -> Iterator[Case]:
    gold = draw.choice([1, -1]) * draw.randint(2, 10 ** draw.randint(1, 12))
    yield "integer: another", str(gold), str(other(draw, gold))
    yield "integer: sign", str(gold), str(-gold)
    yield "integer: a decimal next to it", str(gold), f"{gold}.{draw.choice(['5', '001', '1', '01'])}"
    yield (
        "+integer: writings",
        str(gold),
        draw.choice([f"{gold:,}", f"{gold}.0", f"${gold}$", f"x = {gold}", f"{gold}".replace("-", "−")]),
    )


def rationals(draw: random.Random) -> Iterator[Case]:
    gold = Fraction(draw.choice([1, -1]) * draw.randint(1, 999), draw.randint(2, 999))
    if gold.denominator == 1 or abs(gold) == 1:
        return
    wrong = Fraction(other(draw, gold.numerator), gold.denominator)
    assert wrong != gold
    yield "fraction: numerator", frac(gold), frac(wrong)
    assert 1 / gold != gold
    yield "fraction: upside down", frac(gold), f"{gold.denominator}/{gold.numerator}"
    yield "fraction: sign", frac(gold), frac(-gold)
    rounded = round(float(gold), 2)
    if Fraction(str(rounded)) != gold:
        yield "fraction: two decimals of it", frac(gold), str(rounded)
    times = draw.randint(2, 9)
    yield (
        "+fraction: writings",
        frac(gold),
        draw.choice(
            [
                f"{gold.numerator}/{gold.denominator}",
                frac(gold, "\\dfrac"),
                f"\\frac{{{gold.numerator * times}}}{{{gold.denominator * times}}}",
            ]
        ),
    )


def decimals(draw: random.Random) -> Iterator[Case]:
    places = draw.randint(1, 6)
    gold = Fraction(draw.randint(11, 10**6), 10**places)
    text = f"{float(gold):.{places}f}"
    for kind, wrong in (
        ("last digit", gold + Fraction(1, 10**places)),
        ("point moved", gold * 10),
        ("digit added", gold + Fraction(7, 10 ** (places + 1))),
    ):
        assert wrong != gold
        yield f"decimal: {kind}", text, f"{float(wrong):.{places + 1}f}"
    yield "+decimal: writings", text, draw.choice([frac(gold), text + "0", f"\\({text}\\)", f"{text} \\text{{ cm}}"])


def radicals(draw: random.Random) -> Iterator[Case]:
    a, b, c = draw.randint(-9, 9), draw.randint(1, 9), draw.choice([2, 3, 5, 6, 7, 10, 11, 13])

    def text(a: int, b: int, c: int) -> str:
        return f"{a if a else ''}{'+' if a and b > 0 else ''}{b if b != 1 else ''}\\sqrt{{{c}}}"

    gold = text(a, b, c)
    # 1 and the square roots of two different square-free numbers are independent: another a, b or c is another number.
    yield "radical: conjugate", gold, f"{a if a else ''}-{b}\\sqrt{{{c}}}"
    yield "radical: coefficient", gold, text(a, b + draw.randint(1, 5), c)
    yield "radical: term", gold, text(a + draw.choice([1, 2, -11]), b, c)
    yield "radical: radicand", gold, text(a, b, draw.choice([n for n in (2, 3, 5, 6, 7, 10, 11, 13) if n != c]))
    yield (
        "radical: root of a sum",
        f"\\sqrt{{{c}}}+\\sqrt{{{b}}}",
        f"\\sqrt{{{c + b}}}",
    )  # (a+b)^2 = a^2 + b^2 only where ab = 0
    yield (
        "+radical: writings",
        gold,
        draw.choice([f"{b}\\sqrt{{{c}}}+({a})", f"{a}+\\sqrt{{{b * b * c}}}", f"{a}+{b}*{c}^{{1/2}}"]),
    )


def polynomials(draw: random.Random) -> Iterator[Case]:
    coefficients = {power: draw.choice([-1, 1]) * draw.randint(1, 9) for power in draw.sample(range(5), 3)}

    def text(terms: dict[int, int], name: str = "x", order: int = -1) -> str:
        parts = [
            f"{c:+d}" + (f"{name}^{p}" if p > 1 else name if p else "")
            for p, c in sorted(terms.items(), key=lambda t: order * t[0])
        ]
        return "".join(parts).removeprefix("+")

    gold = text(coefficients)
    power = draw.choice(list(coefficients))
    yield "polynomial: sign of a term", gold, text({**coefficients, power: -coefficients[power]})
    yield (
        "polynomial: coefficient",
        gold,
        text({**coefficients, power: coefficients[power] + draw.choice([10, 1 if coefficients[power] != -1 else 2])}),
    )
    yield "polynomial: term dropped", gold, text({p: c for p, c in coefficients.items() if p != power})
    free = next(p for p in range(6) if p not in coefficients)
    yield "polynomial: exponent", gold, text({(free if p == power else p): c for p, c in coefficients.items()})
    if set(coefficients) != {0}:
        yield "polynomial: another letter", gold, text(coefficients, "y")
        yield "polynomial: constant multiple", gold, f"2({gold})"
    a, b = draw.randint(1, 9), draw.randint(-9, -1)
    yield (
        "+polynomial: writings",
        gold,
        draw.choice([text(coefficients, order=1), f"y = {gold}", gold.replace("x^", "x**"), f"\\left({gold}\\right)"]),
    )
    yield "+polynomial: factored", f"x^2{a + b:+d}x{a * b:+d}" if a + b else f"x^2{a * b:+d}", f"(x{a:+d})(x{b:+d})"


def functions(draw: random.Random) -> Iterator[Case]:
    a, b = draw.randint(2, 9), draw.randint(2, 9)
    pairs = [
        (f"\\frac{{\\pi}}{{{a}}}", f"\\frac{{\\pi}}{{{a + 1}}}"),
        (f"{a}\\pi", f"{a}"),
        (f"\\ln {a}", f"\\ln {a + 1}"),
        (f"e^{{{a}}}", f"e^{{-{a}}}"),
        (f"1-\\frac{{{a}}}{{e}}", f"1+\\frac{{{a}}}{{e}}"),
        (f"\\sin({a}x)", f"\\cos({a}x)"),
        (f"\\sin({a}x)", f"\\sin({a + 1}x)"),
        (f"\\frac{{x+{a}}}{{x-{b}}}", f"\\frac{{x-{b}}}{{x+{a}}}"),
        (f"\\log_{{{a}}} {a + 1}", f"\\log_{{{a + 1}}} {a}"),
        (f"{a}+{b}i", f"{a}-{b}i"),
        (f"|x-{a}|", f"x-{a}"),
        (f"{a}^{{x}}", f"x^{{{a}}}"),
    ]
    for gold, wrong in draw.sample(pairs, 4):
        yield "function: another", gold, wrong
    yield (
        "+function: writings",
        *draw.choice(
            [
                (f"\\sin^2(x)+\\cos^2(x)+{a}", f"{a + 1}"),
                (f"\\frac{{{a}}}{{\\sqrt{{{a}}}}}", f"\\sqrt{{{a}}}"),
                (f"{a}\\ln 2", f"\\ln {2**a}"),
                (f"\\frac{{x^2-{a * a}}}{{x-{a}}}", f"x+{a}"),
                (f"e^{{{a}x}}", f"(e^x)^{a}"),
                (f"{a}+{b}i", f"{b}i+{a}"),
            ]
        ),
    )


def extremes(draw: random.Random) -> Iterator[Case]:
    n = draw.randint(60, 900)
    yield "extreme: tiny powers", f"\\frac{{1}}{{2^{{{n}}}}}", f"\\frac{{1}}{{2^{{{n - 1}}}}}"
    yield "extreme: factorials", f"\\frac{{1}}{{{n}!}}", f"\\frac{{1}}{{{n + draw.randint(1, 3)}!}}"
    yield "extreme: huge and one more", f"10^{{{n}}}", f"10^{{{n}}}+1"
    yield "extreme: tiny against zero", f"\\frac{{1}}{{10^{{{n}}}}}", "0"
    yield "extreme: exponentials", f"e^{{-{n}}}", f"e^{{-{n + 1}}}"
    yield "+extreme: writings", f"\\frac{{1}}{{2^{{{n}}}}}", f"2^{{-{n}}}"


def points(draw: random.Random) -> Iterator[Case]:
    values = draw.sample(range(-20, 60), draw.randint(2, 4))
    gold = f"({', '.join(map(str, values))})"
    yield "tuple: order", gold, f"({', '.join(map(str, values[1:] + values[:1]))})"
    yield "tuple: component", gold, f"({', '.join(map(str, [values[0] + draw.randint(1, 5), *values[1:]]))})"
    yield "tuple: too short", gold, f"({', '.join(map(str, values[:-1]))})" if len(values) > 2 else str(values[0])
    yield "tuple: too long", gold, f"({', '.join(map(str, [*values, draw.randint(0, 9)]))})"
    yield (
        "+tuple: writings",
        gold,
        draw.choice(
            [f"\\left({','.join(map(str, values))}\\right)", gold.replace(", ", ","), f"({'; '.join(map(str, values))})"]
        ),
    )


def sets(draw: random.Random) -> Iterator[Case]:
    values = draw.sample(range(-30, 60), draw.randint(2, 5))
    gold = draw.choice(["\\{%s\\}", "%s"]) % ", ".join(map(str, values))
    fresh = draw.choice([n for n in range(61, 99)])
    yield "set: element changed", gold, f"\\{{{', '.join(map(str, [*values[:-1], fresh]))}\\}}"
    yield "set: element missing", gold, f"\\{{{', '.join(map(str, values[:-1]))}\\}}"
    yield "set: element too many", gold, f"\\{{{', '.join(map(str, [*values, fresh]))}\\}}"
    yield "+set: writings", gold, f"\\{{{', '.join(map(str, draw.sample(values, len(values))))}\\}}"


def intervals(draw: random.Random) -> Iterator[Case]:
    low = draw.randint(-20, 20)
    high = low + draw.randint(1, 20)
    left, right = draw.choice("(["), draw.choice(")]")
    gold = f"{left}{low}, {high}{right}"
    yield "interval: left bracket", gold, f"{'[' if left == '(' else '('}{low}, {high}{right}"
    yield "interval: right bracket", gold, f"{left}{low}, {high}{']' if right == ')' else ')'}"
    yield "interval: end", gold, f"{left}{low}, {high + draw.randint(1, 5)}{right}"
    yield "interval: to infinity", gold, f"{left}{low}, \\infty)"
    yield (
        "+interval: writings",
        gold,
        draw.choice([f"x \\in {gold}", f"\\left{left}{low},{high}\\right{right}", f"{left}{low}.0, {high}{right}"]),
    )


def relations(draw: random.Random) -> Iterator[Case]:
    bound, sign = draw.randint(-20, 20), draw.choice(["<", ">", "\\le", "\\ge"])
    flipped = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}[sign]
    strict = {"<": "\\le", ">": "\\ge", "\\le": "<", "\\ge": ">"}[sign]
    gold = f"x {sign} {bound}"
    yield "inequality: direction", gold, f"x {flipped} {bound}"
    yield "inequality: strictness", gold, f"x {strict} {bound}"
    yield "inequality: bound", gold, f"x {sign} {bound + draw.choice([-1, 1, 10])}"
    yield "inequality: only the bound", gold, str(bound)
    yield "+inequality: writings", gold, f"{bound} {flipped} x"
    slope, shift = draw.choice([2, 3, 4, -2, -3]), draw.randint(1, 9)
    yield "equation: slope", f"y = {slope}x+{shift}", f"y = {-slope}x+{shift}"
    yield "equation: shift", f"y = {slope}x+{shift}", f"y = {slope}x-{shift}"
    yield "equation: another name", f"a = {bound}", f"b = {bound}"
    yield "equation: only a side", f"{slope}x+y = {shift}", str(shift)
    yield (
        "+equation: writings",
        f"y = {slope}x+{shift}",
        draw.choice([f"y - {slope}x = {shift}".replace("- -", "+ "), f"2y = {2 * slope}x+{2 * shift}"]),
    )


def matrices(draw: random.Random) -> Iterator[Case]:
    cells = [[draw.randint(-9, 9) for _ in range(2)] for _ in range(2)]
    if cells[0] == cells[1] or cells[0][1] == cells[1][0]:
        return

    def text(rows: list[list[int]], name: str = "pmatrix") -> str:
        return f"\\begin{{{name}}}" + " \\\\ ".join(" & ".join(map(str, row)) for row in rows) + f"\\end{{{name}}}"

    gold = text(cells)
    yield "matrix: transposed", gold, text([list(column) for column in zip(*cells)])
    yield "matrix: rows swapped", gold, text(cells[::-1])
    yield "matrix: cell", gold, text([[cells[0][0] + 1, cells[0][1]], cells[1]])
    yield "matrix: row missing", gold, text(cells[:1])
    yield "+matrix: writings", gold, text(cells, "bmatrix")


UNITS = [("cm", "m"), ("kg", "g"), ("km", "cm"), ("hours", "minutes"), ("cm^2", "cm^3"), ("m", "kg"), ("L", "mL"), ("s", "m")]


def units(draw: random.Random) -> Iterator[Case]:
    number = draw.randint(2, 500)
    unit, wrong = draw.choice(UNITS)
    gold = draw.choice([f"{number} {unit}", f"{number}\\text{{ {unit}}}"])
    yield "unit: another", gold, f"{number} \\text{{ {wrong}}}"
    yield "unit: number", gold, f"{other(draw, number)}\\text{{ {unit}}}"
    yield "percent: number", f"{number}\\%", f"{number + draw.randint(1, 9)}\\%"
    yield "base: digit", f"1{number % 10}1_{{11}}", f"1{(number + 1) % 10}1_{{11}}"
    yield "+unit: writings", gold, draw.choice([f"{number}", f"{number}~\\mathrm{{{unit}}}"])
    yield "+unit: converted", f"{number} \\text{{ m}}", f"{number * 100} \\text{{ cm}}"


WORDS = ["even", "odd", "increasing", "Monday", "isosceles", "no solution", "Evelyn", "convergent", "parallel", "true"]


def words(draw: random.Random) -> Iterator[Case]:
    gold, wrong = draw.sample(WORDS, 2)
    letters = list(gold)
    draw.shuffle(letters)
    yield "word: another", f"\\text{{{gold}}}", f"\\text{{{wrong}}}"
    if "".join(letters).casefold().split() != gold.casefold().split():
        yield "word: letters shuffled", f"\\text{{{gold}}}", "".join(letters)
    yield "word: not", f"\\text{{{gold}}}", f"not {gold}"
    yield "+word: writings", f"\\text{{{gold}}}", draw.choice([gold, f"\\textbf{{{gold}}}", f"\\text{{{gold.capitalize()}}}"])


def prose(draw: random.Random) -> Iterator[Case]:
    gold = draw.randint(2, 10_000)
    yield "bare: refusal with the gold in it", str(gold), f"I cannot solve it, maybe {gold}"
    yield "bare: gold in prose", str(gold), f"It could be {gold} but it could be something else"
    yield "bare: two answers", str(gold), f"{gold} or {gold + draw.randint(1, 9)}"
    yield "bare: box inside the reasoning", str(gold), f"<think>perhaps \\boxed{{{gold}}}"
    yield "broken: cut off", f"\\frac{{{gold}}}{{7}}", f"\\frac{{{gold}}}{{"
    yield "broken: digits glued", str(gold), f"{gold} {gold}"
    yield "broken: empty parts", str(gold), draw.choice(["{}", "()", "\\text{}", "\\frac{}{}", "=", "\\sqrt{}"])


FAMILIES: list[Callable[[random.Random], Iterator[Case]]] = [
    integers, rationals, decimals, radicals, polynomials, functions, extremes, points, sets, intervals, relations, matrices,
    units, words, prose, *NOTATIONS,
]  # fmt: skip


def cases(num: int, seed: int) -> list[Case]:
    """Draw cases, families in turn, until there are ``num`` negatives."""
    draw = random.Random(seed)
    drawn: list[Case] = []
    num_negatives = 0
    while num_negatives < num:
        for family in FAMILIES:
            found = [case for case in family(draw) if case[1] != case[2]]
            num_negatives += sum(not kind.startswith("+") for kind, _, _ in found)
            drawn += found
    return drawn


def as_row(case: Case) -> dict[str, str]:
    kind, gold, pred = case
    return {"gold": gold, "pred": pred if kind.startswith("bare") else f"<think>Let me see.</think>So \\boxed{{{pred}}}."}


def run(num: int, seed: int) -> dict[str, object]:
    drawn = cases(num, seed)
    start = time.perf_counter()
    verdicts = list(judge_rows("math", map(as_row, drawn)))
    seconds = time.perf_counter() - start
    tried, mistaken = Counter(), Counter()
    undecided = 0
    mistakes: list[dict[str, str]] = []
    for (kind, gold, pred), verdict in zip(drawn, verdicts):
        tried[kind] += 1
        undecided += verdict["verdict"] == "undecided"
        if (verdict["verdict"] == "correct") != kind.startswith("+"):
            mistaken[kind] += 1
            mistakes.append({"kind": kind, "gold": gold, "pred": pred, **verdict})

    def total(counts: Counter[str], positive: bool) -> int:
        return sum(n for kind, n in counts.items() if kind.startswith("+") == positive)

    return {
        "num_negatives": total(tried, False),
        "num_kinds_of_negatives": sum(not kind.startswith("+") for kind in tried),
        "false_accepts": total(mistaken, False),
        "num_positives": total(tried, True),
        "false_rejects": total(mistaken, True),
        "undecided": undecided,
        "seconds": round(seconds, 2),
        "mistakes_by_kind": dict(mistaken),
        "mistakes": mistakes,
    }


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--num", type=int, default=12_000, help="negatives to draw")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    report = run(arguments.num, arguments.seed)
    report["mistakes"] = report["mistakes"][:40]
    print(json.dumps(report, indent=2, ensure_ascii=False))
    return 1 if report["false_accepts"] > MAX_FALSE_ACCEPTS * report["num_negatives"] else 0


if __name__ == "__main__":
    sys.exit(main())
