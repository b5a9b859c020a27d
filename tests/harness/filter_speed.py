"""Measure megabytes of traces a second through the cheap filters, each and all, beside datatrove's, on one core.

    python -m tests.harness.filter_speed [--megabytes 20] [--repeat 3] [--shared-megabytes 2]

First each of our filters and all that are on by default, at three lengths of trace. Then all of ours and datatrove's three, in
turn, on the same traces of 12,000 characters. Not equal work: theirs judge web text by its words, which spaCy cuts (what that
alone costs has a row of its own), ours judge a completion's form, repetition, language and refusals without cutting words.
Both sides pass these traces through every filter, whatever the one before said.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from stillhouse.pipeline.filters.judging import filter_verdicts
from stillhouse.pipeline.filters.settings import FILTERS, FilterSetting, default_filters, make_filter
from stillhouse.pipeline.records import Trace
from tests.harness.long_traces import long_traces
from tests.harness.side_by_side import Cost, interleaved, keep_to_one_core, missing, parser_of, table


def megabytes_of(traces: list[Trace]) -> float:
    return sum(len(trace.completion.encode()) for trace in traces) / 1e6


def each_filter(traces: list[Trace], num_rounds: int) -> dict[str, tuple[float, int]]:
    """By filter: the least CPU seconds over the rounds, and how many traces it is against."""
    lists = {name: (FilterSetting(name),) for name in FILTERS} | {"all of them": default_filters(max_tokens=10**6)}
    found = {}
    for name, settings in lists.items():
        filters = [(setting, make_filter(setting)) for setting in settings]
        seconds, num_against = [], 0
        for _ in range(num_rounds):
            begin = time.process_time()
            num_against = sum(bool(filter_verdicts(trace, filters)) for trace in traces)
            seconds.append(time.process_time() - begin)
        found[name] = min(seconds), num_against
    return found


def beside_datatrove(traces: list[Trace], num_rounds: int) -> tuple[dict[str, Cost], dict[str, int]]:
    """Costs of ours and of theirs on the same traces, and how many each of theirs is against."""
    from tests.harness import datatrove_routes

    filters = [(setting, make_filter(setting)) for setting in default_filters(max_tokens=10**6)]
    theirs = datatrove_routes.quality_filters()
    texts = [trace.completion for trace in traces]
    against: dict[str, int] = {}

    def run(*names: str) -> Callable[[], None]:
        def pass_through() -> None:
            for name in names:
                against[name] = 0
            for document in datatrove_routes.documents(texts):
                for name in names:
                    against[name] += theirs[name].filter(document) is not True

        return pass_through

    routes = {
        "ours, all": lambda: [filter_verdicts(trace, filters) for trace in traces],
        "datatrove, all three": run(*theirs),
        **{f"datatrove, {name}": run(name) for name in theirs},
        "datatrove, words alone": lambda: [datatrove_routes.words(text) for text in texts],
    }
    datatrove_routes.words("Its tokenizer is made at the first word.")
    return interleaved(routes, num_rounds), against


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--megabytes", type=float, default=20.0, help="of traces through our filters")
    parser.add_argument("--repeat", type=int, default=3, help="rounds: the best for ours alone, medians beside datatrove")
    parser.add_argument("--shared-megabytes", type=float, default=2.0, help="of traces through both sides")
    arguments = parser.parse_args()
    keep_to_one_core()
    for num_chars in (2_000, 12_000, 60_000):
        traces = long_traces(max(1, int(arguments.megabytes * 1e6 / num_chars)), num_chars=num_chars)
        size = megabytes_of(traces)
        print(f"\n{len(traces):,} traces of {num_chars:,} characters, {size:.1f} MB; MB/s of one core's time")
        for name, (seconds, num_against) in each_filter(traces, arguments.repeat).items():
            print(f"  {name:20} {size / seconds:10.1f}   against {num_against} of {len(traces)}")
    if why := missing("datatrove", "spacy"):
        print(f"\nbeside datatrove: not measured, {why}")
        return
    traces = long_traces(max(1, int(arguments.shared_megabytes * 1e6 / 12_000)), seed=3)
    costs, against = beside_datatrove(traces, arguments.repeat)
    print(f"\n{len(traces):,} traces of 12,000 characters, both sides in turn, medians of {arguments.repeat}")
    print("\n".join(table(costs, megabytes_of(traces), "MB")))
    print("  datatrove's are against " + ", ".join(f"{num} ({name})" for name, num in against.items()))


if __name__ == "__main__":
    main()
