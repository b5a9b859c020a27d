"""The trace store in a bucket: a real S3-compatible server, with conditional PUT and without."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import fsspec
import pytest

from stillhouse.pipeline.trace_store.checks import collect_garbage, verify_store
from stillhouse.pipeline.trace_store.exporting import export
from stillhouse.pipeline.trace_store.folder import StorageError, open_folder
from stillhouse.pipeline.trace_store.store import TraceStore
from stillhouse.pipeline.trace_store.summary import summarize
from stillhouse.pipeline.trace_store.totals import Totals
from tests.s3_server import S3Proxy, running_proxy, running_s3
from tests.stored_traces import add_traces, commit_traces, some_trace

CANARY = "canary-3f9d1c-secret"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def s3_port():
    with running_s3() as port:
        yield port


both_kinds = pytest.mark.parametrize("proxy", [True, False], ids=["conditional", "unconditional"], indirect=True)


@pytest.fixture
def proxy(request, s3_port, monkeypatch):
    """A server whose PUT can, or cannot, refuse to write over something; the environment points at it."""
    with running_proxy(s3_port, conditional=getattr(request, "param", True)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield proxy


@pytest.fixture
def url(proxy) -> str:
    """An empty bucket's folder."""
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    return f"s3://{bucket}/my/traces"


@both_kinds
def test_the_probe_finds_out_what_the_server_does(proxy: S3Proxy, url: str):
    """A writer that trusts a server to refuse, which does not, writes over another's commit."""
    folder = open_folder(url)
    assert folder.exclusive is proxy.conditional
    assert folder.list("commits") == []
    if proxy.conditional:
        assert folder.create("commits/1", b"mine")
        assert not folder.create("commits/1", b"theirs")
        assert folder.read("commits/1") == b"mine"


@both_kinds
def test_traces_come_back_from_a_bucket(proxy: S3Proxy, url: str, tmp_path):
    """The same store as on a disk: written, read, counted, checked and exported."""
    reader = TraceStore(url)
    assert (reader.commits(), list(reader.traces()), TraceStore.exists(url)) == ([], [], False)
    writer = TraceStore(url)
    for first in (0, 8):
        commit_traces(writer, [some_trace(number) for number in range(first, first + 10)], tmp_path, writer="a", calls=1)
        assert reader.num_rows == (10 if first == 0 else 20)  # seen at once
    expected = [some_trace(number) for number in range(18)]
    assert list(reader.traces()) == expected
    assert list(reader.traces({expected[3].key, expected[17].key})) == [expected[3], expected[17]]
    assert reader.keys().contains([trace.key for trace in expected]).all()
    assert verify_store(url).problems == ()
    assert summarize(url).by_finish_reason == {"stop": 18}
    assert export(url, tmp_path / "all.jsonl", format="jsonl") == 18
    names = ["commits/0000000001.json", "commits/0000000002.json"]
    assert reader.commit_names() == (names if proxy.conditional else [name.replace(".json", "-a.json") for name in names])


def check_two_writers(url: str, scratch: Path, num_commits: int) -> None:
    """Two writers that commit at the same moments."""
    together = threading.Barrier(2)

    def write(writer: str, first: int) -> None:
        store = TraceStore(url)
        for number in range(first, first + num_commits):
            entry = add_traces(store, [some_trace(number)], scratch)
            together.wait(timeout=60)
            store.commit(writer=writer, shards=[entry], calls=[], totals=Totals(num_calls=number - first + 1))

    threads = [threading.Thread(target=write, args=("a", 0)), threading.Thread(target=write, args=("b", 1000))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = TraceStore(url)
    assert len(store.commits()) == 2 * num_commits
    expected = {some_trace(first + number).key for first in (0, 1000) for number in range(num_commits)}
    assert {trace.key for trace in store.traces()} == expected
    assert store.totals() == Totals(num_calls=2 * num_commits)
    assert verify_store(url).problems == ()


@both_kinds
def test_two_writers_lose_nothing(url: str, tmp_path):
    """Two drivers that seal at the same moment: a commit written over is a shard of paid traces that nobody sees."""
    check_two_writers(url, tmp_path, 5)


@pytest.mark.slow
@both_kinds
def test_two_writers_lose_nothing_for_long(url: str, tmp_path):
    """As above, fifty commits each."""
    check_two_writers(url, tmp_path, 50)


def test_a_lost_reply_does_not_commit_twice(proxy: S3Proxy, url: str, tmp_path):
    """The PUT went through and its reply did not: the client asks again and is told that the name is taken, by itself."""
    store = TraceStore(url)
    commit_traces(store, [some_trace(0)], tmp_path, calls=1)
    proxy.lose_replies = 1
    commit_traces(store, [some_trace(1)], tmp_path, calls=2)
    assert [commit.seq for commit in TraceStore(url).commits()] == [1, 2]
    assert list(TraceStore(url).traces()) == [some_trace(0), some_trace(1)]


def test_a_writer_killed_before_its_commit_leaves_only_garbage(url: str, tmp_path):
    """What it had put there is sealed again later; seen twice it would be trained on twice."""
    commit_traces(TraceStore(url), [some_trace(0)], tmp_path)
    code = f"""
import os
from pathlib import Path
from stillhouse.pipeline.trace_store.store import TraceStore
from tests.stored_traces import add_traces, some_trace
add_traces(TraceStore({url!r}), [some_trace(1)], Path({str(tmp_path)!r}))
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 9
    folder = open_folder(url)
    assert len(folder.list("shards")) == 2
    assert list(TraceStore(url).traces()) == [some_trace(0)]
    assert verify_store(url).problems == ()
    assert collect_garbage(url) == []
    [left] = collect_garbage(url, older_than_s=-5)
    assert left.startswith("shards/part-")
    assert list(TraceStore(url).traces()) == [some_trace(0)]
    assert len(folder.list("shards")) == 1


@pytest.mark.slow
def test_a_large_shard_goes_up_in_parts(url: str, tmp_path):
    """A seal's shard is larger than one PUT of the client library."""
    folder = open_folder(url)
    data = os.urandom(1 << 20) * 101
    (tmp_path / "big").write_bytes(data)
    folder.write_file("shards/big", tmp_path / "big")
    assert folder.size("shards/big") == len(data)
    with folder.open("shards/big") as file:
        file.seek(100 << 20)
        assert file.read() == data[100 << 20 :]


def test_a_server_without_conditions_is_found_out(s3_port, proxy: S3Proxy, url: str, tmp_path):
    """Some S3-compatible servers answer 501 to a condition: names with the writer in them serve there, too."""
    proxy.refuse_conditions = True
    commit_traces(TraceStore(url), [some_trace(0)], tmp_path, writer="a")
    assert TraceStore(url).commit_names() == ["commits/0000000001-a.json"]


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("no bucket", "there is no such bucket"),
        ("403", "access is denied"),
        ("refused", "Could not connect to the endpoint URL"),
        ("no keys", "Unable to locate credentials"),
    ],
)
def test_trouble_is_one_sentence_and_exit_code_4(proxy: S3Proxy, url: str, monkeypatch, trouble, said):
    """A traceback of forty lines through three libraries hides which of bucket, key or address is wrong."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    if trouble == "no bucket":
        url = "s3://no-such-bucket-here/traces"
    elif trouble == "403":
        proxy.refuse = (403, "AccessDenied", "Access Denied")
    elif trouble == "refused":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    else:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", "nowhere")
    with pytest.raises(StorageError, match=said) as caught:
        TraceStore(url)
    assert str(caught.value).startswith(f"{url}/store.json cannot be read: ")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    with pytest.raises(StorageError, match=said):
        open_folder(url).write("shards/x", b"x")
    with pytest.raises(StorageError, match=said):
        open_folder(url).list("commits")


def test_the_secret_key_is_nowhere(proxy: S3Proxy, url: str, tmp_path):
    """A key in a file, a message or a listing is a key that has to be changed."""
    store = TraceStore(url)
    commit_traces(store, [some_trace(0)], tmp_path)
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    contents = files.cat(files.find(url))
    assert len(contents) == 3
    assert not any(CANARY.encode() in data for data in contents.values())
    proxy.refuse = (403, "SignatureDoesNotMatch", "The request signature we calculated does not match")
    command = [sys.executable, "-m", "stillhouse.jobs.cli.main", "traces", "verify", url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (4, "", 1)
    assert CANARY not in done.stderr + repr(store.folder) + repr(vars(store))
