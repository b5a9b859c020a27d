"""One chat request on the wire: posted once, under four time limits, read whole or as a stream. Nothing is retried here."""

from __future__ import annotations

import asyncio
import contextvars
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from stillhouse.pipeline.errors import first_line
from stillhouse.teachers.chat_stream import ChatStream
from stillhouse.teachers.loops import TAIL_CHARACTERS

_CHECK_EVERY_CHARACTERS = 500
_MAX_ERROR_BYTES = 64 << 10
_KEPT_ALIVE_S = 4.0
"""Idle connections are closed by us first. uvicorn, under most engine servers, does so after 5 s, and a request that crosses
with that is a broken connection of which nobody knows whether it was billed."""


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """Seconds that a request may take: to connect; from then to the first byte; between two bytes; and all together.

    The first byte of an answer that is not streamed comes when its last token is generated, so ``first_byte_s`` is long.
    """

    connect_s: float = 10.0
    first_byte_s: float = 1800.0
    idle_s: float = 300.0
    total_s: float = 7200.0


@dataclass(slots=True)
class Exchange:
    """What became of one request.

    ``broken`` says in words what went wrong on the way, "" where the answer, or what we wanted of it, came whole. ``status`` is
    None where no answer began. ``sent_at`` is in monotonic seconds, 0 where no byte of the request can have gone out;
    ``seconds`` counts from there to the last byte.
    """

    status: int | None = None
    retry_after: str | None = None
    location: str | None = None
    body: bytes = b""
    stream: ChatStream | None = None
    stopped: str = ""
    broken: str = ""
    too_slow: bool = False
    sent_at: float = 0.0
    seconds: float = 0.0

    @property
    def sent(self) -> bool:
        return self.sent_at > 0


class HeldBackError(Exception):
    """A connection was there, but the endpoint's gate had closed meanwhile; nothing was sent."""


@dataclass(slots=True)
class _Clock:
    """Ends the exchange at whichever of its limits comes first."""

    timer: asyncio.Timeout
    limits: TimeLimits
    hold_back: Callable[[], bool]
    exchange: Exchange
    started: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    waiting_for: str = "a connection"
    limit_s: float = 0.0

    def about_to_send(self) -> None:
        if self.hold_back():
            raise HeldBackError
        self.exchange.sent_at = time.monotonic()
        self.allow(self.limits.first_byte_s, "the first byte")

    def allow(self, seconds: float, waiting_for: str) -> None:
        now = asyncio.get_running_loop().time()
        left = self.started + self.limits.total_s - now
        if left < seconds:
            seconds, waiting_for = left, "the last byte"
        self.waiting_for = waiting_for
        self.limit_s = self.limits.total_s if waiting_for == "the last byte" else seconds
        self.timer.reschedule(now + seconds)


_CLOCK: contextvars.ContextVar[_Clock] = contextvars.ContextVar("clock of the request that this task makes")


class _Connector(aiohttp.TCPConnector):
    """Looks at the gate after a connection is there, so that the time to connect cannot carry a request past Retry-After."""

    async def connect(self, *args: Any, **options: Any) -> Any:
        connection = await super().connect(*args, **options)
        try:
            _CLOCK.get().about_to_send()
        except HeldBackError:
            connection.release()
            raise
        return connection


def open_session(api_key: str, limits: TimeLimits) -> aiohttp.ClientSession:
    """A session for `post`: no proxies, no ``.netrc``, no cookies, no limit on connections. Needs a running loop."""
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(
        connector=_Connector(limit=0, ttl_dns_cache=300, keepalive_timeout=_KEPT_ALIVE_S, socket_factory=_socket),
        timeout=aiohttp.ClientTimeout(total=None, connect=limits.connect_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=headers,
        trust_env=False,  # no proxy or .netrc gets to see the prompts or the key unasked
    )


async def post(
    session: aiohttp.ClientSession,
    url: str,
    body: bytes,
    *,
    exchange: Exchange,
    limits: TimeLimits,
    hold_back: Callable[[], bool],
    stop_when: Callable[[str], str | None] | None,
) -> None:
    """Post a chat request and read its answer.

    Args:
        exchange: filled as the answer comes, so that it says how far that was also where the caller is cancelled.
        hold_back: asked at the last moment before the request goes out.
        stop_when: gets the end of a stream's text every 500 characters; what it returns ends the stream.

    Raises:
        HeldBackError: ``hold_back`` said so.
    """
    try:
        async with asyncio.timeout(None) as timer:
            clock = _Clock(timer, limits, hold_back, exchange)
            _CLOCK.set(clock)
            # A redirect would make a POST a GET, or carry the prompts to a host that nobody named.
            async with session.post(url, data=body, allow_redirects=False) as response:
                exchange.status = response.status
                exchange.retry_after = response.headers.get("Retry-After")
                exchange.location = response.headers.get("Location")
                await _read(response, exchange, clock, stop_when)
    except (aiohttp.ClientError, OSError) as error:  # a time limit is an OSError, too
        exchange.broken = _in_words(error, exchange, _CLOCK.get())
        exchange.too_slow = exchange.sent and isinstance(error, TimeoutError)
    except (ValueError, RecursionError) as error:  # from the stream: an event that is none
        exchange.broken = f"broke off: {error}"
    finally:
        if exchange.sent:
            exchange.seconds = time.monotonic() - exchange.sent_at


async def _read(
    response: aiohttp.ClientResponse, exchange: Exchange, clock: _Clock, stop_when: Callable[[str], str | None] | None
) -> None:
    is_answer = 200 <= response.status < 300
    if is_answer and response.content_type == "text/event-stream":
        exchange.stream = ChatStream()
        await _read_stream(response, exchange, exchange.stream, clock, stop_when)
        return
    pieces, num_bytes = [], 0
    async for piece in response.content.iter_any():
        clock.allow(clock.limits.idle_s, "the next byte")
        pieces.append(piece)
        num_bytes += len(piece)
        if not is_answer and num_bytes > _MAX_ERROR_BYTES:
            response.close()
            break
    exchange.body = b"".join(pieces)


async def _read_stream(
    response: aiohttp.ClientResponse,
    exchange: Exchange,
    stream: ChatStream,
    clock: _Clock,
    stop_when: Callable[[str], str | None] | None,
) -> None:
    tail, new, num_checked = "", [], 0
    async for piece in response.content.iter_any():
        clock.allow(clock.limits.idle_s, "the next byte")
        text = stream.feed(piece)
        if stream.done:
            # What follows [DONE] is the end of the body; read, so that the connection can be used again.
            continue
        if stop_when is None or stream.complete:
            continue
        new.append(text)
        if stream.num_characters - num_checked >= _CHECK_EVERY_CHARACTERS:
            num_checked = stream.num_characters
            tail = (tail + "".join(new))[-TAIL_CHARACTERS:]
            new.clear()
            if why := stop_when(tail):
                exchange.stopped = why
                response.close()  # the server sees the connection go and stops generating
                return


def _in_words(error: Exception, exchange: Exchange, clock: _Clock) -> str:
    if isinstance(error, TimeoutError) and exchange.sent:
        return f"let us wait longer than {clock.limit_s:g} s for {clock.waiting_for}"
    said = f"{type(error).__name__}: {first_line(error)}"
    if not exchange.sent:
        return f"cannot be reached ({said})"
    return f"broke off its answer ({said})" if exchange.status is not None else f"broke the connection ({said})"


def _socket(address: Any) -> socket.socket:
    """A socket that notices within two minutes that its peer is gone, and that no router forgets during a long silence."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # not on every system
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made
