r"""More families for `tests.harness.perturbed`: what goes wrong between notations rather than between values.

Names and their values, precedence, indices, moduli, counting notation, dates, conditions behind a number, units in roman type,
signs and brackets of sets. Each negative differs from its gold by how it was made.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import comb, gcd

Case = tuple[str, str, str]
Family = Callable[[random.Random], Iterator[Case]]

MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November"),
    "December",
)
NAMES = (("x", "y"), ("a", "b"), ("m", "n"), ("p", "q"), ("A", "B"), ("r", "s"), ("k", "n"))


def frac(value: Fraction) -> str:
    sign, value = "-" if value < 0 else "", abs(value)
    return sign + (str(value) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}")


def mixed_numbers(draw: random.Random) -> Iterator[Case]:
    whole, top = draw.randint(2, 20), draw.randint(2, 8)
    bottom = draw.randint(top + 1, top + 9)
    if gcd(top, bottom) > 1:
        return
    part, gold = Fraction(top, bottom), f"{whole}\\frac{{{top}}}{{{bottom}}}"
    if Fraction(int(f"{whole}{top}"), bottom) != whole + part:
        yield "mixed: digits glued", gold, f"\\frac{{{whole}{top}}}{{{bottom}}}"
    if whole * part != whole + part:
        yield "mixed: product", gold, frac(whole * part)
    yield "mixed: sign of the part", f"-{gold}", frac(part - whole)
    yield "+mixed: writings", gold, draw.choice([frac(whole + part), f"{whole} {top}/{bottom}", f"{whole}+{frac(part)}"])


def precedence(draw: random.Random) -> Iterator[Case]:
    a, b = draw.randint(2, 9), draw.randint(2, 9)
    yield from draw.sample(
        [
            ("precedence: sum below", f"\\frac{{{a}}}{{x+{b}}}", f"\\frac{{{a}}}{{x}}+{b}"),
            ("precedence: slash", f"{a}/(x+{b})", f"{a}/x+{b}"),
            ("precedence: minus and square", f"-x^2+{a}", f"(-x)^2+{a}"),
            ("precedence: tower", f"{a}^{{x^{b}}}", f"({a}^x)^{b}"),
            ("precedence: factorial", f"({a}n)!", f"{a}n!"),
            ("precedence: root", f"\\sqrt{{{a}x}}", f"\\sqrt{{{a}}}x"),
            ("precedence: modulus", f"|x-{a}|", f"|x|-{a}"),
            ("precedence: function", f"\\sin {a}x", f"{a}\\sin x"),
            ("precedence: squared function", f"\\sin^2 x+{a}", f"\\sin x^2+{a}"),
            ("precedence: logarithm", f"\\ln(x+{a})", f"\\ln x+{a}"),
            ("precedence: exponent", f"e^{{{a}x+{b}}}", f"e^{{{a}x}}+{b}"),
            ("precedence: power of a product", f"({a}x)^{b}", f"{a}x^{b}"),
            ("precedence: floor", f"\\lfloor n/{a}\\rfloor", f"\\lceil n/{a}\\rceil"),
            ("precedence: floor of another", f"\\lfloor n/{a}\\rfloor", f"\\lfloor n/{a + 1}\\rfloor"),
            ("precedence: maximum", f"\\max(x,{a})", f"\\max(x,{a + 1})"),
            ("precedence: two moduli", f"|x-{a}|+|x+{b}|", f"|2x-{a}+{b}|"),
        ],
        6,
    )
    yield "+precedence: writings", f"({a}x)^{b}", draw.choice([f"{a**b}x^{b}", f"{a}^{b}x^{b}"])


def repeating_decimals(draw: random.Random) -> Iterator[Case]:
    x, y = draw.sample(range(1, 9), 2)
    gold = f"0.\\overline{{{x}{y}}}"
    yield "repeating: what repeats", gold, f"0.{x}\\overline{{{y}}}"
    yield "repeating: cut", gold, f"0.{x}{y}"
    yield "repeating: swapped", gold, f"0.\\overline{{{y}{x}}}"
    yield "+repeating: writings", gold, draw.choice([frac(Fraction(10 * x + y, 99)), f"0.({x}{y})"])


def scientific(draw: random.Random) -> Iterator[Case]:
    mantissa, exponent = f"{draw.randint(1, 9)}.{draw.randint(1, 9)}", draw.randint(3, 12)
    gold = f"{mantissa}\\times 10^{{{exponent}}}"
    yield "scientific: exponent", gold, f"{mantissa}\\times 10^{{{exponent + 1}}}"
    yield "scientific: sign of the exponent", gold, f"{mantissa}e-{exponent}"
    whole = str(int(Fraction(mantissa) * 10**exponent))
    yield "+scientific: writings", gold, draw.choice([f"{mantissa}e{exponent}", f"{mantissa} \\cdot 10^{{{exponent}}}", whole])


def ratios(draw: random.Random) -> Iterator[Case]:
    a, b, c = draw.sample(range(1, 30), 3)
    yield "ratio: swapped", f"{a}:{b}", f"{b}:{a}"
    yield "ratio: part of the whole", f"{a}:{b}", f"{a}:{a + b}"
    yield "ratio: three in another order", f"{a}:{b}:{c}", f"{a}:{c}:{b}"
    yield "+ratio: writings", f"{a}:{b}:{c}", draw.choice([f"{a} : {b} : {c}", f"{2 * a}:{2 * b}:{2 * c}"])


def times_and_dates(draw: random.Random) -> Iterator[Case]:
    hour, minute = draw.randint(1, 12), draw.randint(10, 59)
    yield "time: half of the day", f"{hour}:{minute} \\text{{ p.m.}}", f"{hour}:{minute} \\text{{ a.m.}}"
    yield "time: minute", f"{hour}:{minute}\\text{{ p.m.}}", f"{hour}:{minute - 1:02d}\\text{{ p.m.}}"
    (month, other), day = draw.sample(MONTHS, 2), draw.randint(1, 27)
    yield "date: month", f"\\text{{{month} {day}}}", f"\\text{{{other} {day}}}"
    yield "date: day", f"{month} {day}", f"{month} {day + 1}"
    yield "date: half of it", f"{month} {day}", draw.choice([month, str(day)])
    writings = [f"{day} {month}", f"\\text{{{month} {day}}}", f"\\text{{{month} }}{day}", f"\\text{{{month} {day}th}}"]
    yield "+date: writings", f"{month} {day}", draw.choice(writings)


def named_values(draw: random.Random) -> Iterator[Case]:
    (x, y), (u, v) = draw.choice(NAMES), draw.sample(range(-9, 20), 2)
    gold = f"{x}={u}, {y}={v}"
    yield "names: values swapped", gold, draw.choice([f"{x}={v}, {y}={u}", f"({x},{y})=({v},{u})", f"{y}={u}, {x}={v}"])
    yield "names: two values of one", gold, draw.choice([f"{x}={u} \\text{{ or }} {x}={v}", f"{x} = {u}\\text{{ or }}{v}"])
    yield "names: others", gold, f"t={u}, w={v}"
    yield "names: one missing", gold, f"{x}={u}"
    yield "names: all equal", gold, f"{x}={y}={u}"
    yield "names: a point for two roots", f"{x}={u}\\text{{ or }}{x}={v}", gold
    writings = [f"{y}={v}, {x}={u}", f"({x},{y})=({u},{v})", f"({u},{v})", f"{x}={u}\\text{{ and }}{y}={v}"]
    writings.append(f"\\begin{{cases}} {x} = {u}, \\\\ {y} = {v} \\end{{cases}}")
    yield "+names: writings", gold, draw.choice(writings)
    roots = [f"{v},{u}", f"{x}={v},{u}", f"\\{{{u},{v}\\}}", f"{x}_1={u}, {x}_2={v}", f"{x}\\in\\{{{v},{u}\\}}"]
    yield "+names: roots", f"{x}={u}\\text{{ or }}{x}={v}", draw.choice(roots)


def unions(draw: random.Random) -> Iterator[Case]:
    low = draw.randint(-20, 0)
    ends = [low + sum(draw.randint(2, 9) for _ in range(n)) * (n + 1) for n in range(4)]
    a, b, c, d = sorted(set(ends)) if len(set(ends)) == 4 else (low, low + 3, low + 5, low + 9)
    gold = f"({a},{b})\\cup({c},{d})"
    yield "union: bracket", gold, f"({a},{b}]\\cup({c},{d})"
    yield "union: piece missing", gold, f"({a},{b})"
    yield "union: gap filled", gold, f"({a},{d})"
    yield "union: gap", gold, f"({a},{b})\\cup({c},{d + 1})"
    yield "union: rays for what they leave", f"(-\\infty,{a})\\cup({d},\\infty)", f"({a},{d})"
    yield "+union: writings", gold, draw.choice([f"({c},{d})\\cup({a},{b})", f"x \\in ({a}, {b}) \\cup ({c}, {d})"])


def moduli(draw: random.Random) -> Iterator[Case]:
    centre, radius = draw.randint(1, 9), draw.randint(1, 9)
    gold = f"{centre - radius}<x<{centre + radius}"
    yield "modulus: centre", gold, f"|x+{centre}|<{radius}"
    yield "modulus: radius", gold, f"|x-{centre}|<{radius + 1}"
    yield "modulus: strictness", gold, f"|x-{centre}|\\le {radius}"
    yield "modulus: outside", gold, f"|x-{centre}|>{radius}"
    yield "modulus: another letter", gold, f"|y-{centre}|<{radius}"
    writings = [f"|x-{centre}|<{radius}", f"|{centre}-x|<{radius}", f"({centre - radius},{centre + radius})"]
    writings += [f"|2x-{2 * centre}|<{2 * radius}", f"-{radius}<x-{centre}<{radius}"]
    yield "+modulus: writings", gold, draw.choice(writings)


def counting(draw: random.Random) -> Iterator[Case]:
    n = draw.randint(5, 12)
    k = draw.randint(2, n - 2)
    value = str(comb(n, k))
    if 2 * k + 1 != n:
        yield "binomial: one more", value, f"\\binom{{{n}}}{{{k + 1}}}"
    of_one_more = [f"C({n + 1},{k})", f"{{}}_{{{n + 1}}}C_{{{k}}}", f"C_{{{n + 1}}}^{{{k}}}"]
    yield "binomial: of one more", value, draw.choice(of_one_more)
    yield "binomial: permutations", value, f"P({n},{k})"
    yield "binomial: fraction", f"\\binom{{{n}}}{{{k}}}", frac(Fraction(n, k))
    writings = [f"C({n},{k})", f"{{{n} \\choose {k}}}", f"{{}}_{{{n}}}C_{{{k}}}", f"C_{{{n}}}^{{{k}}}", f"{n}C{k}"]
    yield "+binomial: writings", value, draw.choice([*writings, f"\\frac{{{n}!}}{{{k}!{n - k}!}}", f"{{}}^{{{n}}}C_{{{k}}}"])


def curves(draw: random.Random) -> Iterator[Case]:
    a, b = draw.sample(range(2, 10), 2)
    ellipse = f"\\frac{{x^2}}{{{a}}}+\\frac{{y^2}}{{{b}}}=1"
    yield "curve: axes swapped", ellipse, f"\\frac{{x^2}}{{{b}}}+\\frac{{y^2}}{{{a}}}=1"
    yield "curve: hyperbola", ellipse, f"\\frac{{x^2}}{{{a}}}-\\frac{{y^2}}{{{b}}}=1"
    yield "curve: radius not squared", f"(x-{a})^2+y^2={b * b}", f"(x-{a})^2+y^2={b}"
    yield "curve: centre", f"(x-{a})^2+(y+{b})^2=5", f"(x+{a})^2+(y-{b})^2=5"
    yield "curve: turned", f"y^2={a}x", f"x^2={a}y"
    yield "+curve: writings", ellipse, draw.choice([f"{b}x^2+{a}y^2={a * b}", f"\\frac{{y^2}}{{{b}}}+\\frac{{x^2}}{{{a}}}=1"])


def residues(draw: random.Random) -> Iterator[Case]:
    a = draw.randint(2, 9)
    m = a + draw.randint(2, 9)
    gold = f"x\\equiv {a}\\pmod{{{m}}}"
    yield "residue: another", gold, f"x\\equiv {a - 1}\\pmod{{{m}}}"
    yield "residue: modulus", gold, f"x\\equiv {a}\\pmod{{{m + 1}}}"
    yield "residue: swapped", gold, f"x\\equiv {m}\\pmod{{{a}}}"
    yield "residue: equation", gold, f"x={a}"
    yield "+residue: writings", gold, draw.choice([f"x \\equiv {a + m} \\pmod{{{m}}}", f"x\\equiv {a}\\ (\\text{{mod }} {m})"])


def conditions(draw: random.Random) -> Iterator[Case]:
    k = str(draw.randint(10, 999))
    before = ("at least", "less than", "not", "no more than", "more than")
    behind = ("or more", "or less", "at most", "if we are lucky")
    words = [f"\\text{{{word} }}{k}" for word in before] + [f"{k}\\text{{ {word}}}" for word in behind]
    yield "condition: words", k, draw.choice(words)
    signs = (">{}", "\\ge {}", "\\neq {}", "x\\ne {}", "\\le {}", "x>{}", "2x={}", "x^2={}", "x+1={}", "\\sqrt{{x}}={}")
    yield "condition: sign", k, draw.choice(signs).format(k)
    operations = ("{}-1", "{}!", "{}^2", "-({})", "{}i", "{}\\pi", "\\log {}", "{}x", "{}_{{11}}", "1/{}", "\\ln 0+{}", "{}e")
    yield "condition: operation", k, draw.choice(operations).format(k)
    asked = ("a+b={}", "xy={}", "m+n={}", "S_{{ABC}}={}", "\\text{{Area}}={}", "|z|={}", "={}", "\\therefore {}", "{}个")
    yield "+condition: what was asked", k, draw.choice(asked).format(k)


def letters(draw: random.Random) -> Iterator[Case]:
    a, b = draw.sample(range(2, 10), 2)
    greek = ("\\rho", "p"), ("\\nu", "v"), ("\\omega", "w"), ("\\alpha", "a"), ("\\chi", "x"), ("\\mu", "u"), ("\\tau", "t")
    one, other = draw.choice(greek)
    yield "letter: looks alike", f"{a}{one}", f"{a}{other}"
    yield "letter: case", f"\\pi r^2+{a}", f"\\pi R^2+{a}"
    yield "letter: index", f"a_{a}+x", f"a_{b}+x"
    yield "letter: index as a factor", f"a_{{{a}{b}}}", f"a_{{{a}}}{b}"
    yield "letter: index as a power", f"x_{a}", f"x^{a}"
    yield "letter: number behind it", f"{a}x", f"x{a}"
    yield "letter: bound letter", f"f(n)=n+{a}", f"f(x)=n+{a}"
    yield "letter: name of a function", f"f(x)={a}x", f"g(x)={a}x"
    yield "letter: chain of equal ones", "a=b=c", "a=x=c"
    sides = draw.choice([("A\\subset B", "B\\subset A"), ("p\\implies q", "q\\implies p"), ("f\\circ g", "g\\circ f")])
    yield "letter: direction", *sides


def roman_units(draw: random.Random) -> Iterator[Case]:
    n = draw.randint(2, 500)
    gold = f"{n} \\mathrm{{~m}} / \\mathrm{{s}}"
    yield "roman unit: another", gold, draw.choice([f"{gold}^{{2}}", f"{n}\\ \\mathrm{{km}}/\\mathrm{{s}}", f"{n}\\text{{ m}}"])
    yield "roman unit: number", gold, f"{n + 1} \\mathrm{{~m}} / \\mathrm{{s}}"
    yield "roman unit: power", f"{n} \\mathrm{{~cm}}^{{2}}", f"{n} \\mathrm{{~cm}}^{{3}}"
    writings = [f"{n}", f"{n}\\text{{ m/s}}", f"{n}\\,\\mathrm{{m/s}}", f"{n}\\,\\mathrm{{m}}\\,\\mathrm{{s}}^{{-1}}"]
    yield "+roman unit: writings", gold, draw.choice(writings)


def long_numbers(draw: random.Random) -> Iterator[Case]:
    number = draw.randint(10**30, 10**31)
    yield "long: last digit", str(number), str(number + draw.randint(1, 9))
    yield "long: last decimal", f"0.{number}", f"0.{number + 1}"
    yield "long: product", f"{number}\\cdot 3", str(3 * number + 1)
    yield "long: factorial", f"{number % 80 + 10}!", f"{number % 80 + 10}!+1"
    yield "+long: writings", str(number), draw.choice([f"{number:,}", f"{number}.0", f"{number - 1}+1"])


def pairs(draw: random.Random) -> Iterator[Case]:
    a, b, c, d = draw.sample(range(20), 4)
    gold = f"({a},{b}),({c},{d})"
    yield "pairs: one swapped", gold, f"({b},{a}),({c},{d})"
    yield "pairs: regrouped", gold, f"({a},{c}),({b},{d})"
    yield "pairs: flat", gold, f"({a},{b},{c},{d})"
    yield "pairs: digits glued", f"{a + 1}, {b}", f"{a + 1}{b}"
    cases = "\\begin{{cases}}x & x{}{}\\\\-x & x{}{}\\end{{cases}}"
    yield "pairs: cases", cases.format(">", a, "\\le ", a), cases.format("\\ge ", a, "<", a)
    yield "+pairs: writings", gold, draw.choice([f"({c},{d}),({a},{b})", f"\\{{{gold}\\}}", f"(x,y)={gold}"])


NOTATIONS: list[Family] = [
    mixed_numbers, precedence, repeating_decimals, scientific, ratios, times_and_dates, named_values, unions, moduli, counting,
    curves, residues, conditions, letters, roman_units, long_numbers, pairs,
]  # fmt: skip
