"""Environment variables that every process of a run should have, unless the user set them otherwise."""

from __future__ import annotations

import os

from stillhouse.pipeline.sandbox.choice import VARIABLE as SANDBOX_VARIABLE
from stillhouse.pipeline.sandbox.packages import VARIABLE as PACKAGES_VARIABLE

PROCESS_ENVIRONMENT = {
    # A thread that waits for its neighbours sleeps. By default libgomp's spin, and on a machine that anyone else uses that
    # is ruinous: the demo's training step went from 0.3 s to 8.4 s beside one busy process, with PASSIVE to 0.5 s.
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
}


def settle_environment() -> None:
    """Set what the user has not; has to come before torch is imported and before a local Ray is started."""
    for name, value in PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def worker_environment() -> dict[str, str]:
    """The same variables as they stand here, and where and with what programs may run, for workers of somebody else's Ray."""
    chosen = {name: os.environ[name] for name in (SANDBOX_VARIABLE, PACKAGES_VARIABLE) if name in os.environ}
    return {name: os.environ.get(name, value) for name, value in PROCESS_ENVIRONMENT.items()} | chosen
