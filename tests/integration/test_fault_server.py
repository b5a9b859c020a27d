"""The shipped fault server over real sockets: every fault as named, the same ones each time, an honest ledger."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import os
import random
import signal
import subprocess
import sys
import time

import aiohttp
import psutil
import pytest

from stillhouse.pipeline.errors import IntegrityError, TeacherError
from stillhouse.teachers.fault_answers import SyntheticAnswers
from stillhouse.teachers.fault_ledger import read_ledger, summary
from stillhouse.teachers.fault_plan import DEFAULT_WEIGHTS, FAULTS, FaultPlan, parse_faults, request_identity
from stillhouse.teachers.fault_process import running_fault_server
from stillhouse.teachers.fault_server import FaultServer

REFUSALS = [name for name, fault in FAULTS.items() if fault.status not in (None, 200)]
WAITS = ["status_429_seconds", "status_429_date"]


def _body(text: str = "What is 3 + 4?", **more) -> dict:
    return {"model": "drill", "messages": [{"role": "user", "content": text}], "seed": 5, "temperature": 0.6, **more}


def _plan(*faults: str, **more) -> FaultPlan:
    options = {"retry_after_s": (0.3, 0.3), "stall_s": 0.05, "slow_s": 0.2} | more
    return FaultPlan(7, 1.0 if faults else 0.0, dict.fromkeys(faults, 1.0), **options)


async def _post(session: aiohttp.ClientSession, base_url: str, body: dict, **headers: str) -> tuple[int, dict, bytes]:
    async with session.post(f"{base_url}/chat/completions", json=body, headers=headers) as response:
        return response.status, dict(response.headers), await response.read()


def _served(use, plan: FaultPlan, **options):
    """What ``use(session, server)`` gives while a server runs the plan."""

    async def run():
        async with FaultServer(plan, **options) as server, aiohttp.ClientSession() as session:
            return await use(session, server)

    return asyncio.run(run())


def _ask(plan: FaultPlan, body: dict, **options) -> tuple[int, dict, bytes]:
    return _served(lambda session, server: _post(session, server.base_url, body), plan, **options)


def _events(content: bytes) -> list[dict]:
    data = [line.removeprefix("data: ") for line in content.decode().split("\n\n") if line]
    return [json.loads(line) for line in data if line != "[DONE]"]


def _joined(events: list[dict], name: str = "content") -> str:
    return "".join(event["choices"][0]["delta"].get(name) or "" for event in events if event["choices"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_has_its_status_and_only_the_named_ones_a_retry_after(name, stream):
    """A drill for 429 or 503 would exercise another path of the client than the one it names."""
    status, headers, content = _ask(_plan(name), _body(stream=stream))
    assert status == FAULTS[name].status
    assert ("Retry-After" in headers) == (name in WAITS)
    assert content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("reset", aiohttp.ClientOSError),
        ("reset_midway", (aiohttp.ClientOSError, aiohttp.ClientPayloadError)),
        ("stall", aiohttp.ServerDisconnectedError),
        ("truncated_body", aiohttp.ClientPayloadError),
    ],
)
def test_a_broken_connection_breaks_where_it_says(name, error, stream):
    """A client's handling of resets, stalls and cut bodies would go untested while the drill says that it was."""
    with pytest.raises(error):
        _ask(_plan(name), _body(stream=stream))


def test_a_reset_in_mid_body_comes_after_the_headers_and_part_of_the_text():
    """reset_midway would be the same as reset, and no client would ever be left with half an answer."""

    async def read(session, server):
        got = b""
        async with session.post(f"{server.base_url}/chat/completions", json=_body()) as response:
            with contextlib.suppress(aiohttp.ClientError):
                async for piece in response.content.iter_any():
                    got += piece
            return response.status, int(response.headers["Content-Length"]), got

    status, announced, got = _served(read, _plan("reset_midway"))
    assert status == 200
    assert 0 < len(got) < announced


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_without_a_fault_reads_with_the_openai_sdk(stream):
    """Users' own clients, most of them on this SDK, could not be drilled against it."""
    openai = pytest.importorskip("openai")
    plan = _plan()

    async def read(session, server):
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="any", max_retries=0) as client:
            more = {"stream_options": {"include_usage": True}} if stream else {}
            answer = await client.chat.completions.create(**_body(logprobs=True, top_logprobs=2, stream=stream), **more)
            if not stream:
                [choice] = answer.choices
                return choice.message.content, choice.finish_reason, choice.logprobs.content, answer.usage.completion_tokens
            chunks = [chunk async for chunk in answer]
            choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
            text = "".join(choice.delta.content or "" for choice in choices)
            logprobs = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
            return text, choices[-1].finish_reason, logprobs, chunks[-1].usage.completion_tokens

    text, finish_reason, logprobs, num_tokens = _served(read, plan)
    assert text.startswith("<think>\n")
    assert text.endswith("}.")
    assert "\\boxed{" in text.split("</think>\n\n")[1]
    assert finish_reason == "stop"
    assert "".join(token.token for token in logprobs) == text
    assert {len(token.top_logprobs) for token in logprobs} == {2}
    assert num_tokens == len(logprobs) == -(-len(text) // 4)


@pytest.mark.parametrize("shape", ["reasoning", "reasoning_content"])
def test_reasoning_stands_where_the_shape_says_streamed_and_whole(shape):
    """A client that looks for reasoning in one place only would pass a drill of the other."""

    async def read(session, server):
        whole = await _post(session, server.base_url, _body())
        streamed = await _post(session, server.base_url, _body(stream=True))
        return json.loads(whole[2])["choices"][0]["message"], _events(streamed[2])

    message, events = _served(read, _plan(), answers=SyntheticAnswers(shape=shape))
    assert message[shape] == _joined(events, shape) != ""
    assert message["content"] == _joined(events) != ""
    assert "think>" not in message[shape] + message["content"]


def test_max_tokens_cuts_the_text_and_says_length():
    """Length stops, which must never be trained on, would not occur in drills."""
    _, _, content = _ask(_plan(), _body(max_tokens=10))
    answer = json.loads(content)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(answer["choices"][0]["message"]["content"]) == 40
    assert answer["usage"]["completion_tokens"] == 10


def test_odd_answers_are_odd_in_the_one_way_that_they_name():
    """null_content, missing_usage and duplicate_id would test nothing, or more than they say."""

    def one(name, body):
        return json.loads(_ask(_plan(*name), body)[2])

    plain = one([], _body())
    null = one(["null_content"], _body())
    assert null["choices"][0]["message"]["content"] is None
    assert "\\boxed{" in null["choices"][0]["message"]["reasoning"]
    assert null["usage"] == plain["usage"]
    assert one(["missing_usage"], _body()) == {name: value for name, value in plain.items() if name != "usage"}

    async def twice(session, server):
        answers = [await _post(session, server.base_url, _body(text)) for text in ("one", "two")]
        return [json.loads(content) for _, _, content in answers]

    first, second = _served(twice, _plan("duplicate_id"))
    assert first["id"] == second["id"]
    assert first["choices"] != second["choices"]


def test_answers_that_are_no_completion():
    """A client that takes a gateway's page or any JSON for an answer would store it as a trace."""
    assert b"<html>" in _ask(_plan("html_200"), _body())[2]
    assert json.loads(_ask(_plan("empty_choices"), _body())[2])["choices"] == []
    wrong = {_ask(_plan("wrong_json"), _body(str(i)))[2] for i in range(20)}
    assert len(wrong) > 2
    for content in wrong:
        with pytest.raises((ValueError, LookupError, TypeError)):
            json.loads(content)["choices"][0]["message"]["content"]


def test_a_truncated_stream_ends_cleanly_without_its_last_events():
    """The worst way to lose an answer's end, which no transport error reports, would not be drilled."""
    body = _body(stream=True, stream_options={"include_usage": True})
    plan = FaultPlan(7, 1.0, {"truncated_stream": 1.0, "reset": 1e-9})  # alone it could not break whole answers
    whole, cut = _ask(_plan(), body)[2], _ask(plan, body)[2]
    assert whole.startswith(cut)
    assert cut.endswith(b"\n\n")
    assert b"[DONE]" in whole
    assert b"[DONE]" not in cut
    assert all(event["choices"][0]["finish_reason"] is None and not event["usage"] for event in _events(cut))


def test_a_slow_body_arrives_whole_and_slowly():
    """Idle limits would be tried against an answer that comes at once."""
    started = time.monotonic()
    slow = _ask(_plan("slow_body"), _body())[2]
    assert time.monotonic() - started >= 0.2
    assert slow == _ask(_plan(), _body())[2]


def _requests(number: int) -> list[dict]:
    return [_body(f"How much is {i} + {i}?", stream=i % 2 == 0) for i in range(number)]


async def _ask_all(session: aiohttp.ClientSession, base_url: str, bodies: list[dict], concurrent: int) -> None:
    waiting = iter(bodies)

    async def worker() -> None:
        for body in waiting:
            with contextlib.suppress(aiohttp.ClientError):
                await _post(session, base_url, body)

    await asyncio.gather(*(worker() for _ in range(concurrent)))


def test_the_same_seed_breaks_the_same_requests_in_any_order(tmp_path):
    """A failed drill could not be repeated: with hundreds in flight no two runs send in the same order."""
    bodies = _requests(150) * 2
    random.Random(1).shuffle(bodies)

    def met(name: str, bodies: list[dict], concurrent: int, seed: int = 3) -> dict:
        plan = FaultPlan(seed, 0.5, stall_s=0, slow_s=0, retry_after_s=(0, 0))
        path = tmp_path / name
        _served(lambda session, server: _ask_all(session, server.base_url, bodies, concurrent), plan, ledger=path)
        return {(c.identity, c.attempt): (c.fault, c.status, c.prompt_tokens, c.completion_tokens) for c in read_ledger(path)}

    one = met("one", bodies, 1)
    assert len(one) == 300
    assert met("other", sorted(bodies, key=str), 60) == one
    assert met("another-seed", bodies, 60, seed=4) != one


def test_the_ledger_bills_what_was_written_and_nothing_else(tmp_path):
    """Comparing a client's books with this ledger would show overspending that never was, or hide one that was."""
    bodies = _requests(400)
    plan = FaultPlan(1, 0.7, stall_s=0, slow_s=0, retry_after_s=(0, 0))
    path = tmp_path / "served.jsonl"
    _served(lambda session, server: _ask_all(session, server.base_url, bodies, 50), plan, ledger=path)
    calls = read_ledger(path)
    assert [call.number for call in calls] == list(range(400))
    assert {call.fault for call in calls} == {"", *DEFAULT_WEIGHTS}
    answers, by_identity = SyntheticAnswers(1), {request_identity(body): body for body in bodies}
    for call in calls:
        fault = plan.fault(call.identity, 0, stream=call.stream)
        assert call.fault == (fault.name if fault else "")
        usage = answers.completion(by_identity[call.identity], call.identity, "")["usage"]
        written = fault is None or fault.generates
        assert call.prompt_tokens == (usage["prompt_tokens"] if written else 0)
        assert call.completion_tokens == (usage["completion_tokens"] if written else 0)
    counts = summary(calls)
    assert sum(counts["faults"].values()) == sum(call.fault != "" for call in calls)
    assert counts["completion_tokens"] == sum(call.completion_tokens for call in calls)
    assert 0.6 < sum(counts["faults"].values()) / 400 < 0.8


@pytest.mark.parametrize("name", WAITS)
@pytest.mark.parametrize(("grace_s", "found"), [(0.0, "endpoint"), (3600.0, "")])
def test_who_comes_before_its_retry_after_is_named(tmp_path, name, grace_s, found):
    """A client that ignores Retry-After would look as good as one that waits."""
    path = tmp_path / "served.jsonl"
    plan = _plan(name, retry_after_s=(600.0, 600.0))

    async def hurry(session, server):
        _, headers, _ = await _post(session, server.base_url, _body("a"))
        await _post(session, server.base_url, _body("b"))
        await _post(session, server.base_url, _body("a"))
        await _post(session, server.base_url.replace("/v1", "/other/v1"), _body("c"))
        return headers["Retry-After"]

    retry_after = _served(hurry, plan, ledger=path, grace_s=grace_s)
    first, *rest = read_ledger(path)
    assert [call.early for call in rest] == [found, "request", ""]
    assert rest[0].in_gate_s > 0 == rest[2].in_gate_s
    assert first.not_before >= first.time + 600
    if name == "status_429_date":
        assert first.not_before == email.utils.parsedate_to_datetime(retry_after).timestamp()
    else:
        assert retry_after == "600"


def test_who_waits_is_not_called_early(tmp_path):
    """A client that does as it is told would be accused."""
    path = tmp_path / "served.jsonl"

    async def wait(session, server):
        for _ in range(3):
            _, headers, _ = await _post(session, server.base_url, _body())
            await asyncio.sleep(float(headers["Retry-After"]))

    _served(wait, _plan("status_429_seconds"), ledger=path, grace_s=0.0)
    assert [call.early for call in read_ledger(path)] == ["", "", ""]


def test_in_front_of_a_real_endpoint_it_breaks_what_comes_back(tmp_path):
    """A user's drill with the real model behind it would answer with made-up texts, or pay for answers that nobody wanted."""

    async def run():
        behind = FaultServer(_plan(), answers=SyntheticAnswers(99, shape="reasoning"), ledger=tmp_path / "behind.jsonl")
        async with behind, aiohttp.ClientSession() as session:

            async def through(plan: FaultPlan, body: dict, name: str = "front") -> tuple[int, dict, bytes]:
                async with FaultServer(plan, upstream=behind.base_url, ledger=tmp_path / f"{name}.jsonl") as front:
                    return await _post(session, front.base_url, body)

            direct = (await _post(session, behind.base_url, _body()))[2]
            whole = (await through(_plan(), _body()))[2]
            events = _events((await through(_plan(), _body(stream=True)))[2])
            null = (await through(_plan("null_content"), _body()))[2]
            paid = len(read_ledger(tmp_path / "behind.jsonl"))
            refused = await through(_plan("status_503"), _body())
            assert len(read_ledger(tmp_path / "behind.jsonl")) == paid
            return direct, whole, events, null, refused

    direct, whole, events, null, refused = asyncio.run(run())
    answer = json.loads(whole)
    assert answer["choices"] == json.loads(direct)["choices"]
    assert _joined(events, "reasoning") == answer["choices"][0]["message"]["reasoning"]
    assert _joined(events) == answer["choices"][0]["message"]["content"]
    assert json.loads(null)["choices"][0]["message"]["content"] is None
    assert refused[0] == 503
    billed = read_ledger(tmp_path / "front.jsonl")[0]
    assert billed.completion_tokens == answer["usage"]["completion_tokens"]


def test_a_refusal_of_the_upstream_is_passed_on(tmp_path):
    """The real endpoint's own 429 would reach the client without its Retry-After, or be billed."""

    async def run():
        async with FaultServer(_plan("status_429_seconds")) as behind:
            front = FaultServer(_plan(), upstream=behind.base_url, ledger=tmp_path / "front.jsonl")
            async with front, aiohttp.ClientSession() as session:
                return await _post(session, front.base_url, _body())

    status, headers, _ = asyncio.run(run())
    assert (status, headers["Retry-After"]) == (429, "0.3")
    [call] = read_ledger(tmp_path / "front.jsonl")
    assert (call.fault, call.status, call.completion_tokens) == ("", 429, 0)


def test_an_upstream_that_is_not_there_is_said_and_not_billed(tmp_path):
    """A typing error in --upstream would look like one more fault of the plan."""
    path = tmp_path / "served.jsonl"
    status, _, content = _ask(_plan(), _body(), upstream="http://127.0.0.1:9/v1", ledger=path)
    assert status == 502
    assert "http://127.0.0.1:9/v1/chat/completions does not answer" in json.loads(content)["error"]["message"]
    [call] = read_ledger(path)
    assert (call.fault, call.status, call.completion_tokens) == ("", 502, 0)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"messages": 3}', b'{"model": "drill"}', b'{"messages": [], "max_tokens": "many"}']
)
def test_a_body_that_asks_nothing_is_refused_and_written_down(tmp_path, content):
    """A client that sends rubbish would see a broken server instead of a 400."""
    path = tmp_path / "served.jsonl"

    async def post(session, server):
        async with session.post(f"{server.base_url}/chat/completions", data=content) as response:
            return response.status, await response.json()

    status, answer = _served(post, _plan("reset"), ledger=path)
    assert status == 400
    assert "no chat request" in answer["error"]["message"]
    assert [(call.status, call.fault) for call in read_ledger(path)] == [(400, "")]


def test_a_killed_server_leaves_whole_lines_and_goes_on_in_the_same_file(tmp_path):
    """After a drill that kills the server nobody could say what it had billed."""
    path = tmp_path / "served.jsonl"
    for life in range(2):
        with running_fault_server(_plan(), ledger=path, options={"mean-characters": 200}) as server:

            async def ask(url=server.base_url, life=life):
                async with aiohttp.ClientSession() as session:
                    await _ask_all(session, url, [_body(f"{life} {i}") for i in range(200)], 20)

            asyncio.run(ask())
            os.kill(server.pid, signal.SIGKILL)
    assert len(read_ledger(path)) == 400
    path.write_text(path.read_text() + "{torn")
    with pytest.raises(IntegrityError, match="line 401 of"):
        read_ledger(path)


def test_the_process_runs_the_plan_that_it_was_given(tmp_path):
    """A drill from Python would run with other faults or waits than those in its plan."""
    path = tmp_path / "served.jsonl"
    plan = FaultPlan(11, 0.5, {"status_429_seconds": 2.0, "null_content": 0.5}, retry_after_s=(0.25, 0.75))
    bodies = _requests(60)
    with running_fault_server(plan, ledger=path) as server:

        async def ask():
            async with aiohttp.ClientSession() as session:
                await _ask_all(session, server.endpoint("second"), bodies, 10)

        asyncio.run(ask())
    for call in read_ledger(path):
        fault = plan.fault(call.identity, 0, stream=call.stream)
        assert call.fault == (fault.name if fault else "")
        assert call.endpoint == "/second/v1"
        if call.not_before:
            assert call.not_before >= call.time + plan.wait_s(call.identity, 0) - 0.001


def test_it_ends_with_the_process_that_started_it():
    """A drill that was killed would leave its server behind, with its port and its memory."""
    starter = (
        "import time; from stillhouse.teachers.fault_plan import FaultPlan; "
        "from stillhouse.teachers.fault_process import running_fault_server\n"
        "with running_fault_server(FaultPlan()) as server: print(server.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as process:
        server = psutil.Process(int(process.stdout.readline()))
        process.kill()
        server.wait(timeout=60)  # raises where it goes on
    assert not server.is_running()


def test_a_server_that_cannot_start_says_so(tmp_path):
    """A drill would hang on a port that is taken or a fault that is misspelt."""
    with pytest.raises(TeacherError, match="before it served"), running_fault_server(_plan(), options={"port": "many"}):
        pass
    command = [sys.executable, "-m", "stillhouse.teachers.fault_server", "--faults", "reset,explode"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "there is no fault explode; there are status_408, " in ended.stderr


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FaultPlan(rate=2), "a share from 0 to 1, not 2"),
        (lambda: FaultPlan(weights={"reset": 0}), "weights above 0"),
        (lambda: FaultPlan(weights={"truncated_stream": 1}), "also breaks whole answers"),
        (lambda: FaultPlan(retry_after_s=(2, 1)), "retry_after_s=\\(2, 1\\)"),
        (lambda: parse_faults("reset:often"), "'reset:often' should read name or name:weight"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(make, said):
    """A typing error would run a drill without the faults that it is about."""
    with pytest.raises(ValueError, match=said):
        make()


def test_faults_come_at_their_rate_and_weights():
    """A share of 20 % would be another share; 401, which stops a client, would be among the defaults."""
    assert "unauthorized" not in FaultPlan().weights
    plan = FaultPlan(5, 0.2, {"reset": 3.0, "stall": 1.0})
    met = [plan.fault(f"{i:032x}", i % 3) for i in range(20_000)]
    names = [fault.name for fault in met if fault]
    assert abs(len(names) / 20_000 - 0.2) < 0.012  # 4 standard deviations
    assert abs(names.count("reset") / len(names) - 0.75) < 0.028
    waits = [plan.wait_s(f"{i:032x}", 0) for i in range(1000)]
    assert 1.0 <= min(waits) < 1.1 < 2.9 < max(waits) <= 3.0


def test_answers_have_the_length_that_was_asked_for():
    """A drill's cost and memory would be off by what its texts are off."""
    for mean in (300, 2000):
        answers = SyntheticAnswers(2, mean_characters=mean)
        lengths = [len("<think>\n\n</think>\n\n".join(answers.text(f"{i:032x}"))) for i in range(2000)]
        assert sum(lengths) / 2000 == pytest.approx(mean, rel=0.06)
    assert SyntheticAnswers(2).text("a" * 32) == SyntheticAnswers(2).text("a" * 32) != SyntheticAnswers(3).text("a" * 32)
