"""Values that cross between the program's sandbox and the tests': plain data as JSON, everything else by reference.

Runs inside both sandboxes. Not pickle: to read a pickle is to run it. What arrives is data and nothing else; a
subclass of a builtin type arrives as the builtin type, so that an ``__eq__`` of the sender's stays with the sender.
"""

import collections
import datetime
import decimal
import fractions


class CannotCross(BaseException):
    """A value has no form in which it could be handed over. Not an Exception: tests must not swallow it."""


_SEQUENCES = {"l": list, "t": tuple, "s": set, "f": frozenset, "q": collections.deque}
_TIMES = {"date": datetime.date, "datetime": datetime.datetime, "time": datetime.time}


def encode(value, refer):
    """Turn a value into JSON values; ``refer(value)`` gives the form of what is not plain data, or raises CannotCross."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["i", int.__format__(value, "x")]  # decimal digits are limited by the interpreter, hexadecimal ones are not
    if isinstance(value, float):
        return ["d", float.hex(value)]
    if isinstance(value, complex):
        return ["z", value.real.hex(), value.imag.hex()]
    if isinstance(value, (bytes, bytearray)):
        return ["b" if isinstance(value, bytes) else "a", bytes(value).hex()]
    if isinstance(value, dict):
        return ["m", *([encode(key, refer), encode(item, refer)] for key, item in dict.items(value))]
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
    if tag == "m":
        return {decode(key, resolve): decode(item, resolve) for key, item in parts}
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](decode(item, resolve) for item in parts)
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
    elif isinstance(old, tuple) and len(old) == len(new):
        for a, b in zip(old, new):
            overwrite(a, b)
    elif type(old) is type(new) and hasattr(old, "__dict__"):
        vars(old).clear()
        vars(old).update(vars(new))
