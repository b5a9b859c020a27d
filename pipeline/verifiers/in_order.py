"""Apply a function to items side by side, in threads, and yield what it returns in the items' order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

Done = tuple[list[Result], BaseException | None]
_CHUNKS_AHEAD = 4
_PATIENCE_S = 0.1


def in_order(function: Callable[[Item], Result], chunks: Iterable[list[Item]], *, num_workers: int) -> Iterator[Result]:
    """Yield ``function(item)`` for each item of each chunk, in order, as soon as it and those before it are known.

    A chunk is one thread's work, so a slow item holds up its own chunk's results and no other thread. Chunks are read in a
    thread of their own, at most a few a worker ahead: a source that waits for its next line holds back no result, and one
    without an end needs no more memory. Closing the iterator early drops what is not begun.

    Raises:
        whatever the function or the source raises, at the place in the order where it happened.
    """
    results: queue.Queue[Future[Done] | BaseException | None] = queue.Queue(_CHUNKS_AHEAD * num_workers)
    stopped = threading.Event()

    def work(chunk: list[Item]) -> Done:
        found: list[Result] = []
        failure: BaseException | None = None
        try:
            for item in chunk:
                if not stopped.is_set():
                    found.append(function(item))
        except BaseException as error:
            failure = error  # raised again behind the results before it
        return found, failure

    def put(result: Future[Done] | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                results.put(result, timeout=_PATIENCE_S)
                return True
            except queue.Full:
                continue
        return False

    threads = ThreadPoolExecutor(num_workers, thread_name_prefix="judge")

    def read() -> None:
        try:
            for chunk in chunks:
                if stopped.is_set() or not put(threads.submit(work, chunk)):
                    return
        except BaseException as error:  # raised again where it is waited for
            put(error)
        else:
            put(None)

    # A daemon: it may be waiting for a line that never comes when the caller has had enough.
    threading.Thread(target=read, name="judge-reader", daemon=True).start()
    try:
        while (result := _patiently(results.get, queue.Empty)) is not None:
            if isinstance(result, BaseException):
                raise result
            found, error = _patiently(result.result, TimeoutError)
            yield from found
            if error is not None:
                raise error
    finally:
        stopped.set()
        threads.shutdown(wait=True, cancel_futures=True)


def _patiently(wait: Callable[..., Result], nothing_yet: type[Exception]) -> Result:
    """Wait for ever, a moment at a time: an interrupt that comes just before a wait without an end is never seen."""
    while True:
        try:
            return wait(timeout=_PATIENCE_S)
        except nothing_yet:
            continue
