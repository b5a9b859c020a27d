"""The endpoint teacher when its server is overloaded, slow, down or gone: when it waits, how long, and when it gives up."""

from __future__ import annotations

import asyncio
import email.utils
import socket
import time
from datetime import UTC, datetime, timedelta

import pytest

from stillhouse.pipeline.errors import TeacherError
from stillhouse.pipeline.records import Trace
from stillhouse.teachers.endpoint import Endpoints, TimeLimits
from stillhouse.teachers.engine_process import free_port
from stillhouse.teachers.retrying import retry_after_s
from tests.chat_server import status
from tests.endpoint_run import ServerAt, answer, complete, request


@pytest.mark.parametrize("code", [429, 503, 500])
def test_no_request_at_all_comes_before_retry_after(server, run, code):
    """If it failed, we would knock while we are told not to, with hundreds of requests, and be banned."""
    texts = list(map(str, range(8)))
    server.delay_s = dict.fromkeys(texts[1:4], 0.15)  # under way when the refusal comes
    server.faults = [status(code, headers={"Retry-After": "0.6"})]
    assert [type(trace) for trace in run.complete(server.base_url, texts=texts, max_concurrent=4)] == [Trace] * 8
    first = server.requests[0].time_s
    later = [received.time_s - first for received in server.requests if received.time_s - first > 0.3]
    assert len(later) >= 5
    assert min(later) >= 0.6


def test_a_request_that_is_still_connecting_is_held_back_as_well(server, run, monkeypatch):
    """If it failed, requests that look up a name or shake hands while another is told Retry-After would still go out."""
    look_up = socket.getaddrinfo

    def slowly(*arguments, **options):
        time.sleep(1.0)
        return look_up(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    endpoints = Endpoints([url := server.base_url.replace("127.0.0.1", "localhost")])

    async def drive():
        async with run.client(endpoints=endpoints) as client:
            asked = asyncio.create_task(complete(client, request("a")))
            await asyncio.sleep(0.15)
            endpoints.hold(url, 1.5)
            until = time.monotonic() + 1.5
            await asked
            return until

    until = asyncio.run(drive())
    [received] = server.requests
    assert received.time_s >= until
    assert len(run.calls()) == 1  # one call, though it took two connections to make it


def test_retry_after_as_a_date_is_waited_out(server, run):
    """If it failed, the second form that the standard allows would be ignored."""
    told = []

    def later(handler, body):
        until = (datetime.now(UTC) + timedelta(seconds=1.5)).replace(microsecond=0)
        told.append(until.timestamp())
        handler.send_text(503, "later", {"Retry-After": email.utils.format_datetime(until, usegmt=True)})

    server.faults = [later]
    run.one(server.base_url)
    assert time.time() - time.monotonic() + server.requests[1].time_s >= told[0]


def test_an_endpoint_that_asks_for_an_hour_is_out_of_reach(server, slept, run):
    """If it failed, a run on rented machines would sleep through a ban, or shorten the wait and lengthen the ban."""
    server.faults = [status(429, headers={"Retry-After": "3600"})]
    with pytest.raises(TeacherError, match="left alone for 3600 s") as caught:
        run.one(server.base_url, slept=slept)
    assert caught.value.exit_code == 4
    assert len(server.requests) == 1
    assert slept == []


def test_overload_lowers_the_number_of_requests_and_success_raises_it(server, run):
    """If it failed, the client would go on with as many requests as its server cannot take."""
    endpoints = Endpoints([server.base_url])
    server.faults = [status(429, headers={"Retry-After": "0.1"})] * 8
    run.complete(texts=list(map(str, range(8))), max_concurrent=8, endpoints=endpoints)
    assert 4 <= endpoints.limit(server.base_url) < 8
    run.complete(texts=list(map(str, range(40))), max_concurrent=8, endpoints=Endpoints([server.base_url]))
    assert endpoints.in_flight == 0


def test_attempts_are_counted_and_the_last_answer_is_told(server, slept, run):
    """If it failed, a dead teacher would be asked for ever, or given up after one bad second."""
    server.fault_for_all = status(503, text="all busy")
    with pytest.raises(TeacherError, match=r"503: 'all busy', 3 times; everything committed stays") as caught:
        run.one(server.base_url, slept=slept, max_attempts=3)
    assert caught.value.exit_code == 4
    assert len(server.requests) == 3
    assert len(slept) == 2


def test_refusals_for_load_use_up_no_attempts_but_the_deadline_holds(server, slept, run):
    """If it failed, a strict rate limit would end a run by itself, or a vendor that only refuses would keep it for ever."""
    server.faults = [status(429)] * 9
    assert run.one(server.base_url, slept=slept, max_attempts=2).key
    assert len(server.requests) == 10
    server.fault_for_all = status(429, text="slow down")
    with pytest.raises(TeacherError, match=r"429: 'slow down', 1 times; the deadline of 0 s"):
        run.one(server.base_url, slept=slept, deadline_s=0.0)


def test_an_unreachable_port_is_one_clear_error(slept, run):
    """If it failed, a wrong base_url would end in a traceback of three libraries."""
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}/v1"
    with pytest.raises(TeacherError, match=rf"'tiny' at {url} cannot be reached") as caught:
        run.one(url, slept=slept, max_attempts=4)
    assert caught.value.exit_code == 4
    assert len(slept) == 3
    assert [(row["status"], row["completion_tokens"]) for row in run.calls()] == [(None, 0)] * 4  # nothing billed


def test_an_endpoint_that_is_down_for_a_while_costs_no_request_its_attempts(model, slept, run):
    """If it failed, an engine that is started again would end the run for every request that met it down."""
    port = free_port("127.0.0.1")
    endpoints = Endpoints([f"http://127.0.0.1:{port}/v1"], open_after_s=0.0, probe_after_s=0.1)
    notes: list[str] = []

    def hang_up(handler, body):
        handler.send_text(200, answer(), {"Connection": "close"})  # a connection that is kept would outlive the server

    async def drive():
        options = {"slept": slept, "max_attempts": 3, "max_concurrent": 30, "note": notes.append}
        async with run.client(endpoints=endpoints, **options) as client:
            with ServerAt(port, model) as server:
                server.faults = [hang_up]
                await complete(client, request("before"))
            tasks = [asyncio.create_task(complete(client, request(str(number)))) for number in range(30)]
            while not endpoints.failing:
                await asyncio.sleep(0.02)
            with ServerAt(port, model):
                return await asyncio.gather(*tasks)

    assert len(asyncio.run(drive())) == 30
    assert len(notes) == 2
    assert "cannot be reached" in notes[0]
    assert "so does every request now" in notes[0]
    assert "answers again" in notes[1]


def test_an_endpoint_that_never_answered_is_given_up_with_one_message(slept, run):
    """If it failed, a wrong base_url would keep a run waiting for hours."""
    notes: list[str] = []
    options = {"slept": slept, "max_concurrent": 30, "note": notes.append}
    errors = run.complete(f"http://127.0.0.1:{free_port('127.0.0.1')}/v1", texts=list(map(str, range(60))), **options)
    assert len({str(error) for error in errors}) == 1
    assert "cannot be reached" in str(errors[0])
    assert len(notes) == 1


def test_a_request_whose_endpoint_goes_away_for_good_ends_at_its_deadline(server, slept, run):
    """If it failed, a run would wait for ever for an engine that nobody starts again."""
    endpoints = Endpoints([server.base_url])

    def go_away(handler, body):
        endpoints.remove(server.base_url)
        handler.send_text(503, "", {"Retry-After": "0.1"})

    server.faults = [go_away]
    with pytest.raises(TeacherError, match=r"no endpoint of the teacher 'tiny' took the request for 0\.5 s"):
        run.one(endpoints=endpoints, slept=slept, deadline_s=0.5, max_attempts=1, note=lambda text: None)
    assert len(server.requests) == 1
    server.fault_for_all = None
    endpoints.add(server.base_url)
    assert run.one(endpoints=endpoints, slept=slept).key  # another client may use them


def test_requests_move_to_the_replicas_that_live(server, slept, run):
    """If it failed, one dead engine replica of several would end the run."""
    dead = f"http://127.0.0.1:{free_port('127.0.0.1')}/v1"
    traces = run.complete(dead, server.base_url, texts=list(map(str, range(30))), slept=slept, max_concurrent=4)
    assert [type(trace) for trace in traces] == [Trace] * 30
    assert sum(row["endpoint"] == dead for row in run.calls()) <= 8


def _stall(seconds: float, before: bytes = b"", kind: str = "application/json"):
    """Send the headers and ``before`` of a body, if any, and nothing more for a while."""

    def fault(handler, body):
        if before:
            handler.send_text(200, "", {"Content-Type": kind, "Content-Length": "1000"})
            handler.wfile.write(before)
            handler.wfile.flush()
        time.sleep(seconds)
        handler.close_connection = True

    return fault


@pytest.mark.parametrize(
    ("fault", "limits", "words"),
    [
        (_stall(20.0), TimeLimits(first_byte_s=0.4), "longer than 0.4 s for the first byte"),
        (_stall(20.0, b'{"id": 1'), TimeLimits(idle_s=0.3), "longer than 0.3 s for the next byte"),
        (_stall(20.0, b'{"id": 1'), TimeLimits(total_s=0.5), "longer than 0.5 s for the last byte"),
    ],
)
def test_each_time_limit_ends_the_request_and_says_which(server, slept, run, fault, limits, words):
    """If it failed, a server that hangs would hold a request, and in the end the whole run, for ever."""
    server.faults = [fault]
    assert run.one(server.base_url, slept=slept, limits=limits).key
    first, *_, last = run.calls()
    assert words in first["error"]
    assert first["completion_tokens"] is None  # it may have been billed
    assert last["state"] == "answered"


def test_a_host_that_does_not_answer_is_given_up_by_the_connection_limit(slept, run):
    """If it failed, a wrong address would hold every request as long as a long answer may take."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        fillers = []
        for _ in range(4):  # a full backlog: further connections get no answer
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
            fillers.append(filler)
        started = time.monotonic()
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        with pytest.raises(TeacherError, match=r"cannot be reached \(\w*Timeout"):
            run.one(url, slept=slept, limits=TimeLimits(connect_s=0.3), max_attempts=2)
        assert time.monotonic() - started < 30
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("\u00b2", None),
        ("12", 12),
        (" 12 ", 12),
        ("0.5", 0.5),
        ("-3", 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2015 07:28:00 -0000", 0),
        ("Wednesday, 21-Oct-15 07:28:00 GMT", 0),
    ],
)
def test_retry_after_takes_whatever_servers_send(header, seconds):
    """If it failed, an odd header in one of a hundred thousand answers would crash the run."""
    assert retry_after_s(header) == seconds


def test_retry_after_as_a_date_counts_from_now():
    """If it failed, a date would be waited for too long or not at all."""
    asked_for = (datetime.now(UTC) + timedelta(seconds=45)).replace(microsecond=0)
    before = (asked_for - datetime.now(UTC)).total_seconds()
    seconds = retry_after_s(email.utils.format_datetime(asked_for, usegmt=True))
    assert (asked_for - datetime.now(UTC)).total_seconds() <= seconds <= before
