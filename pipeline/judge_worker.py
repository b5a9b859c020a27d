"""The process that judges text that a model wrote with other people's code: reasoning-gym's scorers, math-verify, JSON
schemas, regular expressions, a user's own function.

Started by file path (``python -P judge_worker.py``) and importing nothing of stillhouse, so that it starts the same way from a
shell, a thread and a Ray actor. One JSON request a line on stdin, one JSON reply a line on stdout. It has no clock of its
own: whoever asks kills it at the deadline.

What it covers: a hang, memory without bound, a crash, files written, processes started, sockets opened, and scorers that
``eval`` the answer with their own variables (the gold among them) in scope. The environment is empty and the network is cut
where the kernel allows it (a network namespace of its own). What it does not cover: it is not a sandbox against a determined
attacker; it runs as the same user, and can read what that user can read.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import io
import json
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

MEMORY_LIMIT_BYTES = 3 << 30
ORPHAN_LIMIT_S = 120
"""A worker whose parent died while it was computing ends by itself after this long."""

_FORBIDDEN_EVENTS = (
    "ctypes.", "os.chmod", "os.chown", "os.exec", "os.fork", "os.kill", "os.link", "os.mkdir", "os.posix_spawn", "os.putenv",
    "os.remove", "os.rename", "os.rmdir", "os.spawn", "os.symlink", "os.system", "os.truncate", "os.unlink", "pty.",
    "shutil.", "socket.", "subprocess.", "urllib.",
)  # fmt: skip
_JUNK_PREFIX, _JUNK_SUFFIX = "I cannot solve it, maybe ", " or something else"


def encode_entry(value: Any) -> Any:
    """Turn a reasoning-gym entry into plain JSON values; tuples and non-text keys survive, which plain JSON loses.

    Raises:
        TypeError: a value that is neither None, bool, number, fraction, text, list, tuple nor dict.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Fraction):
        return {"__fraction__": str(value)}
    if isinstance(value, tuple):
        return {"__tuple__": [encode_entry(item) for item in value]}
    if isinstance(value, list):
        return [encode_entry(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: encode_entry(item) for key, item in value.items()}
        return {"__items__": [[encode_entry(key), encode_entry(item)] for key, item in value.items()]}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode_entry(value.tolist())
    raise TypeError(f"cannot store a {type(value).__name__}")


def decode_entry(value: Any) -> Any:
    """Undo ``encode_entry``."""
    if isinstance(value, list):
        return [decode_entry(item) for item in value]
    if isinstance(value, dict):
        if "__tuple__" in value:
            return tuple(decode_entry(item) for item in value["__tuple__"])
        if "__fraction__" in value:
            return Fraction(value["__fraction__"])
        if "__items__" in value:
            return {decode_entry(key): decode_entry(item) for key, item in value["__items__"]}
        return {key: decode_entry(item) for key, item in value.items()}
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))


_scorers: dict[str, Callable[[str, dict[str, Any]], float]] = {}
_trusted: set[str] = set()
_judging = False  # imports may do what model text may not


def _literal_eval(source: Any, *scopes: Any) -> Any:
    """Stand in for ``eval`` inside a scorer's module: literals only, but for text that the entry itself holds."""
    if not isinstance(source, str) or source in _trusted:
        return builtins.eval(source, *scopes)
    return ast.literal_eval(source)


def _scorer(task: str, options: dict[str, Any]) -> Callable[[str, dict[str, Any]], float]:
    key = json.dumps([task, options], sort_keys=True)
    if key not in _scorers:
        from reasoning_gym.factory import DATASETS

        dataset_type, config_type = DATASETS[task]
        config = config_type(**options) if dataclasses.is_dataclass(config_type) else config_type()
        vars(sys.modules[dataset_type.__module__])["eval"] = _literal_eval
        _scorers[key] = dataset_type(config=config).score_answer
    return _scorers[key]


def judge_reasoning_gym(task: str, options: Any, entry: Any, answer: str, must_be_plain: bool) -> tuple[str, str]:
    """Score one answer by the task's own scorer: only full marks are correct.

    ``must_be_plain`` is set where the answer is not the gold's own words: then a scorer that also gives full marks to prose
    around the gold (around the answer, where there is no gold) proves nothing by accepting the answer, and the outcome is
    undecided. An answer that the scorer cannot read, though it reads the gold, is wrong.
    """
    score_answer = _scorer(task, decode_entry(options))
    entry = decode_entry(entry)
    gold = entry["answer"]
    _trusted.clear()
    _trusted.update(_strings(entry))
    try:
        score = float(score_answer(answer, entry))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        if gold is None or float(score_answer(gold, entry)) != 1.0:
            raise
        return "wrong", f"score_answer of {task} cannot read it: {type(error).__name__}: {str(error)[:80]}"
    if score != 1.0 and answer == gold:
        return "undecided", f"score_answer of {task} gave only {score:.3g} to its own answer"
    if score != 1.0:
        return "wrong", f"score_answer of {task} gave {score:.3g}"
    if must_be_plain:
        plain = answer if gold is None else gold
        for junk in (_JUNK_PREFIX + plain, plain + _JUNK_SUFFIX):
            try:
                accepts_prose = float(score_answer(junk, entry)) == 1.0
            except Exception:  # a scorer that chokes on prose does not accept it
                accepts_prose = False
            if accepts_prose:
                return "undecided", f"score_answer of {task} accepts prose around an answer, and this is not the gold"
    return "correct", f"score_answer of {task} gave 1"


def judge_math(gold: str, answer: str) -> tuple[str, str]:
    """Ask math-verify whether two LaTeX expressions are equal; both without dollars and without a box."""
    import sympy
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX only: the plain-expression extractor runs sympy.parse_expr, which executes what it reads.
    targets = [LatexExtractionConfig(boxed_match_priority=-1)]
    parsed = []
    for name, text in (("gold", gold), ("answer", answer)):
        expressions = [e for e in parse(f"${text}$", targets, parsing_timeout=None) if not isinstance(e, str)]
        if not expressions:
            return "undecided", f"the {name} does not parse as mathematics"
        parsed.append(expressions[0])
    if not verify(parsed[0], parsed[1], timeout_seconds=None):
        return "wrong", "math-verify: not equal"
    # math-verify compares numbers after rounding to six decimals, absolute: 1/2**99 would equal 1/2**98.
    if all(isinstance(e, sympy.Expr) and e.is_number and e.is_finite for e in parsed):
        left, right = (sympy.N(e.doit(), 30) for e in parsed)
        if sympy.Float("1e-6") * max(abs(left), abs(right)) < abs(left - right) < sympy.Float("1e-5"):
            return "wrong", "equal only after rounding to six decimals"
    return "correct", "math-verify: equal"


@functools.cache
def _json_judge() -> Callable[[str, Any, str | None], tuple[str, str]]:
    """``judge_json`` of the file beside this one, by its path: neither this process nor that file knows stillhouse."""
    spec = importlib.util.spec_from_file_location("judge_json", Path(__file__).with_name("judge_json.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.judge_json


def judge_regex(pattern: str, answer: str) -> tuple[str, str]:
    """Judge by a regular expression that has to match the whole answer."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        return "undecided", f"the pattern {pattern[:60]!r} is no regular expression: {error}"
    return ("correct", "the pattern matches") if compiled.fullmatch(answer) else ("wrong", "the pattern does not match")


_functions: dict[str, Callable[..., Any]] = {}


def _function(target: str) -> Callable[..., Any]:
    if target not in _functions:
        module, _, name = target.partition(":")
        _functions[target] = getattr(importlib.import_module(module), name)
    return _functions[target]


def judge_by_function(target: str, answer: str, gold: str, entry: dict[str, Any]) -> tuple[str, str]:
    """Call a user's ``function(answer, gold, entry)`` and read what it says."""
    said = _function(target)(answer, gold, entry)
    reason = f"{target} said {said!r}"[:200]
    if isinstance(said, tuple) and len(said) == 2:
        said, reason = said[0], str(said[1])
    if type(said).__module__ == "numpy":  # numpy.isclose says its own kind of True
        said = said.item()
    if said is None or isinstance(said, bool):
        return {True: "correct", False: "wrong", None: "undecided"}[said], reason
    if isinstance(said, str) and said in ("correct", "wrong", "undecided"):
        return said, reason
    return (
        "undecided",
        f"{target} must return True, False, None, one of the three words, or (word, reason); it returned {said!r}"[:300],
    )


def _prepare(what: str, request: dict[str, Any]) -> None:
    if what == "math":
        judge_math("x+1", "1+x")
    elif what == "json":
        _json_judge()("1", True, "1")
    elif what == "python":
        # The path of whoever asks may have grown since this process was started.
        sys.path += [entry for entry in request["path"] if entry not in sys.path]
        importlib.invalidate_caches()
        _function(request["target"])
    elif what == "reasoning_gym":
        import reasoning_gym  # noqa: F401

        _scorer(request["task"], decode_entry(request["options"]))


def _judge(request: dict[str, Any]) -> tuple[str, str]:
    answer = request["answer"]
    if request["op"] == "math":
        return judge_math(request["gold"], answer)
    if request["op"] == "json":
        return _json_judge()(answer, request["schema"], request["gold"])
    if request["op"] == "regex":
        return judge_regex(request["pattern"], answer)
    if request["op"] == "python":
        return judge_by_function(request["target"], answer, request["gold"], request["entry"])
    return judge_reasoning_gym(request["task"], request["options"], request["entry"], answer, request["must_be_plain"])


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """Judge or prepare; ``spent`` says that the memory ran out, perhaps because an earlier item left something behind."""
    global _judging
    spent = False
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # scorers print
            if request["op"] == "prepare":
                _prepare(request["what"], request)
                return {"outcome": "ready", "reason": "", "network": _network}
            _judging = True
            outcome, reason = _judge(request)
    except MemoryError:
        spent = True
        outcome, reason = "undecided", f"the check needed more than {MEMORY_LIMIT_BYTES >> 30} GiB of memory"
    except BaseException as error:  # SystemExit and the like from model text must not end the worker
        outcome, reason = "undecided", f"the check raised {type(error).__name__}: {str(error)[:120]}"
    finally:
        _judging = False
    return {"outcome": outcome, "reason": reason, "network": _network, "spent": spent}


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    if not _judging:
        return
    if event.startswith(_FORBIDDEN_EVENTS):
        raise PermissionError(f"{event} is not allowed while judging")
    if event == "open":
        mode, flags = args[1], args[2]
        by_mode = isinstance(mode, str) and set(mode) & set("wax+")
        if by_mode or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
            raise PermissionError("writing a file is not allowed while judging")


_network = "unknown"


def _cut_network() -> str:
    """Move into a network namespace of one's own, as root or through a user namespace; say what came of it."""
    new_user, new_net = 0x10000000, 0x40000000
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        return "not cut off: this system has no unshare"
    for flags in (new_net, new_user | new_net):
        if libc.unshare(flags) == 0:
            return "cut off"
    return f"not cut off: unshare says {os.strerror(ctypes.get_errno())}"


def serve() -> None:
    """Answer requests until stdin closes."""
    global _network
    _network = _cut_network()
    requests = os.fdopen(os.dup(0), encoding="utf-8")  # what is judged may close, or read, what is called stdin
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(null, 2)  # ANTLR reports on stderr what it cannot parse; a start that fails has spoken before this
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    sys.addaudithook(_refuse)
    for line in requests:
        signal.setitimer(signal.ITIMER_REAL, ORPHAN_LIMIT_S)
        request = json.loads(line)
        reply = _answer(request)
        replies.write(json.dumps({"id": request["id"], **reply}) + "\n")
        replies.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    serve()
