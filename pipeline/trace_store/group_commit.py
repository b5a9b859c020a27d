"""One thread that owns a spool: whatever is waiting shares one transaction, and futures are done when it is on disk.

Nobody waits on purpose for a group to fill: it grows by itself while the transaction before it is being written.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from stillhouse.pipeline.errors import SpoolError, StillhouseError
from stillhouse.pipeline.trace_store.ledger import Ledger

MAX_GROUP = 1024
"""Operations that share one transaction."""
PROGRESS_S = 5.0
"""While calls are under way, the time spent is made durable at least this often."""

T = TypeVar("T")


@dataclass(slots=True)
class _Task:
    prepare: Callable[[Ledger], Any]
    finish: Callable[[Ledger, Any], Any]
    keep_if_cancelled: bool
    future: Future[Any] = field(default_factory=Future)
    waited_for: bool = True

    def start(self) -> bool:
        """True where the task is to be done; after this its future cannot be cancelled."""
        self.waited_for = self.future.set_running_or_notify_cancel()
        return self.waited_for or self.keep_if_cancelled

    def succeed(self, result: Any) -> None:
        if self.waited_for:
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        if self.waited_for:
            self.future.set_exception(error)


class GroupCommit:
    """Runs a ledger in a thread of its own.

    Args:
        ledger: nobody else touches it from now on.
        after_group: called in the thread after each transaction.
    """

    def __init__(self, ledger: Ledger, *, after_group: Callable[[], None]):
        self._ledger = ledger
        self._after_group = after_group
        self._queue: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._submitting = threading.Lock()
        self._closing = False
        self._stopped_by: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="trace-writer", daemon=True)
        self._thread.start()

    def submit(
        self,
        prepare: Callable[[Ledger], Any],
        finish: Callable[[Ledger, Any], Any] = lambda _, noted: noted,
        *,
        keep_if_cancelled: bool = True,
    ) -> Future[Any]:
        """Have something made durable.

        Args:
            prepare: notes rows in the ledger.
            finish: makes the future's result, once the rows are durable, from what ``prepare`` returned.
            keep_if_cancelled: do it also where the future was cancelled before its turn came.
        """
        return self._put(_Task(prepare, finish, keep_if_cancelled), always=False)

    def ask(self, question: Callable[[Ledger], T]) -> T:
        """Run something in the thread, after everything that was handed in before is durable and settled; wait for it."""

        def answer(ledger: Ledger, _: Any) -> T:
            if ledger.has_news:
                ledger.commit()
            return question(ledger)

        return self._put(_Task(lambda _: None, answer, keep_if_cancelled=True), always=True).result()

    def begin_closing(self) -> bool:
        """From now on only `ask` works. False where that was so already."""
        with self._submitting:
            first, self._closing = not self._closing, True
        return first

    def end(self) -> None:
        """Finish what was handed in and end the thread."""
        self._queue.put(None)
        self._thread.join()

    @property
    def has_ended(self) -> bool:
        """True where the thread takes nothing more."""
        return self._stopped_by is not None

    def _put(self, task: _Task, *, always: bool) -> Future[Any]:
        with self._submitting:
            if self._stopped_by is not None:
                task.future.set_exception(self._refusal())
            elif self._closing and not always:
                task.future.set_exception(SpoolError(f"the spool {self._ledger.spool.path} is being closed"))
            else:
                self._queue.put(task)
        return task.future

    def _run(self) -> None:
        group: list[_Task] = []
        try:
            going_on = True
            while going_on:
                group.clear()
                going_on = self._take(group)
                self._write(group)
                self._after_group()
            self._ledger.commit()
        except BaseException as error:  # whoever waits now, and whoever comes later, is told
            self._stop(error, group)
        else:
            self._stop(SpoolError(f"the spool {self._ledger.spool.path} is closed"), [])

    def _take(self, group: list[_Task]) -> bool:
        """Wait for something to do and take all that is there; False at the end."""
        with contextlib.suppress(queue.Empty):
            if self._ledger.has_news:
                task = self._queue.get_nowait()
            else:
                task = self._queue.get(timeout=PROGRESS_S if self._ledger.account.in_flight else None)
            while task is not None:
                group.append(task)
                if len(group) == MAX_GROUP:
                    return True
                task = self._queue.get_nowait()
            return False
        return True

    def _write(self, group: Sequence[_Task]) -> None:
        ledger = self._ledger
        noted = []
        for task in group:
            if task.start():
                try:
                    noted.append((task, task.prepare(ledger)))
                except Exception as error:
                    task.fail(error)
        ledger.commit()
        for task, note in noted:
            try:
                result = task.finish(ledger, note)
            except Exception as error:
                task.fail(error)
            else:
                task.succeed(result)

    def _stop(self, error: BaseException, group: Sequence[_Task]) -> None:
        with self._submitting:
            self._stopped_by = error
        waiting = [task for task in group if not task.future.done()]
        while not self._queue.empty():
            task = self._queue.get()
            if task is not None:
                task.start()
                waiting.append(task)
        for task in waiting:
            task.fail(self._refusal())

    def _refusal(self) -> StillhouseError:
        """A new exception each: one that is raised in many places would collect all their tracebacks."""
        error = self._stopped_by
        if isinstance(error, StillhouseError):
            refusal = type(error)(str(error))
        else:
            refusal = SpoolError(f"the writer of the spool {self._ledger.spool.path} stopped: {type(error).__name__}: {error}")
        refusal.__cause__ = error
        return refusal
