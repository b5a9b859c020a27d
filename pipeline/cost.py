"""What traces cost, in all and for each that was kept: the figure that budgets and teachers are compared by."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt

from stillhouse.pipeline.trace_store.totals import Totals


class Cost(BaseModel):
    """What the teacher's calls came to.

    ``dollars`` are the price of counted tokens. ``dollars_lost`` and ``tokens_lost`` are what was reserved by calls of which
    nobody knows whether they were billed (lost in a crash, broken off): an upper bound. ``gpu_hours`` are hours of all GPUs
    that the teacher held while traces were written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_calls: NonNegativeInt = 0
    num_failed: NonNegativeInt = 0
    num_lost: NonNegativeInt = 0
    num_truncated: NonNegativeInt = 0
    prompt_tokens: NonNegativeInt = 0
    completion_tokens: NonNegativeInt = 0
    tokens_lost: NonNegativeInt = 0
    dollars: NonNegativeFloat = 0.0
    dollars_lost: NonNegativeFloat = 0.0
    hours: NonNegativeFloat = 0.0
    gpu_hours: NonNegativeFloat = 0.0
    gpu_dollars: NonNegativeFloat = 0.0
    num_kept: NonNegativeInt | None = None
    """Traces that became training rows; None before the filter stage."""

    @classmethod
    def of(cls, totals: Totals, *, num_kept: int | None, num_gpus: float = 0, dollars_per_gpu_hour: float = 0) -> Cost:
        """The cost of a writer's calls.

        Args:
            num_gpus: GPUs that the teacher holds while it writes.
        """
        gpu_hours = totals.seconds / 3600 * num_gpus
        return cls(
            num_calls=totals.num_calls,
            num_failed=totals.num_failed,
            num_lost=totals.num_lost,
            num_truncated=totals.num_truncated,
            prompt_tokens=totals.prompt_tokens,
            completion_tokens=totals.completion_tokens,
            tokens_lost=totals.tokens_lost,
            dollars=totals.dollars,
            dollars_lost=totals.dollars_lost,
            hours=totals.seconds / 3600,
            gpu_hours=gpu_hours,
            gpu_dollars=gpu_hours * dollars_per_gpu_hour,
            num_kept=num_kept,
        )

    @property
    def dollars_in_all(self) -> float:
        """Everything that may have been billed."""
        return self.dollars + self.dollars_lost + self.gpu_dollars

    def line(self) -> str:
        """The cost in one line, with what a kept trace cost."""
        parts = [f"{self.num_calls:,} calls"]
        parts += [f"{count:,} {what}" for what, count in (("failed", self.num_failed), ("lost", self.num_lost)) if count]
        parts.append(f"{self.prompt_tokens + self.completion_tokens:,} tokens")
        if self.gpu_hours:
            parts.append(f"{self.gpu_hours:,.2f} GPU hours")
        if self.dollars_in_all:
            unknown = f" (${self.dollars_lost:,.2f} of it reserved by calls of unknown cost)" if self.dollars_lost else ""
            parts.append(f"${self.dollars_in_all:,.2f}{unknown}")
        text = ", ".join(parts)
        if self.num_kept:
            each = [f"{(self.prompt_tokens + self.completion_tokens) / self.num_kept:,.0f} tokens"]
            each += [f"{3600 * self.gpu_hours / self.num_kept:,.1f} GPU seconds"] if self.gpu_hours else []
            each += [f"${self.dollars_in_all / self.num_kept:,.4f}"] if self.dollars_in_all else []
            text += f"; a kept trace: {', '.join(each)}"
        return text
