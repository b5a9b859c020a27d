"""Streamed answers: put together whole, stopped when they go in circles, kept and asked again when they break off."""

from __future__ import annotations

import asyncio
import time

import pytest

from stillhouse.teachers.endpoint import ChatClient, Endpoints
from stillhouse.teachers.loops import LoopDetector
from tests.chat_server import status
from tests.endpoint_run import answer, breaks_after, complete, events, request, streams


def test_a_streamed_answer_is_the_whole_one(server, slept, run):
    """If it failed, streaming, which a loop can be stopped in, would lose reasoning, counts or the end."""
    usage = {"prompt_tokens": 11, "completion_tokens": 5}
    server.faults = [streams(*events({"reasoning": "3 and "}, {"reasoning": "4"}, {"content": "7"}, usage=usage))]
    trace = run.one(server.base_url, slept=slept, stream=True)
    assert server.requests[0].body["stream"] is True
    assert server.requests[0].body["stream_options"] == {"include_usage": True}
    assert (trace.reasoning, trace.answer_text, trace.finish_reason) == ("3 and 4", "7", "stop")
    assert (trace.num_prompt_tokens, trace.num_completion_tokens, trace.usage_counted) == (11, 5, True)


def test_a_server_that_does_not_stream_is_understood_all_the_same(server, slept, run):
    """If it failed, a recipe with streaming would fail on every server without it."""
    server.faults = [status(200, text=answer())]
    assert run.one(server.base_url, slept=slept, stream=True).completion == "7"


ERROR_EVENT = b'data: {"error": {"message": "the engine died"}}\n\n'
BEGINNING = events({"reasoning": "first I add"}, finish_reason=None, done=False)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (streams(*BEGINNING), "ended its stream without a finish_reason"),
        (streams(*BEGINNING, b"data: [DONE]\n\n"), "ended its stream without a finish_reason"),
        (streams(*BEGINNING, ERROR_EVENT), "the engine died"),
        (breaks_after(*BEGINNING), "broke off its answer"),
    ],
)
def test_a_stream_that_breaks_off_is_kept_as_a_truncated_trace_and_asked_again(server, slept, run, fault, words):
    """If it failed, half an answer would be trained on as a whole one, or paid text thrown away."""
    server.faults = [fault, streams(*events({"content": "7"}))]
    trace = run.one(server.base_url, slept=slept, stream=True)
    assert (trace.completion, trace.finish_reason) == ("7", "stop")
    first, second = run.calls()
    assert words in first["error"]
    assert (first["state"], second["state"]) == ("truncated", "answered")
    [partial] = [stored for stored in run.stored() if stored.key != trace.key]
    assert (partial.completion, partial.finish_reason) == ("<think>\nfirst I add", "truncated")
    assert partial.problem_id == trace.problem_id


def test_what_breaks_after_the_last_chunk_is_a_whole_answer(server, slept, run):
    """If it failed, an answer that came to its end would be paid for twice."""
    server.faults = [breaks_after(*events({"content": "<think>\n3\n</think>\n\n7"}, done=False))]
    trace = run.one(server.base_url, slept=slept, stream=True)
    assert (trace.answer_text, trace.finish_reason, trace.usage_counted) == ("7", "stop", False)
    assert len(server.requests) == 1


def test_a_stream_that_goes_in_circles_is_stopped(server, slept, run):
    """If it failed, a loop would be paid for up to the token limit."""
    sent = [0]
    circles = events(*[{"content": f"Let me check number {n % 2} again, slowly. "} for n in range(400)])
    server.faults = [streams(*circles, pause_s=0.004, sent=sent)]
    trace = run.one(server.base_url, slept=slept, stream=True, stop_when=LoopDetector())
    assert trace.finish_reason == "loop"
    assert 1000 <= len(trace.completion) < 4000
    assert trace.usage_counted is False
    assert len(server.requests) == 1
    time.sleep(0.1)
    assert sent[0] < 300  # the server saw the connection go


def test_stopping_needs_a_stream():
    """If it failed, a recipe that stops loops would silently not do so."""
    with pytest.raises(ValueError, match="needs stream=True"):
        ChatClient(Endpoints(), "tiny", ledger=None, stop_when=LoopDetector())


def test_one_that_is_cancelled_leaves_a_true_ledger(server, slept, run):
    """If it failed, an interrupted run would count calls as under way for ever, or lose what their streams had brought."""
    server.faults = [streams(*BEGINNING, *events({"content": "7"}), pause_s=20.0)]

    async def drive():
        async with run.client(endpoints=endpoints, slept=slept, stream=True, max_concurrent=1) as client:
            tasks = [asyncio.create_task(complete(client, request(text))) for text in "ab"]
            while not server.requests:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert endpoints.in_flight == 0

    endpoints = Endpoints([server.base_url])
    asyncio.run(drive())
    [call] = run.calls()
    assert (call["state"], call["error"]) == ("truncated", "cancelled")
    assert [trace.completion for trace in run.stored()] == ["<think>\nfirst I add"]
