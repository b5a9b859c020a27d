"""Commands about teachers: the known ones, and a server that breaks on purpose."""

from __future__ import annotations

import json

import typer

from stillhouse.jobs.cli.say import JsonOption, say
from stillhouse.pipeline.errors import ExitCode


def list_teachers(as_json: JsonOption = False) -> int:
    """List the known teachers and their published settings.

    A recipe with one of them as teacher.model or teacher.like takes these settings where it gives none.
    """
    from dataclasses import asdict

    from stillhouse.teachers.known import known_teachers

    found = known_teachers()
    if as_json:
        say(json.dumps([asdict(teacher) for teacher in found], indent=2))
        return int(ExitCode.PASS)
    width = max(len(teacher.name) for teacher in found)
    for teacher in found:
        sampling = teacher.settings()["sampling"]
        drawn = ", ".join(f"{name} {value}" for name, value in sampling.items())
        size = f"{teacher.total_params:g} B" + (
            f" ({teacher.active_params:g} B active)" if teacher.active_params != teacher.total_params else ""
        )
        think = "the prompt opens <think>" if teacher.opens_think else "it opens its reasoning itself"
        say(f"{teacher.name:{width}}  {size}; {drawn}; {think}; {teacher.license}")
    say("\nSources of each value: stillhouse teachers --json")
    return int(ExitCode.PASS)


def fault_server(context: typer.Context) -> int:
    """Serve a chat endpoint that breaks on purpose.

    For drills. Without --upstream it makes its answers up; with it, it stands before a real one. All options: --help.
    """
    from stillhouse.teachers.fault_server import main

    main(context.args)
    return int(ExitCode.PASS)
