"""Adaptive limits, gates and circuit breakers over endpoints that come and go: who gets the next request, and when."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from stillhouse.pipeline.errors import TeacherError
from stillhouse.teachers.concurrency import AdaptiveLimit, Endpoints

A, B, C = "http://a:1/v1", "http://b:1/v1", "http://c:1/v1"


def test_overload_halves_once_a_round_trip_and_success_grows_slowly():
    """If it failed, one burst of 429 would stop the client, or it would hammer a server that asks it not to."""
    limit = AdaptiveLimit(64, 4)
    for _ in range(30):  # all sent at once, all refused
        limit.overloaded(sent_at=10.0, now=11.0)
    assert limit.value == 32
    limit.overloaded(sent_at=11.5, now=12.0)
    assert limit.value == 16
    for _ in range(17):  # one round trip, and a bit
        limit.succeeded()
    assert limit.value == 17
    for _ in range(10_000):
        limit.succeeded()
    assert limit.value == 64
    for second in range(20):
        limit.overloaded(sent_at=100.0 + second, now=100.5 + second)
    assert limit.value == 4


@pytest.mark.parametrize(("most", "least"), [(0, 1), (4, 0), (4, 5)])
def test_a_limit_that_cannot_be_is_refused(most, least):
    """If it failed, a recipe with max_concurrent 0 would wait for ever."""
    with pytest.raises(ValueError, match="1 <= least <= most"):
        AdaptiveLimit(most, least)


def test_the_least_busy_endpoint_gets_the_next_request():
    """If it failed, one of several engine replicas would do the work and the others stand by."""

    async def run():
        endpoints = Endpoints([A, B, C])
        first = [await endpoints.acquire() for _ in range(30)]
        assert {url: first.count(url) for url in (A, B, C)} == {A: 10, B: 10, C: 10}
        for _ in range(5):
            endpoints.release(B, True)
        assert [await endpoints.acquire() for _ in range(5)] == [B] * 5

    asyncio.run(run())


def test_no_more_than_allowed_are_in_flight_and_repeats_go_first():
    """If it failed, a retried request would wait behind a whole run's worth of new ones until its deadline."""

    async def run():
        endpoints = Endpoints([A, B])
        endpoints.bound(3)
        for _ in range(3):
            await endpoints.acquire()
        order = []

        async def wait(name, again):
            await endpoints.acquire(again=again)
            order.append(name)

        waiting = [asyncio.create_task(wait(name, name == "again")) for name in ("first", "second", "again")]
        await asyncio.sleep(0.01)
        assert order == []
        assert endpoints.in_flight == 3
        for expected in (["again"], ["again", "first"], ["again", "first", "second"]):
            endpoints.release(A)
            await asyncio.sleep(0.01)
            assert order == expected
            assert endpoints.in_flight == 3
        await asyncio.gather(*waiting)

    asyncio.run(run())


def test_one_that_is_cancelled_while_it_waits_takes_no_place():
    """If it failed, every cancelled request would shrink the client by one, to a standstill."""

    async def run():
        endpoints = Endpoints([A])
        endpoints.bound(1)
        await endpoints.acquire()
        waiting = [asyncio.create_task(endpoints.acquire()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        endpoints.release(A)  # gives the place to the second
        waiting[1].cancel()  # which is cancelled before it takes it
        assert await waiting[2] == A
        assert endpoints.in_flight == 1

    asyncio.run(run())


def test_endpoints_come_and_go_while_requests_wait():
    """If it failed, a run on engine replicas would end with the first of them that is started again."""

    async def run():
        endpoints = Endpoints([A])
        assert await endpoints.acquire() == A
        endpoints.remove(f"{A}/")
        assert endpoints.urls == []
        assert endpoints.failing
        waiting = asyncio.create_task(endpoints.acquire())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        watcher = threading.Thread(target=endpoints.add, args=(B,))  # as the pool's own thread does
        watcher.start()
        assert await asyncio.wait_for(waiting, 60) == B
        watcher.join()
        endpoints.release(A, False)  # what was in flight there ended with it
        assert endpoints.in_flight == 1
        endpoints.add(A)
        assert await endpoints.acquire() == A

    asyncio.run(run())


def test_a_closed_gate_holds_everything_back_until_it_opens():
    """If it failed, the other requests would knock while one of them has been told to stay away."""

    async def run():
        endpoints = Endpoints([A, B])
        endpoints.hold(A, 0.2)
        endpoints.hold(A, 0.05)  # a shorter one does not open it
        started = time.monotonic()
        assert [await endpoints.acquire() for _ in range(3)] == [B, B, B]
        assert endpoints.held(A)
        endpoints.remove(B)
        assert await endpoints.acquire() == A
        assert time.monotonic() - started >= 0.2
        assert not endpoints.held(A)
        endpoints.hold(A, 0.1)
        started = time.monotonic()
        await endpoints.wait_until_open(A)
        assert time.monotonic() - started >= 0.1

    asyncio.run(run())


def test_a_dead_endpoint_is_probed_by_one_request_at_a_time_until_it_answers():
    """If it failed, an engine that is being started again would use up every request's attempts, or never be asked again."""

    async def run():
        endpoints = Endpoints([A], open_after_failures=5, open_after_s=0.0, probe_after_s=0.05)
        for _ in range(5):
            await endpoints.acquire()
        assert not endpoints.failing
        for _ in range(5):
            endpoints.release(A, False)
        assert endpoints.failing
        started = time.monotonic()
        waiting = [asyncio.create_task(endpoints.acquire()) for _ in range(4)]
        done, _ = await asyncio.wait(waiting, timeout=0.15)
        assert len(done) == 1  # the probe
        assert time.monotonic() - started >= 0.05
        endpoints.release(A, False)  # which fails: twice the pause, and one more
        started = time.monotonic()
        await asyncio.wait(waiting[1:], return_when=asyncio.FIRST_COMPLETED)
        assert time.monotonic() - started >= 0.1
        assert [task.done() for task in waiting] == [True, True, False, False]
        endpoints.release(A, True)
        assert not endpoints.failing
        await asyncio.wait_for(asyncio.gather(*waiting), 60)

    asyncio.run(run())


def test_failures_in_one_burst_do_not_open_the_breaker():
    """If it failed, one reset of a load balancer would pause a client with hundreds of requests in flight."""

    async def run():
        endpoints = Endpoints([A])
        for _ in range(40):
            await endpoints.acquire()
        for _ in range(40):
            endpoints.release(A, False)
        assert not endpoints.held(A)
        assert await asyncio.wait_for(endpoints.acquire(), 60) == A

    asyncio.run(run())


def test_a_dead_replica_does_not_draw_the_requests_of_the_living():
    """If it failed, the replica that fails at once, and so has the least in flight, would get every request."""

    async def run():
        endpoints = Endpoints([A, B])
        asked = []
        for _ in range(100):
            url = await endpoints.acquire()
            asked.append(url)
            if url == A:
                endpoints.release(A, False)
        assert asked.count(A) == 3
        assert not endpoints.failing

    asyncio.run(run())


def test_one_that_is_marked_unhealthy_gets_one_request_until_it_answers():
    """If it failed, a replica whose health check fails would go on getting its share."""

    async def run():
        endpoints = Endpoints([A, B])
        endpoints.mark_unhealthy(A)
        assert sorted([await endpoints.acquire() for _ in range(5)]) == [A, B, B, B, B]
        endpoints.release(A, True)
        assert [await endpoints.acquire() for _ in range(4)] == [A] * 4

    asyncio.run(run())


def test_to_stop_ends_all_that_wait_with_one_message():
    """If it failed, thousands of planned requests would each knock with a wrong key before the user hears of it."""

    async def run():
        endpoints = Endpoints([A])
        endpoints.bound(1)
        assert await endpoints.acquire() == A
        endpoints.hold(A, 100)
        gate = asyncio.create_task(endpoints.wait_until_open(A))
        waiting = [asyncio.create_task(endpoints.acquire()) for _ in range(3)]
        await asyncio.sleep(0)
        endpoints.stop("out of credit")
        endpoints.stop("the client was closed")
        results = await asyncio.gather(*waiting, endpoints.acquire(), return_exceptions=True)
        assert [(type(result), str(result)) for result in results] == [(TeacherError, "out of credit")] * 4
        await asyncio.wait_for(gate, 60)
        endpoints.release(A, True)
        assert endpoints.in_flight == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.example.com/v1",
        "ftp://api.example.com",
        "http://",
        "http://host:port/v1",
        "http://[::1/v1",
        "https://user:canary@host/v1",
        "https://host/v1?key=canary",
        "https://host/v1#canary",
    ],
)
def test_what_is_no_address_is_refused_and_no_secret_in_it_shown(url):
    """If it failed, a wrong base_url would end in a traceback, or a password in it would stand in a log."""
    with pytest.raises(TeacherError, match=r"like https://api\.example\.com/v1.*correct teacher\.base_url") as caught:
        Endpoints([url])
    assert "canary" not in str(caught.value)
