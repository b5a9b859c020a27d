"""Where an endpoint's key comes from: an environment variable or a file, never a recipe or a flag."""

from __future__ import annotations

import os
import re
from pathlib import Path

from stillhouse.pipeline.errors import TeacherError


def key_from_environment(variable: str, *, base_url: str) -> str:
    """The key in an environment variable.

    Raises:
        TeacherError: the variable is not set, or holds what cannot be a key; never quotes it.
    """
    key = os.environ.get(variable, "").strip()  # a mounted secret often ends in a newline
    if not key:
        raise TeacherError(
            f"the endpoint {base_url} needs a key and the environment variable {variable} is not set; export it where the run "
            "starts (a submitted job: in the environment of `ray start`)"
        )
    return checked_key(key, f"the environment variable {variable}")


def key_from_file(path: Path, *, base_url: str) -> str:
    """The key that is all there is in a file, as a mounted secret has it.

    Raises:
        TeacherError: the file cannot be read, or holds what cannot be a key; never quotes it.
    """
    try:
        key = path.read_bytes().decode("utf-8", "replace").strip()
    except OSError as error:
        raise TeacherError(f"the endpoint {base_url} needs a key and {path} cannot be read: {error.strerror}") from error
    if not key:
        raise TeacherError(f"the endpoint {base_url} needs a key and {path} is empty")
    return checked_key(key, str(path))


def checked_key(key: str, where: str) -> str:
    """``key`` itself, if it can stand in a header. TeacherError otherwise: an HTTP library would quote it in full."""
    if not key.isascii() or not key.isprintable() or " " in key:
        raise TeacherError(
            f"{where} holds what cannot be a key: it has blanks, line ends or characters beyond ASCII in it; give the key alone"
        )
    return key


MIN_SECRET_CHARACTERS = 12
"""A shorter key is no secret but a placeholder (``none``, ``EMPTY``), and may well be a word of an answer."""


class KeyEraser:
    """Takes a key out of what an endpoint said: some servers repeat it in their refusals, or even in an answer.

    Also where JSON writes ``/``, ``+`` or ``=`` in it as an escape.
    """

    def __init__(self, key: str):
        self._core = max(re.findall(r"[A-Za-z0-9]+", key), key=len, default=key).encode()
        self._pattern = re.compile(b"".join(_spellings(character) for character in key))

    def __call__(self, said: bytes) -> bytes:
        if not self._core or self._core not in said:  # quick, for the millions of answers without it
            return said
        return self._pattern.sub(b"[key]", said)


def _spellings(character: str) -> bytes:
    plain = re.escape(character.encode())
    if character.isalnum():
        return plain
    return b"(?:%s|\\\\%s|\\\\u(?i:%04x))" % (plain, plain, ord(character))
