"""What a plan says of the teacher: draws a problem, the servers' command line, and what is not here yet."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from stillhouse.jobs import engines, serve_llm
from stillhouse.jobs.recipe import Recipe
from stillhouse.jobs.recipe_teacher import AnyTeacher, EndpointTeacher, EngineTeacher, ReplayTeacher
from stillhouse.jobs.replaying import REPLAYED_FILES
from stillhouse.jobs.servers import engine_spec, ray_serve_arguments
from stillhouse.jobs.sources import teacher_sampling
from stillhouse.pipeline.row_files import count_rows
from stillhouse.pipeline.stopping import StoppingRule, expected_draws
from stillhouse.teachers.engine_commands import sampling_notes

PACKAGES = {
    "vllm": ("vllm", "from the clone: .venv/bin/pip install -e '.[vllm]'"),
    "sglang": ("sglang", "in an environment of its own, named in teacher.engine_python: pip install sglang"),
    "transformers_serve": ("fastapi", "from the clone: .venv/bin/pip install -e '.[serving]'"),
    "llama_cpp": ("llama_cpp", "from the clone: .venv/bin/pip install -e '.[llama-cpp]'"),
}
"""An engine's module, and how it is installed."""
UNKNOWN_REPLAY_ROWS = 100_000


def expected_samples(teacher: AnyTeacher, pass_rate: float) -> float:
    """Draws a problem: the recipe's number, or what its stopping rule comes to at this pass rate."""
    if isinstance(teacher, ReplayTeacher):
        return 1.0
    if teacher.adaptive is None:
        return float(teacher.samples_per_problem)
    rule = teacher.adaptive
    return expected_draws(StoppingRule(rule.verified, rule.max_samples, rule.min_pass_rate, rule.error), pass_rate)


def engine_lines(recipe: Recipe) -> tuple[str, ...]:
    """How Ray brings the teacher's servers up, for one whose servers are ours to start."""
    teacher = recipe.teacher
    if not isinstance(teacher, EngineTeacher):
        return ()
    spec = engine_spec(teacher)
    if teacher.on_ray_serve:
        lines = serve_llm.describe(ray_serve_arguments(teacher))
    else:
        lines = engines.describe(
            spec,
            replicas=teacher.replicas,
            gpus_per_replica=teacher.num_gpus,
            cpus_per_replica=recipe.cluster.cpus_per_teacher_actor,
        )
    return (*lines, *(f"  {sentence}" for sentence in sampling_notes(spec, teacher_sampling(recipe))))


def replayed_rows(teacher: ReplayTeacher) -> int:
    """Rows of the data set, where it is a file that is here; else the recipe's limit, or a guess."""
    if teacher.path and Path(teacher.path).is_file():
        size = count_rows(teacher.path, what="traces", endings=REPLAYED_FILES)
        return min(size, teacher.limit or size)
    return teacher.limit or UNKNOWN_REPLAY_ROWS


def missing_for_teacher(teacher: AnyTeacher) -> list[str]:
    """What this machine lacks before the teacher can be asked, in sentences."""
    if isinstance(teacher, EndpointTeacher):
        if teacher.api_key_env and not os.environ.get(teacher.api_key_env):
            return [f"the environment variable {teacher.api_key_env} with the key for {teacher.base_url} is not set"]
        if teacher.api_key_file and not Path(teacher.api_key_file).is_file():
            return [f"the file {teacher.api_key_file} with the key for {teacher.base_url} is not there"]
    if isinstance(teacher, ReplayTeacher) and teacher.path and not Path(teacher.path).is_file():
        return [f"the file {teacher.path} does not exist"]
    if isinstance(teacher, EngineTeacher):
        return _missing_for_engine(teacher)
    return []


def _missing_for_engine(teacher: EngineTeacher) -> list[str]:
    missing = []
    if teacher.kind == "llama_cpp" and not Path(teacher.model).is_file():
        missing.append(f"the GGUF file {teacher.model} is not there")
    module, how = PACKAGES[teacher.kind]
    if teacher.engine_python and not Path(teacher.engine_python).exists():
        missing.append(f"the interpreter {teacher.engine_python} of the engine's environment is not there")
    elif not teacher.engine_python and importlib.util.find_spec(module) is None:
        missing.append(f"{module} is not installed; {how}")
    return missing
