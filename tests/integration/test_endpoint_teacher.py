"""The endpoint teacher against real HTTP servers: a tiny model that completes, and every way such a server breaks."""

from __future__ import annotations

import email.utils
import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime, timedelta

import pytest

from stillhouse.pipeline.errors import TeacherError
from stillhouse.pipeline.extraction import split_reasoning
from stillhouse.pipeline.records import Sampling
from stillhouse.teachers.endpoint import EndpointGenerator, read_completion, retry_after_s
from stillhouse.teachers.local import TransformersGenerator
from stillhouse.teachers.tracing import render_for_teacher
from tests.chat_server import ChatServer, changed, cut_off, echo_key, reset, status
from tests.tiny_models import make_model

SAMPLING = Sampling(0.7, 0.95, 12)
KEY_VARIABLE = "STILLHOUSE_TEST_ENDPOINT_KEY"
CANARY = "sk-canary-4f1d9a"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TransformersGenerator:
    return TransformersGenerator(make_model(tmp_path_factory.mktemp("models") / "qwen", "Qwen2"), dtype="float32")


@pytest.fixture
def server(model):
    with ChatServer(model) as running:
        yield running


@pytest.fixture
def slept():
    return []


def _client(server: ChatServer, slept: list[float], **options) -> EndpointGenerator:
    return EndpointGenerator(server.base_url, "tiny", sleep=slept.append, **options)


def _asked(*texts: str) -> list[str]:
    return render_for_teacher(
        texts, kind="endpoint", model="tiny", revision=None, system_prompt=None, prompt_suffix="", opens_think=True
    )


def _one(client: EndpointGenerator, text: str = "What is 3 + 4?"):
    return client.complete(_asked(text), [5], SAMPLING)[0]


def test_completions_come_back_in_order_and_are_the_models_own(server, model, slept):
    """If it failed, one problem's completion would be stored as another's, and every trained row would be suspect."""
    texts = [f"What is {number} + 4?" for number in range(12)]
    seeds = [2**63 - 1 - 10**15 * number for number in range(12)]
    server.delay_s = {texts[0]: 0.4, texts[3]: 0.2}
    completions = _client(server, slept, max_concurrent=4).complete(_asked(*texts), seeds, SAMPLING)

    rendered = [
        model.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in texts
    ]
    direct = [model.complete([prompt], [seed % 2**31], SAMPLING)[0] for prompt, seed in zip(rendered, seeds)]
    assert len({completion.text for completion in direct}) == 12
    assert [c.text for c in completions] == [c.text for c in direct]
    assert [c.num_completion_tokens for c in completions] == [c.num_completion_tokens for c in direct]
    assert [c.num_prompt_tokens for c in completions] == [c.num_prompt_tokens for c in direct]
    assert [c.seed for c in completions] == seeds
    assert 2 <= server.most_under_way <= 4
    assert slept == []


def test_what_is_sent_is_what_the_recipe_says(server, slept):
    """If it failed, the teacher would sample by its server's defaults while the trace names the recipe's."""
    prompt = render_for_teacher(
        ["What is 3 + 4?"],
        kind="endpoint",
        model="tiny",
        revision=None,
        system_prompt="Be brief.",
        prompt_suffix="Box it.",
        opens_think=True,
    )
    _client(server, slept).complete(prompt, [2**40 + 9], SAMPLING)
    [request] = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.authorization is None
    assert request.body == {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?\n\nBox it."}],
        "temperature": 0.7,
        "top_p": 0.95,
        "max_tokens": 12,
        "n": 1,
        "seed": 9,
    }


@pytest.mark.parametrize("code", [408, 409, 429, 500, 502, 503, 504])
def test_passing_faults_are_tried_again(server, slept, code):
    """If it failed, one overloaded minute of a hosted teacher would end a run of days."""
    server.faults = [status(code), status(code)]
    _one(_client(server, slept))
    assert len(server.requests) == 3
    assert len(slept) == 2
    assert 0 <= slept[0] <= 2
    assert 0 <= slept[1] <= 4
    assert server.requests[0].body == server.requests[2].body


@pytest.mark.parametrize("fault", [reset, cut_off, status(200, text="<html>busy</html>"), status(200, text='{"choices": [')])
def test_broken_answers_are_tried_again(server, slept, fault):
    """If it failed, a connection that breaks, even in the middle of an answer, would end the run with a traceback."""
    server.faults = [fault]
    completion = _one(_client(server, slept))
    assert completion.num_completion_tokens > 0
    assert len(server.requests) == 2
    assert len(slept) == 1


@pytest.mark.parametrize("code", [400, 401, 402, 403, 404, 405, 422])
def test_refusals_are_not_tried_again(server, slept, code):
    """If it failed, a wrong key would be sent over and over until the account is locked, or a bad request paid six times."""
    server.fault_for_all = status(code, text='{"error": "the reason"}')
    with pytest.raises(TeacherError, match=rf"{code}.*the reason.*not retried") as caught:
        _one(_client(server, slept))
    assert caught.value.exit_code == 4
    assert len(server.requests) == 1
    assert slept == []


def test_a_wrong_key_is_one_error_and_no_further_request(server, slept, monkeypatch):
    """If it failed, thousands of planned traces would each knock with the wrong key before the user hears of it."""
    monkeypatch.setenv(KEY_VARIABLE, "wrong")
    server.fault_for_all = status(401)
    client = _client(server, slept, api_key_env=KEY_VARIABLE, max_concurrent=3)
    with pytest.raises(TeacherError, match="401") as caught:
        client.complete(_asked(*map(str, range(200))), range(200), SAMPLING)
    assert caught.value.exit_code == 4
    assert len(server.requests) <= 3  # those already under way


def test_a_refusal_wakes_the_requests_that_wait(server):
    """If it failed, the error would be shown only after the longest Retry-After of its neighbours."""
    server.faults = [status(429, headers={"Retry-After": "500"}), status(403)]
    started = time.monotonic()
    with pytest.raises(TeacherError, match="403"):
        EndpointGenerator(server.base_url, "tiny", max_concurrent=2).complete(_asked("a", "b"), [1, 2], SAMPLING)
    assert time.monotonic() - started < 60
    assert len(server.requests) == 2


@pytest.mark.parametrize(("header", "seconds"), [("7", 7), ("90", 90), ("0", 0), ("0.5", 0.5)])
def test_retry_after_in_seconds_is_waited_out(server, slept, header, seconds):
    """If it failed, we would knock while we are told not to, and be banned."""
    server.faults = [status(429, headers={"Retry-After": header}), status(503, headers={"Retry-After": header})]
    _one(_client(server, slept))
    assert slept == [seconds, seconds]


def test_retry_after_as_a_date_is_waited_out(server, slept):
    """If it failed, the second form that the standard allows would be ignored."""
    asked_for = (datetime.now(UTC) + timedelta(seconds=45)).replace(microsecond=0)
    server.faults = [status(429, headers={"Retry-After": email.utils.format_datetime(asked_for, usegmt=True)})]
    before = (asked_for - datetime.now(UTC)).total_seconds()
    _one(_client(server, slept))
    after = (asked_for - datetime.now(UTC)).total_seconds()
    assert len(slept) == 1
    assert after <= slept[0] <= before


def test_no_request_comes_before_retry_after_by_the_clock(server):
    """If it failed, waiting would be computed right and still not done."""
    server.faults = [status(429, headers={"Retry-After": "1"})]
    _one(EndpointGenerator(server.base_url, "tiny"))
    first, second = server.requests
    assert second.time_s - first.time_s >= 1.0


def test_an_endpoint_that_asks_for_an_hour_is_out_of_reach(server, slept):
    """If it failed, a run on rented machines would sleep through a ban, or shorten the wait and lengthen the ban."""
    server.faults = [status(429, headers={"Retry-After": "3600"})]
    with pytest.raises(TeacherError, match="left alone for 3600 s") as caught:
        _one(_client(server, slept))
    assert caught.value.exit_code == 4
    assert len(server.requests) == 1
    assert slept == []


def test_attempts_are_counted_and_the_last_answer_is_told(server, slept):
    """If it failed, a dead teacher would be asked for ever, or given up after one bad second."""
    server.fault_for_all = status(503, text="all busy")
    with pytest.raises(TeacherError, match=r"503: 'all busy', 3 times; everything committed stays") as caught:
        _one(_client(server, slept, max_attempts=3))
    assert caught.value.exit_code == 4
    assert len(server.requests) == 3
    assert len(slept) == 2


def test_an_unreachable_port_is_one_clear_error(slept):
    """If it failed, a wrong base_url would end in a traceback of three libraries."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = EndpointGenerator(f"http://127.0.0.1:{port}/v1", "tiny", sleep=slept.append, max_attempts=4)
    with pytest.raises(
        TeacherError, match=rf"'tiny' at http://127.0.0.1:{port}/v1/chat/completions cannot be reached"
    ) as caught:
        client.complete(_asked("a"), [1], SAMPLING)
    assert caught.value.exit_code == 4
    assert len(slept) == 3


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(server, model, slept, monkeypatch, code):
    """If it failed, prompts would go to a host that the recipe does not name."""
    monkeypatch.setenv(KEY_VARIABLE, CANARY)
    with ChatServer(model) as elsewhere:
        server.faults = [status(code, headers={"Location": f"{elsewhere.base_url}/chat/completions"})]
        with pytest.raises(TeacherError, match=r"redirect to .*correct teacher\.base_url"):
            _one(_client(server, slept, api_key_env=KEY_VARIABLE))
        assert elsewhere.requests == []


def _without_usage(answer):
    return {name: value for name, value in answer.items() if name != "usage"}


def _with_message(**fields):
    return changed(lambda answer: answer | {"choices": [answer["choices"][0] | {"message": fields}]})


@pytest.mark.parametrize("shape", ["reasoning", "reasoning_content"])
def test_separated_reasoning_is_joined_into_one_completion(model, slept, shape):
    """If it failed, a teacher whose server splits off the reasoning would teach answers alone."""
    with ChatServer(model, shape=shape) as server:
        completion = _one(_client(server, slept))
        prompt = model.tokenizer.apply_chat_template(
            server.requests[0].body["messages"], tokenize=False, add_generation_prompt=True
        )
    written = model.complete([prompt], [5], SAMPLING)[0].text
    parsed = split_reasoning(completion.text)
    half = len(written) // 2
    assert (parsed.reasoning, parsed.answer_text) == (written[:half].strip(), written[half:].strip())


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("content", [None, "", "\n"])
def test_reasoning_without_content_is_a_cut_completion(server, slept, name, content):
    """If it failed, a trace that ran out of tokens while thinking would pass for a finished one."""
    server.faults = [_with_message(role="assistant", content=content, **{name: "first I add"})]
    completion = _one(_client(server, slept))
    assert completion.text == "<think>\nfirst I add"
    assert completion.finish_reason == "length"
    assert split_reasoning(completion.text).reasoning is None


@pytest.mark.parametrize(
    ("fields", "reasoning", "answer"),
    [
        ({"content": "<think>\nadd\n</think>\n\n7"}, "add", "7"),
        ({"content": "add\n</think>\n\n7"}, "add", "7"),  # the endpoint's template opened the block
        ({"content": "<think>\nadd\n</think>\n\n7", "reasoning": "add"}, "add", "7"),  # said twice
        ({"content": "7"}, None, None),
        ({"content": None}, None, None),
    ],
)
def test_inline_reasoning_is_understood(server, slept, fields, reasoning, answer):
    """If it failed, every trace of an endpoint without a reasoning parser would be dropped as malformed."""
    server.faults = [_with_message(role="assistant", **fields)]
    parsed = split_reasoning(_one(_client(server, slept)).text)
    assert (parsed.reasoning, parsed.answer_text) == (reasoning, answer)


def test_missing_usage_is_estimated(server, slept):
    """If it failed, a run over an endpoint without usage would report no tokens and no cost."""
    server.faults = [changed(_without_usage)]
    completion = _one(_client(server, slept), "What is 3 + 4?")
    assert completion.num_prompt_tokens == 4  # 14 characters, 4 a token
    assert completion.num_completion_tokens == -(-len(completion.text) // 4)


@pytest.mark.parametrize(
    ("told", "ours"), [("stop", "stop"), ("length", "length"), ("content_filter", "length"), (None, "length")]
)
def test_only_stop_is_a_finished_completion(told, ours):
    """If it failed, censored or broken-off completions would be trained on as whole ones."""
    answer = {"choices": [{"message": {"content": "7"}, "finish_reason": told}], "usage": {"completion_tokens": 1}}
    assert read_completion(answer, 0).finish_reason == ours


@pytest.mark.parametrize(
    "change",
    [
        lambda answer: [answer],
        lambda answer: None,
        lambda answer: {"error": {"message": "overloaded"}},
        lambda answer: answer | {"choices": []},
        lambda answer: answer | {"choices": None},
        lambda answer: answer | {"choices": [{"message": None, "finish_reason": "stop"}]},
        lambda answer: answer | {"choices": [{"message": {"content": [{"type": "text", "text": "7"}]}}]},
    ],
)
def test_json_that_is_no_chat_completion_is_said_so(server, slept, change):
    """If it failed, a proxy's own JSON would crash the run, or be stored as an empty trace."""
    server.faults = [changed(change)]
    with pytest.raises(TeacherError, match=r"JSON that is no chat completion \(\w+: .+\): '") as caught:
        _one(_client(server, slept))
    assert caught.value.exit_code == 4
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "faults",
    [
        [echo_key(401)],
        [echo_key(500)] * 2,
        [changed(lambda answer: {"error": f"Bearer {CANARY}"})],
        [status(200, text=f"not JSON, {CANARY}")] * 2,
        [status(302, headers={"Location": f"https://127.0.0.1:1/?key={CANARY}"})],
        [reset] * 2,
        [cut_off] * 2,
    ],
)
def test_the_key_reaches_the_server_and_no_error(server, slept, monkeypatch, faults):
    """If it failed, an API key would stand in logs, reports and bug reports."""
    monkeypatch.setenv(KEY_VARIABLE, f"{CANARY}\n")  # as a mounted secret ends
    server.faults = list(faults)
    with pytest.raises(TeacherError) as caught:
        _one(_client(server, slept, api_key_env=KEY_VARIABLE, max_attempts=2))
    assert server.requests[0].authorization == f"Bearer {CANARY}"
    _assert_unseen(caught.value)


@pytest.mark.parametrize("value", [f"{CANARY} {CANARY}", f"{CANARY}\nX-Other: 1", f"{CANARY}\u2019", f"{CANARY}\x00"])
def test_what_cannot_be_a_key_is_refused_unseen(server, slept, value, monkeypatch):
    """If it failed, the HTTP library's complaint would quote the key in full."""
    # Not through the process' environment where it cannot hold the value.
    monkeypatch.setattr(os, "environ", {**os.environ, KEY_VARIABLE: value})
    with pytest.raises(TeacherError, match=f"{KEY_VARIABLE} holds what cannot be a key") as caught:
        _client(server, slept, api_key_env=KEY_VARIABLE)
    _assert_unseen(caught.value)


def test_a_missing_key_names_the_variable(server, slept, monkeypatch):
    """If it failed, a user would learn of the missing key from a 401 on another machine."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(TeacherError, match=f"{KEY_VARIABLE} is not set") as caught:
        _client(server, slept, api_key_env=KEY_VARIABLE)
    assert caught.value.exit_code == 4


def _assert_unseen(error: BaseException) -> None:
    assert CANARY not in "".join(traceback.format_exception(error))
    assert CANARY.encode() not in pickle.dumps(error)  # what Ray sends
    while error:
        assert CANARY not in f"{error} {error!r} {error.args}"
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("\u00b2", None),
        ("12", 12),
        (" 12 ", 12),
        ("-3", 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2015 07:28:00 -0000", 0),
        ("Wednesday, 21-Oct-15 07:28:00 GMT", 0),
    ],
)
def test_retry_after_takes_whatever_servers_send(header, seconds):
    """If it failed, an odd header in one of a hundred thousand answers would crash the run."""
    assert retry_after_s(header) == seconds


@pytest.mark.slow
def test_transformers_serve_is_a_teacher(tmp_path, model):
    """If it failed, the first server that a newcomer tries on a laptop would not work as a teacher."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("transformers serve needs its extra: pip install 'transformers[serving]'")
    folder = model.model.config._name_or_path
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
        client = EndpointGenerator(f"http://127.0.0.1:{port}/v1", folder, max_concurrent=2)
        texts = ["What is 3 + 4?", "a", "step by step"]
        greedy = Sampling(0.0, 1.0, 8)
        completions = client.complete(_asked(*texts), [1, 2, 3], greedy)
    finally:
        process.terminate()
        process.wait(30)
    rendered = [
        model.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in texts
    ]
    direct = model.complete(rendered, [1, 2, 3], greedy)
    assert [(c.finish_reason, c.num_prompt_tokens, c.num_completion_tokens) for c in completions] == [
        (c.finish_reason, c.num_prompt_tokens, c.num_completion_tokens) for c in direct
    ]
    # Its texts come without special tokens.
    assert [c.text for c in completions] == [
        model.tokenizer.decode(model.tokenizer.encode(c.text), skip_special_tokens=True) for c in direct
    ]
