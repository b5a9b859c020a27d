r"""Read an answer into a tree: numbers, expressions, equations, sets, tuples, intervals, matrices, text.

A hand-written descent over the tokens of ``latex.py``, into the trees of ``tree.py``; nothing is evaluated, and depth and size
are bounded.
"""

from __future__ import annotations

from stillhouse.pipeline.verifiers.atoms import bracketed, modulo, number, subscript, unit
from stillhouse.pipeline.verifiers.commands import command, environment
from stillhouse.pipeline.verifiers.latex import Refused, Token, Unreadable, normalized, tokens_of
from stillhouse.pipeline.verifiers.relation_signs import NAME, RELATIONS, are_of_different_names, is_order
from stillhouse.pipeline.verifiers.tree import ENDS, TEXT_NAME, Tree, both_signs, negated

MAX_TOKENS = 1_500
MAX_DEPTH = 60
MAX_WRAPPED = 100

_AFTER_ITEMS = frozenset([")", "]", "}", "\\}", "\\rangle", "\\\\", "&"])


def read(text: str) -> Tree:
    r"""Read one answer, in LaTeX or plain text, without a box.

    ``\pm`` gives both values, as a list. Of a chain ``a = b = c`` all members are kept.

    Raises:
        Unreadable: not mathematics that this reader knows, or too large.
    """
    tokens = tokens_of(normalized(text))
    if not tokens:
        raise Unreadable("nothing there")
    if len(tokens) > MAX_TOKENS:
        raise Refused(f"more than {MAX_TOKENS} tokens")
    first = Reader(tokens, upper_sign=True)
    tree = first.whole()
    if first.saw_two_signs:
        tree = both_signs(tree, Reader(tokens, upper_sign=False).whole())
    return tree


def _chain(operators: list[str], sides: list[Tree], names: list[str | None]) -> Tree:
    return ("rel", tuple(operators), tuple(sides), tuple(names)) if operators else sides[0]


class Reader:
    """One pass over the tokens; ``upper_sign`` says which sign of ``\\pm`` is read."""

    def __init__(self, tokens: list[Token], *, upper_sign: bool):
        self.tokens = [*tokens, Token("end", "", False)]
        self.at = 0
        self.depth = 0
        self.num_wrapped = 0
        self.num_bars = 0
        self.in_index = False
        self.upper_sign = upper_sign
        self.saw_two_signs = False

    @property
    def value(self) -> str:
        return self.tokens[self.at].value

    @property
    def kind(self) -> str:
        return self.tokens[self.at].kind

    def take(self) -> Token:
        token = self.tokens[self.at]
        self.at += 1
        return token

    def skip(self, value: str) -> bool:
        if self.value == value and self.kind != "end":
            self.at += 1
            return True
        return False

    def need(self, *values: str) -> str:
        if self.value not in values or self.kind == "end":
            raise Unreadable(f"expected {' or '.join(values)}, got {self.value or 'the end'!r}")
        return self.take().value

    def whole(self) -> Tree:
        tree = self.sequence()
        if self.kind != "end":
            raise Unreadable(f"unexpected {self.value!r}")
        return tree

    def sequence(self) -> Tree:
        """Items with commas, semicolons, "and", "or" between them; one item alone stands for itself."""
        groups: list[list[Tree]] = [[]]
        joints = set()
        while True:
            while self.kind == "separator" or self.value == ",":
                joints.add(self.take().value)
            if self.skip(";"):
                groups.append([])
                continue
            if self.kind == "end" or self.value in _AFTER_ITEMS or self.value.startswith("\\end{"):
                break
            groups[-1].append(self.relation())
            if not (self.kind == "separator" or self.value in (",", ";")):
                break
        groups = [group for group in groups if group]
        if len(groups) > 1 and any(len(group) > 1 for group in groups):
            items = [group[0] if len(group) == 1 else ("tuple", *group) for group in groups]
        else:
            items = [item for group in groups for item in group]
        if not items:
            return ("list",)
        if len(items) > 1 and len(joints) == 1 and joints != {","}:
            (joint,) = joints
            if all(is_order(item) for item in items):
                return ("both" if joint in ("and", "\\land") else "either", *items)
            if joint in ("or", "\\lor") and are_of_different_names(items):
                return ("either", *items)
            if joint in ("\\land", "\\lor") and not any(item[0] == "rel" for item in items):
                return ("opaque", joint, *items)
        return items[0] if len(items) == 1 else ("list", *items)

    def relation(self) -> Tree:
        operators, sides, names = [], [], []
        start = self.at
        while True:
            sides.append(self.set_expression())
            text = "".join(token.value if token.kind != "text" else "?" for token in self.tokens[start : self.at])
            if sides[-1][0] == "text" and self.value == "=":  # \text{Area} = 27
                names.append(TEXT_NAME + sides[-1][1].casefold())
            else:
                names.append(text if len(text) <= 60 and NAME.fullmatch(text) else None)
            operator = RELATIONS.get(self.value) if self.kind in ("symbol", "command") else None
            if operator is None:
                break
            self.take()
            operators.append(operator)
            start = self.at
        if "~" in operators:
            cut = operators.index("~")
            if cut == 0 and names[0] is not None and len(sides) > 1:  # x ≈ 11
                operators, sides, names = ["="], sides[:2], names[:2]
            else:
                kept = _chain(operators[:cut], sides[: cut + 1], names[: cut + 1])
                return ("approx", kept, sides[cut + 1])
        return _chain(operators, sides, names)

    def set_expression(self) -> Tree:
        parts = [self.ratio()]
        while self.value in ("\\cup", "\\cap", "\\setminus"):
            operator = self.take().value
            other = self.ratio()
            if operator == "\\cup":
                parts.append(other)
            else:
                left = self.wrapped(parts[0] if len(parts) == 1 else ("union", *parts))
                parts = [("opaque", operator, left, other)]
        return parts[0] if len(parts) == 1 else ("union", *parts)

    def ratio(self) -> Tree:
        parts = [self.sum()]
        while self.skip(":"):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else ("ratio", *parts)

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Refused(f"nested deeper than {MAX_DEPTH}")
        terms = []
        negative = self.signs()
        while True:
            term = self.product()
            terms.append(negated(term) if negative else term)
            if self.value not in ("+", "-", "\\pm", "\\mp") or self.kind == "end":
                break
            negative = self.signs()
        tree = terms[0] if len(terms) == 1 else ("add", *terms)
        if self.value in ("\\over", "\\choose"):  # {1 \over 2}: plain TeX
            how, below = self.take().value, self.sum()
            tree = ("div", tree, below) if how == "\\over" else ("fn", "binomial", tree, below)
        self.depth -= 1
        return tree

    def signs(self) -> bool:
        """Read any number of signs; True when together they are a minus."""
        negative = False
        while self.value in ("+", "-", "\\pm", "\\mp"):
            sign = self.take().value
            if sign in ("\\pm", "\\mp"):
                self.saw_two_signs = True
                negative ^= (sign == "\\mp") == self.upper_sign
            else:
                negative ^= sign == "-"
        return negative

    def wrapped(self, inner: Tree) -> Tree:
        """Count a tree that goes into another from the left (``a/b/c``, ``n!!``): it grows deep without brackets."""
        if inner[0] not in ("num", "dec", "sym"):
            self.num_wrapped += 1
            if self.num_wrapped > MAX_WRAPPED:
                raise Refused(f"nested deeper than {MAX_WRAPPED}")
        return inner

    def joined(self, factors: list[Tree]) -> Tree:
        return self.wrapped(factors[0] if len(factors) == 1 else ("mul", *factors))

    def product(self) -> Tree:
        factors = [self.factor()]
        while True:
            if self.value == "*" and self.kind != "end":
                self.take()
                factors.append(self.signed_factor())
            elif self.value == "/":
                self.take()
                left = self.joined(factors)
                factors = [("div", left, self.signed_factor())]
            elif self.value == "\\circ":  # f \circ g is not g \circ f
                self.take()
                left = self.joined(factors)
                factors = [("opaque", "\\circ", left, self.signed_factor()) if self.starts_factor() else ("deg", left)]
            elif self.value in ("\\bmod", "\\mod", "\\pmod"):
                left = self.joined(factors)
                factors = [modulo(self, left)]
            elif self.kind == "text" and factors:
                left = self.joined(factors)
                factors = [("qty", left, unit(self))]
            elif self.starts_factor():
                self.refuse_letter_before_number()
                before, after = factors[-1], self.factor()
                if before[0] in ("num", "dec") and after[0] in ("num", "dec"):
                    after = self.mixed(before, after)
                    factors.pop()
                elif before[0] == "num" and after[0] == "div" and self.is_proper(before, after):  # 918\frac{1}{2}
                    after = ("add", before, after)
                    factors.pop()
                elif before[0] == "num" and after[0] == "pct" and after[1][0] == "div" and self.is_proper(before, after[1]):
                    after = ("pct", ("add", before, after[1]))  # 33\frac{1}{3}\%
                    factors.pop()
                factors.append(after)
            else:
                break
        return factors[0] if len(factors) == 1 else ("mul", *factors)

    def refuse_letter_before_number(self) -> None:
        """``x2`` may be x squared, x with an index or twice x; ``k2^k`` is a product."""
        number, following = self.tokens[self.at], self.tokens[self.at + 1]
        touching = number.kind == "number" and not number.spaced and self.tokens[self.at - 1].kind == "letter"
        if touching and following.value != "^" and not self.in_index:
            raise Refused(f"a letter before the number {number.value[:20]}")

    def is_proper(self, whole: Tree, part: Tree) -> bool:
        numbers = part[1][0] == part[2][0] == "num"
        return bool(numbers and whole[1].denominator == 1 and 0 < part[1][1] < part[2][1])

    def mixed(self, whole: Tree, top: Tree) -> Tree:
        if whole[0] == top[0] == "num" and self.value == "/" and self.tokens[self.at + 1].kind == "number":
            self.take()
            bottom = self.factor()
            part = ("div", top, bottom)
            if bottom[0] == "num" and self.is_proper(whole, part):
                return ("add", whole, part)
        raise Refused("two numbers side by side")

    def signed_factor(self) -> Tree:
        negative = self.signs()
        factor = self.factor()
        return negated(factor) if negative else factor

    def starts_factor(self) -> bool:
        kind, value = self.kind, self.value
        if kind in ("number", "letter"):
            return True
        if kind == "symbol":
            return value in ("(", "{", "[") or (value == "|" and self.num_bars == 0)
        if kind == "environment":
            return value.startswith("\\begin")
        return (
            kind == "command"
            and value not in ENDS
            and value not in RELATIONS
            and value not in ("\\pm", "\\mp", "\\$", "\\degree")
        )

    def factor(self) -> Tree:
        base = self.atom()
        while True:
            before = base
            if self.value == "!" and self.kind == "symbol":
                self.take()
                base = ("fn", "factorial", base)
            elif self.value == "%" and self.kind != "end":
                self.take()
                base = ("pct", base)
            elif self.value == "\\degree":
                self.take()
                base = ("deg", base)
            elif self.value == "\\$":
                self.take()
                base = ("qty", base, "$")
            elif self.value == "'" and self.kind == "symbol":
                self.take()
                if base[0] in ("num", "dec", "qty"):  # feet, minutes of arc: units that nobody converts here
                    raise Refused("a number with a prime")
                base = ("sym", base[1] + "'") if base[0] == "sym" else ("opaque", "'", base)
            elif self.value == "_" and self.kind == "symbol":
                base = subscript(self, base)
            elif self.value == "^" and self.kind == "symbol":
                self.take()
                exponent = self.exponent()
                if exponent == ("sym", "\\circ"):
                    base = ("deg", base)
                elif exponent == ("sym", "'"):
                    base = ("opaque", "'", base)
                else:
                    base = ("pow", base, exponent)
            else:
                break
            self.wrapped(before)
        return base

    def exponent(self) -> Tree:
        if self.skip("'"):
            return ("sym", "'")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Refused(f"nested deeper than {MAX_DEPTH}")
        exponent = self.unbounded_exponent()
        self.depth -= 1
        return exponent

    def unbounded_exponent(self) -> Tree:
        negative = self.signs()
        if self.kind == "letter" or self.kind == "number":
            exponent = self.atom()
        elif self.value in ("{", "(") or self.kind == "command":
            exponent = self.atom()
            if self.value == "^":  # a tower binds to the right
                self.take()
                exponent = ("pow", exponent, self.exponent())
        else:
            raise Unreadable("no exponent")
        return negated(exponent) if negative else exponent

    def argument(self, *, one_digit: bool = False) -> Tree:
        """What a command takes: a group in braces, or the next token alone (TeX: one digit)."""
        if self.skip("{"):
            inner = self.sequence()
            self.need("}")
            return inner
        if self.kind == "number" and one_digit and len(self.value) > 1 and self.value.isdigit():
            token = self.tokens[self.at]
            self.tokens[self.at : self.at + 1] = [
                Token("number", token.value[0], False),
                Token("number", token.value[1:], False),
            ]
        return self.atom()

    def atom(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Refused(f"nested deeper than {MAX_DEPTH}")
        tree = self.unbounded_atom()
        self.depth -= 1
        return tree

    def unbounded_atom(self) -> Tree:
        kind, value, _ = token = self.take()
        if kind == "number":
            return number(self, value)
        if kind == "letter":
            if value in ("f", "g", "F", "G") and self.value == "(" and not self.tokens[self.at].spaced:
                return ("opaque", f"{value}()", self.atom())
            return ("const", value) if value in ("e", "i") else ("sym", value)
        if kind == "text":
            return ("text", value)
        if kind == "environment":
            return environment(self, value)
        if value in ("(", "[", "\\{", "\\langle"):
            return bracketed(self, value)
        if value == "{":
            inner = self.sequence()
            self.need("}")
            return inner
        if value == "|":
            self.num_bars += 1
            inner = self.sum()
            self.num_bars -= 1
            self.need("|")
            return ("fn", "abs", inner)
        if kind == "command":
            return command(self, value)
        raise Unreadable(f"unexpected {token.value or 'end'!r}")
