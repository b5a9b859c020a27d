"""Clients of a chat endpoint with a real trace store behind them, and the pieces that their tests have in common."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path

import pyarrow.parquet as pq

from stillhouse.pipeline.records import Sampling, Trace, content_key
from stillhouse.pipeline.trace_store.budget import Budget
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.writer import TraceWriter
from stillhouse.teachers.chat_response import call_context, parse_chat
from stillhouse.teachers.endpoint import ChatClient, Endpoints
from stillhouse.teachers.local import TransformersGenerator
from stillhouse.teachers.tracing import TraceRequest, render_for_teacher
from tests.chat_server import ChatServer, reset

SAMPLING = Sampling(0.7, 0.95, 12)


class Run:
    """A real store with its writer, and clients that use it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.budget = Budget()

    @contextlib.asynccontextmanager
    async def client(self, *urls: str, slept=None, endpoints: Endpoints | None = None, model: str = "tiny", **options):
        async def note(seconds: float) -> None:
            slept.append(seconds)

        if slept is not None:
            options["sleep"] = note
        endpoints = endpoints or Endpoints(urls)
        store = TraceStore(self.folder / "store")
        with TraceWriter(store, self.folder / "spool", parse=parse_chat, budget=self.budget) as writer:
            async with ChatClient(endpoints, model, ledger=writer, **options) as client:
                yield client

    def complete(self, *urls: str, texts=("What is 3 + 4?",), seeds=(), sampling=SAMPLING, system=None, **options) -> list:
        """Traces in the order of ``texts``; the error in the place of a trace where one was raised."""

        async def run():
            async with self.client(*urls, **options) as client:
                asked = [request(text, *seeds[place : place + 1], system=system) for place, text in enumerate(texts)]
                return await asyncio.gather(*[complete(client, one, sampling) for one in asked], return_exceptions=True)

        return asyncio.run(run())

    def one(self, *urls: str, **options) -> Trace:
        [result] = self.complete(*urls, **options)
        if isinstance(result, Exception):
            raise result
        return result

    def calls(self) -> list[dict]:
        """The ledger in the store, one row a call, in their order."""
        rows = [row for path in (self.folder / "store" / "calls").glob("*") for row in pq.read_table(path).to_pylist()]
        return sorted(rows, key=lambda row: row["call_id"])

    def stored(self) -> list[Trace]:
        return list(TraceStore(self.folder / "store").traces())


def request(text: str, seed: int = 5, system: str | None = None) -> TraceRequest:
    [prompt] = render_for_teacher(
        [text], kind="endpoint", model="tiny", revision=None, system_prompt=system, prompt_suffix="", opens_think=True
    )
    return TraceRequest(content_key("request", prompt, seed), f"problem {text}", prompt, 0, seed)


def complete(client: ChatClient, asked: TraceRequest, sampling: Sampling = SAMPLING):
    context = call_context(asked, teacher="tiny", teacher_revision="r", sampling=sampling)
    return client.complete(asked, sampling, context)


def answer(text: str = "7", finish_reason: str = "stop") -> str:
    """A chat completion as JSON."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return json.dumps({"id": "chatcmpl-1", "model": "tiny", "choices": [choice], "usage": {}})


def events(*deltas: dict, finish_reason: str | None = "stop", usage: dict | None = None, done: bool = True) -> list[bytes]:
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    if finish_reason:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish_reason}]})
    if usage:
        chunks.append({"choices": [], "usage": usage})
    events = [b"data: " + json.dumps({"id": "chatcmpl-1", "model": "tiny"} | chunk).encode() + b"\n\n" for chunk in chunks]
    return [*events, b"data: [DONE]\n\n"] if done else events


def streams(*pieces: bytes, pause_s: float = 0.0, sent: list[int] | None = None):
    """Stream pieces as chunks of HTTP/1.1 and end the body; count the pieces that went out in ``sent``."""

    def fault(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        with contextlib.suppress(ConnectionError):
            for number, piece in enumerate((*pieces, b"")):
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                if sent is not None:
                    sent[0] = number
                time.sleep(pause_s)

    return fault


def breaks_after(*pieces: bytes):
    """The same, and then an RST in the place of the end."""

    def fault(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for piece in pieces:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.flush()
        time.sleep(0.1)
        reset(handler, body)

    return fault


class ServerAt(ChatServer):
    def __init__(self, port: int, model: TransformersGenerator):
        self._port = port
        super().__init__(model)

    def server_bind(self) -> None:
        self.server_address = ("127.0.0.1", self._port)
        super().server_bind()
