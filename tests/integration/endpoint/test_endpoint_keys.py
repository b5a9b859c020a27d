"""An endpoint's key: where it comes from, that the server gets it, and that nobody else ever sees it."""

from __future__ import annotations

import asyncio
import os
import pickle
import traceback
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stillhouse.pipeline.errors import TeacherError
from stillhouse.teachers.api_key import key_from_environment, key_from_file
from stillhouse.teachers.endpoint import ChatClient, Endpoints
from tests.chat_server import echo_key, reset, status
from tests.endpoint_run import answer, events, streams

KEY_VARIABLE = "STILLHOUSE_TEST_ENDPOINT_KEY"
CANARY = "sk-canary/4f1d9a"


@pytest.mark.parametrize(
    "faults",
    [
        [echo_key(401)],
        [echo_key(400)],
        [echo_key(500)] * 2,
        [status(200, text='{"error": "Bearer KEY"}'.replace("KEY", CANARY))] * 2,
        [status(200, text=f"not JSON, {CANARY}")] * 2,
        [status(200, text=f'"{CANARY}'.replace("/", "\\/"))] * 2,
        [status(500, text="x" * 195 + CANARY)] * 2,
        [status(302, headers={"Location": f"https://127.0.0.1:1/?key={CANARY}"})],
        [streams(b"data: " + b"x" * 290 + CANARY.encode() + b"\n\n")] * 2,
        [reset] * 2,
        [status(200, text=CANARY, headers={"Content-Length": "1000", "Connection": "close"})] * 2,
    ],
)
def test_the_key_reaches_the_server_and_no_error_and_no_file(server, slept, run, faults, caplog, capfd):
    """If it failed, an API key would stand in logs, reports, stores and bug reports."""
    server.faults = list(faults)
    with caplog.at_level("DEBUG"), pytest.raises(TeacherError) as caught:
        run.one(server.base_url, slept=slept, max_attempts=2, api_key=CANARY, stream=True)
    assert server.requests[0].authorization == f"Bearer {CANARY}"
    _assert_unseen(caught.value)
    _assert_in_no_file(run.folder)
    assert CANARY not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("spelled", [CANARY, CANARY.replace("/", "\\/"), CANARY.replace("/", "\\u002F")])
def test_a_key_within_an_answer_is_taken_out(server, slept, run, spelled):
    """If it failed, a server that repeats its headers in an answer would put the key into the data set."""
    server.faults = [status(200, text=answer("my key is CANARY.").replace("CANARY", spelled))]
    assert run.one(server.base_url, slept=slept, api_key=CANARY).completion == "my key is [key]."
    pieces = [{"content": "my key is "}, {"content": CANARY[:7]}, {"content": CANARY[7:]}]
    server.faults = [streams(*events(*pieces))]
    assert run.one(server.base_url, slept=slept, api_key=CANARY, stream=True).completion == "my key is [key]"
    _assert_in_no_file(run.folder)


@pytest.mark.parametrize("placeholder", ["none", "EMPTY", "token"])
def test_a_placeholder_in_the_place_of_a_key_changes_no_answer(server, slept, run, placeholder):
    """If it failed, "none of these" would be stored as "[key] of these", because a local server asks for no key."""
    server.faults = [status(200, text=answer(f"{placeholder} of these"))]
    assert run.one(server.base_url, slept=slept, api_key=placeholder).completion == f"{placeholder} of these"


def test_the_client_itself_does_not_show_its_key(server, run):
    """If it failed, a debugger's or a test's picture of the client would hold the key, or a pickle carry it to another node."""

    async def drive():
        async with run.client(server.base_url, api_key=CANARY) as client:
            assert repr(client) == f"ChatClient('tiny' at ['{server.base_url}'])"
            with pytest.raises(TypeError, match="does not leave its process"):
                pickle.dumps(client)

    asyncio.run(drive())


@pytest.mark.parametrize("value", [f"{CANARY} {CANARY}", f"{CANARY}\nX-Other: 1", f"{CANARY}\u2019", f"{CANARY}\x00"])
def test_what_cannot_be_a_key_is_refused_unseen(value, monkeypatch, tmp_path):
    """If it failed, the HTTP library's complaint would quote the key in full."""
    # Not through the process' environment where it cannot hold the value.
    monkeypatch.setattr(os, "environ", {**os.environ, KEY_VARIABLE: value})
    (tmp_path / "key").write_text(value)
    with pytest.raises(TeacherError, match=f"{KEY_VARIABLE} holds what cannot be a key") as from_environment:
        key_from_environment(KEY_VARIABLE, base_url="https://host/v1")
    with pytest.raises(TeacherError, match="key holds what cannot be a key") as from_file:
        key_from_file(tmp_path / "key", base_url="https://host/v1")
    with pytest.raises(TeacherError, match="api_key holds what cannot be a key") as from_caller:
        ChatClient(Endpoints(), "tiny", ledger=None, api_key=value)
    for caught in (from_environment, from_file, from_caller):
        _assert_unseen(caught.value)


def test_keys_come_from_the_environment_or_a_file(monkeypatch, tmp_path):
    """If it failed, a mounted secret, which often ends in a newline, would be sent as a broken header."""
    monkeypatch.setenv(KEY_VARIABLE, f"{CANARY}\n")
    (tmp_path / "key").write_text(f" {CANARY}\r\n")
    assert key_from_environment(KEY_VARIABLE, base_url="https://host/v1") == CANARY
    assert key_from_file(tmp_path / "key", base_url="https://host/v1") == CANARY


def test_a_missing_key_names_where_it_should_be(monkeypatch, tmp_path):
    """If it failed, a user would learn of the missing key from a 401 on another machine."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with pytest.raises(TeacherError, match=f"{KEY_VARIABLE} is not set") as caught:
        key_from_environment(KEY_VARIABLE, base_url="https://host/v1")
    assert caught.value.exit_code == 4
    with pytest.raises(TeacherError, match=r"nowhere cannot be read: No such file"):
        key_from_file(tmp_path / "nowhere", base_url="https://host/v1")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(TeacherError, match="empty is empty"):
        key_from_file(tmp_path / "empty", base_url="https://host/v1")


def _assert_unseen(error: BaseException) -> None:
    assert CANARY not in "".join(traceback.format_exception(error))
    assert CANARY.encode() not in pickle.dumps(error)  # what Ray sends
    while error:
        # Not its first half either, where a text was cut short.
        assert CANARY[:9] not in f"{error} {error!r} {error.args}"
        error = error.__cause__ or error.__context__


def _assert_in_no_file(folder: Path) -> None:
    core = CANARY.rpartition("/")[2].encode()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = str(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else path.read_bytes()
        assert core not in content, path
