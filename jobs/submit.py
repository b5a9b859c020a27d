"""Send a run to a Ray cluster as a job: our package, the resolved recipe, its files and the team's own modules travel along.

The cluster's Python needs the dependencies (the machine image or a container has them) and not Stillhouse itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from stillhouse.jobs.cluster import use_token
from stillhouse.jobs.environment import worker_environment
from stillhouse.jobs.own_code import modules_of
from stillhouse.jobs.recipe import Recipe
from stillhouse.jobs.recipe_problems import FileSource
from stillhouse.jobs.recipe_teacher import ReplayTeacher
from stillhouse.pipeline.errors import ClusterError, ExitCode, RecipeError, first_line

# How Ray's dashboard answers where no node's agent is up, and how long to wait for one.
NO_AGENT = "No available agent"
PATIENCE_S = 120
NOT_SENT = (".git", ".venv", "runs", "build", "dist", "tests", "*.egg-info", "__pycache__", "*.parquet")


def submit(recipe: Recipe, *, address: str, out: str, follow: bool, show: Callable[[str], Any]) -> tuple[str, int]:
    """Start ``stillhouse run`` on a cluster.

    Args:
        address: of the cluster's dashboard, for example ``http://127.0.0.1:8265``. A token, where the cluster asks for one,
            comes from ``RAY_AUTH_TOKEN``.
        out: the run's folder as the cluster's nodes see it: an absolute path on storage that they share.
        follow: stay, hand the job's output to ``show``, and return the job's own exit code.

    Returns:
        the job's id, and its exit code (0 at once where not followed).

    Raises:
        RecipeError: ``out`` is relative.
        ClusterError: there is no cluster at the address, or the job ended without an exit code.
    """
    if not Path(out).is_absolute():
        raise RecipeError(
            f"--out {out!r} is relative to this machine's working folder; a job needs an absolute path that every node of "
            "the cluster sees, for example a shared file system's"
        )
    if not address.startswith(("http://", "https://")):
        raise RecipeError(
            f"--address {address!r} has to be the dashboard's and start with http://, for example http://{address}"
        )
    use_token()
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # Ray would send the job there instead of where the user said
    logging.getLogger("ray").setLevel(logging.WARNING)
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(
            f"no Ray dashboard answers at {address!r} ({first_line(error)}); give the address that `ray start --head` "
            "printed, and RAY_AUTH_TOKEN where the cluster asks for a token"
        ) from error
    # Ray refuses an id that was used before, and a run may be submitted again to go on: each attempt has its own.
    job_id = f"stillhouse-{recipe.name}-{secrets.token_hex(4)}"
    with _parcel(recipe) as (modules, folder):
        command = ["python", "-m", "stillhouse.jobs.cli.main", "run", "recipe.yaml", "--out", out, "--address", "auto"]
        job = {
            "submission_id": job_id,
            "entrypoint": shlex.join(command),
            "runtime_env": {
                "working_dir": str(folder),
                "py_modules": [str(module) for module in modules],
                "env_vars": worker_environment() | {"PYTHONUNBUFFERED": "1"},
            },
            "metadata": {"recipe": recipe.name, "out": out},
        }
        try:
            _hand_over(client, job, show)
        except (ConnectionError, RuntimeError) as error:
            hint = ""
            if NO_AGENT in str(error):
                hint = (
                    ". The agent of the head node does not answer: where another Ray runs on that machine, start this one with "
                    "`ray start --head --dashboard-agent-listen-port=PORT` and a port that is free"
                )
            raise ClusterError(f"the cluster at {address!r} refused the job ({first_line(error)}){hint}") from error
    if not follow:
        return job_id, int(ExitCode.PASS)
    try:
        asyncio.run(_follow(client, job_id, show))
    except KeyboardInterrupt as error:
        raise ClusterError(
            f"no longer following, and the job goes on; look at it with `ray job logs --address {address} --follow {job_id}` "
            f"or end it with `ray job stop --address {address} {job_id}`"
        ) from error
    return job_id, exit_code_of(client, job_id)


def _hand_over(
    client: Any, job: dict[str, Any], show: Callable[[str], Any], *, patience_s: float = PATIENCE_S, pause_s: float = 1
) -> None:
    """Submit the job; wait while the cluster has no agent that takes it, as in the first seconds after its start.

    Raises:
        RuntimeError: what Ray raises, also where ``patience_s`` seconds have passed without an agent.
    """
    give_up = time.monotonic() + patience_s
    told = False
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            # Asking again starts nothing twice: the job's id is taken by the first that gets through.
            if NO_AGENT not in str(error) or time.monotonic() > give_up:
                raise
        if not told:
            show(f"stillhouse: the cluster has no agent yet that takes jobs; trying again for {patience_s:.0f} s\n")
            told = True
        time.sleep(pause_s)


async def _follow(client: Any, job_id: str, show: Callable[[str], Any]) -> None:
    async for lines in client.tail_job_logs(job_id):
        show(lines)


def exit_code_of(client: Any, job_id: str) -> int:
    """The exit code of the job's own process, which ``ray job submit`` flattens to 0 or 1.

    Raises:
        ClusterError: the job never got as far as having one.
    """
    info = client.get_job_info(job_id)
    if info.driver_exit_code is not None:
        return info.driver_exit_code
    if str(info.status) == "STOPPED":
        return int(ExitCode.INTERRUPTED)
    raise ClusterError(f"job {job_id} ended as {info.status} without an exit code: {info.message or 'no message'}")


@contextmanager
def _parcel(recipe: Recipe) -> Iterator[tuple[list[Path], Path]]:
    """What travels: our wheel unpacked (modules and metadata), and a folder with the recipe and its problem files."""
    with tempfile.TemporaryDirectory(prefix="stillhouse-submit-") as temporary:
        root = Path(temporary)
        wheel = make_wheel(root / "wheel")
        unpacked = root / "unpacked"
        # Ray would install a wheel together with its dependencies, torch among them; unpacked it is just put on the path.
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        folder = root / "job"
        folder.mkdir()
        (folder / "recipe.yaml").write_text(with_files(recipe, folder).to_yaml())
        for module in modules_of(recipe):
            copy = shutil.copytree if module.is_dir() else shutil.copy2
            copy(module, folder / module.name)
        yield sorted(path for path in unpacked.iterdir() if path.is_dir()), folder


def with_files(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the local files that it reads copied into ``folder`` and named relative to it."""
    data = recipe.model_dump()

    def sent(path: str, place: str) -> str:
        # In a folder of its own and under its own name, which the report groups problems by.
        name = f"{place}/{Path(path).name}"
        (folder / place).mkdir()
        (folder / name).write_bytes(Path(path).read_bytes())
        return name

    for number, named in enumerate(data["filters"]["evaluation_sets"]):
        if Path(named["name"]).is_file():
            named["name"] = sent(named["name"], f"evaluation-{number}")
    if isinstance(recipe.teacher, ReplayTeacher) and recipe.teacher.path and Path(recipe.teacher.path).is_file():
        data["teacher"]["path"] = sent(recipe.teacher.path, "traces")
    for split in ("train", "validation", "test"):
        sources = []
        for number, source in enumerate(getattr(recipe.problems, split)):
            if isinstance(source, FileSource) and Path(source.path).is_file():
                source = source.model_copy(update={"path": sent(source.path, f"{split}-{number}")})
            sources.append(source.model_dump())
        data["problems"][split] = tuple(sources)
    return Recipe.model_validate(data)


def make_wheel(folder: Path) -> Path:
    """This very code as a wheel: built from the source tree, or packed from the installed files.

    Raises:
        ClusterError: neither is possible.
    """
    folder.mkdir(parents=True)
    source = Path(str(resources.files("stillhouse.jobs.cli"))).parents[1]
    if (source / "pyproject.toml").is_file():
        # A copy: setuptools leaves a build folder in the tree, and what lies in it from an earlier build would travel too.
        copy = folder / "source"
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns(*NOT_SENT))
        # The compiled kernels where setuptools would put them: found up to date there, they are not compiled once more.
        platform = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        built = copy / "build" / platform / "stillhouse" / "kernels"
        built.mkdir(parents=True)
        for library in (source / "kernels").glob("*.so"):
            shutil.copy2(library, built)
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(folder),
            str(copy),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ClusterError(f"the wheel of {source} could not be built: {done.stderr.strip()[-500:]}")
        return next(folder.glob("*.whl"))
    try:
        installed = distribution("stillhouse")
    except PackageNotFoundError as error:
        raise ClusterError("stillhouse is not installed here, so there is nothing to send; pip install it first") from error
    wheel = folder / f"stillhouse-{installed.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in installed.files or ():
            if file.parts[0] != ".." and "__pycache__" not in file.parts:
                archive.write(str(file.locate()), str(file))
    return wheel
