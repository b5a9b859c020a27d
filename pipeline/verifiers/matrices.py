"""Matrices: carry out their sums and products, with trees as cells, and compare them, with tuples too."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from stillhouse.pipeline.verifiers.exact_values import Undecidable
from stillhouse.pipeline.verifiers.tree import Tree

_MAX_CELL = 1_000


def is_matrix(tree: Tree) -> bool:
    """Whether a tree is a matrix, or sums and products with one in them."""
    return tree[0] == "mat" or (tree[0] in ("add", "mul", "neg", "div") and any(is_matrix(part) for part in tree[1:]))


def _matrix(tree: Tree) -> Tree:
    """Carry out sums and products of matrices; the cells stay trees."""
    if tree[0] == "mat" or not is_matrix(tree):
        return tree
    parts = [_matrix(part) for part in tree[1:]]
    if tree[0] == "neg":
        return _scaled(("num", Fraction(-1)), parts[0])
    if tree[0] == "div":
        return _scaled(("div", ("num", Fraction(1)), parts[1]), parts[0])
    total = parts[0]
    for part in parts[1:]:
        if tree[0] == "add":
            if total[0] != "mat" or part[0] != "mat" or (len(total), len(total[1])) != (len(part), len(part[1])):
                raise Undecidable("a sum of matrices of different shape")
            rows = (tuple(("add", x, y) for x, y in zip(row, other)) for row, other in zip(total[1:], part[1:]))
            total = ("mat", *rows)
        elif total[0] == part[0] == "mat":
            if len(total[1]) != len(part) - 1 or len(part) > 9:
                raise Undecidable("a product of matrices that do not fit")
            columns = list(zip(*part[1:]))
            total = ("mat", *(tuple(("add", *(("mul", x, y) for x, y in zip(row, c))) for c in columns) for row in total[1:]))
            if _size(total[1][0], _MAX_CELL) > _MAX_CELL:
                raise Undecidable("too long a product of matrices")
        elif total[0] == "mat" or part[0] == "mat":
            total = _scaled(total, part) if part[0] == "mat" else _scaled(part, total)
        else:
            total = ("mul", total, part)
    return total


def _size(tree: Tree, most: int) -> int:
    """The number of nodes, counted no further than ``most``: a product of products repeats its parts."""
    size = 1
    for part in tree[1:]:
        if isinstance(part, tuple):
            size += _size(part, most - size)
            if size > most:
                break
    return size


def _scaled(factor: Tree, matrix: Tree) -> Tree:
    return ("mat", *(tuple(("mul", factor, cell) for cell in row) for row in matrix[1:]))


def _read_as_matrix(tree: Tree, other: Tree) -> Tree:
    """A tuple beside a matrix: a vector, as long a row or column as the other, or rows in brackets, ``[[1, 2], [3, 4]]``."""
    items = _bracketed(tree)
    if items is None:
        return tree
    rows = [_bracketed(item) for item in items]
    if all(rows):
        return ("mat", *(tuple(row or ()) for row in rows))
    if tree[0] != "tuple" and len(other) != 2:  # [1, 2] is an interval, or a row
        return tree
    return ("mat", items) if len(other) == 2 else ("mat", *((item,) for item in items))


def _bracketed(tree: Tree) -> Tree | None:
    if tree[0] == "tuple":
        return tree[1:]
    return tree[1:3] if tree[0] == "interval" and tree[3:] == (True, True) else None


def same_matrix(gold: Tree, answer: Tree, same: Callable[[Tree, Tree], bool]) -> bool:
    """Whether two matrices are equal cell by cell, after their sums and products are carried out."""
    gold, answer = _matrix(gold), _matrix(answer)
    gold, answer = _read_as_matrix(gold, answer), _read_as_matrix(answer, gold)
    if gold[0] != "mat" or answer[0] != "mat" or (len(gold), len(gold[1])) != (len(answer), len(answer[1])):
        return False
    return all(same(g, a) for row, other in zip(gold[1:], answer[1:]) for g, a in zip(row, other))
