"""What each filter of a run did: how many traces it spoke against, and how right those inside and outside of it were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stillhouse.pipeline.filters.settings import FilterSetting, Mode
from stillhouse.pipeline.records import DECIDED, Verdict


@dataclass(frozen=True, slots=True)
class FilterRate:
    """What one filter or check did: of ``num_in`` traces that reached it, how many it dropped (or would have, in shadow mode).

    Of those that it let through and of those that it spoke against, the numbers that were verified (as right or wrong, what is
    undecided is neither) and that were right: where the two pass rates do not differ, the filter costs right answers and buys
    nothing. A check of the whole run (duplicates, contamination) looks at right traces alone and counts none.
    """

    name: str
    mode: Mode
    num_in: int
    num_against: int
    num_verified_let_through: int = 0
    num_right_let_through: int = 0
    num_verified_against: int = 0
    num_right_against: int = 0

    @property
    def pass_rate_let_through(self) -> float | None:
        """Share of right ones among the verified traces that it let through; None where none was verified."""
        return self.num_right_let_through / self.num_verified_let_through if self.num_verified_let_through else None

    @property
    def pass_rate_against(self) -> float | None:
        """The same of those that it spoke against."""
        return self.num_right_against / self.num_verified_against if self.num_verified_against else None


def filter_rates(settings: Sequence[FilterSetting], verdicts: Iterable[Verdict]) -> list[FilterRate]:
    """Count, filter by filter, what it kept and how right the traces inside and outside were.

    Args:
        settings: those that the verdicts came from, in their order.
        verdicts: of `stillhouse.pipeline.filters.judging.judge_batch`, of any number of batches; read once, all verdicts of a
            trace together.
    """
    running = [setting for setting in settings if setting.mode != "off"]
    place = {setting.name: i for i, setting in enumerate(running)}
    # Per filter: traces let through and spoken against, and of those the verified and the right.
    counts = [{side: [0, 0, 0] for side in ("through", "against")} for _ in running]

    def settle(of_trace: list[Verdict]) -> None:
        against = {place[verdict.check] for verdict in of_trace if verdict.check in place}
        decided = next((place[v.check] for v in of_trace if not v.shadow and v.check in place), len(running) - 1)
        outcome = next((verdict.outcome for verdict in of_trace if verdict.outcome), "")
        for i in range(decided + 1):
            row = counts[i]["against" if i in against else "through"]
            row[0] += 1
            row[1] += outcome in DECIDED
            row[2] += outcome == "correct"

    of_trace: list[Verdict] = []
    for verdict in verdicts:
        if of_trace and of_trace[0].trace_key != verdict.trace_key:
            settle(of_trace)
            of_trace = []
        of_trace.append(verdict)
    if of_trace:
        settle(of_trace)
    return [
        FilterRate(
            setting.name,
            setting.mode,
            sides["through"][0] + sides["against"][0],
            sides["against"][0],
            *sides["through"][1:],
            *sides["against"][1:],
        )
        for setting, sides in zip(running, counts)
    ]
