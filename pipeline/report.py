"""The report of a run: ``report.json`` for programs, ``report.html`` for people, and the table that the terminal prints.

``Report`` is the versioned schema of ``report.json``; its page is drawn in ``report_page.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, NonNegativeFloat, NonNegativeInt, model_validator

from stillhouse.pipeline.cost import Cost
from stillhouse.pipeline.errors import ExitCode
from stillhouse.pipeline.filters.rates import FilterRate
from stillhouse.pipeline.gate import Agreement, Behaviour, GateCheck, Judgement
from stillhouse.pipeline.statistics import Interval
from stillhouse.pipeline.store import write_atomic
from stillhouse.pipeline.tally import Histogram, SourceRate

REPORT_SCHEMA_VERSION = 1
MODELS = {
    "teacher": "teacher",
    "base": "base",
    "student": "16-bit student",
    "checkpoint": "4-bit checkpoint",
    "checkpoint_kernels": "4-bit checkpoint, our kernels",
}


def _finite_or_none(value: object) -> object:
    """JSON has no NaN: a step whose loss was not a number is kept, without a value."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


FiniteOrNone = Annotated[float | None, BeforeValidator(_finite_or_none)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PassAt1(_Section):
    """pass@1 of each model on the same problems; None where a model was not measured.

    ``checkpoint`` is the emitted folder as a user loads it, with transformers and compressed-tensors alone;
    ``checkpoint_kernels`` the same folder with its 4-bit layers on our kernels.
    """

    teacher: Interval | None
    base: Interval | None
    student: Interval | None
    checkpoint: Interval | None
    checkpoint_kernels: Interval | None = None


class ServedBy(_Section):
    """Which code computed a model's linear layers, and on what, in words; as the process that held the model said."""

    path: str
    device: str


class Served(_Section):
    """Which path served the training and each evaluation; ``agreement`` compares the checkpoint's two evaluations.

    ``agreement.difference`` is pass@1 on our kernels minus pass@1 in transformers. None where nothing was measured or noted.
    """

    train: ServedBy | None = None
    teacher: ServedBy | None = None
    base: ServedBy | None = None
    student: ServedBy | None = None
    checkpoint: ServedBy | None = None
    checkpoint_kernels: ServedBy | None = None
    agreement: Agreement | None = None


class FunnelStep(_Section):
    """One step that drops rows: ``num_in = num_dropped + num_kept``. ``reason`` is empty for a step that only counts.

    ``unit`` is what is counted (problems, traces, examples); bars of one unit share a scale.
    """

    stage: str
    reason: str = ""
    num_in: NonNegativeInt
    num_dropped: NonNegativeInt
    num_kept: NonNegativeInt
    unit: str = "traces"

    @model_validator(mode="after")
    def _adds_up(self) -> FunnelStep:
        if self.num_in != self.num_dropped + self.num_kept:
            counts = f"{self.num_in} in, {self.num_dropped} dropped, {self.num_kept} kept"
            raise ValueError(f"funnel step {self.stage!r} does not add up: {counts}")
        return self


class VerifierCheck(_Section):
    """How the verifiers did on one source's own problems before any teacher was asked: golds to accept, altered ones to refuse.

    ``num_golds`` is below ``num_problems`` where a schema, a pattern or tests judge and there is no gold.
    """

    num_problems: NonNegativeInt
    num_golds: NonNegativeInt
    gold_accepted: NonNegativeInt
    num_mutated: NonNegativeInt
    mutated_rejected: NonNegativeInt
    failures: list[str] = []


class Filtering(_Section):
    """What the filter stage found: each filter and check in its order, each source of problems, all traces by two figures.

    ``num_tokens`` is the completion's length; ``repetition`` the share of its runs of 8 words that stood in it before.
    """

    filters: list[FilterRate]
    sources: list[SourceRate]
    num_tokens: Histogram
    repetition: Histogram


class LossPoint(_Section):
    """The training loss (nats a supervised token) and learning rate at one optimizer step; None where it was not finite."""

    step: NonNegativeInt
    loss: FiniteOrNone
    learning_rate: FiniteOrNone


class Results(_Section):
    """What was measured.

    ``num_generated`` counts every completion that the teacher was known or must be taken to have made, ``num_lost_in_flight``
    those of them that were under way at a crash; ``cost`` is what all of its calls came to. ``verifiers`` are by
    ``split: source``.
    """

    pass_at_1: PassAt1
    pass_at_1_by_family: dict[str, PassAt1]
    funnel: list[FunnelStep]
    seconds: dict[str, NonNegativeFloat]
    tokens: dict[str, NonNegativeInt]
    num_generated: NonNegativeInt
    num_lost_in_flight: NonNegativeInt = 0
    cost: Cost | None = None
    loss: list[LossPoint]
    behaviour: dict[str, Behaviour]
    served: Served = Served()
    filtering: Filtering | None = None
    verifiers: dict[str, VerifierCheck] = {}


class GateSection(_Section):
    checks: list[GateCheck]


class Sample(_Section):
    """One trace shown to the reader, with the reasons why it was kept or dropped."""

    prompt: str
    completion: str
    answer: str
    reasons: list[str]
    source: str = ""
    trace_key: str = ""


class Samples(_Section):
    kept: list[Sample]
    dropped: list[Sample]


class SizeBytes(_Section):
    """Bytes of weights: of the emitted checkpoint, and of the same model in 16 bits."""

    checkpoint: NonNegativeInt
    float16: NonNegativeInt


class Report(_Section):
    """Everything a run wants to tell, as ``report.json`` holds it. ``checkpoint`` is the path relative to the run."""

    schema_version: Literal[1] = REPORT_SCHEMA_VERSION
    run_id: str
    recipe_name: str
    created: str
    verdict: Judgement
    exit_code: ExitCode
    checkpoint: str
    size_bytes: SizeBytes
    results: Results
    gate: GateSection
    samples: Samples
    environment: dict[str, str]
    recipe: str


def write_report(report: Report, folder: Path | str) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html`` into a folder, each whole or not at all; returns their paths."""
    from stillhouse.pipeline.report_page import render_page  # jinja2 is imported by those who draw

    folder = Path(folder)
    page = render_page(report)
    json_path, html_path = folder / "report.json", folder / "report.html"
    write_atomic(json_path, (report.model_dump_json(indent=2) + "\n").encode())
    write_atomic(html_path, page.encode())
    return json_path, html_path


def read_report(path: Path | str) -> Report:
    """Read a ``report.json``.

    Raises:
        ValueError: it is not a report of this schema version; pydantic names each field that does not fit.
    """
    return Report.model_validate_json(Path(path).read_bytes())


def summary_table(report: Report) -> str:
    """The result as plain text of some eight lines: accuracies, funnel, seconds, verdict; what the terminal prints."""
    header, *rows = _accuracy_rows(report)
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    aligned = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in (header, *rows)
    ]
    lines = [aligned[0].rstrip(), "  ".join("-" * width for width in widths), *aligned[1:]]
    lines += ["", f"funnel   {funnel_line(report)}"]
    lines += [f"traces   {report.results.cost.line()}"] if report.results.cost else []
    lines.append(f"seconds  {seconds_line(report.results.seconds)}")
    lines.append(f"size     {size_line(report.size_bytes)}")
    lines += [f"{'served' if i == 0 else '':9}{line}".rstrip() for i, line in enumerate(served_lines(report.results.served))]
    verdict, *reasons = verdict_lines(report)
    return "\n".join([*lines, f"verdict  {verdict}", *(f"         {reason}" for reason in reasons)])


def summary_markdown(report: Report) -> str:
    """The same result as Markdown, for a CI summary or a model card."""
    header, *rows = _accuracy_rows(report)
    lines = [f"### Stillhouse: {_cell(report.recipe_name)}: {report.verdict}", ""]
    lines.append("| " + " | ".join(map(_cell, header)) + " |")
    lines.append("|---" + "|---:" * (len(header) - 1) + "|")
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    lines += ["", "| check | expected | measured | outcome |", "|---|---|---:|---|"]
    for check in report.gate.checks:
        measured = measured_text(check)
        lines.append(
            f"| {_cell(check.name)} | {_cell(check.expected)} | {measured} | **{check.outcome}** {_cell(check.explanation)} |"
        )
    lines += ["", f"- Funnel: {funnel_line(report)}"]
    lines += [f"- Traces: {report.results.cost.line()}"] if report.results.cost else []
    lines.append(f"- Seconds: {seconds_line(report.results.seconds)}")
    lines.append(f"- Size: {size_line(report.size_bytes)}")
    lines += [f"- Served: {_cell(line)}" for line in served_lines(report.results.served)]
    return "\n".join(lines) + "\n"


def percent(value: float) -> str:
    """0.853 → ``85.3 %``."""
    return f"{100 * value:.1f} %"


def interval_text(interval: Interval | None) -> str:
    """The estimate with its interval in percent, or a dash where nothing was measured."""
    if interval is None:
        return "not measured"
    return f"{percent(interval.value)} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def measured_text(check: GateCheck) -> str:
    """A gate check's measurement as its table shows it: a share in percent, a ratio as it is."""
    if check.measured is None:
        return "–"
    if check.low is None or check.high is None:
        return f"{check.measured:.3f}"
    return interval_text(Interval(check.measured, check.low, check.high, 0))


def family_names(families: Mapping[str, object]) -> dict[str, str]:
    """Short names of problem sources: the last part of the path, unless two would be the same."""
    short = {family: family.rpartition("/")[2] for family in families}
    return short if len(set(short.values())) == len(short) else {family: family for family in families}


def funnel_line(report: Report) -> str:
    """The funnel in one line: what went in, what each step dropped, what is left."""
    parts: list[str] = []
    unit = None
    for step in report.results.funnel:
        if step.unit != unit:
            parts.append(f"{step.num_in:,} {step.unit}")
            unit = step.unit
        if step.num_dropped:
            parts.append(f"−{step.num_dropped:,} {step.reason or step.stage}")
    if report.results.funnel and (last := report.results.funnel[-1]).num_dropped:
        parts.append(f"{last.num_kept:,} {last.unit} kept")
    lost = report.results.num_lost_in_flight
    return (" → ".join(parts) or "nothing counted") + (f" ({lost:,} more lost in flight and made again)" if lost else "")


def seconds_line(seconds: Mapping[str, float]) -> str:
    """Seconds by stage and in all."""
    stages = ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items())
    return f"{stages}; {sum(seconds.values()):.0f} in all" if stages else "none"


def size_line(size: SizeBytes) -> str:
    """Size of the checkpoint beside its 16-bit size."""
    ratio = f", {size.float16 / size.checkpoint:.2f}× smaller than 16-bit" if size.checkpoint and size.float16 else ""
    return f"{size.checkpoint / 1e6:.2f} MB of weights{ratio}"


def served_rows(served: Served) -> list[tuple[str, ServedBy]]:
    """What was computed, in words, and by which code; in the order of the run."""
    names = {"train": "training"} | MODELS
    return [(name, by) for field, name in names.items() if (by := getattr(served, field)) is not None]


def served_lines(served: Served) -> list[str]:
    """Which path served what, one line a path, then how alike the checkpoint answers on both of its paths."""
    by_path: dict[ServedBy, list[str]] = {}
    for name, by in served_rows(served):
        by_path.setdefault(by, []).append(name)
    lines = [f"{'; '.join(names)}: {by.path} ({by.device})" for by, names in by_path.items()]
    return lines + ([agreement_line(served.agreement)] if served.agreement else [])


def agreement_line(found: Agreement) -> str:
    """How alike the checkpoint answers on our kernels and in transformers, in one line."""
    difference = found.difference
    points = f"{100 * difference.value:+.1f} points [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return (
        f"our kernels and transformers: {found.num_same_verdict:,} of {found.num_completions:,} verdicts and "
        f"{found.num_same_completion:,} whole completions the same, difference {points}"
    )


def verdict_lines(report: Report) -> list[str]:
    """The verdict, then one line for each check that did not pass."""
    checks = report.gate.checks
    passed = sum(check.outcome == "PASS" for check in checks)
    lines = [f"{report.verdict} ({passed} of {len(checks)} checks passed)"]
    return lines + [f"{check.outcome} {check.name}: {check.explanation}" for check in checks if check.outcome != "PASS"]


def _accuracy_rows(report: Report) -> list[list[str]]:
    families = family_names(report.results.pass_at_1_by_family)
    rows = [["", "pass@1 [95 % interval]", *families.values(), "n"]]
    for model, name in MODELS.items():
        overall = getattr(report.results.pass_at_1, model)
        cells = [getattr(report.results.pass_at_1_by_family[family], model) for family in families]
        rows.append(
            [
                name,
                interval_text(overall),
                *("–" if c is None else percent(c.value) for c in cells),
                f"{overall.n if overall else 0:,}",
            ]
        )
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
