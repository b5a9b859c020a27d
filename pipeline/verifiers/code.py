"""Judge a Python program that a model wrote, by stdin/stdout tests or by asserts; it runs in the sandbox and nowhere else.

Expected outputs never enter the sandbox that the program runs in. For stdin/stdout tests this process compares what came out,
at full length; for asserts a second sandbox runs the tests and calls the program across (``sandbox/tests_side.py``).

What counts as what:

- *wrong*: other output, a failed assert, an exception, an exit status other than 0 (even after the right output), an end before
  all calls were answered (``sys.exit``, ``os._exit``), output without end. Output is compared as text, line by line, without
  the white space at the ends of lines and the empty lines at the end: ``0.30`` is not ``0.3`` unless the test has a tolerance.
- *undecided*: the wall clock, the processor time or the memory of all processes together ran out, because these limits are ours
  and the load is the machine's; a program that imports what the sandbox does not show it (``sandbox/packages.py``); tests that
  do not run, that never call the program, that look at what it prints, or whose values cannot cross; a program that stops
  where it asks for shared anonymous memory (``mmap.mmap(-1, n)``), which the sandbox refuses.

What it does not catch: tests that ask the program itself whether it is right (``assert solution.is_correct(x)``).
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.sandbox.choice import chosen_sandbox
from stillhouse.pipeline.sandbox.exchange import judge_calls
from stillhouse.pipeline.sandbox.packages import VARIABLE as PACKAGES
from stillhouse.pipeline.sandbox.packages import shown_packages
from stillhouse.pipeline.sandbox.records import KilledFor, Limits, SandboxResult, Tier
from stillhouse.pipeline.sandbox.run import run_sandboxed
from stillhouse.pipeline.sandbox.service import SandboxService
from stillhouse.pipeline.verifiers.code_tests import (
    accepted_outputs,
    are_rows,
    arguments,
    as_asserts,
    as_text,
    from_json,
    same,
    tolerances,
)
from stillhouse.pipeline.verifiers.fenced_program import program_of
from stillhouse.pipeline.verifiers.judgement import Judgement
from stillhouse.pipeline.verifiers.program_output import first_difference, normalised

DEADLINE_S = 10.0
MAX_PROGRAM_CHARS = 1 << 20
_ROOM_BYTES, _ERROR_BYTES = 1 << 20, 16 << 20
_SEEDS = re.compile(r"\bseed\(")
_FRAME = re.compile(rb'^  File "([^"\n]+)", line \d', re.MULTILINE)
_NO_SHARED_MEMORY = "PermissionError: [Errno 1] Operation not permitted"
_MISSING_MODULE = re.compile(r"ModuleNotFoundError: No module named '(\w+)")
_LIMIT_WORDS: dict[KilledFor, str] = {
    "time": "not ready after {:g} s; killed",
    "cpu": "the processor time ran out",
    "files": "it made more files than allowed; killed",
    "memory": "all its processes together took more memory than allowed; killed",
}
# The setup and the program in one module; files of their own keep the program's line numbers.
_WITH_SETUP = """
for _name in ("setup.py", "program.py"):
    with open(_name, "rb") as _file:
        exec(compile(_file.read(), _name, "exec"))
"""
# Calls a function with each row's arguments, what it prints left out, and writes its results behind a nonce.
_CALLS = """
import json, os, sys, types
nonce, entry_point, calls = json.load(sys.stdin)
out = open(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
program = sys.modules["program"] = types.ModuleType("program")
for name in ("setup.py", "program.py"):
    with open(name, "rb") as file:
        exec(compile(file.read(), name, "exec"), vars(program))
if entry_point.isidentifier() and entry_point not in vars(program) and "Solution" in vars(program):
    entry_point = "Solution()." + entry_point
candidate = eval(entry_point, vars(program))
results = [candidate(*arguments) for arguments in calls]
out.write("\\n" + nonce + json.dumps(results, default=lambda value: value.tolist()) + "\\n")
out.close()
"""


def verify_code(
    problem_entry: Mapping[str, Any],
    completion: str,
    *,
    timeout_s: float = DEADLINE_S,
    sandbox: Tier | SandboxService | None = None,
) -> Judgement:
    """Judge the program in a whole completion (`program_of`: the last python block). Otherwise as `verify_program`."""
    program = program_of(completion)
    if program is None:
        return Judgement("wrong", "no closed ```python block after the think block")
    return verify_program(problem_entry, program, timeout_s=timeout_s, sandbox=sandbox)


def verify_program(
    problem_entry: Mapping[str, Any],
    program: str,
    *,
    timeout_s: float = DEADLINE_S,
    sandbox: Tier | SandboxService | None = None,
) -> Judgement:
    """Judge the source of a program.

    Args:
        problem_entry: ``tests``, one of three forms, lists also as JSON text:

            - a list of ``{"stdin": …, "stdout": …}`` (text, or a list of lines); ``stdout_any`` in place of ``stdout`` is a
              list of outputs that are all right; ``rel_tol`` or ``abs_tol`` let numbers differ so much;
            - a list of ``{"args": […], "returns": …}``, JSON values, with the same tolerances, for ``entry_point``;
            - Python source with asserts, as one text or a list. Functions ``test_*``, classes ``Test*`` and unittest's test
              cases that the tests do not call themselves are called, ``check(candidate)`` with the ``entry_point``.

            ``entry_point`` is a name, or an expression as ``Solution().method``. ``setup`` is source that the program gets
            before its own, and asserts get too: imports that everybody counts on, classes that pass between the two.
        program: Python source.
        timeout_s: seconds for each stdin/stdout test, or for all asserts together.
        sandbox: a tier of this machine's sandbox, or a service (no tests in Python); None is what the environment's
            ``STILLHOUSE_SANDBOX`` says, strict where it says nothing.

    Raises:
        RecipeError: the entry is not of this form, or its tests cannot run on a service.
        SandboxUnavailable: the sandbox is not there. Nothing has been run.
    """
    sandbox = chosen_sandbox() if sandbox is None else sandbox
    tests = from_json(problem_entry.get("tests"))
    setup, entry_point = (str(problem_entry.get(name) or "") for name in ("setup", "entry_point"))
    if len(program) > MAX_PROGRAM_CHARS:
        return Judgement("undecided", f"the program has {len(program)} characters, more than {MAX_PROGRAM_CHARS}; not run")
    if isinstance(tests, Sequence) and tests and all(isinstance(test, str) for test in tests):
        tests = tests if isinstance(tests, str) else "\n".join(tests)  # MBPP's test_list: an assert each
    elif are_rows(tests, "args"):
        if not entry_point:
            raise RecipeError('tests that are rows of "args" and "returns" need an "entry_point", the function to call')
        if isinstance(sandbox, SandboxService):
            return _by_calls(program, setup, entry_point, tests, timeout_s, sandbox)
        tests = as_asserts(tests)
    if isinstance(tests, str) and tests.strip():
        if isinstance(sandbox, SandboxService):
            raise RecipeError("tests with asserts need a sandbox on this machine; a service runs one program from start to end")
        return _by_asserts(program, tests, entry_point, setup, timeout_s, sandbox)
    if are_rows(tests, "stdout", "stdout_any"):
        return _by_output(program, setup, tests, timeout_s, sandbox)
    raise RecipeError(
        'an entry of kind code needs "tests": a list of {"stdin": …, "stdout": …} or of {"args": […], "returns": …}, or Python '
        f"source with asserts; got {str(tests)[:80]!r}"
    )


def _by_output(
    program: str, setup: str, tests: Sequence[Mapping[str, Any]], timeout_s: float, sandbox: Tier | SandboxService
) -> Judgement:
    source, files = (_WITH_SETUP, {"setup.py": setup, "program.py": program}) if setup else (program, {})
    contents = {name: text.encode(errors="surrogatepass") for name, text in files.items()}
    for number, test in enumerate(tests, 1):
        wanted = accepted_outputs(test)
        limits = Limits(wall_s=timeout_s, output_bytes=4 * max(map(len, wanted)) + _ROOM_BYTES, error_bytes=_ERROR_BYTES)
        stdin = as_text(test.get("stdin"))
        if isinstance(sandbox, SandboxService):
            result = sandbox.run_program(source, stdin, files=contents, limits=limits)
        else:
            main = {"main.py": source.encode(errors="surrogatepass")} | contents
            result = run_sandboxed(main, ("main.py",), stdin.encode(errors="surrogatepass"), limits=limits, tier=sandbox)
        for expected in wanted:
            on_service = isinstance(sandbox, SandboxService)
            judgement = _compare(result, expected, program, timeout_s, *tolerances(test), on_service=on_service)
            if judgement.outcome != "wrong":
                break
        if judgement.outcome != "correct":
            return Judgement(judgement.outcome, f"test {number} of {len(tests)}: {judgement.reason}")
    return Judgement("correct", f"the output of all {len(tests)} tests is as expected")


def _compare(
    result: SandboxResult, expected: bytes, program: str, timeout_s: float, rel_tol: float, abs_tol: float, *, on_service: bool
) -> Judgement:
    if result.killed_for in _LIMIT_WORDS:
        return Judgement("undecided", _LIMIT_WORDS[result.killed_for].format(timeout_s))
    if result.killed_for:
        flood = f"{_ERROR_BYTES} bytes on stderr" if len(result.stderr) >= _ERROR_BYTES else f"{len(expected)} bytes expected"
        return Judgement("wrong", f"wrote more than could be right ({flood}); killed")
    if result.exit_status and (why := _not_its_fault(result, program, on_service)):
        return Judgement("undecided", why)
    got, wanted = normalised(result.stdout), normalised(expected)
    line = first_difference(got, wanted, rel_tol, abs_tol)
    if line is not None:
        a, b = (repr(lines[line][:60].decode(errors="replace")) if line < len(lines) else "nothing" for lines in (got, wanted))
        status = f"; exit status {result.exit_status}, {_last_line(result.stderr)}" if result.exit_status else ""
        return Judgement("wrong", f"line {line + 1} is {a}, expected {b}{status}")
    if result.exit_status:
        return Judgement("wrong", f"the right output, then exit status {result.exit_status}: {_last_line(result.stderr)}")
    return Judgement("correct", "as expected")


def _by_calls(
    program: str, setup: str, entry_point: str, rows: Sequence[Mapping[str, Any]], timeout_s: float, service: SandboxService
) -> Judgement:
    """Judge rows of arguments and results on a service: what came back is JSON, and is compared here."""
    nonce = secrets.token_hex(16)
    given = json.dumps([nonce, entry_point, [arguments(row) for row in rows]])
    files = {name: text.encode(errors="surrogatepass") for name, text in (("setup.py", setup), ("program.py", program))}
    result = service.run_program(_CALLS, given, files=files, limits=Limits(wall_s=timeout_s))
    if result.timed_out:
        return Judgement("undecided", _LIMIT_WORDS["time"].format(timeout_s))
    if result.exit_status and (why := _not_its_fault(result, program, on_service=True)):
        return Judgement("undecided", why)
    answers = [line for line in result.stdout.split(b"\n") if line.startswith(nonce.encode())]
    try:
        results = json.loads(answers[-1][len(nonce) :]) if answers else None
    except (ValueError, RecursionError) as error:
        return Judgement("wrong", f"its results are not JSON: {type(error).__name__}")
    if not isinstance(results, list) or len(results) != len(rows):
        said = f"status {result.exit_status}, {_last_line(result.stderr)}"
        return Judgement("wrong", f"the program ended before it had answered all calls: {said}")
    for number, (row, got) in enumerate(zip(rows, results), 1):
        if not same(got, row["returns"], *tolerances(row)):
            said = f"returned {got!r:.60}, expected {row['returns']!r:.60}"
            return Judgement("wrong", _printable(f"test {number} of {len(rows)}: {said}"))
    return Judgement("correct", f"all {len(rows)} results are as expected")


def _by_asserts(program: str, tests: str, entry_point: str, setup: str, timeout_s: float, tier: Tier) -> Judgement:
    ended = judge_calls(program, tests, entry_point, setup, limits=Limits(wall_s=timeout_s), tier=tier)
    if ended.killed_for in _LIMIT_WORDS:
        return Judgement("undecided", _LIMIT_WORDS[ended.killed_for].format(timeout_s))
    if ended.killed_for:
        return Judgement("wrong", "answered with more than the limit on output; killed")
    if ended.program_status is not None:
        return Judgement("wrong", f"the program ended, status {ended.program_status}, before it had answered all calls")
    reason = _printable(ended.reason)
    if missing := _not_shown(reason):
        return Judgement("undecided", missing if ended.outcome == "wrong" else f"{reason}; {missing}")
    if ended.outcome == "wrong" and (why := _wants_shared_memory(reason, program)):
        return Judgement("undecided", why)
    if ended.outcome == "wrong" and _SEEDS.search(tests) and _draws(setup, program):
        return Judgement("undecided", f"{reason}; the tests seed a random generator, and the program's is another process's")
    if ended.outcome not in ("correct", "wrong"):
        return Judgement("undecided", reason)
    return Judgement(ended.outcome, reason)


def _not_its_fault(result: SandboxResult, program: str, on_service: bool) -> str:
    """Why a program that ended with an error proves nothing, "" where it did not."""
    said = _last_line(result.stderr)
    frames = _FRAME.findall(result.stderr.rpartition(b"Traceback (most recent call last):")[2])
    if b"Traceback" in result.stderr and b"setup.py" in frames and b"program.py" not in frames:
        return f"the setup stops with {said}"
    return _not_shown(said, on_service) or ("" if on_service else _wants_shared_memory(said, program))


def _wants_shared_memory(error: str, program: str) -> str:
    """Why a program that stopped where our filter refuses shared anonymous memory proves nothing, "" where it did not."""
    if _NO_SHARED_MEMORY in error and "mmap" in _imported(program):
        return f"{error}; the sandbox has no shared anonymous memory, only MAP_PRIVATE or a file's"
    return ""


def _draws(setup: str, program: str) -> bool:
    """Whether a program uses a random generator, by its own imports or the setup's."""
    code = re.sub(r"#.*", "", program)
    by_module = ("random." in code or ".random" in code) and _imported(f"{setup}\n{program}") & {"random", "numpy"}
    return "random" in _imported(program) or bool(by_module)


def _imported(source: str) -> set[str]:
    """The names in the import statements of a text that need not be Python."""
    statements = (re.findall(r"\w+", text.partition("#")[0]) for text in re.split(r"[;:\n]", source))
    return {name for names in statements if names[:1] in (["import"], ["from"]) for name in names}


def _not_shown(error: str, on_service: bool = False) -> str:
    """Why a program, or its tests, that stopped for want of a module proves nothing, "" where it did not."""
    found = _MISSING_MODULE.search(error)
    if not found or found[1] in sys.stdlib_module_names:
        return ""
    if on_service:
        return f"imports {found[1]}, which the sandbox service does not have"
    shown = shown_packages()
    sees = f"the standard library and {shown}" if shown.versions else "the standard library only"
    named = ",".join((*shown.imports, found[1]))
    return f"imports {found[1]}, and the sandbox shows {sees}; where it is installed, {PACKAGES}={named} shows it too"


def _last_line(stderr: bytes) -> str:
    return _printable(stderr.decode(errors="replace").strip().rpartition("\n")[2])[:120] or "nothing on stderr"


def _printable(text: str) -> str:
    """A program's words without what would steer a terminal, and no more of them than somebody reads."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:500])
