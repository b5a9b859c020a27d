"""The end of a run: the gate's verdict over the committed evaluations, the report, and the checkpoint's card."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from stillhouse.jobs import remote
from stillhouse.jobs.filtering import FILTERING_FILE
from stillhouse.jobs.run_state import RunState, read_problems
from stillhouse.jobs.stages import EVALUATED, SELF_TEST_FILE, served_file
from stillhouse.jobs.status import cost_of
from stillhouse.jobs.traces import stream_planned_traces
from stillhouse.pipeline.gate import GateResult, accuracy, accuracy_by_family, agreement, behaviour, judge
from stillhouse.pipeline.integrity import IntegrityReport, check_checkpoint
from stillhouse.pipeline.records import Graded, Problem, Trace, Verdict, content_key
from stillhouse.pipeline.report import (
    Filtering,
    FunnelStep,
    GateSection,
    LossPoint,
    PassAt1,
    Report,
    Results,
    Sample,
    Samples,
    Served,
    ServedBy,
    SizeBytes,
    VerifierCheck,
    summary_markdown,
    write_report,
)
from stillhouse.pipeline.trace_store.totals import Totals

SHOWN_TRACES = 12
TOKENS_OF = {
    "traces": ("prompt_tokens", "completion_tokens"),
    "probe": ("num_completion_tokens",),
    "train": ("num_tokens",),
} | {f"evaluate-{name}": ("num_completion_tokens",) for name in EVALUATED}


def report_stage(run: RunState) -> Report:
    """Judge, write report.json and report.html, and put the results on the checkpoint's card.

    Made anew every time: it costs seconds, and its thresholds may have changed.
    """
    graded = {name: run.store.read(f"evaluations/{name}", Graded) for name in EVALUATED if _evaluated(run, name)}
    checkpoint = run.store.path("checkpoint")
    integrity = check_checkpoint(checkpoint)
    if integrity.problems and all(problem.startswith("README.md") for problem in integrity.problems):
        # A run that was killed between writing the card and sealing the folder: the card is ours to write again.
        _seal_card(checkpoint, "The gate has not judged this checkpoint yet.")
        integrity = check_checkpoint(checkpoint)
    for problem in integrity.problems:
        run.reporter.note(f"checkpoint: {problem}")
    gate = _judge(run, graded, integrity)
    report = _report(run, graded, gate)
    if integrity.ok:
        _write_card(run, report)
    write_report(report, run.store.root)
    return report


def _evaluated(run: RunState, name: str) -> bool:
    return f"evaluate-{name}" in run.manifests


def _judge(run: RunState, graded: Mapping[str, Sequence[Graded]], integrity: IntegrityReport) -> GateResult:
    thresholds = run.recipe.gate
    return judge(
        base=graded["base"],
        student=graded["student"],
        checkpoint=graded["checkpoint"],
        checkpoint_kernels=graded.get("checkpoint_kernels", ()) if thresholds.kernels else None,
        integrity_ok=integrity.ok,
        min_accuracy=thresholds.min_accuracy,
        min_family_accuracy=thresholds.min_family_accuracy,
        min_student_ratio=thresholds.min_student_ratio,
        min_gain=thresholds.min_gain,
        max_drop=thresholds.max_drop,
        min_think_closed=thresholds.min_think_closed,
        max_kernel_difference=thresholds.max_kernel_difference,
        min_same_verdict=thresholds.min_same_verdict,
    )


def _report(run: RunState, graded: Mapping[str, Sequence[Graded]], gate: GateResult) -> Report:
    recipe, manifests = run.recipe, run.manifests
    families = {name: accuracy_by_family(rows) for name, rows in graded.items()}
    totals = Totals.from_json(manifests["traces"].counts)
    quantization = run.store.read_json("quantization.json")
    return Report(
        run_id=content_key("run", *(manifests[name].fingerprint for name in sorted(manifests)))[:16],
        recipe_name=recipe.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=gate.verdict,
        exit_code=gate.exit_code,
        checkpoint="checkpoint",
        size_bytes=SizeBytes(checkpoint=quantization["size_bytes"], float16=quantization["size_16bit_bytes"]),
        results=Results(
            pass_at_1=PassAt1(**{name: accuracy(graded.get(name, ())) for name in EVALUATED}),
            pass_at_1_by_family={
                family: PassAt1(**{name: families.get(name, {}).get(family) for name in EVALUATED})
                for family in sorted({family for found in families.values() for family in found})
            },
            funnel=_funnel(run),
            seconds={name: manifest.seconds for name, manifest in manifests.items()},
            tokens={
                stage: int(sum(manifests[stage].counts[name] for name in names))
                for stage, names in TOKENS_OF.items()
                if stage in manifests
            },
            num_generated=totals.num_answered + totals.num_lost + totals.num_truncated,
            num_lost_in_flight=totals.num_lost,
            cost=cost_of(recipe, totals, int(manifests["filter"].counts["num_kept"])),
            loss=[
                LossPoint(step=step, loss=loss, learning_rate=rate) for step, loss, rate, _ in run.store.read_json("loss.json")
            ],
            behaviour={name: behaviour(rows) for name, rows in graded.items()},
            served=_served(run, graded),
            filtering=Filtering(**run.store.read_json(FILTERING_FILE)),
            verifiers={name: VerifierCheck(**check) for name, check in run.store.read_json(SELF_TEST_FILE).items()},
        ),
        gate=GateSection(checks=gate.checks),
        samples=_samples(run),
        environment=remote.library_versions() | machine(),
        recipe=recipe.to_yaml(),
    )


def _served(run: RunState, graded: Mapping[str, Sequence[Graded]]) -> Served:
    """Which code computed what, as the workers noted it, and whether the checkpoint answers alike on both of its paths."""
    stages = {"train": "train"} | {name: f"evaluate-{name}" for name in graded}
    noted = {name: ServedBy(**run.store.read_json(served_file(stage))) for name, stage in stages.items()}
    alike = agreement(graded["checkpoint_kernels"], graded["checkpoint"]) if "checkpoint_kernels" in graded else None
    return Served(**noted, agreement=alike)


def machine() -> dict[str, str]:
    """The driver's machine in words: processor family, cores, memory."""
    import os
    import platform

    import psutil

    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    }


def _funnel(run: RunState) -> list[FunnelStep]:
    """Every reason for which traces were dropped, in order, with what was left after it."""
    steps: list[FunnelStep] = []
    left = 0
    stage = None
    for row in run.store.read_json("funnel.json"):
        if row["stage"] != stage:
            stage, left = row["stage"], row["num_in"]
        kept = left - row["num_dropped"]
        steps.append(
            FunnelStep(stage=row["stage"], reason=row["reason"], num_in=left, num_dropped=row["num_dropped"], num_kept=kept)
        )
        left = kept
    return steps


def _samples(run: RunState) -> Samples:
    """A dozen traces that were kept and a dozen that were dropped, spread over the reasons for dropping them."""
    problems = {problem.id: problem for problem in read_problems(run)}
    kept = run.store.read("kept", Trace, key="key")
    dropped: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in run.store.read("verdicts", Verdict):
        if not verdict.keep and not verdict.shadow:
            dropped[f"{verdict.check}: {verdict.outcome or verdict.reason}"].append(verdict)
    shown: list[Verdict] = []
    rank = 0
    while len(shown) < SHOWN_TRACES and any(rank < len(rows) for rows in dropped.values()):
        shown += [rows[rank] for rows in dropped.values() if rank < len(rows)]
        rank += 1
    shown = shown[:SHOWN_TRACES]
    traces = {trace.key: trace for trace in stream_planned_traces(run, {verdict.trace_key for verdict in shown})}
    return Samples(
        kept=[_sample(trace, problems, ["verified as correct"]) for trace in _spread(kept, SHOWN_TRACES)],
        dropped=[
            _sample(traces[verdict.trace_key], problems, [f"{verdict.check}: {verdict.reason}", verdict.evidence])
            for verdict in shown
        ],
    )


def _spread(rows: Sequence[Trace], count: int) -> list[Trace]:
    step = max(1, len(rows) // count)
    return list(rows[::step][:count])


def _sample(trace: Trace, problems: Mapping[str, Problem], reasons: Iterable[str]) -> Sample:
    problem = problems[trace.problem_id]
    return Sample(
        prompt=problem.prompt,
        completion=trace.completion,
        answer=problem.answer,
        reasons=[reason for reason in reasons if reason],
        source=problem.source,
        trace_key=trace.key,
    )


def _write_card(run: RunState, report: Report) -> None:
    """Put the measured results on the checkpoint's card and seal the folder again."""
    recipe = run.recipe
    on_kernels = (
        "\nThe row “our kernels” is the same folder with its 4-bit layers on Stillhouse's own kernels, bit for bit the same "
        "weights:\n`from stillhouse.kernels.swap import swap_to_kernels; swap_to_kernels(model)`.\n"
        if report.results.pass_at_1.checkpoint_kernels
        else ""
    )
    card = f"""# {recipe.name}

{recipe.description}

Distilled by Stillhouse from `{recipe.teacher.model}` into `{recipe.student.base_model}`: {recipe.student.base_weights} base,
LoRA rank {recipe.student.lora.rank}, merged and quantized to int4 with groups of {recipe.quantize.group_size} weights
(compressed-tensors, pack-quantized). Load it with transformers and compressed-tensors:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

The model reasons inside `<think>` … `</think>` and puts its final answer into `\\boxed{{}}`. It was measured with
temperature {recipe.gate.temperature:g} and at most {recipe.gate.max_new_tokens} new tokens.
{on_kernels}
{summary_markdown(report)}
"""
    _seal_card(run.store.path("checkpoint"), card)


def _seal_card(checkpoint: Path, card: str) -> None:
    from stillhouse.students.emitting import replace_card

    replace_card(checkpoint, card)
