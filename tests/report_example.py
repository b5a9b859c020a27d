"""A report as a run writes it: every part filled, one trace that carries markup, judged by the real gate."""

from __future__ import annotations

import math
from collections import Counter

from stillhouse.pipeline.filters.rates import FilterRate
from stillhouse.pipeline.gate import accuracy, accuracy_by_family, agreement, behaviour, judge
from stillhouse.pipeline.records import Graded
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
)
from stillhouse.pipeline.tally import Seen, histogram, source_rates

FAMILIES = ("reasoning_gym/chain_sum", "reasoning_gym/basic_arithmetic", "reasoning_gym/leg_counting")
MARKUP = "<script>document.title = 'taken over'</script><img src=x onerror=alert(1)>"


def graded(model: str, num_correct: int, n: int = 360) -> list[Graded]:
    """``n`` problems; which of them are right is spread over the families a little unevenly."""
    order = sorted(range(n), key=lambda i: (i * 97) % n + 60 * (i % 3 == 2))
    right = set(order[:num_correct])
    return [
        Graded(
            model=model,
            problem_id=f"p{i:04d}",
            source=FAMILIES[i % 3],
            sample_index=0,
            correct=i in right,
            outcome="correct" if i in right else "wrong",
            reason="",
            completion="",
            finish_reason="stop",
            num_completion_tokens=90 + i % 50,
            think_closed=model != "base",
            answer_found=i in right or i % 2 == 0,
        )
        for i in range(n)
    ]


def make_filtering() -> Filtering:
    """What is said of 3,588 traces, longer ones more often wrong, one filter that watches."""
    tally: Counter[Seen] = Counter()
    for i in range(3588):
        family, rank = FAMILIES[i % 3], (i * 7919) % 3588
        length = 40 + round(9 * abs(math.sin(i)) * (1 + i % 3)) + rank // 300
        fate = "filtered" if rank < 70 else "not right" if rank < 472 else "not chosen" if rank < 623 else "kept"
        outcome = "wrong" if fate == "not right" or rank < 60 else "correct"
        tally[Seen(family, "sums" if i % 2 else "", outcome, fate, length, 30 if rank < 20 else rank % 5)] += 1
    return Filtering(
        filters=[
            FilterRate("finished", "drop", 3588, 9, 3579, 3179, 9, 0),
            FilterRate("think_block", "drop", 3579, 61, 3518, 3125, 61, 54),
            FilterRate("contradiction", "shadow", 3518, 12, 3506, 3123, 12, 2),
            FilterRate("exact_dedup", "drop", 3116, 151),
        ],
        sources=source_rates(tally),
        num_tokens=histogram(tally, "num_tokens"),
        repetition=histogram(tally, "repetition"),
    )


def make_report(min_accuracy: float = 0.60, teacher_measured: bool = True) -> Report:
    """The report of an invented run with 84.4 % for its checkpoint."""
    counts = {"teacher": 330, "base": 14, "student": 309, "checkpoint": 304, "checkpoint_kernels": 303}
    rows = {model: graded(model, count) for model, count in counts.items()}
    ours = "42 × int4 on compiled kernels, AVX-512 VNNI/BF16; 1 × float32 in torch"
    decoded = "42 × int4 that compressed-tensors decoded to float32, in torch; 1 × float32 in torch"
    paths = {"train": ours, "teacher": "57 × float32 in torch", "base": "43 × float32 in torch"}
    paths |= {"student": "43 × float32 in torch", "checkpoint": decoded, "checkpoint_kernels": ours}
    if not teacher_measured:
        rows["teacher"] = []
    verdict = judge(
        base=rows["base"],
        student=rows["student"],
        checkpoint=rows["checkpoint"],
        checkpoint_kernels=rows["checkpoint_kernels"],
        integrity_ok=True,
        min_accuracy=min_accuracy,
        min_family_accuracy=0.40,
        min_student_ratio=0.95,
        min_gain=0.30,
        max_drop=0.10,
        min_think_closed=0.90,
        max_kernel_difference=0.05,
        min_same_verdict=0.95,
    )
    by_family = {model: accuracy_by_family(graded_rows) for model, graded_rows in rows.items()}
    loss = [
        LossPoint(
            step=step,
            loss=0.06 + 2.2 * math.exp(-step / 45) + 0.05 * math.sin(step * 1.7) ** 2,
            learning_rate=4e-3 * (step / 30 if step < 30 else 0.5 + 0.5 * math.cos(math.pi * (step - 30) / 270)),
        )
        for step in range(1, 301)
    ]
    kept = Sample(
        prompt="State the final answer to the following arithmetic problem: 12 + 7 - 30 + 4 =",
        completion="<think>\n12 + 7 = 19\n19 - 30 = -11\n-11 + 4 = -7\n</think>\n\\boxed{-7}",
        answer="-7",
        reasons=[],
        source=FAMILIES[0],
        trace_key="9f2c51d07ab34e55",
    )
    wrong = kept.model_copy(
        update={"completion": kept.completion.replace("-7}", "7}"), "reasons": ["wrong answer: expected -7, found 7"]}
    )
    marked_up = kept.model_copy(
        update={"completion": f"<think>\n{MARKUP}\n" + "12 + 7 = 19\n" * 8, "reasons": ["think block not closed"]}
    )
    return Report(
        run_id="demo-20260102-101500",
        recipe_name="demo",
        created="2026-01-02T10:15:00+00:00",
        verdict=verdict.verdict,
        exit_code=verdict.exit_code,
        checkpoint="checkpoint",
        size_bytes=SizeBytes(checkpoint=1_320_448, float16=3_934_208),
        results=Results(
            pass_at_1=PassAt1(**{model: accuracy(graded_rows) for model, graded_rows in rows.items()}),
            pass_at_1_by_family={
                family: PassAt1(**{model: families.get(family) for model, families in by_family.items()}) for family in FAMILIES
            },
            funnel=[
                FunnelStep(
                    stage="problems", num_in=3600, num_dropped=12, num_kept=3588, reason="same text in test", unit="problems"
                ),
                FunnelStep(stage="traces", num_in=3588, num_dropped=0, num_kept=3588),
                FunnelStep(stage="format", reason="think block not closed", num_in=3588, num_dropped=61, num_kept=3527),
                FunnelStep(stage="verify", reason="wrong answer", num_in=3527, num_dropped=402, num_kept=3125),
                FunnelStep(stage="length", reason="cut at max_new_tokens", num_in=3125, num_dropped=9, num_kept=3116),
                FunnelStep(stage="dedup", reason="same completion", num_in=3116, num_dropped=151, num_kept=2965),
                FunnelStep(stage="examples", num_in=2965, num_dropped=0, num_kept=2965, unit="examples"),
            ],
            seconds={
                "problems": 2.1,
                "traces": 78.4,
                "filter": 6.3,
                "examples": 1.2,
                "train": 142.9,
                "quantize": 3.1,
                "validate": 61.0,
            },
            tokens={"traces": 402_118, "examples": 351_870, "train": 1_228_800, "validate": 161_220},
            num_generated=3652,
            num_lost_in_flight=64,
            loss=loss,
            behaviour={model: behaviour(graded_rows) for model, graded_rows in rows.items()},
            served=Served(
                **{name: ServedBy(path=path, device="CPU") for name, path in paths.items()},
                agreement=agreement(rows["checkpoint_kernels"], rows["checkpoint"]),
            ),
            filtering=make_filtering(),
            verifiers={
                f"{split}: {family}": VerifierCheck(
                    num_problems=1200, num_golds=1200, gold_accepted=1200 - 5 * i, num_mutated=400, mutated_rejected=400
                )
                for split in ("test", "train")
                for i, family in enumerate(FAMILIES)
            },
        ),
        gate=GateSection(checks=verdict.checks),
        samples=Samples(kept=[kept] * 3, dropped=[wrong, marked_up]),
        environment={"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "ray": "2.59.0", "stillhouse": "0.1.0"},
        recipe="name: demo\nseed: 0\nteacher:\n  model: tiny\n  sampling: {temperature: 0.6, top_p: 0.95}\n",
    )
