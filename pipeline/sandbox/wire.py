"""What both ends of a function-style check share: the pipes, instances of the setup's classes, exceptions. Runs in both
sandboxes."""

import ast
import builtins
import contextlib
import json
import os
import sys

from stillhouse.pipeline.sandbox.crossing import decode, encode

DEEP = 20_000
"""Recursion limit while values cross: long linked lists."""


def take_pipes():
    """Keep stdin and stdout for the conversation; what is printed or read from here on meets /dev/null."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    return incoming, outgoing


def send(fd, prefix, message):
    data = memoryview(prefix + json.dumps(message).encode() + b"\n")
    while data:
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def deep():
    """Let long linked lists cross; the program keeps the recursion limit that it has chosen."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, DEEP))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def setup_classes(source, entry_point):
    """The classes whose instances cross by their attributes: the setup's, but for one that the program has to fill in."""
    own = {node.id for node in ast.walk(ast.parse(entry_point or "0")) if isinstance(node, ast.Name)}
    return {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)} - own


def state_of(value, classes, refer):
    """The form of an instance of a class that both sides have, None for anything else."""
    name = type(value).__name__
    return ["o", name, encode(dict(vars(value)), refer)] if name in classes and hasattr(value, "__dict__") else None


def instance(parts, classes, namespace, resolve):
    name, state = parts
    if name not in classes:
        raise ValueError(f"no class {name} in the setup")
    kind = namespace[name]
    attributes = decode(state, resolve)
    if any(callable(getattr(kind, attribute, None)) for attribute in attributes):
        raise ValueError(f"attributes that hide methods of {name}")  # the sender's code would answer for the class
    made = object.__new__(kind)
    vars(made).update(attributes)
    return made


def raised(error):
    """The form of an exception: the names of its type and of that one's bases, and its text."""
    return [[kind.__name__ for kind in type(error).__mro__], str(error)[:300]]


def rebuilt(kinds, text, names, *, ends_loops=True):
    """The exception that the other side raised, as the nearest builtin type (or the setup's) that it is one of.

    Unless it ``ends_loops``, what iterators stop with becomes a RuntimeError, as Python makes of it in a generator: in a
    function that is mapped over the tests' cases it would be the end of the cases.
    """
    known = (names.get(kind, getattr(builtins, kind, None)) for kind in kinds)
    known = (kind for kind in known if isinstance(kind, type) and issubclass(kind, Exception))
    found = next((k for k in known if ends_loops or not issubclass(k, (StopIteration, StopAsyncIteration))), RuntimeError)
    try:
        error = found(text)
    except TypeError:  # wants other arguments (UnicodeDecodeError)
        error = RuntimeError(text)
    error.of_the_program = str(kinds[0])
    return error


def run_coroutine(coroutine):
    """Wait for a coroutine's result."""
    import asyncio  # only here: it takes longer to import than all else

    return asyncio.run(coroutine)
