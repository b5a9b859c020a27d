"""Measure decontamination in megabytes of clean traces a second beside datatrove's, and what both find, on one core.

    python -m tests.harness.decontamination_speed [--megabytes 2] [--rounds 3] [--items 60]

The items, and the ways in which they are planted, are those of `tests.harness.decontamination`. datatrove's NGramsDecontFilter
runs twice: as it ships (12 words, every number 0) and as near to ours as it can be set (8 words, numbers kept); its index holds
the items' own n-grams. Not equal work: its answer is one hash that is in a set, ours is an item that is there as a whole, or
nearly, with its own numbers. Ours is fast where a table of the items' rarest runs of words rules a text out; the same traces
with an item in each, where it has to look, are measured too.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from stillhouse.pipeline.decontamination import Decontaminator
from tests.harness.decontamination import cases, items_of
from tests.harness.long_traces import long_traces
from tests.harness.planted import Case
from tests.harness.side_by_side import interleaved, keep_to_one_core, missing, parser_of, table

Pairs = list[tuple[str, str]]
Route = Callable[[Pairs], list[bool]]


def routes_for(items: list[str], folder: Path) -> dict[str, Route]:
    """Ours, and datatrove's two where it can be imported: each says of (prompt, trace) pairs whether they hold an item."""
    judge = Decontaminator({"planted": items})
    routes: dict[str, Route] = {"ours": lambda pairs: [drop is not None for drop in judge.check_batch(pairs)]}
    if missing("datatrove", "spacy"):
        return routes
    from tests.harness.datatrove_routes import Contamination

    for name, num_words, numbers_as_zero in (("datatrove, as it ships", 12, True), ("datatrove, 8 words, numbers", 8, False)):
        (where := folder / str(num_words)).mkdir()
        theirs = Contamination(items, where, num_words=num_words, numbers_as_zero=numbers_as_zero)
        routes[name] = lambda pairs, theirs=theirs: [theirs.check(*pair) for pair in pairs]
    return routes


def shares_found(planted: Iterable[Case], routes: dict[str, Route]) -> list[str]:
    """Lines of the share that each route removes, by the class of case."""
    rows = list(planted)
    pairs = [(prompt, trace) for _, prompt, trace, _ in rows]
    classes = [kind.partition(":")[0] + (", to keep" if not to_remove else "") for kind, _, _, to_remove in rows]
    counts = Counter(classes)
    removed = {name: Counter(c for c, drop in zip(classes, route(pairs)) if drop) for name, route in routes.items()}
    lines = [f"  {'removed':42} {'cases':>6}" + "".join(f"{name:>30}" for name in routes)]
    for name, num in counts.items():
        shares = "".join(f"{100 * of_route[name] / num:28.1f} %" for of_route in removed.values())
        lines.append(f"  {name:42} {num:6}{shares}")
    return lines


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--megabytes", type=float, default=2.0, help="of traces of 12,000 characters through every route")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=60, help="items a task")
    arguments = parser.parse_args()
    keep_to_one_core()
    if why := missing("datatrove", "spacy"):
        print(f"datatrove: not measured, {why}")
    items, siblings, _ = items_of(arguments.items)
    clean = [("?", trace.completion) for trace in long_traces(max(1, int(arguments.megabytes * 1e6 / 12_000)), seed=9)]
    draw = random.Random(1)
    holding = [(prompt, trace.replace("</think>", f"\n{draw.choice(items)}\n</think>", 1)) for prompt, trace in clean]
    with tempfile.TemporaryDirectory(prefix="decontamination-") as folder:
        routes = routes_for(items, Path(folder))
        print("\n".join(shares_found(cases(items, siblings, random.Random(0)), routes)))
        for name, pairs in (("clean", clean), ("with an item in each", holding)):
            size = sum(len(trace.encode()) for _, trace in pairs) / 1e6
            costs = interleaved(
                {n: lambda route=route, pairs=pairs: route(pairs) for n, route in routes.items()}, arguments.rounds
            )
            print(
                f"{len(pairs)} traces, {name}, {size:.1f} MB, {len(items)} items, medians of {arguments.rounds} rounds in turn"
            )
            print("\n".join(table(costs, size, "MB")))


if __name__ == "__main__":
    main()
