"""Explain what a recipe would do, without doing it: stages, tokens, GPU hours, money, disk, and what is missing here.

Every estimate follows from the formulas below and from assumptions that the plan prints; a plan opens no connection and
loads no weights. Its figures are meant to be right within a factor of two or so, to tell an evening from a month.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from stillhouse.jobs.estimates import CPU_CORE, GPUS, Device
from stillhouse.jobs.model_facts import ModelFacts, cached_snapshot, hub_cache, is_path, model_facts
from stillhouse.jobs.plan_stages import (
    DOLLARS_PER_GPU_HOUR,
    StagePlan,
    download_stage,
    probe_stage,
    problems_stage,
    quantize_stage,
    traces_stage,
    train_stage,
    validate_stage,
)
from stillhouse.jobs.plan_teacher import engine_lines, expected_samples, missing_for_teacher, replayed_rows
from stillhouse.jobs.plan_verifiers import FIRST_PROBLEMS, verifier_lines
from stillhouse.jobs.plan_words import in_bytes, in_dollars, in_hours, in_number, in_short, plural
from stillhouse.jobs.recipe import Recipe
from stillhouse.jobs.recipe_problems import AnySource, FileSource, ReasoningGymSource
from stillhouse.jobs.recipe_teacher import EndpointTeacher, EngineTeacher, ReplayTeacher
from stillhouse.jobs.sources import longest_completion, teacher_resources
from stillhouse.pipeline.row_files import count_rows

COMPLETION_SHARE = 0.25
"""Mean completion length over max_new_tokens. OpenR1-Math drew with a limit of 16 k, and most problems took less than 8 k."""
KEPT_SHARE = 0.7
"""Share of traces that verification and filters keep; the share a teacher answers rightly on problems of its level."""
PROMPT_TOKENS = {"reasoning_gym": 60, "file": 150, "dataset": 150}
UNKNOWN_DATASET_SIZE = 10_000
DATASET_SIZES = {  # rows by (name, subset, split), from the data sets' cards
    ("open-r1/OpenR1-Math-220k", "default", "train"): 93_733,
    ("HuggingFaceH4/MATH-500", None, "test"): 500,
    ("openai/gsm8k", "main", "train"): 7_473,
    ("openai/gsm8k", "main", "test"): 1_319,
}


@dataclass(frozen=True)
class Plan:
    """What a recipe would do.

    ``missing`` says what this machine lacks for it; empty means that it can start here. ``downloads`` says what the run fetches
    by itself on first use; ``commands`` are those that Ray's workers start the teacher's servers with; ``verifiers`` say how
    each source's own answers fare.
    """

    recipe: str
    description: str
    stages: tuple[StagePlan, ...]
    assumptions: tuple[str, ...]
    missing: tuple[str, ...]
    downloads: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    verifiers: tuple[str, ...] = ()

    @property
    def gpu_hours(self) -> float:
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def wall_hours(self) -> float:
        return sum(stage.wall_hours for stage in self.stages)

    @property
    def dollars(self) -> float:
        return sum(stage.dollars for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        return sum(stage.disk_bytes for stage in self.stages)


@dataclass
class Needs:
    """What comes up while a plan is made: what it assumed, what has to be there first, what the run downloads by itself."""

    assumptions: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    downloads: list[str] = field(default_factory=list)


def _count(source: AnySource, needs: Needs) -> int:
    """Number of problems of a source; what is assumed for it and what is missing goes into ``needs``."""
    if isinstance(source, ReasoningGymSource):
        return source.size
    guess = source.limit or UNKNOWN_DATASET_SIZE
    if isinstance(source, FileSource):
        path = Path(source.path)
        if not path.is_file():
            needs.missing.append(f"the file {path} does not exist")
            needs.assumptions.append(f"{path} has {plural(guess, 'problem')}: the file is not there")
            return guess
        size = count_rows(source.path, what="problems")
        return min(size, source.limit or size)
    if is_path(source.name) and not Path(source.name).exists():
        needs.missing.append(f"the folder {source.name} does not exist")
        needs.assumptions.append(f"{source.name} ({source.split}) has {plural(guess, 'problem')}: the folder is not there")
        return guess
    if not is_path(source.name) and not cached_snapshot(source.name, kind="datasets"):
        _add_download(needs, f"the data set {source.name}:")
    size = DATASET_SIZES.get((source.name, source.subset, source.split), 0)
    if not size:
        needs.assumptions.append(f"{source.name} ({source.split}) has {plural(guess, 'problem')}: its size is not known here")
        return guess
    return min(size, source.limit or size)


def _local_gpu() -> tuple[int, str]:
    """Number of CUDA devices that torch sees, and the name of the first."""
    if importlib.util.find_spec("torch") is None:
        return 0, ""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and shutil.which("nvidia-smi") is None:
        return 0, ""  # spares a CPU machine two seconds of importing torch
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count, torch.cuda.get_device_name(0) if count else ""


def _add_download(needs: Needs, what: str) -> None:
    """Note what the hub would send: a download, or missing where the environment forbids one."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        needs.missing.append(f"{what} not in {hub_cache()}, and HF_HUB_OFFLINE forbids the download")
    else:
        needs.downloads.append(f"{what} not in {hub_cache()}")


def _add_weights(needs: Needs, name: str, facts: ModelFacts, *, what: str) -> None:
    if facts.folder:
        return
    gigabytes = f"{facts.num_params * 2 / 1e9:,.0f} GB" if facts.num_params > 5e8 else "their files"
    if name == "tiny" or is_path(name):
        needs.missing.append(f"the {what}'s weights {name} are not there: no config.json with safetensors beside it")
    else:
        _add_download(needs, f"the {what}'s weights {name} ({gigabytes}):")


def _gpus_missing(teach: float, train: float, here: int) -> str | None:
    """The GPUs that a recipe asks for; teacher and training take turns, so they are not added up."""
    if max(teach, train) <= here:
        return None
    if teach == train:
        what = f"{plural(teach, 'GPU')}, used by the teacher and then by the training"
    elif teach and train:
        what = f"{plural(teach, 'GPU')} for the teacher and then {train:g} for the training"
    else:
        what = f"{plural(teach or train, 'GPU')} for the {'teacher' if teach else 'training'}"
    return f"{what}; this machine has {here}. On a cluster: stillhouse submit"


def _add_machine(
    needs: Needs, recipe: Recipe, teacher: ModelFacts | None, student: ModelFacts, gpu: Device, disk_bytes: int
) -> None:
    missing = needs.missing
    t, cluster = recipe.teacher, recipe.cluster
    gpus_here, _ = _local_gpu()
    gpus_train = cluster.gpus_per_train_worker * max(1, cluster.train_workers)
    actors, _, gpus_each = teacher_resources(recipe)
    if gpus := _gpus_missing(actors * gpus_each, gpus_train, gpus_here):
        missing.append(gpus)
    missing += missing_for_teacher(t)
    if teacher is not None and t.kind != "llama_cpp":
        _add_weights(needs, t.model, teacher, what="teacher")
    if isinstance(t, EngineTeacher) and t.num_gpus:
        each = teacher.num_params * 2 / t.num_gpus
        if t.dtype != "auto" and each > gpu.memory_bytes * t.gpu_memory_utilization * 0.9:
            missing.append(
                f"memory: {each / 1e9:.0f} GB of teacher weights a GPU do not fit a {gpu.name}; raise teacher.tensor_parallel"
            )
    _add_weights(needs, recipe.student.base_model, student, what="student")
    free = shutil.disk_usage(Path.cwd()).free
    if free < disk_bytes:
        missing.append(f"disk: {in_bytes(disk_bytes)} are needed, {in_bytes(free)} are free in {Path.cwd()}")


def plan(recipe: Recipe) -> Plan:
    """Work out what a recipe would do on this machine or a cluster. Reads local files only.

    Raises:
        OSError, ValueError: a local file that the recipe names is there and cannot be read.
    """
    needs = Needs()
    assumptions = needs.assumptions
    counts: dict[str, int] = {}
    prompt_tokens: dict[str, int] = {}
    for split in ("train", "validation", "test"):
        for source in getattr(recipe.problems, split):
            size = _count(source, needs)
            counts[split] = counts.get(split, 0) + size
            prompt_tokens[split] = prompt_tokens.get(split, 0) + size * PROMPT_TOKENS[source.source]
    if isinstance(recipe.teacher, ReplayTeacher):
        counts["train"] = replayed_rows(recipe.teacher)
        prompt_tokens["train"] = counts["train"] * PROMPT_TOKENS["dataset"]

    t, s, cluster = recipe.teacher, recipe.student, recipe.cluster
    elsewhere = isinstance(t, EndpointTeacher | ReplayTeacher)
    teacher = None if elsewhere else model_facts(t.model, role="teachers")
    student = model_facts(s.base_model, role="students")
    _, gpu_name = _local_gpu()
    gpu = next((device for key, device in GPUS.items() if key in gpu_name), GPUS["H100"])
    on_gpu = bool(cluster.gpus_per_train_worker or teacher_resources(recipe)[2])

    stages = [problems_stage(recipe, counts), *download_stage((t.model, teacher), (s.base_model, student))]
    longest = recipe.gate.max_new_tokens if isinstance(t, ReplayTeacher) else longest_completion(recipe)
    completion = max(1, int(longest * COMPLETION_SHARE))
    samples = expected_samples(t, KEPT_SHARE)
    traces = round(counts["train"] * samples)
    teacher_input = int(prompt_tokens["train"] * samples)
    stages.append(traces_stage(recipe, teacher, gpu, traces, teacher_input, traces * completion))
    if recipe.select.student_band is not None:
        stages.append(probe_stage(recipe, student, gpu, counts["train"], completion))
    solved = counts["train"] * (1 - (1 - KEPT_SHARE) ** samples)
    kept = int(min(traces * KEPT_SHARE, solved * recipe.select.per_problem))
    rows = min(kept, recipe.select.max_examples or kept)
    stay = f"about {plural(rows, 'training row')} would stay"
    if not rows:
        needs.missing.append(f"too few problems: {stay} of {plural(traces, 'trace')}")
    stages.append(StagePlan("filter", f"verify {plural(traces, 'trace')}, drop and select; {stay}", traces))
    row_tokens = completion + prompt_tokens["train"] // max(1, counts["train"])
    stages.append(
        StagePlan(
            "examples", "render, mask and check the training rows", rows, rows * row_tokens, disk_bytes=rows * row_tokens * 4
        )
    )
    stages.append(train_stage(recipe, student, gpu, rows, row_tokens))
    stages.append(quantize_stage(recipe, student))
    asked = 0 if isinstance(t, ReplayTeacher) else min(recipe.gate.teacher_problems, counts["test"])
    if asked:
        tokens_in = prompt_tokens["test"] * asked // counts["test"]
        score = traces_stage(recipe, teacher, gpu, asked, tokens_in, asked * completion)
        stages.append(dataclasses.replace(score, name="teacher score", what=f"the teacher on {plural(asked, 'test problem')}"))
    stages.append(validate_stage(recipe, student, gpu, counts["test"], completion))
    stages.append(StagePlan("report", "report.json and report.html", 1, disk_bytes=2_000_000))

    for name, facts in ((t.model, teacher), (s.base_model, student)):
        if facts and facts.origin in ("name", "guess"):
            why = "by the number in its name" if facts.origin == "name" else "nothing is known of its size"
            assumptions.append(f"{name} has {facts.num_params / 1e9:g} B parameters: {why}")
    assumptions += [
        f"a completion has {plural(completion, 'token')} on average: a quarter of max_new_tokens; "
        "the worst case is four times that",
        "transformers decodes a batch until its longest row ends, which is taken to be after max_new_tokens",
        f"{KEPT_SHARE:.0%} of the traces are verified and kept"
        + (f", so that {samples:.2g} draws a problem are expected" if getattr(t, "adaptive", None) else ""),
        _device_words(gpu if on_gpu else CPU_CORE, gpu_name),
    ]
    if recipe.select.teacher_band or recipe.select.student_band:
        assumptions.append("the bands of pass rates keep every problem: nobody knows yet how many lie outside")
    if any(stage.gpu_hours for stage in stages):
        assumptions.append(f"a GPU hour costs ${DOLLARS_PER_GPU_HOUR:g}")
    disk_bytes = sum(stage.disk_bytes for stage in stages)
    verifiers, refused = verifier_lines(recipe)
    needs.missing.extend(refused)
    _add_machine(needs, recipe, teacher, student, gpu, disk_bytes)
    assumed, missing, downloads = (tuple(dict.fromkeys(lines)) for lines in (needs.assumptions, needs.missing, needs.downloads))
    return Plan(
        recipe.name,
        recipe.description,
        tuple(stages),
        assumed,
        missing,
        downloads,
        commands=engine_lines(recipe),
        verifiers=tuple(verifiers),
    )


def _device_words(device: Device, local_name: str) -> str:
    where = (
        f"as on this machine ({local_name})"
        if local_name and device.is_gpu
        else "no such GPU is here"
        if device.is_gpu
        else "this machine"
    )
    return (
        f"one {device.name} ({where}): {device.flops / 1e12:g} TFLOP/s and {device.bandwidth / 1e12:g} TB/s at peak, "
        f"{device.efficiency:.0%} of it reached, {device.overhead_s * 1e3:g} ms a decoding step besides"
    )


def render_text(plan: Plan) -> str:
    """The plan as text for a terminal: a table of stages, totals, assumptions, and what is missing."""
    heads = ("stage", "items", "tokens", "GPU h", "time", "money", "disk")
    table = [heads]
    table += [
        (
            s.name,
            f"{s.num_items:,}",
            in_short(s.num_tokens),
            in_number(s.gpu_hours),
            in_hours(s.wall_hours),
            in_dollars(s.dollars),
            in_bytes(s.disk_bytes),
        )
        for s in plan.stages
    ]
    tokens = sum(stage.num_tokens for stage in plan.stages if stage.name != "examples")
    table.append(
        (
            "in all",
            "",
            in_short(tokens),
            in_number(plan.gpu_hours),
            in_hours(plan.wall_hours),
            in_dollars(plan.dollars),
            in_bytes(plan.disk_bytes),
        )
    )
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    notes = ["", *(stage.what for stage in plan.stages), ""]
    lines = [f"{plan.recipe}: {plan.description}" if plan.description else plan.recipe, ""]
    for row, note in zip(table, notes):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join([*cells, note]).rstrip())
    if plan.verifiers:
        first = f"Verifiers, on the answers of each source's first {FIRST_PROBLEMS} problems:"
        lines += ["", first, *(f"  - {line}" for line in plan.verifiers)]
    lines += ["", "Assumed:", *(f"  - {line}" for line in plan.assumptions), ""]
    if plan.missing:
        lines += ["Missing on this machine, and needed first:", *(f"  - {line}" for line in plan.missing)]
    else:
        lines.append("Nothing is missing on this machine.")
    if plan.commands:
        lines += ["", "Ray starts:", *(f"  {line}" for line in plan.commands)]
    if plan.downloads:
        lines += ["", "Downloaded on first use:", *(f"  - {line}" for line in plan.downloads)]
    return "\n".join(lines)
