"""The spool's file: one process at a time, a layout that is known, a sound file, a local disk, and what a full one does."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.pipeline.errors import IntegrityError, SpoolError
from stillhouse.pipeline.trace_store.sealing import SpoolReader
from stillhouse.pipeline.trace_store.spool import FILE_NAME, Spool
from stillhouse.pipeline.trace_store.spool_lock import file_system_of, refuse_network_disk


def test_a_second_writer_is_told_which_process_has_the_spool(tmp_path):
    """Two runs over one spool would mix their calls; the message has to say what to stop."""
    first = Spool(tmp_path)
    with pytest.raises(SpoolError, match=rf"open in process {os.getpid()} of this machine"):
        Spool(tmp_path)
    first.close()
    again = Spool(tmp_path)
    assert again.writer == first.writer
    again.close()


@pytest.mark.parametrize(("version", "age"), [(99, "a newer"), (-1, "an older")])
def test_a_spool_of_another_version_is_left_alone(tmp_path, version, age):
    """Reading an unknown layout could lose answers that were paid for."""
    Spool(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    with pytest.raises(SpoolError, match=f"it is of {age} version"):
        Spool(tmp_path)


def test_a_spool_that_is_no_database_is_an_integrity_error(tmp_path):
    """A damaged file must be named, with what to do, and never be replaced by an empty one."""
    damaged = b"not a database" * 4096
    (tmp_path / FILE_NAME).write_bytes(damaged)
    with pytest.raises(IntegrityError, match="not a sound SQLite file"):
        Spool(tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == damaged


def test_a_spool_on_a_network_disk_is_refused(tmp_path):
    """SQLite's log loses data on NFS: better no run than one that seems to work."""
    mounts = f"/dev/vda / ext4 rw 0 0\nserver:/x {tmp_path}/nfs nfs4 rw 0 0\ns3 {tmp_path}/b\\040b fuse.s3fs rw 0 0\n"
    assert file_system_of(tmp_path, mounts) == "ext4"
    refuse_network_disk(tmp_path, mounts)
    for name, kind in (("nfs", "nfs4"), ("b b", "fuse.s3fs")):
        with pytest.raises(SpoolError, match=rf"network file system \({kind}\)"):
            refuse_network_disk(tmp_path / name / "run", mounts)


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from test_trace_writer import *
writer = open_writer(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
acknowledged = []
try:
    for start in range(0, 2000, 20):
        ids = begin(writer, *range(start, start + 20))
        futures = [writer.answered(call, answer("x" * 3000)) for call in ids]
        wait(futures, timeout=30)
        assert all(future.done() for future in futures), "somebody waits for ever"
        acknowledged += [start + i for i, future in enumerate(futures) if future.exception() is None]
        futures[-1].result()
except StillhouseError as error:
    print(json.dumps(acknowledged), error)
try:
    begin(writer, 5000)
except StillhouseError as error:
    print("refused", error)
try:
    writer.close()
except StillhouseError as error:
    print("closed", error)
"""


def test_a_full_disk_is_said_and_loses_nothing_acknowledged(tmp_path):
    """A run that goes on after its disk is full pays for answers that nobody keeps. (A file size limit stands for the disk.)"""
    program = FULL_DISK.format(tests=str(Path(__file__).parent))
    result = subprocess.run([sys.executable, "-c", program, tmp_path], timeout=60, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, refused, closed = result.stdout.splitlines()
    acknowledged = json.loads(first[: first.index("]") + 1])
    assert 10 < len(acknowledged) < 2000
    for line in (first, refused, closed):
        assert "could not be written" in line
        assert "Nothing that was acknowledged is lost" in line
    with contextlib.closing(Spool(tmp_path / "spool")) as spool:
        kept = {call.key for call in spool.open_calls() if call.raw is not None}
    with contextlib.closing(SpoolReader(tmp_path / "spool" / FILE_NAME)) as reader:
        kept.update(reader.keys())
    assert kept >= {hashlib.sha256(str(number).encode()).hexdigest() for number in acknowledged}
