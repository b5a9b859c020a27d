"""A teacher behind OpenAI-compatible chat endpoints: one asynchronous client that asks, retries and keeps the ledger.

The ledger knows of every call before its request goes out, and has every answer before anybody reads it, so that no crash
loses what was paid for. Which failures are retried is in `stillhouse.teachers.retrying`, how many requests go where and when
in `stillhouse.teachers.concurrency`, the request on the wire in `stillhouse.teachers.exchange`.
"""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from stillhouse.pipeline.errors import StillhouseError, TeacherError
from stillhouse.pipeline.records import Sampling, Trace
from stillhouse.pipeline.trace_store.ledger import Intent
from stillhouse.teachers.api_key import MIN_SECRET_CHARACTERS, KeyEraser, checked_key
from stillhouse.teachers.chat_response import envelope
from stillhouse.teachers.concurrency import Endpoints
from stillhouse.teachers.exchange import Exchange, HeldBackError, TimeLimits, open_session, post
from stillhouse.teachers.retrying import (
    MAX_RETRY_AFTER_S,
    MAY_HAVE_BEEN_BILLED,
    OVERLOADED,
    Verdict,
    jitter_s,
    retry_after_s,
    verdict_of,
)
from stillhouse.teachers.tracing import TraceRequest, intent_of

Result = TypeVar("Result")
_DEFAULT_LIMITS = TimeLimits()
_OURS = frozenset({"model", "messages", "temperature", "top_p", "max_tokens", "n", "seed", "stream", "stream_options"})
_GO_ON = "everything committed stays, the same command goes on from there"


class CallLedger(Protocol):
    """What `stillhouse.pipeline.trace_store.writer.TraceWriter` does for a client; see there."""

    def begin(self, intents: Sequence[Intent]) -> Future[list[int]]: ...

    def answered(self, call_id: int, raw: bytes) -> Future[Trace]: ...

    def failed(
        self, call_id: int, *, error: str, status: int | None, billed: Literal["no", "unknown"], partial: bytes = b""
    ) -> Future[None]: ...


class RefusedRequestError(TeacherError):
    """The endpoint refuses this one request, and would again; others may go through."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a call brought no trace, and what to do about it."""

    what: str
    verdict: Verdict
    status: int | None = None
    wait_s: float | None = None
    well: bool | None = False
    """Whether the endpoint is well all the same; None where this says nothing about it."""


def build_body(
    model: str, messages: Sequence[Mapping[str, str]], seed: int, sampling: Sampling, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON of a chat request. Settings that are at their defaults are not sent: many servers refuse what they do not know.

    Args:
        seed: sent modulo 2³¹; whether the endpoint honours it is its business.
        extra: further fields as they are.
    """
    settings = sampling.extras()
    if top_logprobs := settings.pop("top_logprobs", 0):
        settings |= {"logprobs": True, "top_logprobs": top_logprobs}
    return {
        "model": model,
        "messages": messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "n": 1,
        "seed": seed % 2**31,
        **settings,
        **extra,
    }


class ChatClient:
    """Asks chat endpoints for completions; many `complete` calls run at once. Use with ``async with``, in one event loop.

    Args:
        endpoints: where to; may change while requests run.
        model: the endpoint's name for the model.
        ledger: told of every attempt before it goes out, and of what became of it.
        api_key: sent in the header and nowhere else; "" sends none.
        max_concurrent: requests in flight at most, over all endpoints; each endpoint's own limit adapts between
            ``min_concurrent`` and that.
        max_attempts: failed attempts after which a request is given up. Refusals for load (429) do not count, nor do any while
            endpoints that answered before fail for everybody; ``deadline_s``, from a request's first attempt, bounds both.
        stream: ask for server-sent events; then ``stop_when`` can end an answer early, and a connection that breaks leaves
            the beginning.
        stop_when: gets the end of a stream's text every 500 characters; what it returns ends the stream (see
            `stillhouse.teachers.loops.LoopDetector`).
        extra_body: further fields for every request, for example ``{"chat_template_kwargs": {"thinking": True}}``.
        sleep: what waits between two attempts, seconds; None waits on the clock, and no longer than the client goes on.
        note: told once when the endpoints begin to fail for everybody, and when they answer again.

    Raises:
        TeacherError: the key cannot be one.
        ValueError: ``extra_body`` sets what the client sets.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        model: str,
        *,
        ledger: CallLedger,
        api_key: str = "",
        max_concurrent: int = 64,
        min_concurrent: int = 1,
        limits: TimeLimits = _DEFAULT_LIMITS,
        max_attempts: int = 6,
        deadline_s: float = 3600.0 * 6,
        stream: bool = False,
        stop_when: Callable[[str], str | None] | None = None,
        extra_body: Mapping[str, Any] = {},
        sleep: Callable[[float], Awaitable[None]] | None = None,
        note: Callable[[str], None] = warnings.warn,
    ):
        if ours := sorted(_OURS & extra_body.keys()):
            raise ValueError(f"extra_body sets {ours}, which come from the recipe's own settings; leave them out")
        if stop_when is not None and not stream:
            raise ValueError("stop_when looks at an answer while it comes, which needs stream=True")
        self._endpoints = endpoints
        self._endpoints.bound(max_concurrent, min_concurrent)
        self._model = model
        self._ledger = ledger
        self._key = checked_key(api_key, "api_key")
        self._without_key = KeyEraser(api_key)
        self._answer_without_key = KeyEraser(api_key if len(api_key) >= MIN_SECRET_CHARACTERS else "")
        self._limits = limits
        self._max_attempts = max_attempts
        self._deadline_s = deadline_s
        self._stop_when = stop_when
        self._extra = dict(extra_body)
        if stream:
            self._extra |= {"stream": True, "stream_options": {"include_usage": True}}
        self._sleep = sleep or endpoints.pause
        self._note = note
        self._said_failing = False

    def __repr__(self) -> str:
        return f"ChatClient({self._model!r} at {self._endpoints.urls})"

    def __reduce__(self) -> Any:
        raise TypeError("a ChatClient holds a key and open connections and does not leave its process")

    async def __aenter__(self) -> ChatClient:
        self._session = open_session(self._key, self._limits)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._endpoints.stop("the client was closed")
        await self._session.close()

    async def complete(self, request: TraceRequest, sampling: Sampling, context: bytes) -> Trace:
        """Ask for one completion until it is in the ledger.

        Args:
            request: its prompt is the messages as JSON, see `stillhouse.teachers.tracing.render_for_teacher`.
            context: what the ledger's ``parse`` needs, see `stillhouse.teachers.chat_response.call_context`.

        Raises:
            RefusedRequestError: the endpoint refuses this request (400, 404, 405, 413, 422 …).
            TeacherError: the endpoint refuses everything (401, 402, 403, a redirect), cannot be reached, or fails this request
                over and over. After the first of these reasons every request that waits ends with the same message; what is in
                flight goes on, and its answers are kept.
            BudgetReached: the ledger has no money, tokens or time left for it.
        """
        messages = json.loads(request.rendered_prompt)
        body = json.dumps(build_body(self._model, messages, request.seed, sampling, self._extra)).encode()
        deadline = None
        num_tries = num_failures = 0
        while True:
            url = await self._turn(deadline)
            deadline = deadline or asyncio.get_running_loop().time() + self._deadline_s
            well = None
            try:
                intent = intent_of(request, sampling, context, url)
                result = await self._call(url, intent, body)
                well = result.well if isinstance(result, _Failure) else True
            finally:
                self._endpoints.release(url, well)
            if isinstance(result, Trace):
                if self._said_failing:
                    self._said_failing = False
                    self._note(f"the teacher {self._model!r} answers again")
                return result
            num_tries += 1
            num_failures += result.status != 429
            await self._before_next_try(url, result, num_tries, num_failures, deadline)

    async def _turn(self, deadline: float | None) -> str:
        """Wait for an endpoint; a request that was made before (then it has a deadline) comes first, and not for ever."""
        try:
            async with asyncio.timeout_at(deadline):
                return await self._endpoints.acquire(again=deadline is not None)
        except TimeoutError as error:
            waited = f"no endpoint of the teacher {self._model!r} took the request for {self._deadline_s:g} s; {_GO_ON}"
            raise self._given_up(waited) from error

    async def _before_next_try(self, url: str, failure: _Failure, num_tries: int, num_failures: int, deadline: float) -> None:
        """Wait until the request may go out again; raise where it may not."""
        who = f"the teacher {self._model!r} at {url}"
        if failure.verdict == "refused":
            raise RefusedRequestError(f"{who} {failure.what}; this is not retried")
        if failure.verdict == "stop":
            self._endpoints.stop(f"{who} {failure.what}; this is not retried: {_GO_ON}")
        elif failure.wait_s is not None and failure.wait_s > MAX_RETRY_AFTER_S:
            self._endpoints.stop(f"{who} {failure.what}, and asks to be left alone for {failure.wait_s:.0f} s; {_GO_ON}, then")
        if self._endpoints.stopped:
            raise TeacherError(self._endpoints.stopped)
        if self._endpoints.failing and not self._said_failing:
            self._said_failing = True
            self._note(
                f"{who} {failure.what}; so does every request now. Asking again, less and less often, for "
                f"{self._deadline_s:g} s at most"
            )
        if num_failures >= self._max_attempts and not self._endpoints.worth_waiting_for:
            raise self._given_up(f"{who} {failure.what}, {num_tries} times; {_GO_ON}")
        # Where Retry-After said so, the gate of the endpoint does the waiting, for all its requests.
        wait_s = failure.wait_s or jitter_s(num_tries)
        if asyncio.get_running_loop().time() + wait_s > deadline:
            tried = f"{num_tries} times; the deadline of {self._deadline_s:g} s leaves no other try"
            raise self._given_up(f"{who} {failure.what}, {tried}; {_GO_ON}")
        if not failure.wait_s:
            await self._sleep(wait_s)

    def _given_up(self, message: str) -> TeacherError:
        if self._endpoints.failing:  # for the others as well, then, with this one message
            self._endpoints.stop(message)
        return TeacherError(message)

    async def _call(self, url: str, intent: Intent, body: bytes) -> Trace | _Failure:
        """One attempt, one call in the ledger."""
        call_id = await self._begin(intent)
        exchange = Exchange()
        try:
            await self._send(url, body, exchange)
        except asyncio.CancelledError:
            exchange.broken = "cancelled"
            self._note_failure(call_id, exchange, "cancelled")
            raise
        if not exchange.sent and self._endpoints.stopped:
            await _result(self._note_failure(call_id, exchange, "not sent, because the client stopped"))
            raise TeacherError(self._endpoints.stopped)
        if exchange.status in OVERLOADED or exchange.too_slow:
            self._endpoints.overloaded(url, sent_at=exchange.sent_at)
        if raw := self._whole_answer(exchange):
            try:
                return await _result(self._ledger.answered(call_id, self._answer_without_key(raw)))
            except ValueError as error:
                if isinstance(error, StillhouseError):
                    raise
                return _Failure(f"answered {exchange.status} with {error}", "again", exchange.status)
        failure = self._judge(exchange)
        if failure.wait_s and failure.wait_s <= MAX_RETRY_AFTER_S:
            self._endpoints.hold(url, failure.wait_s)
        await _result(self._note_failure(call_id, exchange, failure.what))
        return failure

    def _note_failure(self, call_id: int, exchange: Exchange, what: str) -> Future[None]:
        """Tell the ledger of a call without an answer. A refusal is not billed; a connection that breaks may have been."""
        began = exchange.status is None or 200 <= exchange.status < 300
        may_be_billed = exchange.sent and (began or exchange.status in MAY_HAVE_BEEN_BILLED)
        return self._ledger.failed(
            call_id,
            error=what,
            status=exchange.status,
            billed="unknown" if may_be_billed else "no",
            partial=self._answer_without_key(_beginning(exchange)),
        )

    async def _begin(self, intent: Intent) -> int:
        future = self._ledger.begin([intent])
        try:
            [call_id] = await _result(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._never_sent)
            raise
        return call_id

    def _never_sent(self, begun: Future[list[int]]) -> None:
        if not begun.cancelled() and begun.exception() is None:
            self._ledger.failed(begun.result()[0], error="cancelled before it was sent", status=None, billed="no")

    async def _send(self, url: str, body: bytes, exchange: Exchange) -> None:
        """Post when the gate is open; not at all where the client stopped first."""
        while True:
            await self._endpoints.wait_until_open(url)
            if self._endpoints.stopped:
                return
            try:
                await post(
                    self._session,
                    f"{url}/chat/completions",
                    body,
                    exchange=exchange,
                    limits=self._limits,
                    hold_back=lambda: self._endpoints.held(url) or bool(self._endpoints.stopped),
                    stop_when=self._stop_when,
                )
            except HeldBackError:
                continue
            return

    def _whole_answer(self, exchange: Exchange) -> bytes:
        """The answer for the ledger; b"" where there is none, or not to its end."""
        if exchange.status is None or not 200 <= exchange.status < 300:
            return b""
        if exchange.stream is None:
            return b"" if exchange.broken else envelope(exchange.body, seconds=exchange.seconds)
        # What may be missing after the chunk with the finish_reason is the usage; the text is whole, and paid.
        if exchange.stopped or exchange.stream.complete:
            return envelope(
                exchange.stream.answer(),
                seconds=exchange.seconds,
                complete=exchange.stream.complete,
                stopped=exchange.stopped,
            )
        return b""

    def _judge(self, exchange: Exchange) -> _Failure:
        if exchange.status is None or (200 <= exchange.status < 300 and exchange.broken):
            return _Failure(self._quote(exchange.broken, plain=True), "again", exchange.status)
        if exchange.stream is not None:
            return _Failure("ended its stream without a finish_reason", "again", exchange.status)
        what = f"answered {exchange.status}: {self._quote(exchange.body)}"
        if exchange.location is not None and 300 <= exchange.status < 400:
            what += f", a redirect to {self._quote(exchange.location)}; correct teacher.base_url"
        verdict = verdict_of(exchange.status, exchange.body)
        wait_s = retry_after_s(exchange.retry_after) if verdict == "again" else None
        well = True if verdict == "refused" else None if exchange.status == 429 or verdict == "stop" else False
        return _Failure(what, verdict, exchange.status, wait_s, well)

    def _quote(self, said: bytes | str, *, plain: bool = False) -> str:
        """The start of what the endpoint said, without the key: some repeat it in their refusals."""
        text = self._without_key(said.encode() if isinstance(said, str) else said).decode("utf-8", "replace")
        return " ".join(text[:300].split()) if plain else repr(text[:200])


async def _result(future: Future[Result]) -> Result:
    """A ledger's future in this loop. To be cancelled while waiting does not take back what was asked of the ledger."""
    return future.result() if future.done() else await asyncio.shield(asyncio.wrap_future(future))


def _beginning(exchange: Exchange) -> bytes:
    """What a stream that broke off had brought, for the ledger."""
    if exchange.stream is None or not exchange.stream.num_characters:
        return b""
    return envelope(exchange.stream.answer(), seconds=exchange.seconds, complete=False)
