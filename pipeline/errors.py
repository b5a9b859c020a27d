"""The errors that a user is meant to read: one sentence, one exit code each.

Each member also inherits the standard error it replaces, survives pickling (Ray sends it between processes), and is
printed by the command line without a traceback.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What the process returns; the meaning is part of the command line's contract."""

    PASS = 0
    GATE_FAILED = 1
    USAGE = 2
    INCONCLUSIVE = 3
    INFRASTRUCTURE = 4
    INTEGRITY = 5
    INTERRUPTED = 130


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none: what a sentence for the user quotes of a cause."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class StillhouseError(Exception):
    """Base of what a user is meant to read. ``exit_code`` is what the command line returns."""

    exit_code = ExitCode.INFRASTRUCTURE


class RecipeError(StillhouseError, ValueError):
    """The recipe, or a file it names, is not what it has to be."""

    exit_code = ExitCode.USAGE


class NothingKeptError(StillhouseError, ValueError):
    """A stage ended with no row to go on with."""

    exit_code = ExitCode.GATE_FAILED


class SupervisionError(StillhouseError, ValueError):
    """Training rows would teach the wrong tokens."""

    exit_code = ExitCode.USAGE


class TeacherError(StillhouseError, RuntimeError):
    """The teacher cannot be reached or loaded."""

    exit_code = ExitCode.INFRASTRUCTURE


class ClusterError(StillhouseError, RuntimeError):
    """Ray, or a job on it, is not there or failed."""

    exit_code = ExitCode.INFRASTRUCTURE


class IntegrityError(StillhouseError, ValueError):
    """A file is not what its manifest says."""

    exit_code = ExitCode.INTEGRITY


class SpoolError(StillhouseError, OSError):
    """The file that a writer's calls are made durable in cannot be opened or written."""

    exit_code = ExitCode.INFRASTRUCTURE


class BudgetReached(StillhouseError, RuntimeError):
    """A call would spend more than the budget allows; says which cap, what is spent and reserved, and what was asked for."""

    exit_code = ExitCode.USAGE
