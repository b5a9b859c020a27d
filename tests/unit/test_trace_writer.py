"""The write path of traces: durable before it is acknowledged, sealed once, and every failure said in words."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import threading
from concurrent.futures import wait
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stillhouse.pipeline.errors import IntegrityError, SpoolError, StillhouseError
from stillhouse.pipeline.records import Trace, content_key
from stillhouse.pipeline.trace_store import writer as writer_module
from stillhouse.pipeline.trace_store.budget import Prices
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.writer import Intent, TraceWriter

PRICES = Prices(dollars_per_million_input=0.27, dollars_per_million_output=1.1)


def key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def intent(number: int) -> Intent:
    request = json.dumps({"key": key_of(number), "prompt": f"{number} + 1 ="}).encode()
    return Intent(key_of(number), f"p{number}", request, 20, 100, endpoint="http://teacher/v1")


def answer(text: str, prompt_tokens: int = 10, completion_tokens: int = 50) -> bytes:
    return json.dumps({"text": text, "usage": [prompt_tokens, completion_tokens]}).encode()


def parse(request: bytes, raw: bytes) -> Trace:
    asked, got = json.loads(request), json.loads(raw)
    return Trace(
        *(asked["key"], "p", "teacher", "rev", asked["prompt"], got["text"], None, got["text"], "stop", *got["usage"]),
        *(0.6, 0.95, 100, 0, 7, 1.5),
    )


def open_writer(folder: Path, **settings) -> TraceWriter:
    return TraceWriter(TraceStore(folder / "store"), folder / "spool", parse=parse, prices=PRICES, **settings)


def begin(writer: TraceWriter, *numbers: int) -> list[int]:
    return writer.begin([intent(number) for number in numbers]).result()


def ledger_rows(folder: Path) -> list[dict]:
    entries = [entry for commit in TraceStore(folder / "store").commits() for entry in commit.calls]
    return [row for entry in entries for row in pq.read_table(folder / "store" / entry.name).to_pylist()]


def test_an_acknowledged_trace_is_the_one_in_the_store(tmp_path):
    """What a run works on now and what it finds after a restart have to be the same trace, price included."""
    with open_writer(tmp_path) as writer:
        first, second = begin(writer, 1, 2)
        traces = [writer.answered(first, answer("a ½ 🙂")).result(), *writer.answered_many([(second, answer("b"))]).result()]
    assert [trace.dollars for trace in traces] == [PRICES.dollars(10, 50)] * 2
    store = TraceStore(tmp_path / "store")
    assert list(store.traces()) == traces
    assert store.totals().num_answered == 2
    assert store.totals().dollars == pytest.approx(2 * PRICES.dollars(10, 50))


def test_the_ledger_says_how_every_call_ended(tmp_path):
    """Whoever checks the vendor's bill needs each call: what was reserved, what was used, and why it failed."""
    with open_writer(tmp_path) as writer:
        ids = begin(writer, 1, 2, 3, 4)
        writer.answered(ids[0], answer("a")).result()
        writer.failed(ids[1], error="429 Too Many Requests \ud83d", status=429, billed="no").result()
        writer.failed(ids[2], error="reset", status=None, billed="unknown", partial=answer("begi", 10, 3)).result()
        unreadable = writer.answered(ids[3], b"<html>")
        with pytest.raises(ValueError, match="Expecting value"):
            unreadable.result()
        totals = writer.totals()
    rows = ledger_rows(tmp_path)
    assert [row["call_id"] for row in rows] == ids
    assert [row["key"] for row in rows] == [key_of(n) for n in (1, 2, 3, 4)]
    assert [row["state"] for row in rows] == ["answered", "failed", "truncated", "unreadable"]
    assert [row["status"] for row in rows] == [200, 429, None, 200]
    assert [row["prompt_tokens"] for row in rows] == [10, 0, None, None]
    assert [row["completion_tokens"] for row in rows] == [50, 0, None, None]
    assert [row["raw"] for row in rows] == [None, None, None, b"<html>"]
    assert rows[1]["error"] == "429 Too Many Requests ?"
    assert all(row["dollars_reserved"] == PRICES.dollars(20, 100) for row in rows)
    assert all(0 < row["sent_at"] <= row["done_at"] for row in rows)
    assert (totals.num_calls, totals.num_answered, totals.num_failed, totals.num_truncated) == (4, 1, 3, 1)
    assert totals.tokens_lost == 2 * 120
    assert TraceStore(tmp_path / "store").totals().num_calls == 4


def test_a_broken_off_answer_is_never_the_planned_one(tmp_path):
    """The beginning of an answer under the planned key would be trained on, and the problem never asked again."""
    with open_writer(tmp_path) as writer:
        (call,) = begin(writer, 1)
        writer.failed(call, error="cut", status=200, billed="unknown", partial=answer("begi")).result()
        keys = writer.keys()
        assert key_of(1) not in keys
        name = writer.writer
    (trace,) = TraceStore(tmp_path / "store").traces()
    assert trace.key == content_key("partial", key_of(1), name, call)
    assert (trace.finish_reason, trace.completion) == ("truncated", "begi")


def test_a_beginning_that_cannot_be_read_is_kept_as_it_came(tmp_path):
    """Its tokens may have been paid for; losing the bytes or the error would leave nothing to look at."""
    with open_writer(tmp_path) as writer:
        (call,) = begin(writer, 1)
        writer.failed(call, error="reset", status=None, billed="unknown", partial=b'{"te').result()
    (row,) = ledger_rows(tmp_path)
    assert row["state"] == "failed"
    assert row["raw"] == b'{"te'
    assert row["error"].startswith("reset; its first 4 bytes are kept as they came: JSONDecodeError")


def test_bytes_that_are_no_text_are_kept_to_the_byte(tmp_path):
    """What a vendor sent and nobody could read is evidence, whatever its encoding; it must not spoil its neighbours."""
    odd = bytes(range(256)) * 3 + b"\x00\xff\xfe\xed\xa0\x80\x00"
    with open_writer(tmp_path) as writer:
        ids = begin(writer, 1, 2, 3, 4)
        for call, raw in zip(ids, [answer("a"), odd, b"", answer("½")]):
            writer.answered(call, raw).exception()
    assert [row["raw"] for row in ledger_rows(tmp_path)] == [None, odd, b"", None]
    assert [trace.completion for trace in TraceStore(tmp_path / "store").traces()] == ["a", "½"]


def test_a_wrong_call_is_refused_alone(tmp_path):
    """One caller's mistake must not take down what others have in the same transaction."""
    with open_writer(tmp_path) as writer:
        (call,) = begin(writer, 1)
        futures = [writer.answered(99, answer("x")), writer.answered(call, answer("a")), writer.answered(call, answer("b"))]
        wait(futures)
        assert futures[1].result().completion == "a"
        for future in (futures[0], futures[2]):
            with pytest.raises(ValueError, match="is not under way"):
                future.result()
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            Intent("abc", "p", b"", 1, 1)
    assert TraceStore(tmp_path / "store").num_rows == 1


@pytest.mark.parametrize(("text", "tokens"), [("half \ud83d", 5), ("fine", 1 << 70), ("fine", -1), ("fine", 2.5)])
def test_an_answer_that_no_file_can_hold_fails_alone(tmp_path, text, tokens):
    """Found out only when sealing, one odd answer would keep all later ones out of the store for good."""
    with open_writer(tmp_path) as writer:
        odd, good = begin(writer, 1, 2)
        with pytest.raises(ValueError):
            writer.answered(odd, answer(text, 1, tokens)).result()
        writer.answered(good, answer("b")).result()
    assert [trace.completion for trace in TraceStore(tmp_path / "store").traces()] == ["b"]
    assert [row["state"] for row in ledger_rows(tmp_path)] == ["unreadable", "answered"]


def test_an_answer_parsed_into_another_call_s_trace_is_refused(tmp_path):
    """A mixed-up parser would store one problem's answer as another's."""
    with open_writer(tmp_path) as writer:
        (call,) = writer.begin([Intent(key_of(5), "p", intent(6).request, 1, 1)]).result()
        with pytest.raises(ValueError, match="was parsed into a trace of"):
            writer.answered(call, answer("x")).result()


def test_many_answers_together_keep_the_good_ones(tmp_path):
    """One unusable row of a batch must not cost the others, which were paid for."""
    with open_writer(tmp_path) as writer:
        ids = begin(writer, 1, 2, 3)
        with pytest.raises(ValueError, match="Expecting value"):
            writer.answered_many([(ids[0], answer("a")), (ids[1], b"?"), (ids[2], answer("c"))]).result()
    assert {trace.completion for trace in TraceStore(tmp_path / "store").traces()} == {"a", "c"}


def test_asyncio_and_threads_write_at_once(tmp_path):
    """Callers of both kinds share a writer; mixed up call ids or lost wake-ups would hang or misfile answers."""

    async def ask(writer: TraceWriter, number: int) -> Trace:
        (call,) = await asyncio.wrap_future(writer.begin([intent(number)]))
        return await asyncio.wrap_future(writer.answered(call, answer(f"text {number}")))

    async def ask_all(writer: TraceWriter) -> list[Trace]:
        return await asyncio.gather(*(ask(writer, number) for number in range(300)))

    def ask_in_thread(writer: TraceWriter, start: int) -> None:
        for number in range(start, start + 40):
            (call,) = begin(writer, number)
            writer.answered(call, answer(f"text {number}")).result()

    with open_writer(tmp_path, shard_bytes=4000) as writer:
        threads = [threading.Thread(target=ask_in_thread, args=(writer, start)) for start in range(1000, 1400, 40)]
        for thread in threads:
            thread.start()
        traces = asyncio.run(ask_all(writer))
        for thread in threads:
            thread.join()
        assert [trace.completion for trace in traces] == [f"text {n}" for n in range(300)]
    stored = {trace.key: trace.completion for trace in TraceStore(tmp_path / "store").traces()}
    assert stored == {key_of(n): f"text {n}" for n in [*range(300), *range(1000, 1400)]}
    assert TraceStore(tmp_path / "store").num_rows == 700


def test_answers_go_on_while_a_seal_is_under_way(tmp_path):
    """A seal into a slow object store takes minutes; requests must not stand still for it."""
    answered_meanwhile = threading.Event()

    class SlowStore(TraceStore):
        def commit(self, **settings):
            assert answered_meanwhile.wait(30), "no answer was acknowledged while the seal was being written"
            return super().commit(**settings)

    with TraceWriter(SlowStore(tmp_path / "store"), tmp_path / "spool", parse=parse, seal_after_s=0.01) as writer:
        (call,) = begin(writer, 1)
        writer.answered(call, answer("a")).result()
        (call,) = begin(writer, 2)
        writer.answered(call, answer("b")).result()
        answered_meanwhile.set()
    assert len(TraceStore(tmp_path / "store").keys()) == 2


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_trace_writer import *
writer = open_writer(Path(sys.argv[1]))
ids = begin(writer, 1, 2, 3)
writer.answered(ids[0], answer("a")).result()
writer.answered(ids[1], answer("b")).result()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_after_kill_9_answers_are_there_and_what_was_in_flight_is_counted(tmp_path):
    """The promise of the store: what was acknowledged is never paid for again, and what may have been is not forgotten."""
    program = KILLED.format(tests=str(Path(__file__).parent))
    assert subprocess.run([sys.executable, "-c", program, tmp_path], timeout=60).returncode == -9
    with open_writer(tmp_path) as writer:
        assert {trace.completion for trace in writer.recovered()} == {"a", "b"}
        keys = writer.keys()
        assert [key_of(n) in keys for n in (1, 2, 3)] == [True, True, False]
        totals = writer.totals()
        assert (totals.num_calls, totals.num_answered, totals.num_lost) == (3, 2, 1)
        assert totals.dollars_lost == PRICES.dollars(20, 100)
        (again,) = begin(writer, 3)
        writer.answered(again, answer("c")).result()
    assert [trace.completion for trace in TraceStore(tmp_path / "store").traces()] == ["a", "b", "c"]
    assert [row["state"] for row in ledger_rows(tmp_path)] == ["answered", "answered", "lost", "answered"]


def test_a_store_that_is_down_is_said_once_and_sealed_into_later(tmp_path, monkeypatch):
    """An object store away for an hour must neither stop a run nor lose its answers, nor go unnoticed."""
    monkeypatch.setattr(writer_module, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(writer_module, "RETRY_LAST_S", 0.02)
    said: list[str] = []
    back = threading.Event()

    def note(sentence: str) -> None:
        said.append(sentence)
        if "again" in sentence and "trying" not in sentence:
            back.set()

    store = TraceStore(tmp_path / "store")
    (tmp_path / "store").mkdir(exist_ok=True)
    in_the_way = tmp_path / "store" / "shards"
    in_the_way.write_text("a file where a folder has to be")
    writer = TraceWriter(store, tmp_path / "spool", parse=parse, seal_after_s=0.01, note=note)
    for number in range(40):
        (call,) = begin(writer, number)
        writer.answered(call, answer(f"text {number}")).result()
        threading.Event().wait(0.005)
    assert len(said) == 1
    assert "cannot be sealed" in said[0]
    assert len(list(writer.recovered())) == 40
    in_the_way.unlink()
    assert back.wait(30)
    assert len(said) == 2
    writer.close()
    assert TraceStore(tmp_path / "store").num_rows == 40


def test_closing_onto_a_store_that_is_down_raises_and_keeps_the_answers(tmp_path):
    """A run that ends without its traces in the store must not look finished; starting it again has to be enough."""
    writer = open_writer(tmp_path)
    (call,) = begin(writer, 1)
    writer.answered(call, answer("a")).result()
    (tmp_path / "store").mkdir(exist_ok=True)
    (tmp_path / "store" / "shards").write_text("in the way")
    with pytest.raises(StillhouseError, match="shards"):
        writer.close()
    (tmp_path / "store" / "shards").unlink()
    with open_writer(tmp_path) as writer:
        assert [trace.completion for trace in writer.recovered()] == ["a"]
    assert [trace.completion for trace in TraceStore(tmp_path / "store").traces()] == ["a"]


def test_an_error_in_parse_reaches_its_caller_and_nobody_else(tmp_path):
    """A bug in a parser must show with its own traceback, and the bytes that were paid for must stay."""

    def buggy(request: bytes, raw: bytes) -> Trace:
        if raw == b"bug":
            raise KeyError("choices")
        return parse(request, raw)

    with TraceWriter(TraceStore(tmp_path / "store"), tmp_path / "spool", parse=buggy) as writer:
        first, second = begin(writer, 1, 2)
        with pytest.raises(KeyError, match="choices"):
            writer.answered(first, b"bug").result()
        assert writer.answered(second, answer("b")).result().completion == "b"
    assert [row["raw"] for row in ledger_rows(tmp_path)] == [b"bug", None]


def test_an_answer_that_cannot_be_read_any_more_stops_the_seal(tmp_path):
    """A parser that changed between answer and seal must not turn an acknowledged trace into nothing."""
    writer = open_writer(tmp_path)
    (call,) = begin(writer, 1)
    writer.answered(call, answer("a")).result()
    writer._parse = lambda request, raw: (_ for _ in ()).throw(ValueError("no such field"))
    with pytest.raises(IntegrityError, match="could be read when it came and cannot be now: no such field"):
        writer.close()
    with open_writer(tmp_path) as writer:
        assert [trace.completion for trace in writer.recovered()] == ["a"]


def test_calls_under_way_at_close_count_as_lost(tmp_path):
    """Requests that went out and were given up may be billed: the store's totals have to say so without a restart."""
    writer = open_writer(tmp_path)
    (call,) = begin(writer, 1)
    writer.close()
    with pytest.raises(SpoolError, match="closed"):
        writer.answered(call, answer("late")).result()
    with pytest.raises(SpoolError, match="closed"):
        writer.seal()
    writer.close()
    totals = TraceStore(tmp_path / "store").totals()
    assert (totals.num_lost, totals.tokens_lost) == (1, 120)


def test_a_begin_that_was_cancelled_in_time_reserves_nothing(tmp_path):
    """A task that is cancelled before its request goes out must not leave a call that counts as paid."""
    parsing, go_on = threading.Event(), threading.Event()

    def waiting(request: bytes, raw: bytes) -> Trace:
        parsing.set()
        assert go_on.wait(30)
        return parse(request, raw)

    with TraceWriter(TraceStore(tmp_path / "store"), tmp_path / "spool", parse=waiting) as writer:
        (call,) = begin(writer, 1)
        answered = writer.answered(call, answer("a"))
        assert parsing.wait(30)
        begun = writer.begin([intent(2)])
        assert begun.cancel()
        go_on.set()
        answered.result()
    assert [row["state"] for row in ledger_rows(tmp_path)] == ["answered"]


def test_a_closed_spool_gives_its_space_back(tmp_path):
    """A run of ten million traces must not leave a spool of hundreds of megabytes beside a finished store."""
    with open_writer(tmp_path) as writer:
        ids = begin(writer, *range(600))
        writer.answered_many([(call, answer("x" * 5000)) for call in ids]).result()
        assert writer.seal() is not None
        assert writer.seal() is None
    assert (tmp_path / "spool" / "spool.sqlite").stat().st_size < 200_000
    assert not list((tmp_path / "spool" / "sealing").iterdir())
    assert TraceStore(tmp_path / "store").num_rows == 600
