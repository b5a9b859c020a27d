"""What each fault of a fault server looks like on the wire."""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import socket
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aiohttp import web

from stillhouse.teachers.fault_plan import Fault

_HTML = b"<html><head><title>%d</title></head><body><center><h1>%b</h1></center><hr><center>gateway</center></body></html>"
_NO_COMPLETION = (
    b"[]",
    b"null",
    b'{"status": "ok"}',
    b'{"object": "chat.completion", "choices": "none"}',
    b'{"object": "chat.completion", "choices": [{"index": 0, "message": null}]}',
    b'{"object": "chat.completion", "choices": [{"index"',
)
_MIDWAY_PAUSE_S = 0.02  # long enough for the client to have read the first half when the RST comes
_SLOW_STEPS = 20


def error_content(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's API words one."""
    return {"error": {"message": message, "type": "fault_server", "param": None, "code": status}}


def retry_after(fault: Fault, *, now: float, wait_s: float) -> tuple[dict[str, str], float]:
    """The Retry-After header of a fault and the time it names, in seconds since 1970; no header and 0 for other faults."""
    if fault.name == "status_429_seconds":
        seconds = math.ceil(wait_s) if wait_s >= 1 else round(wait_s, 3)
        return {"Retry-After": f"{seconds:g}"}, now + seconds
    if fault.name == "status_429_date":
        not_before = math.ceil(now + wait_s)
        return {"Retry-After": email.utils.formatdate(not_before, usegmt=True)}, float(not_before)
    return {}, 0.0


def refusal(fault: Fault, *, headers: Mapping[str, str], authorization: str, variant: float, stream: bool) -> web.Response:
    """What a fault answers in place of a completion.

    Args:
        authorization: the request's header; ``unauthorized`` repeats it, as some vendors do.
        variant: in [0, 1), picks one of the forms of ``wrong_json``.
    """
    status = fault.status or 200
    if fault.name in ("html_200", "status_502", "status_504"):
        page = _HTML % (status, fault.what.partition(",")[0].encode())
        return web.Response(body=page, status=status, headers=headers, content_type="text/html")
    if fault.name == "wrong_json":
        content = _NO_COMPLETION[int(variant * len(_NO_COMPLETION))]
    elif fault.name == "empty_choices":
        content = b'{"id": "chatcmpl-empty", "object": "chat.completion", "choices": []}'
    else:
        said = f"incorrect API key: {authorization}" if fault.name == "unauthorized" else fault.what
        content = json.dumps(error_content(status, said)).encode()
    if stream and status == 200:
        return web.Response(body=b"data: %b\n\ndata: [DONE]\n\n" % content, headers=headers, content_type="text/event-stream")
    return web.Response(body=content, status=status, headers=headers, content_type="application/json")


def altered(fault: Fault | None, completion: dict[str, Any], *, earlier_id: str) -> dict[str, Any]:
    """What a fault that delivers makes of a chat completion; any other leaves it as it is."""
    match fault.name if fault else "":
        case "duplicate_id":
            return {**completion, "id": earlier_id}
        case "missing_usage":
            return {name: value for name, value in completion.items() if name != "usage"}
        case "null_content":
            [choice, *others] = completion["choices"]
            message = dict(choice["message"])
            texts = [message.pop(name, None) for name in ("reasoning", "reasoning_content", "content")]
            text = "\n".join(filter(None, texts)).removeprefix("<think>\n").replace("\n</think>\n", "")
            broken = {**choice, "message": {**message, "content": None, "reasoning": text}}
            return {**completion, "choices": [broken, *others]}
    return completion


async def send(
    request: web.BaseRequest, fault: Fault | None, parts: Sequence[bytes], *, stream: bool, stall_s: float, slow_s: float
) -> web.StreamResponse:
    """Send an answer, whole or broken on its way.

    Args:
        parts: the body; the events of a stream.
    """
    content_type = "text/event-stream" if stream else "application/json"
    name = fault.name if fault else ""
    if name == "stall":
        await asyncio.sleep(stall_s)
        return hang_up(request)
    if name == "truncated_stream":
        parts = parts[: len(parts) // 2]  # half of them leaves at least the last two out: finish_reason and [DONE]
        name = ""
    whole = b"".join(parts)
    if name not in ("slow_body", "reset_midway", "truncated_body"):
        response = web.Response(body=whole, content_type=content_type)
        if stream:
            response.enable_chunked_encoding()
        return response
    response = web.StreamResponse(headers={"Content-Type": content_type})
    if not stream:
        response.content_length = len(whole)
    await response.prepare(request)
    if name == "slow_body":
        for piece in _cut(whole, _SLOW_STEPS):
            await response.write(piece)
            await asyncio.sleep(slow_s / _SLOW_STEPS)
        return response
    await response.write(whole[: len(whole) // 2])
    if name == "truncated_body":
        return hang_up(request, response)
    await asyncio.sleep(_MIDWAY_PAUSE_S)
    return reset(request, response)


def _cut(content: bytes, num_pieces: int) -> Iterable[bytes]:
    step = -(-len(content) // num_pieces)
    return (content[start : start + step] for start in range(0, len(content), step))


def hang_up(request: web.BaseRequest, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """Close the connection after what was written; returns what a handler has to return then."""
    if request.transport:
        request.transport.close()
    return response or web.Response()


def reset(request: web.BaseRequest, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """Close the connection with an RST, which also throws away what the client had not read yet."""
    if request.transport:
        linger_not = struct.pack("ii", 1, 0)
        request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
        request.transport.abort()
    return response or web.Response()
