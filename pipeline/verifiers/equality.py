r"""Decide whether two answers, read into trees, are the same answer: by kind of gold, then by value.

What is taken for equal, and what is not:

- a name before the value does not count (``x = 5`` and ``5``), another name does (``x = 5`` is not ``y = 5``);
- equations are equal up to a constant factor, inequalities up to a positive one; a gold that is an inequality takes the
  interval, a gold that is an interval wants an interval back;
- sets and bare lists have no order, and what a gold lists twice must be there twice; tuples have one, and so have values given
  to different names (``AB=4, CD=5``), which may change places with their names and never are values of one (``x = 4 or 5``);
- ``(a, b)`` is a pair, an open interval or a vector of one row or column; every other bracket must match;
- units are converted; a unit on one side alone does not count; per cent likewise (10% is 10, and 0.1;
  but for a gold below 1, as 0.25, 25% alone);
- a decimal is exact, but two: ten or more right digits of a gold that has no last one, and a gold of four or more digits that
  is the rounded answer. A short decimal that merely rounds to the other side is undecided.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.pipeline.verifiers.evaluate import constant_ratio, decimal_value, exact_value, same_value
from stillhouse.pipeline.verifiers.exact_values import Undecidable, is_constant
from stillhouse.pipeline.verifiers.latex import plain_words
from stillhouse.pipeline.verifiers.matrices import is_matrix, same_matrix
from stillhouse.pipeline.verifiers.named_values import (
    SEQUENCES,
    grouped,
    head,
    items_of,
    named,
    names_and_values,
    same_assignment,
    same_name,
    stem,
)
from stillhouse.pipeline.verifiers.real_sets import REALS, as_real_set, same_real_set, unknowns
from stillhouse.pipeline.verifiers.same_number import same_number, same_quantity
from stillhouse.pipeline.verifiers.tree import TEXT_NAME, Tree, symbols

_MAX_ITEMS = 64
_UNKNOWNS = frozenset("abcdmnpqrstuvwxyz")
_SEQUENCE_LETTERS = frozenset("abcAFST")
_ROUGHLY = 0.05
_ORDERS = ("<", ">", "<=", ">=", "!=")


def same_answer(gold: Tree, answer: Tree) -> bool:
    """Whether an answer is the gold's.

    Raises:
        Undecidable: this module cannot tell.
    """
    gold, answer = (grouped(_without_rounding(tree)) for tree in (gold, answer))
    if {gold[0], answer[0]} & {"either", "both"}:
        return _same_conditions(gold, answer)
    if REALS in (gold, answer):
        return _same_set(gold, answer[2][1] if answer[0] == "rel" and answer[1] == ("in",) else answer)
    if (by_name := same_assignment(gold, answer, same_answer)) is not None:
        return by_name
    if gold[0] == "rel" or answer[0] == "rel":
        # "1 < 1" has no unknown to compare by; it is still the same as itself.
        return gold == answer or _same_relation(gold, answer)
    if "text" in (gold[0], answer[0]):
        return gold[0] == answer[0] and plain_words(gold[1]).strip("()") == plain_words(answer[1]).strip("()")
    if "date" in (gold[0], answer[0]):
        return gold == answer
    if "time" in (gold[0], answer[0]):
        return gold[0] == answer[0] and _same_time(gold, answer)
    if is_matrix(gold) or is_matrix(answer):
        return same_matrix(gold, answer, same_answer)
    if gold[0] in SEQUENCES or answer[0] in SEQUENCES:
        return _same_sequence(gold, answer)
    if {gold[0], answer[0]} & {"interval", "union"} or gold[:2] == answer[:2] == ("opaque", "\\setminus"):
        return _same_set(gold, answer)
    if "ratio" in (gold[0], answer[0]):
        return _same_ratio(gold, answer)
    return same_quantity(gold, answer)


def _without_rounding(tree: Tree) -> Tree:
    """Drop what follows an approximately-equals sign, if it is about the same number."""
    if tree[0] != "approx":
        return tree
    exact = tree[1][2][-1] if tree[1][0] == "rel" else tree[1]
    both = exact, tree[2]
    if all(is_constant(side) for side in both):
        value, rounded = (decimal_value(side) for side in both)
        if abs(value - rounded) > _ROUGHLY * abs(value):
            raise Undecidable("approximately equal, it says, and is not")
    return tree[1]


# ---- names and relations


def _same_relation(gold: Tree, answer: Tree) -> bool:
    gold_named, answer_named = named(gold), named(answer)
    if gold_named and answer_named:
        if gold_named[0] != answer_named[0] and _argument(gold_named[0]) in symbols(gold_named[1]):
            return False  # f(n) = n + 1 and f(x) = n + 1
        if same_name(gold_named[0], answer_named[0]) or not gold_named[0] or not answer_named[0]:
            return same_answer(gold_named[1], answer_named[1])
        if gold_named[0].partition("(")[0] == answer_named[0].partition("(")[0] != "":  # f(1) and f(2), P(A) and P(B)
            return False
        if gold_named[0].startswith(TEXT_NAME) != answer_named[0].startswith(TEXT_NAME):
            return same_answer(gold_named[1], answer_named[1])
        if gold_named[0].startswith("(") != answer_named[0].startswith("("):
            return False
        return _same_equation(gold, answer)
    if gold[0] != "rel" and answer_named:
        return same_answer(gold, answer_named[1])
    if gold[0] == "union" and len(gold) == 2 and gold[1][0] == "rel":  # {x | x > 1} and x > 1
        return _same_relation(gold[1], answer)
    if gold[0] != "rel" and answer[1] == ("=",) and _is_measured(answer[2][0]) and is_constant(gold):
        return same_answer(gold, answer[2][1])
    if answer[0] != "rel" and gold_named:
        return same_answer(gold_named[1], answer)
    if gold[0] == answer[0] == "rel":
        gold_equation, answer_equation = (set(tree[1]) <= {"="} for tree in (gold, answer))
        if gold_equation and answer_equation:
            return _same_equation(gold, answer)
        if not gold_equation and not answer_equation and "in" not in gold[1]:
            if answer_named:  # the gold is an inequality, the answer says x in [..]
                return answer_named[0] in unknowns(gold) and _same_set(gold, answer_named[1])
            return _same_inequality(gold, answer)
        return False
    if gold[0] == "rel" and set(gold[1]) & set(_ORDERS):
        return _same_set(gold, answer)
    return False  # an equation is not its one side; a gold that is a set wants a set, not an inequality


def _argument(name: str) -> str:
    return name.partition("(")[2].removesuffix(")") if not name.startswith("(") else ""


def _is_measured(tree: Tree) -> bool:
    r"""Whether a side names what a problem asks for: ``a + b``, ``xy``, ``\cos A``; no ``2x``, which is to be solved."""
    if tree[0] == "fn":
        return tree[1] in ("sin", "cos", "tan") and tree[2][0] == "sym"
    if tree[0] == "mul":  # "So x = 5" is no product
        return len(tree) == 3 and all(part[0] == "sym" and part[1] in _UNKNOWNS for part in tree[1:])
    letters = [part[1] if part[0] == "neg" else part for part in tree[1:]] if tree[0] == "add" else []
    return all(letter[0] == "sym" for letter in letters) and len(set(letters)) == len(letters) > 1


def _same_conditions(gold: Tree, answer: Tree) -> bool:
    """Inequalities with "and" or "or" between them: the set that they leave, else one by one."""
    if answer[0] == "rel" and answer[1] == ("in",):  # x in (-inf, 1) or the like
        return unknowns(answer) == unknowns(gold) and _same_conditions(gold, answer[2][1])
    conditions = ("rel", "either", "both")
    if gold[0] in (*conditions, "list") and (gold[0] in conditions or answer[0] != "list"):
        gold_set, answer_set = as_real_set(gold), as_real_set(answer)
        if gold_set is not None and answer_set is not None and _one_unknown(gold, answer):
            return same_real_set(gold_set, answer_set, same_answer)
    if gold[0] not in ("either", "rel") and answer[0] == "either" and answer[1][1] == ("=",):  # x = 1, y = 2; not "or"
        return False
    lists = ("either", "both", "list")
    if gold[0] not in lists or answer[0] not in lists or {gold[0], answer[0]} == {"either", "both"}:
        return False
    return _same_unordered(gold[1:], answer[1:])


def _one_unknown(*trees: Tree) -> bool:
    """Whether inequalities are about the same name; sets have none."""
    return len(set().union(*map(unknowns, trees))) <= 1


def _difference(tree: Tree) -> Tree:
    return ("add", tree[2][0], ("neg", tree[2][1]))


def _same_equation(gold: Tree, answer: Tree) -> bool:
    if len(gold[2]) != 2 or len(answer[2]) != 2:
        return len(gold[2]) == len(answer[2]) and all(same_answer(g, a) for g, a in zip(gold[2], answer[2]))
    sides = [side for tree in (gold, answer) for side in tree[2]]
    if any(side[0] in (*SEQUENCES, "interval", "union", "ratio", "text", "mat") for side in sides):
        return all(same_answer(g, a) for g, a in zip(gold[2], answer[2]))
    return constant_ratio(_difference(gold), _difference(answer)) is not None


def _rising(tree: Tree) -> tuple[tuple[str, ...], tuple[Tree, ...]]:
    """Turn a chain of > into one of <."""
    operators, sides = tree[1], tree[2]
    if all(operator in (">", ">=") for operator in operators):
        return tuple("<" if o == ">" else "<=" for o in reversed(operators)), tuple(reversed(sides))
    return operators, sides


def _same_inequality(gold: Tree, answer: Tree) -> bool:
    gold_operators, gold_sides = _rising(gold)
    operators, sides = _rising(answer)
    one_modulus = {gold[3][0], answer[3][0]} in (
        {name, f"|{name}|"} for name in unknowns(gold)
    )  # |x| \ne 3, which is two points
    if gold_operators == operators and not one_modulus and _same_sides(gold_sides, sides, operators):
        return True
    gold_set, answer_set = as_real_set(gold), as_real_set(answer)  # |x| < 1 and -1 < x < 1
    about_one = unknowns(gold) == unknowns(answer)
    return bool(gold_set and answer_set) and about_one and same_real_set(gold_set, answer_set, same_answer)


def _same_sides(gold: Sequence[Tree], answer: Sequence[Tree], operators: Sequence[str]) -> bool:
    if len(gold) == 2:
        sign = constant_ratio(("add", gold[0], ("neg", gold[1])), ("add", answer[0], ("neg", answer[1])))
        return sign == 1 or (sign == -1 and operators == ("!=",))
    return all(same_answer(g, a) for g, a in zip(gold, answer))


def _same_set(gold: Tree, answer: Tree) -> bool:
    if gold == answer:
        return True
    gold_set, answer_set = as_real_set(gold), as_real_set(answer)
    if gold_set is None or answer_set is None:
        if {gold[0], answer[0]} <= {"interval", "union", "rel", "opaque", "set", "tuple"}:
            raise Undecidable("sets that are no unions of intervals")
        return False
    return same_real_set(gold_set, answer_set, same_answer)


# ---- sequences


def _same_sequence(gold: Tree, answer: Tree) -> bool:
    if {gold[0], answer[0]} & {"interval", "union"}:
        other = answer if gold[0] in ("interval", "union") else gold
        if other[0] == "list" and _are_intervals(other[1:]):  # (-inf, 1) and (2, inf): where a function rises
            return _same_set(*(("union", *tree[1:]) if tree is other else tree for tree in (gold, answer)))
        if other[0] == "list" and any(item[0] == "rel" and item[1][0] in _ORDERS for item in other[1:]):
            raise Undecidable("two inequalities, and no word whether both or one of them")
        return other[0] != "list" and _same_set(gold, answer)
    if {gold[0], answer[0]} == {"tuple", "set"}:
        pair = [items_of(tree)[0] if tree[0] == "set" and len(tree) == 2 else tree for tree in (gold, answer)]
        return pair[0][0] == pair[1][0] == "tuple" and same_answer(*pair)  # {(1, 2)}: the one solution
    grouped_alone = any(a[0] in ("tuple", "set") and b[0] not in SEQUENCES for a, b in ((gold, answer), (answer, gold)))
    if grouped_alone and (len(items_of(gold)) != 1 or len(items_of(answer)) != 1):
        return False
    (gold_names, gold_values), (names, values) = names_and_values(gold), names_and_values(answer)
    if max(len(gold_values), len(values)) > _MAX_ITEMS:
        raise Undecidable(f"more than {_MAX_ITEMS} items")
    stems, gold_stems = ({stem(name) for name in found if name} for found in (names, gold_names))
    if len(stems) == len(gold_stems) == 1 and stems != gold_stems:
        return False
    if any(item[0] == "rel" and name is None for item, name in zip(items_of(gold), gold_names)):  # equations
        return gold[0] == answer[0] and _same_unordered(items_of(gold), items_of(answer))
    all_named = None not in gold_names and None not in names and gold[0] == answer[0] == "list"
    if all_named and len(gold_stems) > 1:
        return _same_unordered(items_of(gold), items_of(answer))
    if "tuple" in (gold[0], answer[0]):
        if _several_of_one(gold_names) or _several_of_one(names):
            return False
        return len(values) == len(gold_values) and all(same_answer(g, a) for g, a in zip(gold_values, values))
    if all_named and all(any(head(n) != stem(n) for n in found) for found in (gold_names, names)):  # a_3 = 2, a_37 = 19
        return _same_unordered(items_of(gold), items_of(answer))
    if any(map(_are_members, (gold_names, names))) and not all(gold_names + names):  # a_1 = 1, a_2 = 2 is 1, 2
        return len(values) == len(gold_values) and all(same_answer(g, a) for g, a in zip(gold_values, values))
    repeated = gold[0] == answer[0] == "list" and len(_distinct(gold_values)) < len(gold_values)
    return _same_unordered(gold_values, values, repeated=repeated)


def _several_of_one(names: Sequence[str | None]) -> bool:
    """``x = 1 or x = 2``, ``x = 1, 2``: several values of one name, and so no point."""
    return len(names) > 1 and names[0] is not None and set(names) <= {names[0], None}


def _are_members(names: Sequence[str | None]) -> bool:
    """Whether values are named as members of a sequence, ``a_1, a_2``, and not as roots, ``x_1, x_2``, which have no order."""
    return len(names) > 1 and all(name and "_" in name and stem(name) in _SEQUENCE_LETTERS for name in names)


def _are_intervals(items: Sequence[Tree]) -> bool:
    """Whether items are intervals: each can be one, and a square bracket or an infinite end says so."""
    pieces = [as_real_set(item) if item[0] in ("interval", "tuple") else None for item in items]
    infinite = (("const", "inf"), ("neg", ("const", "inf")))
    return all(pieces) and any(item[0] == "interval" or set(infinite) & set(item[1:]) for item in items)


def _same_unordered(gold: Sequence[Tree], answer: Sequence[Tree], *, repeated: bool = False) -> bool:
    """Whether items are the same in some order; ``repeated``: each as often, as the angles 45, 45 and 90."""
    gold_left, left = (list(items) if repeated else _distinct(items) for items in (gold, answer))
    if len(gold_left) != len(left):
        return False
    for item in gold_left:
        found = next((i for i, other in enumerate(left) if same_answer(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _distinct(items: Sequence[Tree]) -> list[Tree]:
    kept: list[Tree] = []
    for item in items:
        value = exact_value(item) if is_constant(item) and item[0] not in SEQUENCES else None
        if not any(item == other or (value is not None and value == exact_value(other)) for other in kept):
            kept.append(item)
    return kept


# ---- ratios


def _same_ratio(gold: Tree, answer: Tree) -> bool:
    if gold[0] != answer[0]:
        times = gold if gold[0] == "ratio" else answer
        if _looks_like_a_time(times):
            return False
        return same_number(gold, answer)
    if len(gold) != len(answer):
        return False
    if all(same_answer(g, a) for g, a in zip(gold[1:], answer[1:])):
        return True
    if _looks_like_a_time(gold) or _looks_like_a_time(answer):
        return False
    first = constant_ratio(gold[1], answer[1])
    return first is not None and all(
        same_value(("mul", gold[1], a), ("mul", g, answer[1])) for g, a in zip(gold[2:], answer[2:])
    )


def _same_time(gold: Tree, answer: Tree) -> bool:
    """``3:30 p.m.`` is ``15:30``; where one of the two does not say which half of the day, ``3:30`` as well."""
    (_, hour, minutes, half), (_, other_hour, other_minutes, other_half) = gold, answer
    if minutes != other_minutes or (half and other_half and half != other_half):
        return False
    if hour == other_hour:
        return True
    day_hours = [h % 12 + 12 * (part == "p") for h, part in ((hour, half), (other_hour, other_half)) if part]
    return len(day_hours) == 1 and day_hours[0] == (other_hour if half else hour)


def _looks_like_a_time(ratio: Tree) -> bool:
    hours, minutes = exact_value(ratio[1]), exact_value(ratio[2])
    return (
        len(ratio) == 3
        and hours is not None
        and minutes is not None
        and 0 <= hours <= 24
        and (minutes == 0 or 10 <= minutes < 60)
        and hours.denominator == minutes.denominator == 1
    )
