"""A made-up vendor with books of its own: bills a seeded random usage up to what each call reserved, and is at times rude.

One request is a line ``<call id> <reserved prompt tokens> <reserved completion tokens>``, one answer a line. Every bill is
told to whoever listens at ``bills`` before its answer leaves: a caller that dies or is cut off has been billed all the same.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Callable

from tests.chaos.synthetic import make_answer, make_text

SHARE_CUT_OFF, SHARE_REFUSED = 0.04, 0.04
REFUSED = b"refused\n"


def usage_of(call_id: int, reserved_prompt: int, reserved_completion: int) -> tuple[int, int]:
    """Tokens that a call is billed for: a pure function of the call, at most what it reserved."""
    draw = random.Random(f"usage/{call_id}")
    return draw.randint(1, reserved_prompt), draw.randint(1, reserved_completion)


async def _serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, bill: Callable[[str], None]) -> None:
    while line := await _next_line(reader):
        call_id, reserved_prompt, reserved_completion = map(int, line.split())
        draw = random.Random(f"manners/{call_id}")
        await asyncio.sleep(draw.uniform(0.002, 0.04))
        manners = draw.random()
        if manners < SHARE_REFUSED:
            writer.write(REFUSED)
            continue
        prompt, completion = usage_of(call_id, reserved_prompt, reserved_completion)
        bill(f"{call_id} {prompt} {completion}\n")
        if manners < SHARE_REFUSED + SHARE_CUT_OFF:
            break
        writer.write(make_answer(make_text(str(call_id), 60), prompt, completion) + b"\n")
    writer.close()


async def _next_line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readline()
    except ConnectionResetError:  # the caller was killed
        return b""


def serve_vendor(listening: socket.socket, bills: int) -> None:
    """Serve until killed; ``bills`` is the descriptor that the bills are written to, one line each."""

    def bill(line: str) -> None:
        os.write(bills, line.encode())

    async def forever() -> None:
        server = await asyncio.start_server(lambda reader, writer: _serve_one(reader, writer, bill), sock=listening)
        await server.serve_forever()

    asyncio.run(forever())
