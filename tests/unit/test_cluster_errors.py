"""What a failure on a worker becomes for the user."""

from __future__ import annotations

import pickle

import pytest

from stillhouse.jobs.cluster import meant_error
from stillhouse.pipeline.errors import (
    ClusterError,
    ExitCode,
    IntegrityError,
    NothingKeptError,
    RecipeError,
    SupervisionError,
    TeacherError,
)


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


class Wrapped(Exception):
    """As Ray wraps: the cause hangs on an attribute."""

    def __init__(self, cause):
        super().__init__("long traceback text")
        self.cause = cause


class Failed(Exception):
    """As Ray Train wraps: one exception a worker."""

    def __init__(self, failures):
        super().__init__("training failed")
        self.worker_failures = failures


def test_our_error_is_found_behind_rays_wrappings():
    """The sentence that was written for the user reaches the user, whatever layers Ray puts around it."""
    ours = TeacherError("the teacher is not there")
    assert meant_error(Wrapped(ours)) is ours
    assert meant_error(Failed({0: Wrapped(Wrapped(ours))})) is ours
    assert meant_error(caused(RuntimeError("outer"), ours)) is ours


def test_a_foreign_error_becomes_a_cluster_error_that_names_it():
    """Nothing is swallowed: type and first line stay readable."""
    meant = meant_error(Wrapped(KeyError("weights")))
    assert isinstance(meant, ClusterError)
    assert "KeyError" in str(meant)
    assert "weights" in str(meant)


def test_a_circle_of_causes_ends():
    """Exceptions that point at each other must not hang the error path."""
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert isinstance(meant_error(first), ClusterError)


@pytest.mark.parametrize(
    ("error", "code", "standard"),
    [
        (RecipeError("x"), ExitCode.USAGE, ValueError),
        (NothingKeptError("x"), ExitCode.GATE_FAILED, ValueError),
        (SupervisionError("x"), ExitCode.USAGE, ValueError),
        (TeacherError("x"), ExitCode.INFRASTRUCTURE, RuntimeError),
        (ClusterError("x"), ExitCode.INFRASTRUCTURE, RuntimeError),
        (IntegrityError("x"), ExitCode.INTEGRITY, ValueError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_travel_between_processes_with_their_exit_code(error, code, standard):
    """Ray pickles what a worker raises; schedulers branch on the exit code."""
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == "x"
    assert back.exit_code == code
    assert isinstance(back, standard)
