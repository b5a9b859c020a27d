"""What a request costs the client: ours beside openai's AsyncClient and plain httpx, against one local server, in one run.

``python -m stillhouse.teachers.bench_client`` keeps 1,000 requests in flight over 1,000 connections to a server in a process of
its own, which answers every request at once with the same chat completion. Each round measures each client once, in turn; the
medians over the rounds are shown. CPU is all that the client's process used, threads included, over the number of requests.
Connections are opened before the clock starts. ``openai`` and ``httpx`` come with ``pip install 'stillhouse[bench]'``.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from stillhouse.pipeline.records import Sampling, Trace, content_key
from stillhouse.pipeline.trace_store.ledger import Intent
from stillhouse.teachers.chat_response import call_context, parse_chat
from stillhouse.teachers.endpoint import CallLedger, ChatClient, Endpoints, build_body
from stillhouse.teachers.tracing import TraceRequest

SAMPLING = Sampling(0.6, 0.95, 2048)
MODEL = "teacher"
Ask = Callable[[int], Awaitable[str]]
"""Ask for the completion of one request, by its number; its text."""


class _InstantServer(asyncio.Protocol):
    """Answers every HTTP request on its connection with the same bytes."""

    def __init__(self, answer: bytes):
        self._answer = answer
        self._received = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(rest) >= length:
            self._received = rest[length:]
            self._transport.write(self._answer)


def _serve(answer: bytes, pipe: Any) -> None:
    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _InstantServer(answer), "127.0.0.1", 0, backlog=4096)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    _allow_sockets()
    asyncio.run(run())


@contextmanager
def instant_server(num_characters: int) -> Any:
    """A server in a process of its own, whose answers have so many characters; gives its base URL."""
    text = "<think>\n" + ("Add the two numbers and carry the one. " * (num_characters // 39 + 1))[:num_characters]
    message = {"role": "assistant", "content": text + "\n</think>\n\n\\boxed{7}"}
    body = json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 30, "completion_tokens": num_characters // 4, "total_tokens": 30 + num_characters // 4},
        }
    ).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(head + body, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1"
    finally:
        process.terminate()
        process.join()


class MemoryLedger:
    """A ledger that keeps nothing: what is left is the client's own cost."""

    def __init__(self) -> None:
        self._requests: dict[int, bytes] = {}
        self._ids = itertools.count(1)

    def begin(self, intents: Sequence[Intent]) -> Future[list[int]]:
        ids = [next(self._ids) for _ in intents]
        self._requests.update(zip(ids, (intent.request for intent in intents)))
        return _done(ids)

    def answered(self, call_id: int, raw: bytes) -> Future[Trace]:
        return _done(parse_chat(self._requests.pop(call_id), raw))

    def failed(self, call_id: int, *, error: str, status: int | None, billed: str, partial: bytes = b"") -> Future[None]:
        raise RuntimeError(f"the local server failed: {error}")


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


def _request(number: int) -> TraceRequest:
    messages = [{"role": "user", "content": f"What is {number} + 4? " + "Please reason step by step. " * 6}]
    return TraceRequest(content_key("bench", number), f"problem {number}", json.dumps(messages), 0, number)


@asynccontextmanager
async def _ours(url: str, in_flight: int, ledger: CallLedger) -> AsyncIterator[Ask]:
    async with ChatClient(Endpoints([url]), MODEL, ledger=ledger, api_key="none", max_concurrent=in_flight) as client:

        async def ask(number: int) -> str:
            request = _request(number)
            context = call_context(request, teacher=MODEL, teacher_revision="", sampling=SAMPLING)
            return (await client.complete(request, SAMPLING, context)).completion

        yield ask


@asynccontextmanager
async def ours_in_memory(url: str, in_flight: int) -> AsyncIterator[Ask]:
    async with _ours(url, in_flight, MemoryLedger()) as ask:
        yield ask


@asynccontextmanager
async def ours_durable(url: str, in_flight: int) -> AsyncIterator[Ask]:
    from stillhouse.pipeline.trace_store.store import TraceStore
    from stillhouse.pipeline.trace_store.writer import TraceWriter

    with tempfile.TemporaryDirectory(dir=".") as folder:  # here, because /tmp is memory on some machines
        store = TraceStore(Path(folder) / "store")
        with TraceWriter(store, Path(folder) / "spool", parse=parse_chat) as writer:
            async with _ours(url, in_flight, writer) as ask:
                yield ask


def _body(number: int) -> dict[str, Any]:
    request = _request(number)
    return build_body(MODEL, json.loads(request.rendered_prompt), request.seed, SAMPLING, {})


@asynccontextmanager
async def openai_client(url: str, in_flight: int) -> AsyncIterator[Ask]:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:

        async def ask(number: int) -> str:
            return (await client.chat.completions.create(**_body(number))).choices[0].message.content or ""

        yield ask


@asynccontextmanager
async def httpx_client(url: str, in_flight: int) -> AsyncIterator[Ask]:
    import httpx

    limits = httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    async with httpx.AsyncClient(limits=limits, timeout=600, trust_env=False) as client:

        async def ask(number: int) -> str:
            answer = await client.post(f"{url}/chat/completions", json=_body(number), headers={"Authorization": "Bearer none"})
            return answer.raise_for_status().json()["choices"][0]["message"]["content"]

        yield ask


CLIENTS: dict[str, Callable[[str, int], Any]] = {
    "stillhouse, ledger in memory": ours_in_memory,
    "stillhouse, ledger on disk": ours_durable,
    "openai AsyncOpenAI": openai_client,
    "httpx AsyncClient": httpx_client,
}


async def measure(client: Callable[[str, int], Any], url: str, *, num_requests: int, in_flight: int) -> dict[str, float]:
    """One round of one client: requests/s and milliseconds of CPU a request."""

    async def keep_in_flight(ask: Ask, numbers: range) -> None:
        waiting = iter(numbers)

        async def worker() -> None:
            for number in waiting:
                if not (await ask(number)).endswith("\\boxed{7}"):
                    raise RuntimeError("an answer came back changed")

        await asyncio.gather(*[worker() for _ in range(in_flight)])

    async with client(url, in_flight) as ask:
        await keep_in_flight(ask, range(in_flight))  # opens the connections
        wall, cpu = time.perf_counter(), time.process_time()
        await keep_in_flight(ask, range(in_flight, in_flight + num_requests))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"requests_per_s": num_requests / wall, "cpu_ms_per_request": 1000 * cpu / num_requests}


def run(*, num_requests: int, in_flight: int, num_rounds: int, num_characters: int) -> dict[str, Any]:
    """Measure all clients in turn, ``num_rounds`` times; medians by client, with the machine they were measured on."""
    _allow_sockets()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CLIENTS}
    with instant_server(num_characters) as url:
        for _ in range(num_rounds):
            for name, client in CLIENTS.items():
                rounds[name].append(asyncio.run(measure(client, url, num_requests=num_requests, in_flight=in_flight)))
    return {
        "num_requests": num_requests,
        "in_flight": in_flight,
        "num_rounds": num_rounds,
        "answer_characters": num_characters,
        "python": platform.python_version(),
        "clients": {
            name: {figure: round(statistics.median(one[figure] for one in measured), 3) for figure in measured[0]}
            for name, measured in rounds.items()
        },
    }


def _allow_sockets() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000, help="measured in each round (default: %(default)s)")
    parser.add_argument("--in-flight", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--characters", type=int, default=2000, help="of each answer (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    figures = run(
        num_requests=options.requests,
        in_flight=options.in_flight,
        num_rounds=options.rounds,
        num_characters=options.characters,
    )
    if options.json:
        json.dump(figures, sys.stdout, indent=1)
        print()
        return
    print(f"{'client':<30} {'requests/s':>12} {'CPU ms/request':>15}")
    for name, figure in figures["clients"].items():
        print(f"{name:<30} {figure['requests_per_s']:>12,.0f} {figure['cpu_ms_per_request']:>15.3f}")


if __name__ == "__main__":
    main()
