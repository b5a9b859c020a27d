"""Judge a Python program that a model wrote, by stdin/stdout tests or by asserts; it runs in the sandbox and nowhere else.

Expected outputs never enter the sandbox that the program runs in. For stdin/stdout tests this process compares what came out,
at full length; for asserts a second sandbox runs the tests and calls the program across (``sandbox/tests_side.py``).

What counts as what:

- *wrong*: other output, a failed assert, an exception, an exit status other than 0 (even after the right output), an end before
  all calls were answered (``sys.exit``, ``os._exit``), output without end. Output is compared as text, line by line, without
  the white space at the ends of lines and the empty lines at the end: ``0.30`` is not ``0.3``.
- *undecided*: the wall clock, the processor time or the memory of all processes together ran out, because these limits are ours
  and the load is the machine's; a program that imports what is not in the standard library, which is all that it is shown;
  tests that do not run, that never call the program, that look at what it prints, or whose values cannot cross.

What it does not catch: tests that ask the program itself whether it is right (``assert solution.is_correct(x)``).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.sandbox.choice import chosen_sandbox
from stillhouse.pipeline.sandbox.exchange import judge_calls
from stillhouse.pipeline.sandbox.records import KilledFor, Limits, SandboxResult, Tier
from stillhouse.pipeline.sandbox.run import run_sandboxed
from stillhouse.pipeline.sandbox.service import SandboxService
from stillhouse.pipeline.verifiers.fenced_program import program_of
from stillhouse.pipeline.verifiers.judgement import Judgement

DEADLINE_S = 10.0
MAX_PROGRAM_CHARS = 1 << 20
_ROOM_BYTES, _ERROR_BYTES = 1 << 20, 16 << 20
_MISSING_MODULE = re.compile(r"ModuleNotFoundError: No module named '(\w+)")
_LIMIT_WORDS: dict[KilledFor, str] = {
    "time": "not ready after {:g} s; killed",
    "cpu": "the processor time ran out",
    "files": "it made more files than allowed; killed",
    "memory": "all its processes together took more memory than allowed; killed",
}


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
        problem_entry: ``tests``, either a list of ``{"stdin": …, "stdout": …}`` (text, or a list of lines) or Python source
            with asserts, as one text or a list. For the latter ``entry_point`` (a name, or an expression as
            ``Solution().method``), which is handed to ``check(candidate)`` where the tests define that, and ``setup``, source
            that the program and the tests both get (classes that pass between them). Functions ``test_*``, classes ``Test*``
            and unittest's test cases that the tests do not call themselves are called.
        program: Python source.
        timeout_s: seconds for each stdin/stdout test, or for all asserts together.
        sandbox: a tier of this machine's sandbox, or a service (stdin/stdout tests only); None is what the environment's
            ``STILLHOUSE_SANDBOX`` says, strict where it says nothing.

    Raises:
        RecipeError: the entry is not of this form, or its tests cannot run on a service.
        SandboxUnavailable: the sandbox is not there. Nothing has been run.
    """
    sandbox = chosen_sandbox() if sandbox is None else sandbox
    tests = problem_entry.get("tests")
    if len(program) > MAX_PROGRAM_CHARS:
        return Judgement("undecided", f"the program has {len(program)} characters, more than {MAX_PROGRAM_CHARS}; not run")
    if isinstance(tests, Sequence) and tests and all(isinstance(test, str) for test in tests):
        tests = tests if isinstance(tests, str) else "\n".join(tests)  # MBPP's test_list: an assert each
    if isinstance(tests, str) and tests.strip():
        if isinstance(sandbox, SandboxService):
            raise RecipeError("tests with asserts need a sandbox on this machine; a service runs stdin/stdout tests only")
        setup, entry_point = (problem_entry.get(name) or "" for name in ("setup", "entry_point"))
        return _by_asserts(program, tests, str(entry_point), str(setup), timeout_s, sandbox)
    if isinstance(tests, Sequence) and tests and all(isinstance(test, Mapping) and "stdout" in test for test in tests):
        return _by_output(program, tests, timeout_s, sandbox)
    raise RecipeError(
        'an entry of kind code needs "tests": a list of {"stdin": …, "stdout": …}, or Python source with asserts; '
        f"got {str(tests)[:80]!r}"
    )


def normalised(output: bytes) -> list[bytes]:
    """What of an output counts: its lines without white space at their ends, and without empty lines at the end of all."""
    lines = [line.rstrip() for line in output.split(b"\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _by_output(program: str, tests: Sequence[Mapping[str, Any]], timeout_s: float, sandbox: Tier | SandboxService) -> Judgement:
    for number, test in enumerate(tests, 1):
        expected = _text(test["stdout"]).encode(errors="surrogatepass")
        limits = Limits(wall_s=timeout_s, output_bytes=4 * len(expected) + _ROOM_BYTES, error_bytes=_ERROR_BYTES)
        stdin = _text(test.get("stdin"))
        if isinstance(sandbox, SandboxService):
            result = sandbox.run_program(program, stdin, limits=limits)
        else:
            data = stdin.encode(errors="surrogatepass")
            result = run_sandboxed(
                {"main.py": program.encode(errors="surrogatepass")}, ("main.py",), data, limits=limits, tier=sandbox
            )
        judgement = _compare(result, expected, timeout_s)
        if judgement.outcome != "correct":
            return Judgement(judgement.outcome, f"test {number} of {len(tests)}: {judgement.reason}")
    return Judgement("correct", f"the output of all {len(tests)} tests is as expected")


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "\n".join(map(str, value))
    return "" if value is None else str(value)


def _compare(result: SandboxResult, expected: bytes, timeout_s: float) -> Judgement:
    if result.killed_for in _LIMIT_WORDS:
        return Judgement("undecided", _LIMIT_WORDS[result.killed_for].format(timeout_s))
    if result.killed_for:
        flood = f"{_ERROR_BYTES} bytes on stderr" if len(result.stderr) >= _ERROR_BYTES else f"{len(expected)} bytes expected"
        return Judgement("wrong", f"wrote more than could be right ({flood}); killed")
    if result.exit_status and (missing := _not_shown(_last_line(result.stderr))):
        return Judgement("undecided", missing)
    got, wanted = normalised(result.stdout), normalised(expected)
    if got != wanted:
        line = next((i for i, (a, b) in enumerate(zip(got, wanted)) if a != b), min(len(got), len(wanted)))
        a, b = (repr(lines[line][:60].decode(errors="replace")) if line < len(lines) else "nothing" for lines in (got, wanted))
        status = f"; exit status {result.exit_status}, {_last_line(result.stderr)}" if result.exit_status else ""
        return Judgement("wrong", f"line {line + 1} is {a}, expected {b}{status}")
    if result.exit_status:
        return Judgement("wrong", f"the right output, then exit status {result.exit_status}: {_last_line(result.stderr)}")
    return Judgement("correct", "as expected")


def _by_asserts(program: str, tests: str, entry_point: str, setup: str, timeout_s: float, tier: Tier) -> Judgement:
    ended = judge_calls(program, tests, entry_point, setup, limits=Limits(wall_s=timeout_s), tier=tier)
    if ended.killed_for in _LIMIT_WORDS:
        return Judgement("undecided", _LIMIT_WORDS[ended.killed_for].format(timeout_s))
    if ended.killed_for:
        return Judgement("wrong", "answered with more than the limit on output; killed")
    if ended.program_status is not None:
        return Judgement("wrong", f"the program ended, status {ended.program_status}, before it had answered all calls")
    if ended.outcome == "wrong" and (missing := _not_shown(ended.reason)):
        return Judgement("undecided", missing)
    if ended.outcome not in ("correct", "wrong"):
        return Judgement("undecided", ended.reason)
    return Judgement(ended.outcome, ended.reason)


def _not_shown(error: str) -> str:
    """Why a program that stopped for want of a module proves nothing, "" where it did not."""
    found = _MISSING_MODULE.search(error)
    if not found or found[1] in sys.stdlib_module_names:
        return ""
    return f"the program imports {found[1]}, and the sandbox shows it the standard library only"


def _last_line(stderr: bytes) -> str:
    return stderr.decode(errors="replace").strip().rpartition("\n")[2][:120] or "nothing on stderr"
