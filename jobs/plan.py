"""Explain what a recipe would do, without doing it: stages, tokens, GPU hours, money, disk, and what is missing here.

Every estimate follows from the formulas below and from assumptions that the plan prints; a plan opens no connection and
loads no weights. Its figures are meant to be right within a factor of two or so, to tell an evening from a month.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from stillhouse.jobs.estimates import (
    CPU_CORE,
    GPUS,
    Device,
    batched_decoding_s,
    decoding_tokens_per_s,
    training_tokens_per_s,
)
from stillhouse.jobs.model_facts import ModelFacts, cached_snapshot, hub_cache, is_path, model_facts
from stillhouse.jobs.plan_teacher import engine_lines, expected_samples, missing_for_teacher, replayed_rows
from stillhouse.jobs.recipe import DatasetSource, FileSource, ReasoningGymSource, Recipe
from stillhouse.jobs.recipe_teacher import EndpointTeacher, EngineTeacher, ReplayTeacher, Teacher
from stillhouse.jobs.sources import longest_completion, teacher_resources

DOLLARS_PER_GPU_HOUR = 3.0
COMPLETION_SHARE = 0.25
"""Mean completion length over max_new_tokens. OpenR1-Math drew with a limit of 16 k, and most problems took less than 8 k."""
KEPT_SHARE = 0.7
"""Share of traces that verification and filters keep; the share a teacher answers rightly on problems of its level."""
PROMPT_TOKENS = {"reasoning_gym": 60, "file": 150, "dataset": 150}
UNKNOWN_DATASET_SIZE = 10_000
BYTES_PER_TOKEN_ON_DISK = 3.0
"""A token is about 4 characters and zstd halves them; a trace is kept as text, and a training row as two int32 columns."""
DATASET_SIZES = {  # rows by (name, subset, split), from the data sets' cards
    ("open-r1/OpenR1-Math-220k", "default", "train"): 93_733,
    ("HuggingFaceH4/MATH-500", None, "test"): 500,
    ("openai/gsm8k", "main", "train"): 7_473,
    ("openai/gsm8k", "main", "test"): 1_319,
}


@dataclass(frozen=True)
class StagePlan:
    """One stage: what it does, how many items go through it, and what that costs. Hours are of all devices together."""

    name: str
    what: str
    num_items: int
    num_tokens: int = 0
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    wall_hours: float = 0.0
    dollars: float = 0.0
    disk_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """What a recipe would do.

    ``missing`` says what this machine lacks for it; empty means that it can start here. ``downloads`` says what the run fetches
    by itself on first use; ``commands`` are those that Ray's workers start the teacher's servers with.
    """

    recipe: str
    description: str
    stages: tuple[StagePlan, ...]
    assumptions: tuple[str, ...]
    missing: tuple[str, ...]
    downloads: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()

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


def _count(source: ReasoningGymSource | FileSource | DatasetSource, needs: Needs) -> int:
    """Number of problems of a source; what is assumed for it and what is missing goes into ``needs``."""
    if isinstance(source, ReasoningGymSource):
        return source.size
    guess = source.limit or UNKNOWN_DATASET_SIZE
    if isinstance(source, FileSource):
        path = Path(source.path)
        if not path.is_file():
            needs.missing.append(f"the file {path} does not exist")
            needs.assumptions.append(f"{path} has {_plural(guess, 'problem')}: the file is not there")
            return guess
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            size = pq.read_metadata(path).num_rows
        else:
            with path.open("rb") as lines:
                size = sum(1 for line in lines if line.strip())
        return min(size, source.limit or size)
    if is_path(source.name) and not Path(source.name).exists():
        needs.missing.append(f"the folder {source.name} does not exist")
        needs.assumptions.append(f"{source.name} ({source.split}) has {_plural(guess, 'problem')}: the folder is not there")
        return guess
    if not is_path(source.name) and not cached_snapshot(source.name, kind="datasets"):
        _add_download(needs, f"the data set {source.name}:")
    size = DATASET_SIZES.get((source.name, source.subset, source.split), 0)
    if not size:
        needs.assumptions.append(f"{source.name} ({source.split}) has {_plural(guess, 'problem')}: its size is not known here")
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
        what = f"{_plural(teach, 'GPU')}, used by the teacher and then by the training"
    elif teach and train:
        what = f"{_plural(teach, 'GPU')} for the teacher and then {train:g} for the training"
    else:
        what = f"{_plural(teach or train, 'GPU')} for the {'teacher' if teach else 'training'}"
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
        missing.append(f"disk: {_bytes(disk_bytes)} are needed, {_bytes(free)} are free in {Path.cwd()}")


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

    stages = [_problems_stage(recipe, counts), *_download_stage((t.model, teacher), (s.base_model, student))]
    longest = recipe.gate.max_new_tokens if isinstance(t, ReplayTeacher) else longest_completion(recipe)
    completion = max(1, int(longest * COMPLETION_SHARE))
    samples = expected_samples(t, KEPT_SHARE)
    traces = round(counts["train"] * samples)
    teacher_input = int(prompt_tokens["train"] * samples)
    stages.append(_traces_stage(recipe, teacher, gpu, traces, teacher_input, traces * completion))
    solved = counts["train"] * (1 - (1 - KEPT_SHARE) ** samples)
    kept = int(min(traces * KEPT_SHARE, solved * recipe.select.per_problem))
    rows = min(kept, recipe.select.max_examples or kept)
    stay = f"about {_plural(rows, 'training row')} would stay"
    if not rows:
        needs.missing.append(f"too few problems: {stay} of {_plural(traces, 'trace')}")
    stages.append(StagePlan("filter", f"verify {_plural(traces, 'trace')}, drop and select; {stay}", traces))
    row_tokens = completion + prompt_tokens["train"] // max(1, counts["train"])
    stages.append(
        StagePlan(
            "examples", "render, mask and check the training rows", rows, rows * row_tokens, disk_bytes=rows * row_tokens * 4
        )
    )
    stages.append(_train_stage(recipe, student, gpu, rows, row_tokens))
    stages.append(_quantize_stage(recipe, student))
    asked = 0 if isinstance(t, ReplayTeacher) else min(recipe.gate.teacher_problems, counts["test"])
    if asked:
        tokens_in = prompt_tokens["test"] * asked // counts["test"]
        score = _traces_stage(recipe, teacher, gpu, asked, tokens_in, asked * completion)
        stages.append(dataclasses.replace(score, name="teacher score", what=f"the teacher on {_plural(asked, 'test problem')}"))
    stages.append(_gate_stage(recipe, student, gpu, counts["test"], completion))
    stages.append(StagePlan("report", "report.json and report.html", 1, disk_bytes=2_000_000))

    for name, facts in ((t.model, teacher), (s.base_model, student)):
        if facts and facts.origin in ("name", "guess"):
            why = "by the number in its name" if facts.origin == "name" else "nothing is known of its size"
            assumptions.append(f"{name} has {facts.num_params / 1e9:g} B parameters: {why}")
    assumptions += [
        f"a completion has {_plural(completion, 'token')} on average: a quarter of max_new_tokens; "
        "the worst case is four times that",
        "transformers decodes a batch until its longest row ends, which is taken to be after max_new_tokens",
        f"{KEPT_SHARE:.0%} of the traces are verified and kept"
        + (f", so that {samples:.2g} draws a problem are expected" if getattr(t, "adaptive", None) else ""),
        _device_words(gpu if on_gpu else CPU_CORE, gpu_name),
    ]
    if any(stage.gpu_hours for stage in stages):
        assumptions.append(f"a GPU hour costs ${DOLLARS_PER_GPU_HOUR:g}")
    disk_bytes = sum(stage.disk_bytes for stage in stages)
    _add_machine(needs, recipe, teacher, student, gpu, disk_bytes)
    assumed, missing, downloads = (tuple(dict.fromkeys(lines)) for lines in (needs.assumptions, needs.missing, needs.downloads))
    return Plan(recipe.name, recipe.description, tuple(stages), assumed, missing, downloads, engine_lines(recipe))


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


def _problems_stage(recipe: Recipe, counts: dict[str, int]) -> StagePlan:
    words = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    return StagePlan("problems", words, sum(counts.values()), disk_bytes=sum(counts.values()) * 1000)


def _download_stage(*models: tuple[str, ModelFacts | None]) -> list[StagePlan]:
    """Weights that the hub would send first: 16 bits a parameter."""
    absent = [(name, facts) for name, facts in models if facts and not facts.folder and name != "tiny" and not is_path(name)]
    if not absent:
        return []
    what = "weights that are not on this machine: " + ", ".join(name for name, _ in absent)
    return [StagePlan("download", what, len(absent), disk_bytes=sum(facts.num_params * 2 for _, facts in absent))]


def _traces_stage(
    recipe: Recipe, facts: ModelFacts | None, gpu: Device, traces: int, input_tokens: int, output_tokens: int
) -> StagePlan:
    t, cluster = recipe.teacher, recipe.cluster
    disk = int(output_tokens * BYTES_PER_TOKEN_ON_DISK)
    tokens = input_tokens + output_tokens
    if isinstance(t, ReplayTeacher):
        what = f"read from {t.path or t.name} ({t.layout}); no teacher is asked"
        return StagePlan("traces", what, traces, tokens, disk_bytes=disk)
    if isinstance(t, EndpointTeacher):
        dollars = (input_tokens * t.price_per_million_input_tokens + output_tokens * t.price_per_million_output_tokens) / 1e6
        what = f"{t.model} at {t.base_url}: {_samples_words(t)}, {t.max_concurrent} at once"
        if t.budget.max_dollars is not None and t.budget.max_dollars < dollars:
            what += f", {_money(dollars)} of which the budget pays {_money(t.budget.max_dollars)}"
            dollars = t.budget.max_dollars
        # A hosted reasoning model streams some 40 tokens a second to one request.
        return StagePlan(
            "traces",
            what,
            traces,
            tokens,
            dollars=dollars,
            wall_hours=output_tokens / (40 * t.max_concurrent) / 3600,
            disk_bytes=disk,
        )
    if isinstance(t, EngineTeacher):
        copies, device = t.replicas, gpu if t.num_gpus else CPU_CORE
        devices = t.num_gpus or cluster.cpus_per_teacher_actor
        unit = _plural(devices, "GPU" if t.num_gpus else "CPU")
        what = f"{t.model} on {t.kind}: {_samples_words(t)}, {_plural(copies, 'replica')} of {unit}"
        speed = decoding_tokens_per_s(facts, device, batch_size=t.max_concurrent, num_devices=devices)
        wall_s = output_tokens / speed / copies
    else:
        on_gpu = cluster.gpus_per_teacher_actor > 0
        device = gpu if on_gpu else CPU_CORE
        devices = cluster.gpus_per_teacher_actor if on_gpu else cluster.cpus_per_teacher_actor
        copies = cluster.num_teacher_actors
        unit = _plural(devices, "GPU" if on_gpu else "CPU")
        what = f"{t.model} in transformers: {_samples_words(t)}, {_plural(copies, 'actor')} of {unit}"
        wall_s = batched_decoding_s(
            facts,
            device,
            num_sequences=-(-traces // copies),
            batch_size=t.batch_size,
            num_tokens=output_tokens / copies,
            max_new_tokens=t.sampling.max_new_tokens,
            num_devices=devices,
            weight_bytes=4.0 if t.dtype == "float32" else 2.0,
        )
    # Reading the prompt costs a forward pass at full efficiency; it is small beside the reasoning and counted with it.
    prefill_s = input_tokens * 2 * facts.num_active_params / (device.flops * device.efficiency * devices)
    hours = (wall_s + prefill_s / copies) / 3600
    return _device_stage("traces", what, traces, tokens, device, hours * devices * copies, hours, disk)


def _samples_words(teacher: Teacher) -> str:
    if teacher.adaptive:
        return f"up to {teacher.max_samples} a problem, until {teacher.adaptive.verified} verified"
    return f"{teacher.samples_per_problem} a problem"


def _train_stage(recipe: Recipe, facts: ModelFacts, gpu: Device, rows: int, row_tokens: int) -> StagePlan:
    train, cluster, lora = recipe.train, recipe.cluster, recipe.student.lora
    tokens = train.num_steps * train.tokens_per_step if train.num_steps else int(train.epochs * rows * row_tokens)
    steps = train.num_steps or max(1, -(-tokens // train.tokens_per_step))
    workers = max(1, cluster.train_workers)
    on_gpu = cluster.gpus_per_train_worker > 0
    device = gpu if on_gpu else CPU_CORE
    devices = workers * (cluster.gpus_per_train_worker if on_gpu else cluster.cpus_per_train_worker)
    # Seven projections a layer, each about hidden × 2.3 hidden on average: rank · (in + out) parameters apiece.
    adapter = int(facts.num_layers * 7 * lora.rank * 3.3 * facts.hidden_size)
    speed = training_tokens_per_s(
        facts, device, gradient_checkpointing=train.gradient_checkpointing, num_adapter_params=adapter
    )
    device_hours = tokens / speed / 3600
    base = f"{recipe.student.base_model} over {recipe.student.base_weights}"
    what = f"LoRA r={lora.rank} on {base}: {_plural(steps, 'step')} of {_plural(train.tokens_per_step, 'token')}"
    # A resumable checkpoint holds the adapter and two optimizer moments in float32; two are kept.
    return _device_stage("train", what, steps, tokens, device, device_hours, device_hours / devices, 2 * adapter * 12)


def _quantize_stage(recipe: Recipe, facts: ModelFacts) -> StagePlan:
    group = recipe.quantize.group_size
    body = facts.num_params - facts.num_embedding_params
    four_bit = int(body * (4 + 16 / group) / 8 + facts.num_embedding_params * 2)
    what = f"merge, {recipe.quantize.format} in groups of {group}: a checkpoint of {_bytes(four_bit)}"
    return StagePlan("quantize", what, 1, disk_bytes=four_bit + facts.num_params * 2)


def _gate_stage(recipe: Recipe, facts: ModelFacts, gpu: Device, test_problems: int, teacher_completion: int) -> StagePlan:
    gate, cluster = recipe.gate, recipe.cluster
    problems = min(test_problems, gate.num_problems or test_problems)
    num_models = 4 if gate.kernels else 3
    answers = num_models * problems * gate.samples_per_problem
    completion = min(teacher_completion, gate.max_new_tokens)
    on_gpu = cluster.gpus_per_train_worker > 0
    device = gpu if on_gpu else CPU_CORE
    devices = cluster.gpus_per_train_worker if on_gpu else cluster.cpus_per_train_worker
    copies = max(1, cluster.train_workers)
    weight_bytes = 4.0 if recipe.student.dtype == "float32" else 2.0
    one_model_s = batched_decoding_s(
        facts,
        device,
        num_sequences=-(-answers // num_models // copies),
        batch_size=gate.batch_size,
        num_tokens=answers * completion / num_models / copies,
        max_new_tokens=gate.max_new_tokens,
        num_devices=devices,
        weight_bytes=weight_bytes,
    )
    hours = num_models * one_model_s / 3600
    samples = _plural(gate.samples_per_problem, "sample")
    models = "base, student and checkpoint, the last also on our kernels," if gate.kernels else "base, student and checkpoint"
    what = f"{models} on {_plural(problems, 'test problem')}, {samples} each"
    return _device_stage(
        "validate", what, answers, answers * completion, device, hours * devices * copies, hours, answers * 2000
    )


def _device_stage(
    name: str, what: str, items: int, tokens: int, device: Device, device_hours: float, wall_hours: float, disk: int
) -> StagePlan:
    gpu_hours, cpu_hours = (device_hours, 0.0) if device.is_gpu else (0.0, device_hours)
    return StagePlan(
        name, what, items, int(tokens), gpu_hours, cpu_hours, wall_hours, gpu_hours * DOLLARS_PER_GPU_HOUR, int(disk)
    )


def render_text(plan: Plan) -> str:
    """The plan as text for a terminal: a table of stages, totals, assumptions, and what is missing."""
    heads = ("stage", "items", "tokens", "GPU h", "time", "money", "disk")
    table = [heads]
    table += [
        (
            s.name,
            f"{s.num_items:,}",
            _short(s.num_tokens),
            _number(s.gpu_hours),
            _hours(s.wall_hours),
            _money(s.dollars),
            _bytes(s.disk_bytes),
        )
        for s in plan.stages
    ]
    tokens = sum(stage.num_tokens for stage in plan.stages if stage.name != "examples")
    table.append(
        (
            "in all",
            "",
            _short(tokens),
            _number(plan.gpu_hours),
            _hours(plan.wall_hours),
            _money(plan.dollars),
            _bytes(plan.disk_bytes),
        )
    )
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    notes = ["", *(stage.what for stage in plan.stages), ""]
    lines = [f"{plan.recipe}: {plan.description}" if plan.description else plan.recipe, ""]
    for row, note in zip(table, notes):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join([*cells, note]).rstrip())
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


def _plural(count: float, noun: str) -> str:
    number = f"{count:,.0f}" if count == int(count) else f"{count:g}"
    return f"{number} {noun}" if count == 1 else f"{number} {noun}s"


def _scaled(value: float, units: Iterable[tuple[float, str]]) -> str:
    for size, unit in units:
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return "-"


def _short(value: float) -> str:
    return _scaled(value, ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"), (1, "")))


def _bytes(value: float) -> str:
    return _scaled(value, ((1e12, " TB"), (1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1, " B")))


def _hours(value: float) -> str:
    return "<1 s" if 0 < value < 1 / 3600 else _scaled(value, ((24, " d"), (1, " h"), (1 / 60, " min"), (1 / 3600, " s")))


def _number(value: float) -> str:
    return "<0.01" if 0 < value < 0.01 else f"{value:,.3g}" if 0 < value < 1000 else f"{value:,.0f}" if value else "-"


def _money(value: float) -> str:
    return f"${value:,.0f}" if value >= 1 else "-" if not value else "<$0.01" if value < 0.01 else f"${value:.2f}"
