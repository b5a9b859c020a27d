"""A chat endpoint that breaks on purpose: OpenAI-compatible, seeded, with a ledger of what it served.

For drills of a client, ours or yours: one command stands in for a bad vendor.

    stillhouse fault-server --fault-rate 0.2 --seed 7 --ledger served.jsonl
    {"base_url": "http://127.0.0.1:40123/v1", "pid": 4711, "ledger": "served.jsonl"}

Answers are synthetic chain-of-thought texts, or with ``--upstream`` those of a real endpoint, broken on their way back. The
upstream is always asked for a whole answer, and a stream is cut from it here: so what an answer costs is known, and stands in
the ledger, before its first byte goes out. A fault that needs no answer is not forwarded, and costs nothing.

Any path that ends in ``/chat/completions`` answers, and what stands before it is an endpoint of its own: one server plays
several vendors, each with its own Retry-After.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from stillhouse.teachers import fault_breakage
from stillhouse.teachers.fault_answers import (
    SyntheticAnswers,
    check_request,
    completion_text,
    num_prompt_tokens,
    num_tokens,
    stream_events,
)
from stillhouse.teachers.fault_breakage import error_content
from stillhouse.teachers.fault_ledger import Gates, LedgerFile, ServedCall
from stillhouse.teachers.fault_plan import DEFAULT_WEIGHTS, FAULTS, Fault, FaultPlan, parse_faults, request_identity
from stillhouse.teachers.fault_upstream import Upstream, UpstreamRefused

_PATH = "/chat/completions"
_LOOK_S = 0.5
_NAME_WIDTH = max(map(len, FAULTS))


class FaultServer:
    """Serves while the context lasts: ``async with FaultServer(plan, ledger=path) as server: server.base_url``.

    Args:
        plan: which request meets what.
        answers: who writes the answers; by default texts of 2,000 characters from the plan's seed.
        upstream: base URL of a real endpoint that writes them instead, ``…/v1``; the client's key is handed on to it.
        ledger: file that every served call is appended to; None keeps none.
        port: 0 takes a free one.
        latency_s: how long every answer and refusal takes.
        grace_s: how long after a refusal other requests may still come, being on their way; see `Gates`.
    """

    def __init__(
        self,
        plan: FaultPlan,
        *,
        answers: SyntheticAnswers | None = None,
        upstream: str | None = None,
        ledger: Path | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        latency_s: float = 0.0,
        grace_s: float = 0.25,
    ) -> None:
        self._plan = plan
        self._answers = answers or SyntheticAnswers(plan.seed)
        self._upstream = Upstream(upstream) if upstream else None
        self._ledger_path = ledger
        self._address = (host, port)
        self._latency_s = latency_s
        self._gates = Gates(grace_s)
        self._num_arrived = self._under_way = 0
        self._attempts: Counter[str] = Counter()
        self._earlier_id = "chatcmpl-earlier"

    @property
    def base_url(self) -> str:
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}/v1"

    async def __aenter__(self) -> FaultServer:
        self._ledger = LedgerFile(self._ledger_path) if self._ledger_path else None
        if self._upstream:
            await self._upstream.__aenter__()
        # Without a router and its middlewares, which cost as much as an answer does.
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, *self._address, backlog=4096).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        if self._upstream:
            await self._upstream.__aexit__()
        if self._ledger:
            self._ledger.close()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "GET":
            return web.json_response({"object": "list", "data": [{"id": "fault-server", "object": "model"}]})
        if not request.path.endswith(_PATH):
            return web.json_response(error_content(404, f"{request.path} is no chat endpoint"), status=404)
        call = ServedCall(number=self._num_arrived, time=time.time(), endpoint=request.path.removesuffix(_PATH))
        self._num_arrived += 1
        self._under_way += 1
        call = dataclasses.replace(call, under_way=self._under_way)
        try:
            return await self._serve(request, call)
        finally:
            self._under_way -= 1

    async def _serve(self, request: web.BaseRequest, call: ServedCall) -> web.StreamResponse:
        try:
            body = json.loads(await request.content.read())
            check_request(body)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            self._record(call, status=400)
            message = f"the body is no chat request ({type(error).__name__}: {error})"
            return web.json_response(error_content(400, message), status=400)
        call = self._judged(call, body)
        fault = self._plan.fault(call.identity, call.attempt, stream=call.stream)
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        if fault and not fault.generates:
            return self._refuse(request, call, fault)
        try:
            if self._upstream:
                completion = await self._upstream.completion(body, request.headers)
            else:
                completion = self._answers.completion(body, call.identity, f"chatcmpl-{call.identity[:24]}-{call.attempt}")
        except UpstreamRefused as refused:
            self._record(call, status=refused.status)
            return web.Response(body=refused.body, status=refused.status, headers=refused.headers)
        call = self._billed(call, body, completion)
        return await self._answer(request, call, fault, completion, body.get("stream_options") or {})

    def _judged(self, call: ServedCall, body: Mapping[str, Any]) -> ServedCall:
        identity = request_identity(body)
        attempt = self._attempts[identity]
        self._attempts[identity] += 1
        early, in_gate_s = self._gates.judge(call.endpoint, identity, call.time)
        return dataclasses.replace(
            call, identity=identity, attempt=attempt, stream=bool(body.get("stream")), early=early, in_gate_s=in_gate_s
        )

    def _refuse(self, request: web.BaseRequest, call: ServedCall, fault: Fault) -> web.StreamResponse:
        now = time.time()
        wait_s = self._plan.wait_s(call.identity, call.attempt)
        headers, not_before = fault_breakage.retry_after(fault, now=now, wait_s=wait_s)
        if not_before:
            self._gates.close(call.endpoint, call.identity, now=now, not_before=not_before)
        self._record(call, fault=fault.name, status=fault.status, not_before=not_before)
        if fault.name == "reset":
            return fault_breakage.reset(request)
        return fault_breakage.refusal(
            fault,
            headers=headers,
            authorization=request.headers.get("Authorization", ""),
            variant=self._plan.draw("variant", call.identity, call.attempt),
            stream=call.stream,
        )

    @staticmethod
    def _billed(call: ServedCall, body: Mapping[str, Any], completion: Mapping[str, Any]) -> ServedCall:
        usage = completion.get("usage") or {}
        return dataclasses.replace(
            call,
            prompt_tokens=usage.get("prompt_tokens", num_prompt_tokens(body["messages"])),
            completion_tokens=usage.get("completion_tokens", num_tokens(completion_text(completion))),
        )

    async def _answer(
        self,
        request: web.BaseRequest,
        call: ServedCall,
        fault: Fault | None,
        completion: dict[str, Any],
        stream_options: Mapping[str, Any],
    ) -> web.StreamResponse:
        completion = fault_breakage.altered(fault, completion, earlier_id=self._earlier_id)
        self._earlier_id = completion.get("id", self._earlier_id)
        name, status = (fault.name, fault.status) if fault else ("", 200)
        self._record(call, fault=name, status=status, response_id=self._earlier_id)
        if call.stream:
            parts = stream_events(completion, include_usage=bool(stream_options.get("include_usage")))
        else:
            parts = [json.dumps(completion, ensure_ascii=False).encode()]
        return await fault_breakage.send(
            request, fault, parts, stream=call.stream, stall_s=self._plan.stall_s, slow_s=self._plan.slow_s
        )

    def _record(self, call: ServedCall, **found: Any) -> None:
        if self._ledger:
            self._ledger.append(dataclasses.replace(call, **found))


async def serve(server: FaultServer, *, ledger: Path | None, ends_with_parent: bool) -> None:
    """Serve until SIGINT or SIGTERM; one JSON line with the base URL goes to stdout first."""
    parent = os.getppid()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with server:
        print(json.dumps({"base_url": server.base_url, "pid": os.getpid(), "ledger": str(ledger or "")}), flush=True)
        while not stopped.is_set() and not (ends_with_parent and os.getppid() != parent):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), _LOOK_S)


def main(arguments: list[str] | None = None) -> None:
    """``stillhouse fault-server``, also ``python -m stillhouse.teachers.fault_server``; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="stillhouse fault-server",
        description=__doc__.splitlines()[0],
        epilog="faults:\n" + "\n".join(f"  {fault.name:{_NAME_WIDTH}}  {fault.what}" for fault in FAULTS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--fault-rate", type=float, default=0.2, help="share of requests that meet a fault")
    parser.add_argument("--faults", default=",".join(DEFAULT_WEIGHTS), help="name,name:weight,…; default: all but unauthorized")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ledger", type=Path, help="JSONL file that every served call is appended to")
    parser.add_argument("--upstream", help="base URL of a real endpoint that writes the answers, …/v1")
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--retry-after-s", default="1-3", help="shortest-longest wait that a 429 asks for")
    parser.add_argument("--stall-s", type=float, default=30.0)
    parser.add_argument("--slow-s", type=float, default=5.0)
    parser.add_argument("--grace-s", type=float, default=0.25, help="how long after a 429 other requests may be on their way")
    parser.add_argument("--mean-characters", type=int, default=2000, help="mean length of a synthetic answer")
    parser.add_argument("--ends-with-parent", action="store_true", help="stop when the process that started this one is gone")
    parser.add_argument("--shape", choices=["inline", "reasoning", "reasoning_content"], default="inline")
    given = parser.parse_args(arguments)
    try:
        low, high = map(float, given.retry_after_s.split("-"))
        plan = FaultPlan(
            given.seed, given.fault_rate, parse_faults(given.faults), (low, high), stall_s=given.stall_s, slow_s=given.slow_s
        )
    except ValueError as error:
        parser.error(str(error))
    answers = SyntheticAnswers(given.seed, mean_characters=given.mean_characters, shape=given.shape)
    server = FaultServer(
        plan,
        answers=answers,
        upstream=given.upstream,
        ledger=given.ledger,
        host=given.host,
        port=given.port,
        latency_s=given.latency_ms / 1000,
        grace_s=given.grace_s,
    )
    asyncio.run(serve(server, ledger=given.ledger, ends_with_parent=given.ends_with_parent))


if __name__ == "__main__":
    main()
