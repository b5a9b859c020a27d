"""Reading chat completions: where reasoning may stand, how answers end, what is no completion, and streams put together."""

from __future__ import annotations

import json

import pytest

from stillhouse.pipeline.extraction import split_reasoning
from stillhouse.pipeline.records import Sampling, content_key
from stillhouse.teachers.chat_response import call_context, envelope, parse_chat, read_completion
from stillhouse.teachers.chat_stream import ChatStream
from stillhouse.teachers.tracing import TraceRequest

MESSAGES = [{"role": "user", "content": "What is 3 + 4?"}]
REQUEST = TraceRequest(content_key("request"), "problem", json.dumps(MESSAGES), 2, 2**40 + 9)
SAMPLING = Sampling(0.6, 0.95, 64, top_k=20, top_logprobs=2)
CONTEXT = call_context(REQUEST, teacher="org/teacher", teacher_revision="abc", sampling=SAMPLING)


def _answer(finish_reason="stop", **message) -> dict:
    return {
        "id": "chatcmpl-7",
        "model": "teacher-0528",
        "choices": [{"index": 0, "message": message or {"content": "7"}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 3},
    }


def _trace(answer, **known):
    return parse_chat(CONTEXT, envelope(json.dumps(answer).encode(), **({"seconds": 1.5} | known)))


def test_a_trace_has_all_that_request_and_answer_say():
    """If it failed, a stored trace could not be told from another's, or would lose what was paid for."""
    trace = _trace(_answer(content="<think>\n3 and 4\n</think>\n\n7"))
    assert (trace.key, trace.problem_id, trace.sample_index, trace.seed) == (REQUEST.key, "problem", 2, 2**40 + 9)
    assert (trace.rendered_prompt, trace.teacher, trace.teacher_revision) == (REQUEST.rendered_prompt, "org/teacher", "abc")
    assert (trace.reasoning, trace.answer_text, trace.finish_reason) == ("3 and 4", "7", "stop")
    assert (trace.num_prompt_tokens, trace.num_completion_tokens, trace.usage_counted) == (9, 3, True)
    assert (trace.temperature, trace.top_p, trace.max_new_tokens) == (0.6, 0.95, 64)
    assert json.loads(trace.sampling_extras) == {"top_k": 20, "top_logprobs": 2}
    assert (trace.response_id, trace.served_model, trace.seconds) == ("chatcmpl-7", "teacher-0528", 1.5)


def test_the_envelope_keeps_the_servers_bytes():
    """If it failed, what the ledger calls raw would be our own rendering, and a wrong one could not be found out."""
    said = b'{ "choices" :[{"message":{"content":"7 \\u00e9 \xc3\xa9"}}],  "n": 1.00}'
    raw = envelope(said, seconds=0.25)
    assert said in raw
    assert json.loads(raw) == {"answer": json.loads(said), "seconds": 0.25, "stream_complete": True, "stopped": ""}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_separated_reasoning_is_joined(name):
    """If it failed, a teacher whose server splits off the reasoning would teach answers alone."""
    completion = read_completion(_answer(content="\n\n7", **{name: "3 and 4\n"}), 0)
    assert completion.text == "<think>\n3 and 4\n</think>\n\n7"
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("content", [None, "", "\n"])
@pytest.mark.parametrize(("told", "ours"), [("stop", "length"), ("length", "length"), ("content_filter", "content_filter")])
def test_reasoning_without_content_is_a_cut_completion(name, content, told, ours):
    """If it failed, a trace that ran out of tokens while thinking would pass for a finished one."""
    completion = read_completion(_answer(told, content=content, **{name: "first I add"}), 0)
    assert (completion.text, completion.finish_reason) == ("<think>\nfirst I add", ours)
    assert split_reasoning(completion.text).reasoning is None


@pytest.mark.parametrize(
    ("fields", "reasoning", "answer"),
    [
        ({"content": "<think>\nadd\n</think>\n\n7"}, "add", "7"),
        ({"content": "add\n</think>\n\n7"}, "add", "7"),  # the endpoint's template opened the block
        ({"content": "<think>\nadd\n</think>\n\n7", "reasoning": "add"}, "add", "7"),  # said twice
        ({"content": "7"}, None, None),
        ({"content": None}, None, None),
        ({"content": "7", "reasoning": ""}, None, None),
    ],
)
def test_inline_reasoning_is_understood(fields, reasoning, answer):
    """If it failed, every trace of an endpoint without a reasoning parser would be dropped as malformed."""
    parsed = split_reasoning(read_completion(_answer(**fields), 0).text)
    assert (parsed.reasoning, parsed.answer_text) == (reasoning, answer)


@pytest.mark.parametrize(
    ("told", "ours"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("content_filter", "content_filter"),
        ("abort", "truncated"),
        ("insufficient_system_resource", "truncated"),
        ("tool_calls", "length"),
        ("something new", "length"),
        (None, "length"),
        (["stop"], "length"),
    ],
)
def test_only_stop_is_a_finished_completion(told, ours):
    """If it failed, censored or broken-off completions would be trained on as whole ones."""
    assert read_completion(_answer(told), 0).finish_reason == ours


@pytest.mark.parametrize(
    ("usage", "prompt_tokens", "completion_tokens", "counted"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 3}, 9, 3, True),
        ({"prompt_tokens": 9, "completion_tokens": 0}, 9, 0, True),
        ({"prompt_tokens": 9}, 9, 2, False),
        ({}, 4, 2, False),
        (None, 4, 2, False),
        ("many", 4, 2, False),
        ({"prompt_tokens": "9", "completion_tokens": -1}, 4, 2, False),
        ({"prompt_tokens": True, "completion_tokens": 10**30}, 4, 2, False),
    ],
)
def test_usage_that_is_missing_or_wrong_is_estimated_and_said_so(usage, prompt_tokens, completion_tokens, counted):
    """If it failed, a run would report no tokens and no cost, or estimates as if they were counted."""
    completion = read_completion(_answer(content="seven") | {"usage": usage}, 0, num_prompt_characters=14)
    assert (completion.num_prompt_tokens, completion.num_completion_tokens) == (prompt_tokens, completion_tokens)
    assert completion.usage_counted is counted


def test_half_a_surrogate_pair_does_no_harm():
    """If it failed, one broken emoji in a million answers would stop the writer, which can only hold UTF-8."""
    trace = _trace(json.loads('{"id": "\\ud83d", "choices": [{"message": {"content": "7 \\ud83d, é"}}]}'))
    assert trace.completion == "7 ?, é"
    assert trace.response_id == "?"


def test_log_probabilities_are_kept_when_they_come():
    """If it failed, a recipe that pays for log probabilities would store none."""
    tokens = [
        {"token": "7\ud83d", "logprob": -0.1, "bytes": None, "top_logprobs": [{"token": "7", "logprob": -0.1}]},
        {"token": ".", "logprob": -2, "top_logprobs": []},
        {"token": "\n", "logprob": -3.5},
    ]
    answer = _answer()
    answer["choices"][0]["logprobs"] = {"content": tokens}
    trace = _trace(answer)
    trace.logprobs.encode()
    assert json.loads(trace.logprobs) == [["7\ud83d", -0.1, [["7", -0.1]]], [".", -2, []], ["\n", -3.5, []]]
    answer["choices"][0]["logprobs"] = {"content": None}
    assert _trace(answer).logprobs == ""


@pytest.mark.parametrize(
    "answer",
    [
        None,
        [],
        "7",
        {"error": {"message": "overloaded"}},
        {"choices": []},
        {"choices": None},
        {"choices": [None]},
        {"choices": [{"message": None, "finish_reason": "stop"}]},
        {"choices": [{"finish_reason": "stop"}]},
        {"choices": [{"message": {"content": [{"type": "text", "text": "7"}]}}]},
        {"choices": [{"message": {"content": "7", "reasoning": 7}}]},
        {"choices": [{"message": {"content": "7"}, "logprobs": {"content": [7]}}]},
        {"choices": [{"message": {"content": "7"}, "logprobs": {"content": [{"token": "7"}]}}]},
    ],
)
def test_json_that_is_no_chat_completion_is_said_so(answer):
    """If it failed, a proxy's own JSON would crash the run, or be stored as an empty trace."""
    with pytest.raises(ValueError, match=r"JSON that is no chat completion \(.+\): '"):
        _trace(answer)


@pytest.mark.parametrize(
    "said", [b"", b"<html>busy</html>", b'{"choices": [', b"\xff\xfe\x00", b"[" * 100_000, b'{"choices": "\xe9"}']
)
def test_what_is_not_json_is_said_so(said):
    """If it failed, a gateway's page in the place of an answer would end the run with a traceback."""
    with pytest.raises(ValueError, match="something that is not JSON: '"):
        parse_chat(CONTEXT, envelope(said, seconds=0.0))


def test_how_a_stream_ended_decides_over_what_it_said():
    """If it failed, an answer that broke off or went in circles would be trained on."""
    assert _trace(_answer(), complete=False).finish_reason == "truncated"
    assert _trace(_answer(), complete=False, stopped="the last 20 lines are the same").finish_reason == "loop"
    # A server cannot say so of itself: these names in its own JSON mean nothing.
    assert _trace(_answer() | {"stopped": "loop", "stream_complete": False}).finish_reason == "stop"


def _event(chunk) -> bytes:
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


def _chunk(finish_reason=None, logprobs=None, **delta) -> dict:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
    return {"id": "chatcmpl-7", "model": "teacher-0528", "object": "chat.completion.chunk", "choices": [choice]}


USAGE = {"id": "chatcmpl-7", "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}
STREAM = b"".join(
    [
        b": keep-alive\n\n",
        _event(_chunk(role="assistant", content="")),
        _event(_chunk(reasoning="3 und é")),
        _event(_chunk(reasoning_content=" = 🙂", logprobs={"content": [{"token": "a", "logprob": -1}]})),
        b"event: message\nid: 4\n",
        _event(_chunk(content="7")).replace(b"\n", b"\r\n"),
        _event(_chunk(content=".", logprobs={"content": [{"token": "b", "logprob": -2}]})).replace(b"data: ", b"data:"),
        _event(_chunk("stop")),
        _event(USAGE),
        b"data: [DONE]\n\n",
    ]
)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10_000])
def test_a_stream_reads_as_the_whole_answer_would(size):
    """If it failed, a streamed teacher's texts would be broken where packets end, in the middle of a letter."""
    stream = ChatStream()
    text = "".join(stream.feed(STREAM[start : start + size]) for start in range(0, len(STREAM), size))
    assert text == "3 und é = 🙂7."
    assert stream.num_characters == len(text)
    assert stream.complete
    assert stream.done
    trace = parse_chat(CONTEXT, envelope(stream.answer(), seconds=1.0))
    assert trace.completion == "<think>\n3 und é = 🙂\n</think>\n\n7."
    assert (trace.finish_reason, trace.num_prompt_tokens, trace.num_completion_tokens) == ("stop", 9, 3)
    assert (trace.response_id, trace.served_model, trace.usage_counted) == ("chatcmpl-7", "teacher-0528", True)
    assert json.loads(trace.logprobs) == [["a", -1, []], ["b", -2, []]]


def test_a_stream_is_complete_with_its_finish_reason_and_not_before():
    """If it failed, a proxy that ends a broken stream with [DONE] would give us half an answer as a whole one."""
    stream = ChatStream()
    stream.feed(_event(_chunk(content="7")) + b"data: [DONE]\n\n")
    assert stream.done
    assert not stream.complete
    stream.feed(_event(_chunk("length")))
    assert stream.complete
    assert parse_chat(CONTEXT, envelope(stream.answer(), seconds=1.0)).finish_reason == "length"


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"error": {"message": "the engine died"}}\n',
        b"data: 7\n",
        b'data: {"choices": [\n',
        b'data: {"choices": [7]}\n',
        b'data: {"choices": [{"delta": "7"}]}\n',
        b'data: {"choices": [{"delta": {"content": 7}}]}\n',
        b'data: {"choices": "\xff"}\n',
    ],
)
def test_an_event_that_is_no_chunk_breaks_the_stream_and_keeps_what_came(event):
    """If it failed, an engine that dies in the middle of a stream would be read as one that has finished."""
    stream = ChatStream()
    stream.feed(_event(_chunk(content="first ")))
    with pytest.raises(ValueError):
        stream.feed(event)
    assert not stream.complete
    assert json.loads(stream.answer())["choices"][0]["message"]["content"] == "first "
