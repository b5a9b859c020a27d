"""How many requests go to which endpoint, and when: adaptive limits, gates, and endpoints that come and go.

One event loop acquires and releases. `Endpoints.add`, `Endpoints.remove` and `Endpoints.mark_unhealthy` may be called from any
thread: whoever watches engine replicas does so from one of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
import time
from collections import deque
from collections.abc import Iterable
from urllib.parse import urlsplit

from stillhouse.pipeline.errors import TeacherError

_SUSPECT_AFTER_FAILURES = 3
_MAX_COOLDOWN_S = 60.0
_GROWTH = 0.05


class AdaptiveLimit:
    """How many requests may be under way: halved when the server is overloaded, grown slowly while it is not.

    Additive increase, multiplicative decrease (as TCP does, RFC 5681): a round trip of successes adds one request, or 5 % where
    that is more. A refusal halves once a round trip: one that answers a request sent before the last halving says nothing new.
    """

    def __init__(self, most: int, least: int = 1):
        if not 1 <= least <= most:
            raise ValueError(f"a limit on requests needs 1 <= least <= most; got least={least}, most={most}")
        self._most, self._least = most, least
        self._value = float(most)
        self._halved_at = float("-inf")

    @property
    def value(self) -> int:
        return int(self._value)

    def succeeded(self) -> None:
        self._value = min(float(self._most), self._value + max(1 / self._value, _GROWTH))

    def overloaded(self, *, sent_at: float, now: float) -> None:
        """A request that was sent at ``sent_at`` was refused for load; both times monotonic, seconds."""
        if sent_at >= self._halved_at:
            self._value = max(float(self._least), self._value / 2)
            self._halved_at = now


class _Endpoint:
    """What is known of one base URL."""

    def __init__(self, url: str, limit: AdaptiveLimit, cooldown_s: float):
        self.url = url
        self.limit = limit
        self.in_flight = 0
        self.removed = False
        self.num_holds = 0
        self.openers: list[asyncio.Future[None]] = []
        self.recover(cooldown_s)

    def recover(self, cooldown_s: float) -> None:
        self.failures = 0
        self.failing_since = 0.0
        self.cooldown_s = cooldown_s
        self.quarantined = self.probing = False

    @property
    def may_take(self) -> bool:
        if self.removed or self.num_holds or (self.quarantined and self.probing):
            return False
        return self.in_flight < self.limit.value


class Endpoints:
    """Hands out base URLs, the one with the least requests in flight first.

    Each URL has an adaptive limit, a gate that Retry-After closes for all its requests, and a circuit breaker: after
    ``open_after_failures`` failures in a row over at least ``open_after_s`` seconds, or after three while another URL does
    well, it gets one request at a time, after a pause that doubles up to a minute, until one succeeds.

    Args:
        urls: each up to where ``/chat/completions`` follows, for example ``https://api.example.com/v1``.
        probe_after_s: the first of those pauses.
    """

    def __init__(
        self,
        urls: Iterable[str] = (),
        *,
        open_after_failures: int = 20,
        open_after_s: float = 30.0,
        probe_after_s: float = 5.0,
    ):
        self._open_after_failures, self._open_after_s, self._probe_after_s = open_after_failures, open_after_s, probe_after_s
        self._most, self._least = 1_000_000, 1
        self._endpoints: dict[str, _Endpoint] = {}  # replaced whole, so that the loop can walk it while a thread adds
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[asyncio.Future[str]] = deque()
        self._stopped = ""
        self._stopping = asyncio.Event()
        self._ever_well = False
        for url in urls:
            self.add(url)

    def bound(self, max_concurrent: int, min_concurrent: int = 1) -> None:
        """Begin to serve a client: at most ``max_concurrent`` requests in flight over all URLs, no URL's limit below
        ``min_concurrent``. What stopped an earlier client is over.
        """
        self._stopped = ""
        self._stopping.clear()
        self._most, self._least = max_concurrent, min_concurrent
        for endpoint in self._endpoints.values():
            endpoint.limit = AdaptiveLimit(max_concurrent, min_concurrent)

    def add(self, url: str) -> None:
        """Let requests go to ``url`` from now on, with a clean slate; one that is there already recovers.

        Raises:
            TeacherError: it is no http(s) URL.
        """
        url = _checked(url)
        with self._lock:
            known = self._endpoints.get(url)
            if known is None:
                new = _Endpoint(url, AdaptiveLimit(self._most, self._least), self._probe_after_s)
                kept = {name: known for name, known in self._endpoints.items() if known.in_flight or not known.removed}
                self._endpoints = {**kept, url: new}
            else:
                known.removed = False
                known.recover(self._probe_after_s)
        self._wake()

    def remove(self, url: str) -> None:
        """Send nothing more to ``url``; what is in flight there goes on."""
        if known := self._endpoints.get(url.rstrip("/")):
            known.removed = True

    def mark_unhealthy(self, url: str) -> None:
        """Give ``url`` one request at a time, until one succeeds or it is added again."""
        if known := self._endpoints.get(url.rstrip("/")):
            known.quarantined = True

    @property
    def urls(self) -> list[str]:
        return [endpoint.url for endpoint in self._present()]

    @property
    def in_flight(self) -> int:
        return sum(endpoint.in_flight for endpoint in self._endpoints.values())

    @property
    def failing(self) -> bool:
        """True where no URL is there, or every one has failed so often in a row that it is not one request's fault."""
        return all(endpoint.failures >= self._open_after_failures for endpoint in self._present())

    @property
    def worth_waiting_for(self) -> bool:
        """True while all fail and yet some answer may come: they answered before, or are taken away to be started again."""
        return self.failing and (self._ever_well or not self._present())

    def limit(self, url: str) -> int:
        """Requests that ``url`` gets at the same time, at most, as things stand."""
        return self._endpoints[url].limit.value

    async def acquire(self, *, again: bool = False) -> str:
        """Wait for a URL that may take a request, and count the request as in flight there; `release` ends it.

        Args:
            again: the request was made before; it goes before those that were not.

        Raises:
            TeacherError: `stop` was called.
        """
        self._loop = asyncio.get_running_loop()
        if self._stopped:
            raise TeacherError(self._stopped)
        if not self._waiting and (free := self._free()):
            return self._take(free)
        place = self._loop.create_future()
        if again:
            self._waiting.appendleft(place)
        else:
            self._waiting.append(place)
        self._hand_out()
        try:
            return await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.release(place.result())
            raise

    def release(self, url: str, ok: bool | None = None) -> None:
        """A request that `acquire` counted is over.

        Args:
            ok: it was answered; it failed in a way that says the endpoint is not well; None where it says nothing about that.
        """
        endpoint = self._endpoints[url]
        endpoint.in_flight -= 1
        endpoint.probing = False
        if ok:
            self._ever_well = True
            endpoint.recover(self._probe_after_s)
            endpoint.limit.succeeded()
        elif ok is False:
            self._failed(endpoint)
        self._hand_out()

    def overloaded(self, url: str, *, sent_at: float) -> None:
        """A request to ``url`` that was sent at ``sent_at`` (monotonic seconds) was refused for load."""
        self._endpoints[url].limit.overloaded(sent_at=sent_at, now=time.monotonic())

    def hold(self, url: str, seconds: float) -> None:
        """Close the gate of ``url``: no request goes out to it for so long. Of several holds the longest counts."""
        endpoint = self._endpoints[url]
        endpoint.num_holds += 1
        asyncio.get_running_loop().call_later(seconds, self._unhold, endpoint)

    def held(self, url: str) -> bool:
        return self._endpoints[url].num_holds > 0

    async def wait_until_open(self, url: str) -> None:
        """Wait while the gate of ``url`` is closed. Returns at once after `stop`, for the caller to look."""
        endpoint = self._endpoints[url]
        while endpoint.num_holds and not self._stopped:
            opener = asyncio.get_running_loop().create_future()
            endpoint.openers.append(opener)
            await opener

    async def pause(self, seconds: float) -> None:
        """Wait for so long, or until `stop`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    def stop(self, message: str) -> None:
        """End everything that waits, with a TeacherError that says ``message``; the first one stays."""
        if self._stopped:
            return
        self._stopped = message
        self._stopping.set()
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_exception(TeacherError(message))
        for endpoint in self._endpoints.values():
            self._open(endpoint)

    @property
    def stopped(self) -> str:
        """What `stop` was told; "" while it was not called."""
        return self._stopped

    def _present(self) -> list[_Endpoint]:
        return [endpoint for endpoint in self._endpoints.values() if not endpoint.removed]

    def _free(self) -> _Endpoint | None:
        best, total = None, 0
        for endpoint in self._endpoints.values():
            total += endpoint.in_flight
            if endpoint.may_take and (best is None or endpoint.in_flight < best.in_flight):
                best = endpoint
        return best if total < self._most else None

    def _take(self, endpoint: _Endpoint) -> str:
        endpoint.in_flight += 1
        endpoint.probing = endpoint.quarantined
        return endpoint.url

    def _hand_out(self) -> None:
        while self._waiting:
            if self._waiting[0].done():  # cancelled while it waited
                self._waiting.popleft()
            elif free := self._free():
                self._waiting.popleft().set_result(self._take(free))
            else:
                return

    def _failed(self, endpoint: _Endpoint) -> None:
        now = time.monotonic()
        if not endpoint.failures:
            endpoint.failing_since = now
        endpoint.failures += 1
        broken = endpoint.failures >= self._open_after_failures and now - endpoint.failing_since >= self._open_after_s
        if not broken and endpoint.failures >= _SUSPECT_AFTER_FAILURES:
            # With no fewer in flight than the others, an endpoint that fails fast would draw all requests to itself.
            broken = any(other.failures < _SUSPECT_AFTER_FAILURES for other in self._present() if other is not endpoint)
        if broken and not endpoint.num_holds:
            endpoint.quarantined = True
            self.hold(endpoint.url, endpoint.cooldown_s)
            endpoint.cooldown_s = min(_MAX_COOLDOWN_S, 2 * endpoint.cooldown_s)

    def _unhold(self, endpoint: _Endpoint) -> None:
        endpoint.num_holds -= 1
        if not endpoint.num_holds:
            self._open(endpoint)
            self._hand_out()

    def _open(self, endpoint: _Endpoint) -> None:
        openers, endpoint.openers = endpoint.openers, []
        for opener in openers:
            if not opener.done():
                opener.set_result(None)

    def _wake(self) -> None:
        """Let those that wait look again, from whichever thread this is."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_out)


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0 and not (parts.query or parts.fragment)
    except ValueError:  # a port that is no number, a bracket that is not closed
        fine = False
    if not fine or "@" in url:
        shown = re.split("[?#]", url.rpartition("@")[2])[0]  # not a password, nor a key in the query
        raise TeacherError(
            f"an endpoint's address has to be like https://api.example.com/v1, without password or query; got {shown!r}; "
            "correct teacher.base_url"
        )
    return url.rstrip("/")
