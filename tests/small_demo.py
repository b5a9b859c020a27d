"""The command as a user calls it, and the demo recipe made small enough for a test."""

from __future__ import annotations

import sys
from pathlib import Path

SMALL_DEMO = (
    *(f"problems.train.{family}.size=16" for family in range(3)),
    *(f"problems.validation.{family}.size=2" for family in range(3)),
    *(f"problems.test.{family}.size=6" for family in range(3)),
    "teacher.batch_size=16",
    "teacher.samples_per_problem=2",
    "train.num_steps=12",
    "train.tokens_per_step=1024",
    "train.save_steps=4",
    "gate.teacher_problems=6",
    "gate.max_new_tokens=96",
    "gate.min_accuracy=null",
    "gate.min_family_accuracy=null",
    "gate.min_student_ratio=null",
    "gate.min_gain=null",
    "gate.max_drop=null",
    "gate.min_think_closed=null",
    "gate.max_kernel_difference=0.5",
    "gate.min_same_verdict=null",
    "cluster.cpus_per_train_worker=1",
    "cluster.object_store_mb=100",
)
"""The demo recipe with everything made small; its gate asks for nothing that twelve steps cannot give."""


def command(*arguments: str) -> list[str]:
    """``stillhouse`` with arguments, through this very Python."""
    return [sys.executable, "-m", "stillhouse.jobs.cli.main", *arguments]


def small_demo(out: Path, *extra: str, verb: str = "run") -> list[str]:
    """The small demo as a command line; ``extra`` are further ``--set`` values."""
    settings = [part for value in (*SMALL_DEMO, *extra) for part in ("--set", value)]
    return command(verb, "demo", "--out", str(out), *settings)
