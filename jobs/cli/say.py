"""Data on stdout: what every command of the command line prints its results with."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]


def say(text: str) -> None:
    """Print to stdout; a reader that has gone (``| head``) must not turn a passed gate into a failed one."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
