"""Values that cross between the program's sandbox and the tests': plain data as JSON, everything else by reference.

Runs inside both sandboxes. Not pickle: to read a pickle is to run it. What arrives is data and nothing else; a
subclass of a builtin type arrives as the builtin type, so that an ``__eq__`` of the sender's stays with the sender.
"""

import collections
import datetime
import decimal
import fractions
import functools
import math
import sys


class CannotCross(BaseException):
    """A value has no form in which it could be handed over. Not an Exception, and noted: tests must not swallow it."""

    reasons = ()

    def __init__(self, reason=""):
        super().__init__(reason)
        CannotCross.reasons += (reason,)


_SEQUENCES = {"l": list, "t": tuple, "s": set, "f": frozenset, "q": collections.deque}
_VIEWS = {"K": type({}.keys()), "V": type({}.values()), "I": type({}.items())}
_FACTORIES = {kind.__name__: kind for kind in (int, float, str, list, dict, set, tuple, bool)}
_TIMES = {"date": datetime.date, "datetime": datetime.datetime, "time": datetime.time}
_ARRAY_KINDS = "biufcSUmM"  # numpy's, of fixed size: nothing in them refers to an object


def encode(value, refer):
    """Turn a value into JSON values; ``refer(value)`` gives the form of what is not plain data, or raises CannotCross."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["i", int.__format__(value, "x")]  # decimal digits are limited by the interpreter, hexadecimal ones are not
    numpy = sys.modules.get("numpy")  # where nobody has imported it, there is none of it
    if (
        numpy is not None
        and (type(value) is numpy.ndarray or isinstance(value, numpy.generic))
        and value.dtype.kind in _ARRAY_KINDS
    ):
        array = numpy.asarray(value)
        return ["A" if type(value) is numpy.ndarray else "a0", array.dtype.str, list(array.shape), array.tobytes().hex()]
    if isinstance(value, float):
        return ["d", float.hex(value)]
    if isinstance(value, complex):
        return ["z", value.real.hex(), value.imag.hex()]
    if isinstance(value, (bytes, bytearray)):
        return ["b" if isinstance(value, bytes) else "a", bytes(value).hex()]
    if isinstance(value, dict):
        kind = next(kind for kind in (collections.OrderedDict, dict) if isinstance(value, kind))
        pairs = [[encode(key, refer), encode(item, refer)] for key, item in kind.items(value)]
        if kind is collections.OrderedDict:
            return ["O", *pairs]
        if isinstance(value, collections.Counter):
            return ["C", *pairs]
        factory = getattr(value.default_factory, "__name__", "") if isinstance(value, collections.defaultdict) else ""
        return ["M", factory, *pairs] if factory in _FACTORIES else ["m", *pairs]
    for tag, kind in _VIEWS.items():
        if isinstance(value, kind):
            return [tag, *(encode(item, refer) for item in value)]
    if isinstance(value, tuple) and isinstance(fields := getattr(value, "_fields", None), tuple):
        return ["N", type(value).__name__, list(fields), [encode(item, refer) for item in tuple.__iter__(value)]]
    for tag, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return [tag, *(encode(item, refer) for item in kind.__iter__(value))]
    if isinstance(value, range):
        return ["r", *(encode(n, refer) for n in (value.start, value.stop, value.step))]
    if isinstance(value, decimal.Decimal):
        return ["D", str(value)]
    if isinstance(value, fractions.Fraction):
        return ["F", encode(value.numerator, refer), encode(value.denominator, refer)]
    if isinstance(value, datetime.timedelta):
        return ["T", value.days, value.seconds, value.microseconds]
    for name in ("datetime", "date", "time"):  # a datetime is a date
        if isinstance(value, _TIMES[name]):
            return ["t" + name, value.isoformat()]
    return refer(value)


def decode(form, resolve):
    """Undo ``encode``; ``resolve(tag, parts)`` reads the receiver's kinds of reference.

    Raises:
        ValueError, TypeError: not a form that ``encode`` writes (an unhashable member of a set, digits that are none).
    """
    if form is None or isinstance(form, (bool, str)):
        return form
    if not isinstance(form, list) or not form or not isinstance(form[0], str):
        raise ValueError("not a value")
    tag, *parts = form
    if tag == "i":
        return int(parts[0], 16)
    if tag == "d":
        return float.fromhex(parts[0])
    if tag == "z":
        return complex(float.fromhex(parts[0]), float.fromhex(parts[1]))
    if tag in ("b", "a"):
        return (bytes if tag == "b" else bytearray).fromhex(parts[0])
    if tag in ("m", "O", "C", "M"):
        pairs = [(decode(key, resolve), decode(item, resolve)) for key, item in parts[tag == "M" :]]
        if tag == "M":
            return collections.defaultdict(_FACTORIES[parts[0]], pairs)
        return {"m": dict, "O": collections.OrderedDict, "C": _counter}[tag](pairs)
    if tag in _VIEWS:
        items = [decode(item, resolve) for item in parts]
        shown = dict(items) if tag == "I" else dict(enumerate(items)) if tag == "V" else dict.fromkeys(items)
        return shown.items() if tag == "I" else shown.values() if tag == "V" else shown.keys()
    if tag == "N":
        name, fields, items = parts
        values = tuple(decode(item, resolve) for item in items)
        if len(fields) != len(values) or any(map(callable, values)) or set(fields) & set(dir(tuple)):
            return values  # its attributes would be the sender's code
        return _named_tuple(name, tuple(fields))(*values)
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](decode(item, resolve) for item in parts)
    if tag in ("A", "a0"):
        return _array(*parts)[() if tag == "a0" else ...]
    if tag == "r":
        return range(*(decode(part, resolve) for part in parts))
    if tag == "D":
        return decimal.Decimal(parts[0])
    if tag == "F":
        return fractions.Fraction(decode(parts[0], resolve), decode(parts[1], resolve))
    if tag == "T":
        return datetime.timedelta(*parts)
    if tag[0] == "t" and tag[1:] in _TIMES:
        return _TIMES[tag[1:]].fromisoformat(parts[0])
    return resolve(tag, parts)


def _array(kind, shape, content):
    import numpy  # shown here as it is there

    kind, content = numpy.dtype(str(kind)), bytes.fromhex(content)
    if kind.kind not in _ARRAY_KINDS or kind.itemsize * math.prod(shape) != len(content):
        raise ValueError("not an array")
    return numpy.frombuffer(content, kind).reshape(shape).copy()


def _counter(pairs):
    return collections.Counter(dict(pairs))


@functools.lru_cache(64)
def _named_tuple(name, fields):
    return collections.namedtuple(name, fields)


def overwrite(old, new):
    """Make a value that was handed over by copy look like what the other side made of it in place."""
    if isinstance(old, (list, bytearray)):
        old[:] = new
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)
    elif isinstance(old, collections.deque):
        old.clear()
        old.extend(new)
    elif "numpy" in sys.modules and isinstance(old, sys.modules["numpy"].ndarray):
        old[...] = new
    elif isinstance(old, tuple) and len(old) == len(new):
        for a, b in zip(old, new):
            overwrite(a, b)
    elif type(old) is type(new) and hasattr(old, "__dict__"):
        vars(old).clear()
        vars(old).update(vars(new))
