"""The endpoint teacher against real HTTP servers: a tiny model that completes, and every way such a server breaks."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from stillhouse.pipeline.errors import TeacherError
from stillhouse.pipeline.extraction import split_reasoning
from stillhouse.pipeline.records import Sampling, Trace
from stillhouse.pipeline.trace_store.budget import Budget
from stillhouse.teachers.endpoint import ChatClient, Endpoints, RefusedRequestError, build_body
from stillhouse.teachers.engine_process import free_port
from stillhouse.teachers.loops import LoopDetector
from tests.chat_server import ChatServer, changed, cut_off, reset, status
from tests.endpoint_run import SAMPLING, answer, complete, request


def test_completions_are_the_models_own_and_belong_to_their_requests(server, model, slept, run):
    """If it failed, one problem's completion would be stored as another's, and every trained row would be suspect."""
    texts = [f"What is {number} + 4?" for number in range(12)]
    seeds = [2**63 - 1 - 10**15 * number for number in range(12)]
    server.delay_s = {texts[0]: 0.4, texts[3]: 0.2}
    traces = run.complete(server.base_url, texts=texts, seeds=seeds, max_concurrent=4, slept=slept)

    rendered = [
        model.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in texts
    ]
    direct = [model.complete([prompt], [seed % 2**31], SAMPLING)[0] for prompt, seed in zip(rendered, seeds)]
    assert len({completion.text for completion in direct}) == 12
    assert [t.completion for t in traces] == [c.text for c in direct]
    assert [t.num_completion_tokens for t in traces] == [c.num_completion_tokens for c in direct]
    assert [t.num_prompt_tokens for t in traces] == [c.num_prompt_tokens for c in direct]
    assert [t.seed for t in traces] == seeds
    assert [t.problem_id for t in traces] == [f"problem {text}" for text in texts]
    assert traces[0].seconds >= 0.4
    assert 2 <= server.most_under_way <= 4
    assert slept == []
    assert sorted(run.stored(), key=lambda t: t.key) == sorted(traces, key=lambda t: t.key)
    assert [(row["state"], row["endpoint"]) for row in run.calls()] == [("answered", server.base_url)] * 12


def test_what_is_sent_is_what_the_recipe_says(server, run):
    """If it failed, the teacher would sample by its server's defaults while the trace names the recipe's."""
    run.one(server.base_url, texts=["What is 3 + 4?"], seeds=[2**40 + 9], system="Be brief.")
    [received] = server.requests
    assert received.path == "/v1/chat/completions"
    assert received.authorization is None
    assert received.body == {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}],
        "temperature": 0.7,
        "top_p": 0.95,
        "max_tokens": 12,
        "n": 1,
        "seed": 9,
    }


def test_further_settings_are_sent_when_they_are_set():
    """If it failed, a strict server would refuse every request for a field at its default, or a setting would be lost."""
    plain = build_body("m", [], 1, SAMPLING, {})
    full = Sampling(0.7, 0.95, 12, top_k=20, min_p=0.1, presence_penalty=0.5, repetition_penalty=1.1, reasoning_effort="high")
    settings = {"top_k": 20, "min_p": 0.1, "presence_penalty": 0.5, "repetition_penalty": 1.1, "reasoning_effort": "high"}
    assert build_body("m", [], 1, full, {"chat_template_kwargs": {"thinking": True}}) == plain | settings | {
        "chat_template_kwargs": {"thinking": True}
    }
    with_logprobs = build_body("m", [], 1, Sampling(0.7, 0.95, 12, top_logprobs=3), {})
    assert with_logprobs == plain | {"logprobs": True, "top_logprobs": 3}


@pytest.mark.parametrize("name", ["model", "n", "seed", "max_tokens", "stream"])
def test_further_fields_cannot_take_the_place_of_ours(name, run):
    """If it failed, a trace would name a seed or a limit that it was not sampled with."""
    with pytest.raises(ValueError, match=rf"extra_body sets \['{name}'\]"):
        ChatClient(Endpoints(), "tiny", ledger=None, extra_body={name: 1})


@pytest.mark.parametrize("code", [408, 409, 425, 429, 500, 502, 503, 504])
def test_passing_faults_are_tried_again(server, slept, run, code):
    """If it failed, one overloaded minute of a hosted teacher would end a run of days."""
    server.faults = [status(code), status(code)]
    run.one(server.base_url, slept=slept)
    assert len(server.requests) == 3
    assert len(slept) == 2
    assert 0 <= slept[0] <= 2
    assert 0 <= slept[1] <= 4
    assert server.requests[0].body == server.requests[2].body
    assert [(row["state"], row["status"]) for row in run.calls()] == [("failed", code), ("failed", code), ("answered", 200)]


@pytest.mark.parametrize(
    "fault",
    [
        reset,
        cut_off,
        status(200, text="<html>busy</html>"),
        status(200, text='{"choices": ['),
        status(200, text='{"error": {"message": "overloaded"}}'),
        status(200, text=""),
    ],
)
def test_broken_answers_are_tried_again(server, slept, run, fault):
    """If it failed, a connection that breaks, even in the middle of an answer, would end the run with a traceback."""
    server.faults = [fault]
    assert run.one(server.base_url, slept=slept).num_completion_tokens > 0
    assert len(server.requests) == 2
    assert len(slept) == 1


@pytest.mark.parametrize(
    ("fault", "billed"),
    [(status(429), False), (status(503), False), (status(504), True), (reset, True), (cut_off, True)],
)
def test_what_may_have_been_billed_counts_against_the_budget(server, slept, run, fault, billed):
    """If it failed, a run would overspend by what its vendor billed for answers that never arrived, or starve on refusals."""
    server.faults = [fault]
    run.one(server.base_url, slept=slept)
    first, second = run.calls()
    assert (first["completion_tokens"] is None) is billed  # not known
    assert first["reserved_completion_tokens"] == 12
    assert first["reserved_prompt_tokens"] >= 6
    assert second["state"] == "answered"


@pytest.mark.parametrize("code", [400, 404, 405, 413, 422])
def test_a_refused_request_is_not_tried_again_and_others_go_on(server, slept, run, code):
    """If it failed, a bad request would be paid for six times, or one prompt that is too long would end the run."""
    server.faults = [status(code, text='{"error": "the reason"}')]
    refused, *traces = run.complete(server.base_url, texts=["a", "b", "c"], max_concurrent=1, slept=slept)
    assert isinstance(refused, RefusedRequestError)
    assert re.search(rf"{code}.*the reason.*not retried", str(refused))
    assert refused.exit_code == 4
    assert [type(trace) for trace in traces] == [Trace, Trace]
    assert len(server.requests) == 3
    assert slept == []


@pytest.mark.parametrize(
    "fault",
    [status(401), status(402), status(403), status(429, text='{"error": {"code": "insufficient_quota"}}')],
    ids=["401", "402", "403", "out of credit"],
)
def test_a_wrong_key_is_one_error_and_no_further_request(server, slept, run, fault):
    """If it failed, thousands of planned traces would each knock with the wrong key before the user hears of it."""
    server.fault_for_all = fault
    results = run.complete(server.base_url, texts=list(map(str, range(200))), max_concurrent=3, slept=slept, api_key="wrong")
    assert len({str(result) for result in results}) == 1
    assert re.search(r"answered 4\d\d.*not retried.*everything committed stays", str(results[0]))
    assert results[0].exit_code == 4
    assert len(server.requests) <= 3  # those already under way
    assert slept == []
    assert {row["state"] for row in run.calls()} == {"failed"}


def test_what_is_in_flight_when_the_key_runs_out_is_kept(server, slept, run):
    """If it failed, answers that were paid for would be thrown away with the refusal of their neighbour."""
    server.delay_s = {"a": 1.0}

    async def drive():
        async with run.client(server.base_url, max_concurrent=2, slept=slept) as client:
            first = asyncio.create_task(complete(client, request("a")))
            while not server.requests:
                await asyncio.sleep(0.01)
            server.faults = [status(402, text="out of credit")]
            rest = [asyncio.create_task(complete(client, request(text))) for text in "bcdef"]
            return await asyncio.gather(first, *rest, return_exceptions=True)

    kept, *errors = asyncio.run(drive())
    assert isinstance(kept, Trace)
    assert len({str(error) for error in errors}) == 1
    assert "402: 'out of credit'" in str(errors[0])
    assert len(server.requests) == 2
    assert [trace.key for trace in run.stored()] == [kept.key]


def test_a_refusal_wakes_the_requests_that_wait(server, run):
    """If it failed, the error would be shown only after the longest Retry-After of its neighbours."""
    server.faults = [status(429, headers={"Retry-After": "500"})]
    started = time.monotonic()
    endpoints = Endpoints([server.base_url])

    async def drive():
        async with run.client(endpoints=endpoints, max_concurrent=2) as client:
            waiting = asyncio.create_task(complete(client, request("a")))
            while not server.requests:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            endpoints.stop("the key was refused elsewhere")
            return await asyncio.gather(waiting, return_exceptions=True)

    [error] = asyncio.run(drive())
    assert "refused elsewhere" in str(error)
    assert time.monotonic() - started < 60
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(server, model, slept, run, code):
    """If it failed, prompts would go to a host that the recipe does not name."""
    with ChatServer(model) as elsewhere:
        server.faults = [status(code, headers={"Location": f"{elsewhere.base_url}/chat/completions"})]
        with pytest.raises(TeacherError, match=r"redirect to .*correct teacher\.base_url"):
            run.one(server.base_url, slept=slept, api_key="sk-canary")
        assert elsewhere.requests == []


def test_no_proxy_of_the_environment_gets_the_prompts(server, slept, run, monkeypatch, tmp_path):
    """If it failed, prompts and key would go through whatever proxy a machine happens to have set."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port('127.0.0.1')}")
    (tmp_path / ".netrc").write_text("default login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    run.one(server.base_url, slept=slept)
    assert server.requests[0].authorization is None


def test_a_budget_ends_the_requests_beyond_it_and_no_other(server, slept, run):
    """If it failed, a cap would be overrun, or reaching it would lose what was paid for."""
    run.budget = Budget(max_tokens=420)
    results = run.complete(server.base_url, texts=list("abcdefghij"), max_concurrent=1, slept=slept)
    traces = [result for result in results if isinstance(result, Trace)]
    assert 2 <= len(traces) < 10
    assert {type(result).__name__ for result in results if not isinstance(result, Trace)} == {"BudgetReached"}
    assert len(server.requests) == len(traces)
    assert sum(trace.num_prompt_tokens + trace.num_completion_tokens for trace in traces) <= 150


def test_the_same_response_id_for_two_requests_makes_two_traces(server, slept, run):
    """If it failed, a gateway that gives ids twice would make us drop one of two paid answers."""
    server.fault_for_all = status(200, text=answer())
    one, two = run.complete(server.base_url, texts=["a", "b"], slept=slept)
    assert one.response_id == two.response_id == "chatcmpl-1"
    assert {trace.key for trace in run.stored()} == {one.key, two.key}
    assert one.key != two.key


@pytest.mark.parametrize("shape", ["reasoning", "reasoning_content"])
def test_separated_reasoning_is_joined_into_one_completion(model, slept, run, shape):
    """If it failed, a teacher whose server splits off the reasoning would teach answers alone."""
    with ChatServer(model, shape=shape) as server:
        completion = run.one(server.base_url, slept=slept).completion
        prompt = model.tokenizer.apply_chat_template(
            server.requests[0].body["messages"], tokenize=False, add_generation_prompt=True
        )
    written = model.complete([prompt], [5], SAMPLING)[0].text
    parsed = split_reasoning(completion)
    half = len(written) // 2
    assert (parsed.reasoning, parsed.answer_text) == (written[:half].strip(), written[half:].strip())


def test_missing_usage_is_estimated(server, slept, run):
    """If it failed, a run over an endpoint without usage would report no tokens and no cost."""
    server.faults = [changed(lambda whole: {name: value for name, value in whole.items() if name != "usage"})]
    trace = run.one(server.base_url, slept=slept)
    assert trace.num_prompt_tokens == 4  # 14 characters, 4 a token
    assert trace.num_completion_tokens == -(-len(trace.completion) // 4)
    assert trace.usage_counted is False


@pytest.mark.slow
def test_transformers_serve_is_a_teacher(tmp_path, model, run):
    """If it failed, the first server that a newcomer tries on a laptop would not work as a teacher."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("transformers serve needs its extra: pip install 'transformers[serving]'")
    folder = model.model.config._name_or_path
    port = free_port("127.0.0.1")
    command = "from transformers.cli.transformers import main; main()"
    arguments = ["serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", command, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        assert process.poll() is None, (tmp_path / "log").read_text()
        texts = ["What is 3 + 4?", "a", "step by step"]
        greedy = Sampling(0.0, 1.0, 8)
        whole, streamed = (
            run.complete(
                f"http://127.0.0.1:{port}/v1", texts=texts, seeds=seeds, sampling=greedy, model=folder, max_concurrent=2, **mode
            )
            for seeds, mode in (([1, 2, 3], {}), ([4, 5, 6], {"stream": True, "stop_when": LoopDetector()}))
        )
    finally:
        process.terminate()
        process.wait(30)
    rendered = [
        model.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in texts
    ]
    direct = model.complete(rendered, [1, 2, 3], greedy)
    # Its texts come without special tokens.
    plain = [model.tokenizer.decode(model.tokenizer.encode(c.text), skip_special_tokens=True) for c in direct]
    assert [t.completion for t in whole] == plain
    # Its streams end before a last letter that is not whole.
    assert [t.completion.rstrip("\ufffd") for t in streamed] == [text.rstrip("\ufffd") for text in plain]
    for traces in (whole, streamed):
        assert [(t.finish_reason, t.num_prompt_tokens, t.num_completion_tokens) for t in traces] == [
            (c.finish_reason, c.num_prompt_tokens, c.num_completion_tokens) for c in direct
        ]
