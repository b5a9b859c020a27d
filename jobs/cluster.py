"""Ray: start a local one or join a cluster, and turn what its processes raise back into what they meant.

Only ``jobs`` imports ray, and only here and in the files beside it that put work on it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stillhouse.jobs.environment import settle_environment, worker_environment
from stillhouse.pipeline.errors import ClusterError, StillhouseError, first_line

CONNECT_TIMEOUT_S = 10.0
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the process of a submitted job."""
OBJECT_STORE_MB = 256
"""Shared memory of a local Ray unless the recipe says otherwise: traces are text, and small."""


@contextmanager
def ray_session(address: str | None, *, object_store_mb: int | None = None, num_cpus: float | None = None) -> Iterator[Any]:
    """Ray for the time of a run: the cluster at ``address``, or a local one that ends with the block.

    Args:
        address: ``None`` starts a local Ray with this machine's cores; ``auto`` or ``host:port`` joins a cluster.
        object_store_mb: shared memory of a local Ray, MiB.
        num_cpus: cores that a local Ray may hand out; a recipe whose actors ask for more than the machine has gets them
            time-sliced rather than never.

    Raises:
        ClusterError: there is no Ray at that address.
    """
    settle_environment()
    if address is not None:
        use_token()
    import ray

    already = ray.is_initialized()
    if not already:
        settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "stillhouse"}
        if address is None:
            # Without "local", Ray joins whatever cluster it finds on this machine.
            settings["address"] = "local"
            settings["num_cpus"] = max(num_cpus or 0, os.cpu_count() or 1)
            settings["include_dashboard"] = False
            settings["object_store_memory"] = (object_store_mb or OBJECT_STORE_MB) << 20
        else:
            _require_answer(address)
            settings["address"] = address
            if IN_A_JOB not in os.environ:  # a submitted job brought these variables along, and Ray refuses them twice
                settings["runtime_env"] = {"env_vars": worker_environment()}
        try:
            ray.init(**settings)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
            where = "a local Ray could not be started" if address is None else f"there is no Ray cluster at {address!r}"
            raise ClusterError(
                f"{where} ({first_line(error)}); start one with `ray start --head`, or leave --address away for a local run"
            ) from error
    try:
        yield ray
    finally:
        if not already:
            ray.shutdown()


def use_token() -> None:
    """Present Ray's token where this machine has one; has to come before ray is imported.

    ``ray start`` demands the token as soon as one lies under HOME (a local Ray puts it there), but a driver that joins does
    not send it unasked.
    """
    names = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if any(os.environ.get(name) for name in names) or Path("~/.ray/auth_token").expanduser().is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _require_answer(address: str) -> None:
    """Refuse a host and port where nothing listens at once: Ray itself would look for many minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto" and the like are Ray's to find
    try:
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"nothing answers at {address!r} ({first_line(error)}); give the address that `ray start --head` printed, or "
            "leave --address away for a local run"
        ) from error


def meant_error(error: BaseException) -> StillhouseError:
    """What a failure on a worker means to the user: the StillhouseError inside it, or a ClusterError that names it."""
    seen: set[int] = set()
    waiting: list[BaseException] = [error]
    deepest = error
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        # Ray raises a class made on the fly that is both its own and the cause's: the cause itself reads better.
        cause = getattr(current, "cause", None)
        if isinstance(cause, BaseException):
            waiting.insert(0, cause)
        elif isinstance(current, StillhouseError):
            return current
        else:
            deepest = current
        failures = getattr(current, "worker_failures", None)
        if isinstance(failures, dict):
            waiting += [failure for failure in failures.values() if isinstance(failure, BaseException)]
        waiting += [inner for inner in (current.__cause__, current.__context__) if inner is not None]
    return ClusterError(
        f"a Ray worker failed: {type(deepest).__name__}: {first_line(deepest)}; what is committed stays, the same command "
        "goes on from there, and Ray's logs say more (a local Ray's are in session_latest/logs of its temporary folder)"
    )
