"""Manifests: what seals a folder, and what is said when the seal is broken."""

import hashlib
import json

import pytest

from stillhouse.pipeline.errors import ExitCode, IntegrityError
from stillhouse.pipeline.manifest import read_manifest, strict_json, verify_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "deep" / "b.json").write_text("{}")
    return tmp_path


def test_manifest_names_every_file_and_itself(folder):
    """A file could be exchanged, or a checkpoint could not be told from another, without anyone seeing."""
    name = write_manifest(folder, kind="checkpoint", extra={"seed": 7})
    content = read_manifest(folder)
    assert name == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    assert content["files"] == {
        "a.txt": {"sha256": hashlib.sha256(b"first").hexdigest(), "size_bytes": 5},
        "deep/b.json": {"sha256": hashlib.sha256(b"{}").hexdigest(), "size_bytes": 2},
    }
    assert (content["schema_version"], content["kind"], content["provenance"]) == (1, "checkpoint", {"seed": 7})
    assert verify_manifest(folder) == []


def test_same_content_gives_the_same_manifest(folder):
    """The same run twice would give two names to one checkpoint."""
    first = write_manifest(folder, kind="checkpoint", extra={"b": 1, "a": 2})
    (folder / ".manifest.json.99.tmp").write_text("left by a writer that was killed")
    assert write_manifest(folder, kind="checkpoint", extra={"a": 2, "b": 1}) == first
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "deep", "manifest.json"]
    (folder / "a.txt").write_text("other")
    assert write_manifest(folder, kind="checkpoint", extra={"a": 2, "b": 1}) != first


def test_each_difference_is_told_apart(folder):
    """A user would be told "corrupt" and not which file, nor whether it is missing, foreign or changed."""
    (folder / "c.txt").write_text("third")
    write_manifest(folder, kind="checkpoint", extra={})
    (folder / "a.txt").write_text("fIrst")
    (folder / "c.txt").write_text("thirds")
    (folder / "deep" / "b.json").unlink()
    (folder / "deep" / "new.bin").write_bytes(b"x")
    missing, extra, changed, longer = verify_manifest(folder)
    assert missing == "deep/b.json: the manifest lists it and the folder lacks it"
    assert extra == "deep/new.bin: in the folder and not in the manifest"
    expected, actual = hashlib.sha256(b"first").hexdigest(), hashlib.sha256(b"fIrst").hexdigest()
    assert changed == f"a.txt: changed, sha256 {expected} by the manifest, {actual} on disk"
    assert longer == "c.txt: changed, 5 bytes by the manifest, 6 on disk"


def test_links_are_not_sealed(folder, tmp_path_factory):
    """A checkpoint would vouch for a file that is not in it."""
    outside = tmp_path_factory.mktemp("outside") / "secret.txt"
    outside.write_text("first")
    write_manifest(folder, kind="checkpoint", extra={})
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(outside)
    assert verify_manifest(folder) == ["a.txt: not a regular file"]
    with pytest.raises(ValueError, match=r"a\.txt is not a regular file"):
        write_manifest(folder, kind="checkpoint", extra={})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is missing: the folder was never finished"),
        ("{", "cannot be read"),
        ("[]", "expected a JSON object, got a list"),
        ("null", "expected a JSON object, got null"),
        ('{"schema_version": 9}', "has schema_version 9; this version reads 1"),
        ('{"schema_version": 1, "kind": "x", "provenance": {}}', "needs the mapping 'files'"),
        ('{"schema_version": 1, "files": {}}', "needs the text 'kind'"),
        ('{"schema_version": 1, "kind": "x", "provenance": {}, "files": {"a": {}}}', "the entry of 'a' needs sha256"),
        ('{"schema_version": 1, "kind": "x", "provenance": {}, "files": {}}', "was changed after it was written"),
        ('{"schema_version": 1, "schema_version": 1}', "the key 'schema_version' occurs twice"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_an_unreadable_manifest_is_an_integrity_error(folder, text, says):
    """A half-written folder would pass, or end in a traceback."""
    if text is not None:
        (folder / "manifest.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"manifest\.json") as raised:
        read_manifest(folder)
    assert says in str(raised.value)
    assert raised.value.exit_code == ExitCode.INTEGRITY


def test_any_flipped_bit_in_the_manifest_shows(folder):
    """The seed or the commit that a checkpoint claims could change without a trace."""
    write_manifest(
        folder, kind="checkpoint", extra={"seed": 7, "commit": "0123abcd", "sizes": {10: "ten", 9: "nine"}, "pair": (1, 2)}
    )
    path = folder / "manifest.json"
    raw = path.read_bytes()
    assert verify_manifest(folder) == []
    for position in range(0, len(raw), 5):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 0x01]) + raw[position + 1 :])
        try:
            content = read_manifest(folder)
        except IntegrityError:
            continue
        assert raw[position : position + 1].isspace(), f"byte {position} changed {content} unseen"


def test_provenance_has_to_be_json(folder):
    """A manifest would be written that no other program can read."""
    for extra in ({"loss": float("nan")}, {"when": object()}):
        with pytest.raises(ValueError, match="has to be JSON values"):
            write_manifest(folder, kind="checkpoint", extra=extra)
    assert not (folder / "manifest.json").exists()


def test_strict_json_has_one_reading():
    """Two programs would read two different values from one file."""
    assert strict_json(json.dumps({"a": [1, 2.5, None]}).encode()) == {"a": [1, 2.5, None]}
    for raw, says in ((b'{"a": 1, "a": 2}', "'a' occurs twice"), (b"[NaN]", "NaN is not JSON"), (b'"\xff"', "utf-8")):
        with pytest.raises(ValueError, match=says):
            strict_json(raw)
