"""What each stage of a recipe would cost: items, tokens, hours, money and disk, by `stillhouse.jobs.estimates`."""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.jobs.estimates import CPU_CORE, Device, batched_decoding_s, decoding_tokens_per_s, training_tokens_per_s
from stillhouse.jobs.model_facts import ModelFacts, is_path
from stillhouse.jobs.plan_words import in_bytes, in_dollars, plural
from stillhouse.jobs.recipe import Recipe
from stillhouse.jobs.recipe_teacher import EndpointTeacher, EngineTeacher, ReplayTeacher, Teacher

DOLLARS_PER_GPU_HOUR = 3.0
BYTES_PER_TOKEN_ON_DISK = 3.0
"""A token is about 4 characters and zstd halves them; a trace is kept as text, and a training row as two int32 columns."""


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


def problems_stage(recipe: Recipe, counts: dict[str, int]) -> StagePlan:
    """Read the problems of every split."""
    words = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    return StagePlan("problems", words, sum(counts.values()), disk_bytes=sum(counts.values()) * 1000)


def download_stage(*models: tuple[str, ModelFacts | None]) -> list[StagePlan]:
    """Weights that the hub would send first: 16 bits a parameter."""
    absent = [(name, facts) for name, facts in models if facts and not facts.folder and name != "tiny" and not is_path(name)]
    if not absent:
        return []
    what = "weights that are not on this machine: " + ", ".join(name for name, _ in absent)
    return [StagePlan("download", what, len(absent), disk_bytes=sum(facts.num_params * 2 for _, facts in absent))]


def traces_stage(
    recipe: Recipe, facts: ModelFacts | None, gpu: Device, traces: int, input_tokens: int, output_tokens: int
) -> StagePlan:
    """The teacher's completions; also those of its own score."""
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
            what += f", {in_dollars(dollars)} of which the budget pays {in_dollars(t.budget.max_dollars)}"
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
        unit = plural(devices, "GPU" if t.num_gpus else "CPU")
        what = f"{t.model} on {t.kind}: {_samples_words(t)}, {plural(copies, 'replica')} of {unit}"
        speed = decoding_tokens_per_s(facts, device, batch_size=t.max_concurrent, num_devices=devices)
        wall_s = output_tokens / speed / copies
    else:
        on_gpu = cluster.gpus_per_teacher_actor > 0
        device = gpu if on_gpu else CPU_CORE
        devices = cluster.gpus_per_teacher_actor if on_gpu else cluster.cpus_per_teacher_actor
        copies = cluster.num_teacher_actors
        unit = plural(devices, "GPU" if on_gpu else "CPU")
        what = f"{t.model} in transformers: {_samples_words(t)}, {plural(copies, 'actor')} of {unit}"
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


def train_stage(recipe: Recipe, facts: ModelFacts, gpu: Device, rows: int, row_tokens: int) -> StagePlan:
    """Train the adapter on ``rows`` rows of ``row_tokens`` tokens each."""
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
    what = f"LoRA r={lora.rank} on {base}: {plural(steps, 'step')} of {plural(train.tokens_per_step, 'token')}"
    # A resumable checkpoint holds the adapter and two optimizer moments in float32; two are kept.
    return _device_stage("train", what, steps, tokens, device, device_hours, device_hours / devices, 2 * adapter * 12)


def quantize_stage(recipe: Recipe, facts: ModelFacts) -> StagePlan:
    """Merge the adapter and write the 4-bit checkpoint."""
    group = recipe.quantize.group_size
    body = facts.num_params - facts.num_embedding_params
    four_bit = int(body * (4 + 16 / group) / 8 + facts.num_embedding_params * 2)
    what = f"merge, {recipe.quantize.format} in groups of {group}: a checkpoint of {in_bytes(four_bit)}"
    return StagePlan("quantize", what, 1, disk_bytes=four_bit + facts.num_params * 2)


def probe_stage(recipe: Recipe, facts: ModelFacts, gpu: Device, problems: int, teacher_completion: int) -> StagePlan:
    """The base student on the training problems, for ``select.student_band``."""
    select = recipe.select
    answers = problems * select.student_samples
    what = (
        f"{recipe.student.base_model} on {plural(problems, 'training problem')}, "
        f"{plural(select.student_samples, 'sample')} each, for select.student_band"
    )
    return _students_stage("probe", what, recipe, facts, gpu, 1, answers, teacher_completion)


def validate_stage(recipe: Recipe, facts: ModelFacts, gpu: Device, test_problems: int, teacher_completion: int) -> StagePlan:
    """All students on the test problems."""
    gate = recipe.gate
    problems = min(test_problems, gate.num_problems or test_problems)
    num_models = 4 if gate.kernels else 3
    samples = plural(gate.samples_per_problem, "sample")
    models = "base, student and checkpoint, the last also on our kernels," if gate.kernels else "base, student and checkpoint"
    what = f"{models} on {plural(problems, 'test problem')}, {samples} each"
    answers = problems * gate.samples_per_problem
    return _students_stage("validate", what, recipe, facts, gpu, num_models, answers, teacher_completion)


def _students_stage(
    name: str,
    what: str,
    recipe: Recipe,
    facts: ModelFacts,
    gpu: Device,
    num_models: int,
    answers_each: int,
    teacher_completion: int,
) -> StagePlan:
    """Models of the student's size that answer one after another, loaded as they are evaluated."""
    gate, cluster = recipe.gate, recipe.cluster
    completion = min(teacher_completion, gate.max_new_tokens)
    on_gpu = cluster.gpus_per_train_worker > 0
    device = gpu if on_gpu else CPU_CORE
    devices = cluster.gpus_per_train_worker if on_gpu else cluster.cpus_per_train_worker
    copies = max(1, cluster.train_workers)
    one_model_s = batched_decoding_s(
        facts,
        device,
        num_sequences=-(-answers_each // copies),
        batch_size=gate.batch_size,
        num_tokens=answers_each * completion / copies,
        max_new_tokens=gate.max_new_tokens,
        num_devices=devices,
        weight_bytes=4.0 if recipe.student.dtype == "float32" else 2.0,
    )
    hours = num_models * one_model_s / 3600
    answers = num_models * answers_each
    return _device_stage(name, what, answers, answers * completion, device, hours * devices * copies, hours, answers * 2000)


def _device_stage(
    name: str, what: str, items: int, tokens: int, device: Device, device_hours: float, wall_hours: float, disk: int
) -> StagePlan:
    gpu_hours, cpu_hours = (device_hours, 0.0) if device.is_gpu else (0.0, device_hours)
    return StagePlan(
        name, what, items, int(tokens), gpu_hours, cpu_hours, wall_hours, gpu_hours * DOLLARS_PER_GPU_HOUR, int(disk)
    )
