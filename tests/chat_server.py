"""An OpenAI-compatible chat server on 127.0.0.1 that completes with a real model, and breaks on demand.

with ChatServer(generator) as server:
    server.faults = [status(429, headers={"Retry-After": "2"}), reset]
    ...  # the first request gets 429, the second a reset connection, the third a completion
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from stillhouse.pipeline.records import Sampling
from stillhouse.teachers.local import TransformersGenerator

Shape = Literal["inline", "reasoning", "reasoning_content"]


@dataclass(frozen=True)
class Request:
    """One request as it came in, and when (monotonic seconds)."""

    path: str
    body: Mapping[str, Any]
    authorization: str | None
    time_s: float


class ChatServer(ThreadingHTTPServer):
    """Serves ``/v1/chat/completions`` from ``generator`` in threads of its own while the context lasts.

    Attributes:
        faults: what the next requests meet instead of a completion, taken from the front; then all is well again.
        fault_for_all: what every request meets once ``faults`` is used up; None completes.
        shape: where the reasoning stands. The random model writes no think tags: its text's first half is called
            reasoning, the second half the answer, unless the shape is ``inline``, which leaves the text as it is.
        delay_s: how long a request with a given user message waits before it is answered.
        requests: all that came in.
        most_under_way: requests that were in the server at the same time, at most.
    """

    daemon_threads = True

    def __init__(self, generator: TransformersGenerator, *, shape: Shape = "inline"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.generator = generator
        self.shape = shape
        self.faults: list[Fault] = []
        self.fault_for_all: Fault | None = None
        self.delay_s: dict[str, float] = {}
        self.requests: list[Request] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.model_lock = threading.Lock()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> ChatServer:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """Clients that hang up are what the tests are about; the default prints a traceback for each."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        server = self.server
        with server.lock:
            server.requests.append(Request(self.path, body, self.headers.get("Authorization"), time.monotonic()))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            fault = server.faults.pop(0) if server.faults else server.fault_for_all
        try:
            if fault:
                fault(self, body)
            elif self.path != "/v1/chat/completions":
                self.send_text(404, "no such path")
            else:
                time.sleep(server.delay_s.get(body["messages"][-1]["content"], 0.0))
                self.send_text(200, json.dumps(self.completion(body)))
        finally:
            with server.lock:
                server.under_way -= 1

    def completion(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Let the model answer; the result is a ``chat.completion`` object."""
        server = self.server
        prompt = server.generator.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        sampling = Sampling(body["temperature"], body["top_p"], body["max_tokens"])
        with server.model_lock:
            [completion] = server.generator.complete([prompt], [body["seed"]], sampling)
        message = {"role": "assistant", "content": completion.text}
        if server.shape != "inline":
            half = len(completion.text) // 2
            message |= {server.shape: completion.text[:half], "content": completion.text[half:]}
        return {
            "id": f"chatcmpl-{len(server.requests)}",
            "object": "chat.completion",
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": completion.finish_reason}],
            "usage": {
                "prompt_tokens": completion.num_prompt_tokens,
                "completion_tokens": completion.num_completion_tokens,
            },
        }

    def send_text(self, code: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        content = text.encode()
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content)


Fault = Callable[[_Handler, Mapping[str, Any]], None]


def status(code: int, *, headers: Mapping[str, str] | None = None, text: str = '{"error": "on demand"}') -> Fault:
    """Answer with a status of one's own."""
    return lambda handler, body: handler.send_text(code, text, headers)


def reset(handler: _Handler, body: Mapping[str, Any]) -> None:
    """Break the connection with an RST before a byte of the answer."""
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.shutdown(socket.SHUT_RD)
    handler.connection.close()


def cut_off(handler: _Handler, body: Mapping[str, Any]) -> None:
    """Announce the whole answer and hang up in the middle of it."""
    handler.close_connection = True
    content = json.dumps(handler.completion(body))
    handler.send_text(200, content[: len(content) // 2], {"Content-Length": str(len(content))})


def changed(change: Callable[[dict[str, Any]], Any]) -> Fault:
    """Complete, and send what ``change`` makes of the answer."""
    return lambda handler, body: handler.send_text(200, json.dumps(change(handler.completion(body))))


def echo_key(code: int) -> Fault:
    """Refuse, and repeat the key in the answer, as some servers do."""
    return lambda handler, body: handler.send_text(code, f'{{"error": "bad key {handler.headers["Authorization"]}"}}')
