r"""Decide whether two answers, read into trees, are the same answer: by kind of gold, then by value.

What is taken for equal, and what is not:

- a name before the value does not count (``x = 5`` and ``5``), another name does (``x = 5`` is not ``y = 5``);
- equations are equal up to a constant factor, inequalities up to a positive one; a gold that is an inequality takes the
  interval, a gold that is an interval wants an interval back;
- sets and bare lists have no order, tuples do, and so do values given to different names (``AB=4, CD=5``);
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
from stillhouse.pipeline.verifiers.real_sets import REALS, as_real_set, same_real_set
from stillhouse.pipeline.verifiers.same_number import same_number, same_quantity
from stillhouse.pipeline.verifiers.tree import Tree

_MAX_ITEMS = 64
_ROUGHLY = 0.05
_ORDERS = ("<", ">", "<=", ">=", "!=")
_SEQUENCES = ("list", "set", "tuple")


def same_answer(gold: Tree, answer: Tree) -> bool:
    """Whether an answer is the gold's.

    Raises:
        Undecidable: this module cannot tell.
    """
    gold, answer = (_unnamed_group(_without_rounding(tree)) for tree in (gold, answer))
    if {gold[0], answer[0]} & {"either", "both"}:
        return _same_conditions(gold, answer)
    if REALS in (gold, answer):
        return _same_set(gold, answer[2][1] if answer[0] == "rel" and answer[1] == ("in",) else answer)
    if gold[0] == "rel" or answer[0] == "rel":
        # "1 < 1" has no unknown to compare by; it is still the same as itself.
        return gold == answer or _same_relation(gold, answer)
    if "text" in (gold[0], answer[0]):
        return gold[0] == answer[0] and plain_words(gold[1]).strip("()") == plain_words(answer[1]).strip("()")
    if "time" in (gold[0], answer[0]):
        return gold[0] == answer[0] and _same_time(gold, answer)
    if is_matrix(gold) or is_matrix(answer):
        return same_matrix(gold, answer, same_answer)
    if gold[0] in _SEQUENCES or answer[0] in _SEQUENCES:
        return _same_sequence(gold, answer)
    if {gold[0], answer[0]} & {"interval", "union"}:
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


def _named(tree: Tree) -> tuple[str, Tree] | None:
    """Split ``name = value`` or ``name in set``; None for an equation that only holds, as 7 = 11a + c.

    Of a chain ``x = 2 + 3 = 5`` the last member is the value, if those before it are no other numbers.
    """
    if tree[0] != "rel" or set(tree[1]) - {"=", "in"}:
        return None
    operators, sides, names = tree[1:]
    last = sides[-1]
    if operators[-1] == "in":
        return names[-2] or "", last
    if len(sides) == 2 and names[0] is None and names[1] is not None and is_constant(sides[0]):
        return names[1], sides[0]  # 5 = x
    if is_constant(last) and any(is_constant(side) and not same_value(side, last) for side in sides[:-1]):
        return None
    if names[0] is not None:
        return names[0], last
    if len(sides) == 2:
        return ("", last) if is_constant(sides[0]) and is_constant(last) else None
    return ("", last) if is_constant(last) else None


def _head(name: str) -> str:
    """``W`` of ``W(n)``: the letter in the bracket is bound."""
    return name.partition("(")[0] if not name.startswith("(") else name


def _stem(name: str) -> str:
    return _head(name).partition("_")[0]


def _same_relation(gold: Tree, answer: Tree) -> bool:
    gold_named, answer_named = _named(gold), _named(answer)
    if gold_named and answer_named:
        if _head(gold_named[0]) == _head(answer_named[0]) or not gold_named[0] or not answer_named[0]:
            return same_answer(gold_named[1], answer_named[1])
        if gold_named[0].startswith("(") != answer_named[0].startswith("("):
            return False
        return _same_equation(gold, answer)
    if gold[0] != "rel" and answer_named:
        return same_answer(gold, answer_named[1])
    if answer[0] != "rel" and gold_named:
        return same_answer(gold_named[1], answer)
    if gold[0] == answer[0] == "rel":
        gold_equation, answer_equation = (set(tree[1]) <= {"="} for tree in (gold, answer))
        if gold_equation and answer_equation:
            return _same_equation(gold, answer)
        if not gold_equation and not answer_equation and "in" not in gold[1]:
            if answer_named:  # the gold is an inequality, the answer says x in [..]
                return answer_named[0] in _names(gold) and _same_set(gold, answer_named[1])
            return _same_inequality(gold, answer)
        return False
    if gold[0] == "rel" and set(gold[1]) & set(_ORDERS):
        return _same_set(gold, answer)
    return False  # an equation is not its one side; a gold that is a set wants a set, not an inequality


def _same_conditions(gold: Tree, answer: Tree) -> bool:
    """Inequalities with "and" or "or" between them: the set that they leave, else one by one."""
    if answer[0] == "rel" and answer[1] == ("in",):  # x in (-inf, 1) or the like
        return _names(answer) == _names(gold) and _same_conditions(gold, answer[2][1])
    conditions = ("rel", "either", "both")
    if gold[0] in (*conditions, "list") and (gold[0] in conditions or answer[0] != "list"):
        gold_set, answer_set = as_real_set(gold), as_real_set(answer)
        if gold_set is not None and answer_set is not None and _one_unknown(gold, answer):
            return same_real_set(gold_set, answer_set, same_answer)
    lists = ("either", "both", "list")
    if gold[0] not in lists or answer[0] not in lists or {gold[0], answer[0]} == {"either", "both"}:
        return False
    return _same_unordered(gold[1:], answer[1:])


def _names(tree: Tree) -> set[str]:
    parts = tree[1:] if tree[0] in ("either", "both") else (tree,)
    return {name.strip("|") for part in parts if part[0] == "rel" for name in part[3] if name is not None}


def _one_unknown(*trees: Tree) -> bool:
    """Whether inequalities are about the same name; sets have none."""
    return len(set().union(*map(_names, trees))) <= 1


def _difference(tree: Tree) -> Tree:
    return ("add", tree[2][0], ("neg", tree[2][1]))


def _same_equation(gold: Tree, answer: Tree) -> bool:
    if len(gold[2]) != 2 or len(answer[2]) != 2:
        return len(gold[2]) == len(answer[2]) and all(same_answer(g, a) for g, a in zip(gold[2], answer[2]))
    sides = [side for tree in (gold, answer) for side in tree[2]]
    if any(side[0] in (*_SEQUENCES, "interval", "union", "ratio", "text", "mat") for side in sides):
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
    if gold_operators != operators:
        gold_set, answer_set = as_real_set(gold), as_real_set(answer)  # |x| < 1 and -1 < x < 1
        bare = [[name.strip("|") for name in tree[3] if name is not None] for tree in (gold, answer)]
        return bool(gold_set and answer_set) and bare[0] == bare[1] and same_real_set(gold_set, answer_set, same_answer)
    if len(sides) == 2:
        sign = constant_ratio(("add", gold_sides[0], ("neg", gold_sides[1])), ("add", sides[0], ("neg", sides[1])))
        return sign == 1 or (sign == -1 and operators == ("!=",))
    return all(same_answer(g, a) for g, a in zip(gold_sides, sides))


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


def _unnamed_group(tree: Tree) -> Tree:
    """``p=5, q=2, p=7, q=2`` names its pairs in turn: make it a list of pairs."""
    if tree[0] != "list":
        return tree
    named = [_named(item) for item in tree[1:]]
    names = [pair[0] for pair in named if pair]
    if len(names) != len(tree) - 1:
        return tree
    period = len(set(names))
    if 1 < period < len(names) and len(names) % period == 0 and names == names[:period] * (len(names) // period):
        return ("list", *(("tuple", *tree[at : at + period]) for at in range(1, len(tree), period)))
    return tree


def _items(tree: Tree) -> Sequence[Tree]:
    return tree[1:] if tree[0] in _SEQUENCES else (tree,)


def _values(tree: Tree) -> tuple[list[str | None], list[Tree]]:
    named = [(_named(item), item) for item in _items(tree)]
    return [pair[0] if pair else None for pair, _ in named], [pair[1] if pair else item for pair, item in named]


def _same_sequence(gold: Tree, answer: Tree) -> bool:
    if {gold[0], answer[0]} & {"interval", "union"}:
        other = answer if gold[0] in ("interval", "union") else gold
        if other[0] == "list" and _are_intervals(other[1:]):  # (-inf, 1) and (2, inf): where a function rises
            return _same_set(*(("union", *tree[1:]) if tree is other else tree for tree in (gold, answer)))
        if other[0] == "list" and any(item[0] == "rel" and item[1][0] in _ORDERS for item in other[1:]):
            raise Undecidable("two inequalities, and no word whether both or one of them")
        return other[0] != "list" and _same_set(gold, answer)
    if {gold[0], answer[0]} == {"tuple", "set"}:
        return False
    grouped_alone = any(a[0] in ("tuple", "set") and b[0] not in _SEQUENCES for a, b in ((gold, answer), (answer, gold)))
    if grouped_alone and (len(_items(gold)) != 1 or len(_items(answer)) != 1):
        return False
    (gold_names, gold_values), (names, values) = _values(gold), _values(answer)
    if max(len(gold_values), len(values)) > _MAX_ITEMS:
        raise Undecidable(f"more than {_MAX_ITEMS} items")
    all_named = None not in gold_names and None not in names and gold[0] == answer[0] == "list"
    if all_named and len({_stem(n) for n in gold_names}) > 1:
        return _same_unordered(_items(gold), _items(answer))
    if "tuple" in (gold[0], answer[0]) or _parts_have_own_names(gold_names, names) or _parts_have_own_names(names, gold_names):
        return len(values) == len(gold_values) and all(same_answer(g, a) for g, a in zip(gold_values, values))
    if all_named and any(_head(n) != _stem(n) for n in (*gold_names, *names)):  # a_3 = 2, a_37 = 19
        return _same_unordered(_items(gold), _items(answer))
    return _same_unordered(gold_values, values)


def _are_intervals(items: Sequence[Tree]) -> bool:
    """Whether items are intervals: each can be one, and a square bracket or an infinite end says so."""
    pieces = [as_real_set(item) if item[0] in ("interval", "tuple") else None for item in items]
    infinite = (("const", "inf"), ("neg", ("const", "inf")))
    return all(pieces) and any(item[0] == "interval" or set(infinite) & set(item[1:]) for item in items)


def _parts_have_own_names(named: Sequence[str | None], unnamed: Sequence[str | None]) -> bool:
    """``AB=4, CD=5`` against ``4, 5``: the order says which is which. ``x_1, x_2`` are the roots of one equation."""
    if len(named) < 2 or None in named or any(name is not None for name in unnamed):
        return False
    return len({_stem(name) for name in named}) > 1


def _same_unordered(gold: Sequence[Tree], answer: Sequence[Tree]) -> bool:
    gold_left, left = _distinct(gold), _distinct(answer)
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
        value = exact_value(item) if is_constant(item) and item[0] not in _SEQUENCES else None
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
        len(ratio) in (3, 4)
        and hours is not None
        and minutes is not None
        and 0 <= hours <= 24
        and (minutes == 0 or 10 <= minutes < 60)
        and hours.denominator == minutes.denominator == 1
    )
