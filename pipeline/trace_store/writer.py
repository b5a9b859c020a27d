"""The write path of traces: every call is durable before it goes out, every answer before anybody sees it.

One process of a run, its driver, holds a `TraceWriter`. What is handed to it comes back as a future that is done when the
spool's transaction is on disk, so that after kill -9 at any instant nothing that was acknowledged is lost and nothing is
stored twice. Answers are sealed into the store in the background.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

from stillhouse.pipeline.errors import first_line
from stillhouse.pipeline.records import Trace
from stillhouse.pipeline.trace_store.answers import Parse
from stillhouse.pipeline.trace_store.budget import FREE, UNLIMITED, Budget, Prices, Spent
from stillhouse.pipeline.trace_store.group_commit import GroupCommit
from stillhouse.pipeline.trace_store.keys import KeySet
from stillhouse.pipeline.trace_store.ledger import Intent, Ledger
from stillhouse.pipeline.trace_store.sealing import SpoolReader, drop_if_committed, find_commit, publish
from stillhouse.pipeline.trace_store.spool import PendingSeal, Spool
from stillhouse.pipeline.trace_store.store import Commit, TraceStore
from stillhouse.pipeline.trace_store.totals import Totals

__all__ = ["Intent", "TraceWriter"]

RETRY_FIRST_S, RETRY_LAST_S = 5.0, 300.0
"""Between attempts to seal into a store that refuses, doubling."""


def _warn(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=2)


class TraceWriter:
    """Writes the calls of one run into its store, through a spool on a local disk.

    Opening it again after its process died settles what was left: calls that were under way are lost (counted, with what
    they had reserved), answers that came are kept and sealed. Any thread may call it; it has two of its own.

    Args:
        store: where traces end up.
        spool_dir: a folder of this run on a local disk, never on a network file system.
        parse: (request, raw) → its trace; raises ValueError where raw is no usable answer. Deterministic: it runs when an
            answer comes and again when it is sealed.
        prices: what tokens cost.
        budget: caps over the whole life of the spool.
        shard_bytes: bytes of answers at which they are sealed by themselves, and the size of a shard in these bytes.
        seal_after_s: seconds after which they are in any case.
        note: told a sentence when the store cannot be written for a while, and when it can be again. By default a warning.

    Raises:
        SpoolError: another process has the spool open, or it cannot be read or written.
    """

    def __init__(
        self,
        store: TraceStore,
        spool_dir: Path,
        *,
        parse: Parse,
        prices: Prices = FREE,
        budget: Budget = UNLIMITED,
        shard_bytes: int = 128 << 20,
        seal_after_s: float = 900.0,
        note: Callable[[str], None] = _warn,
    ):
        self._store = store
        self._parse = parse
        self._shard_bytes = shard_bytes
        self._seal_after_s = seal_after_s
        self._note = note
        self._scratch = Path(spool_dir) / "sealing"
        self._spool = Spool(Path(spool_dir))
        self.writer = self._spool.writer
        """This spool's name in the store's commits."""
        try:
            drop_if_committed(store, self._spool)
            self._ledger = Ledger(self._spool, parse=parse, prices=prices, budget=budget)
        except BaseException:
            self._spool.close()
            raise
        self._closing = threading.Event()
        self._sealing = threading.Lock()
        self._seal_wanted = threading.Event()
        self._commits = GroupCommit(self._ledger, after_group=self._seal_if_large)
        self._sealer = threading.Thread(target=self._seal_in_background, name="trace-sealer", daemon=True)
        self._sealer.start()

    def begin(self, intents: Sequence[Intent]) -> Future[list[int]]:
        """Reserve and note calls; they may go out once the future is done with their ids.

        The future raises BudgetReached where they could go beyond a cap: then none of them was noted. A future that was
        cancelled in time notes nothing either.
        """
        intents = list(intents)
        return self._commits.submit(lambda ledger: ledger.begin(intents), keep_if_cancelled=False)

    def answered(self, call_id: int, raw: bytes) -> Future[Trace]:
        """Keep a call's whole answer; the future brings its trace, with its price.

        The future raises ValueError where parse found no usable answer (the call then counts as failed, and the bytes stay
        in the ledger), or where the call is not under way.
        """
        return self._commits.submit(lambda ledger: ledger.receive([(call_id, raw)]), lambda ledger, _: ledger.settle(call_id))

    def answered_many(self, items: Sequence[tuple[int, bytes]]) -> Future[list[Trace]]:
        """Keep the answers of several calls together; where some are unusable the others are kept and the first error comes."""
        items = list(items)
        return self._commits.submit(lambda ledger: ledger.receive(items), lambda ledger, _: _settle_all(ledger, items))

    def failed(
        self, call_id: int, *, error: str, status: int | None, billed: Literal["no", "unknown"], partial: bytes = b""
    ) -> Future[None]:
        """Note that a call ended without a whole answer.

        Args:
            error: why, one line.
            status: the HTTP status, None where none came.
            billed: ``no`` gives its reservation back, ``unknown`` keeps it spent.
            partial: what a cut stream delivered; kept as a trace with finish_reason ``truncated`` under a key of its own.
        """
        return self._commits.submit(
            lambda ledger: ledger.fail(call_id, error=error, status=status, billed=billed, partial=partial)
        )

    def recovered(self) -> Iterator[Trace]:
        """Traces that are in the spool and not sealed yet: what an earlier process left, and what came since.

        What is sealed meanwhile may not come: read these first and the store afterwards.
        """
        last_seq = self._commits.ask(lambda ledger: ledger.spool.last_seq)
        with contextlib.closing(SpoolReader(self._spool.path)) as reader:
            for calls in reader.calls(last_seq):
                traces = (call.trace(self._parse, writer=self.writer) for call in calls)
                yield from (trace for trace in traces if trace is not None)

    def keys(self) -> KeySet:
        """Keys of every trace that the store or the spool holds."""
        with contextlib.closing(SpoolReader(self._spool.path)) as reader:
            spooled = reader.keys()  # before the store's: a seal in between moves rows from here to there
        keys = self._store.keys()
        keys.add(spooled)
        return keys

    def totals(self) -> Totals:
        """What the calls whose end is known came to, over all restarts."""
        return self._ledger.account.totals()

    def spent(self) -> Spent:
        """What counts against the budget now, reservations included."""
        return self._ledger.account.spent()

    @property
    def in_flight(self) -> int:
        """Calls begun whose end is not known yet."""
        return self._ledger.account.in_flight

    def seal(self) -> Commit | None:
        """Bring everything answered until now into the store; None where there was nothing. Calls go on meanwhile.

        Raises:
            StillhouseError: the store cannot be written; the answers stay in the spool.
        """
        with self._sealing:
            commit = None
            left = self._commits.ask(lambda ledger: ledger.spool.pending_seal())
            if left is not None:
                commit = find_commit(self._store, left, self.writer) or self._publish(left)
                self._drop(left)
            new = self._commits.ask(lambda ledger: ledger.begin_seal())
            if new is not None:
                commit = self._publish(new)
                self._drop(new)
            return commit

    def close(self) -> None:
        """Seal everything and let go of the spool. Calls still under way count as lost.

        Raises:
            StillhouseError: the store or the spool cannot be written; answers stay in the spool, and opening it again goes on.
        """
        if not self._commits.begin_closing():
            return
        self._closing.set()
        self._seal_wanted.set()
        try:
            self._commits.ask(lambda ledger: ledger.lose_calls_under_way())
            self.seal()
        finally:
            self._commits.end()
            self._sealer.join()
            self._spool.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _publish(self, seal: PendingSeal) -> Commit:
        return publish(
            self._store,
            seal,
            spool=self._spool.path,
            writer=self.writer,
            parse=self._parse,
            scratch=self._scratch,
            shard_bytes=self._shard_bytes,
        )

    def _drop(self, seal: PendingSeal) -> None:
        """Delete the rows of a committed seal, some at a time, so that calls need not wait for long."""
        while self._commits.ask(lambda ledger: ledger.spool.drop_sealed(seal.last_seq)):
            pass

    def _seal_if_large(self) -> None:
        if self._ledger.unsealed_bytes >= self._shard_bytes:
            self._seal_wanted.set()

    def _seal_in_background(self) -> None:
        retry_s = 0.0
        while True:
            if retry_s:
                self._closing.wait(retry_s)
            else:
                self._seal_wanted.wait(self._seal_after_s)
            self._seal_wanted.clear()
            if self._closing.is_set() or self._commits.has_ended:
                return
            try:
                self.seal()
            except Exception as error:  # said here, tried again, and raised by close() where it stays
                if not retry_s:
                    self._note(
                        f"traces cannot be sealed into {self._store.folder.url} now: {first_line(error)} They are safe in "
                        f"{self._spool.path}; trying again until the run ends."
                    )
                retry_s = min(RETRY_LAST_S, 2 * retry_s or RETRY_FIRST_S)
            else:
                if retry_s:
                    self._note(f"traces are sealed into {self._store.folder.url} again")
                retry_s = 0.0


def _settle_all(ledger: Ledger, items: Sequence[tuple[int, Any]]) -> list[Trace]:
    traces: list[Trace] = []
    errors: list[Exception] = []
    for call_id, _ in items:
        try:
            traces.append(ledger.settle(call_id))
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return traces
