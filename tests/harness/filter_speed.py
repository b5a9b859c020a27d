"""Measure megabytes of traces a second through each cheap filter, and through all that are on by default, on one core.

python -m tests.harness.filter_speed [--megabytes 20] [--repeat 3]
"""

from __future__ import annotations

import argparse
import time

from stillhouse.pipeline.filters.judging import filter_verdicts
from stillhouse.pipeline.filters.settings import FILTERS, FilterSetting, default_filters, make_filter
from tests.harness.long_traces import long_traces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    for num_chars in (2_000, 12_000, 60_000):
        traces = long_traces(int(arguments.megabytes * 1e6 / num_chars), num_chars=num_chars)
        size = sum(len(trace.completion.encode()) for trace in traces) / 1e6
        print(f"\n{len(traces):,} traces of {num_chars:,} characters, {size:.1f} MB; MB/s of one core's time")
        lists = {name: (FilterSetting(name),) for name in FILTERS} | {"all of them": default_filters(max_tokens=10**6)}
        for name, settings in lists.items():
            filters = [(setting, make_filter(setting)) for setting in settings]
            seconds, num_against = [], 0
            for _ in range(arguments.repeat):
                begin = time.process_time()
                num_against = sum(bool(filter_verdicts(trace, filters)) for trace in traces)
                seconds.append(time.process_time() - begin)
            print(f"  {name:20} {size / min(seconds):10.1f}   against {num_against} of {len(traces)}")


if __name__ == "__main__":
    main()
