"""The program's end of a function-style check: holds the program, answers what the tests' end (``tests_side.py``) asks of
it."""

import importlib
import json
import sys
import types

from stillhouse.pipeline.sandbox.crossing import decode, encode
from stillhouse.pipeline.sandbox.wire import (
    deep,
    instance,
    raised,
    rebuilt,
    run_coroutine,
    send,
    setup_classes,
    state_of,
    take_pipes,
)


def serve() -> None:
    """Run the setup and the program, then answer requests until the other end closes."""
    with open("setup.py", encoding="utf-8") as file, open("entry_point.txt", encoding="utf-8") as name:
        setup, entry_point = file.read(), name.read()
    incoming, outgoing = take_pipes()
    classes, objects = set(), []

    def refer(value):
        if isinstance(value, Callback):
            return ["c", value.key]
        form = state_of(value, classes, refer)
        if isinstance(value, type) and issubclass(value, Exception):
            return ["x", [kind.__name__ for kind in value.__mro__]]
        if form is None:
            objects.append(value)
            if isinstance(value, types.CoroutineType):
                return ["k", len(objects) - 1]
            form = ["h", len(objects) - 1, type(value).__name__, callable(value), type(value).__module__.partition(".")[0]]
        return form

    class Callback:
        """A function of the tests', called over there."""

        def __init__(self, key):
            self.key = key

        def __call__(self, *args):
            send(outgoing, b"", {"id": request["id"], "back": self.key, "args": [encode(arg, refer) for arg in args]})
            answer = json.loads(incoming.readline())
            if "raised" in answer:
                raise rebuilt(*answer["raised"], {})
            return decode(answer["value"], resolve)

    def resolve(tag, parts):
        if tag == "h":
            return objects[parts[0]]
        if tag == "c":
            return Callback(parts[0])
        if tag == "n":
            return getattr(importlib.import_module(parts[0]), parts[1])
        if tag == "o":
            return instance(parts, classes, vars(program), resolve)
        raise ValueError(f"unknown kind {tag}")

    program, broken = types.ModuleType("program"), None
    sys.modules["program"] = program
    try:
        with open("program.py", encoding="utf-8") as file:
            source = file.read()
        classes |= setup_classes(setup, entry_point)
        exec(compile(setup, "setup.py", "exec"), vars(program))
        exec(compile(source, "program.py", "exec"), vars(program))
    except BaseException as error:
        broken = error
    for line in incoming:
        with deep():
            request = json.loads(line)
        reply = {"id": request["id"]}
        try:
            if broken is not None:
                raise broken
            reply |= act(request, objects, vars(program), refer, resolve)
        except BaseException as error:
            reply = {"id": request["id"], "raised": raised(error)}
        with deep():
            send(outgoing, b"", reply)


def act(request, objects, names, refer, resolve):
    """Do what one request asks for."""
    do = request["do"]
    if do == "name":
        return {"value": encode(names[request["name"]], refer)} if request["name"] in names else {"missing": True}
    target = objects[request["on"]]
    with deep():
        args = [decode(arg, resolve) for arg in request["args"]]
        named = {name: decode(value, resolve) for name, value in request["kwargs"].items()}
    if do != "call":
        result = {
            "attribute": getattr,
            "item": lambda t, k: t[k],
            "await": run_coroutine,
            "set": setattr,
            "set item": lambda t, k, v: t.__setitem__(k, v),
            "iter": iter,
            "next": next,
            "len": len,
            "str": str,
            "repr": repr,
        }[do]
        return {"value": encode(result(target, *args), refer)}
    returned = target(*args, **named)
    with deep():
        result = encode(returned, refer)
        changed = [*enumerate(args), *named.items()]
        before = [*request["args"], *request["kwargs"].values()]
        after = [(name, encode(arg, refer), old) for (name, arg), old in zip(changed, before)]
    return {"value": result, "changed": {name: new for name, new, old in after if new != old and new[0] != "h"}}
