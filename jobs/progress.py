"""Progress on stderr: rich bars on a terminal, one line a stage elsewhere, nothing when asked to be quiet.

Data goes to stdout and never passes through here.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Reporter(Protocol):
    """Where a run says how far it is."""

    def note(self, text: str) -> None:
        """One line."""

    def stage(self, name: str):
        """A context manager for the time of one stage."""

    def begin(self, text: str, total: int, done: int = 0) -> None:
        """Start counting inside a stage."""

    def advance(self, count: int) -> None:
        """Count on."""


class LineReporter:
    """One line when a stage starts and one when it ends: for logs and CI.

    Long stages say every half minute how far they are.

    Args:
        quiet: say nothing at all.
    """

    EVERY_S = 30.0

    def __init__(self, *, quiet: bool = False):
        self._quiet = quiet
        self._text, self._total, self._done, self._said_at = "", 0, 0, 0.0

    def note(self, text: str) -> None:
        if not self._quiet:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        self.note(f"{name} ...")
        yield
        self.note(f"{name}: {time.monotonic() - started:.1f} s")

    def begin(self, text: str, total: int, done: int = 0) -> None:
        self.note(f"  {text}: {total}" + (f", {done} of them committed already" if done else ""))
        self._text, self._total, self._done, self._said_at = text, total, done, time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._said_at > self.EVERY_S:
            self.note(f"  {self._text}: {self._done} of {self._total}")
            self._said_at = time.monotonic()


class BarReporter:
    """A bar for what is counted, and a line a finished stage: for a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._make = lambda: Progress(*columns, console=self._console, transient=True)
        self._progress = None
        self._task = None

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        self._console.print(f"[bold]{name}[/bold]", highlight=False)
        try:
            with self._make() as self._progress:
                yield
        finally:
            self._progress = self._task = None
        self.note(f"  {time.monotonic() - started:.1f} s")

    def begin(self, text: str, total: int, done: int = 0) -> None:
        if self._progress is not None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(text, total=total, completed=done)

    def advance(self, count: int) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)


def make_reporter(*, quiet: bool) -> Reporter:
    """Bars where a person watches; lines in a log, a pipe or CI."""
    if quiet or os.environ.get("CI") or not sys.stderr.isatty():
        return LineReporter(quiet=quiet)
    return BarReporter()
