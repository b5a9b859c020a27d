"""Plant items of families that decontamination was not tuned on, in many ways, and count what is found and wrongly removed.

The part of `tests.harness.decontamination` beyond the families that the method was first made with: those that were looked at
while it was widened, then those that were counted first and had their misses looked at last.
"""

from __future__ import annotations

import random
from collections import Counter

from stillhouse.pipeline.decontamination import Decontaminator
from stillhouse.pipeline.overlap.words import to_words
from tests.harness.planted import Case, grams, to_keep, to_remove
from tests.harness.unseen_items import families

TARGETS = {
    "verbatim and format variants": (("verbatim", "format"), 100.0),
    "embedded": (("embedded",), 99.0),
    "short, embedded": (("short",), 99.0),
    "harder cuts": (("harder",), 0.0),
    "number-swapped, wrongly removed": (("number-swapped",), 1.0),
    "one number changed, wrongly removed": (("one number changed",), 1.0),
    "some numbers equal, wrongly removed": (("one number kept", "some numbers equal"), 1.0),
    "fresh of the same family, wrongly removed": (("fresh",), 1.0),
}
"""By class: how its kinds of cases begin, and the share in percent to reach, or not to exceed; 0 to reach is no target."""


def unseen_cases(held_out: bool, size: int) -> tuple[list[str], list[tuple[str, Case]]]:
    """The items of the seen or the held-out families, and (family, case) for each way in which they are planted."""
    draw = random.Random(0)
    planted: list[tuple[str, Case]] = []
    indexed, others = (families(held_out, size=size, seed=seed) for seed in (1, 10**6))
    known = {to_words(item).words for items in indexed.values() for item in items}
    texts = {" ".join(item.split()) for items in indexed.values() for item in items}
    for family, items in indexed.items():
        fresh = [text for text in others[family] if " ".join(text.split()) not in texts]
        of_fresh = {gram for text in fresh for gram in grams(text)}
        for i, item in enumerate(items):
            found = [*to_remove(item, of_fresh, draw), *to_keep(item, fresh[i % len(fresh)] if fresh else item, known, draw)]
            planted += [(family, case) for case in found]
    return list(dict.fromkeys(item for items in indexed.values() for item in items)), planted


def report(held_out: bool, size: int) -> list[str]:
    """Print what is found of the planted items and what is wrongly removed; return the targets that are missed."""
    items, planted = unseen_cases(held_out, size)
    drops = Decontaminator({"planted": items}).check_batch([(prompt, trace) for _, (_, prompt, trace, _) in planted])
    num, hits, mistakes = Counter[str](), Counter[str](), Counter[tuple[str, str]]()
    missed = []
    for (family, (kind, _, _, wanted)), drop in zip(planted, drops):
        num[kind] += 1
        hits[kind] += drop is not None
        mistakes[kind, family] += (drop is not None) != wanted
    print(f"\n{'held-out' if held_out else 'seen'} families: {len(items)} items, {len(planted)} cases")
    for name, (starts, target) in TARGETS.items():
        kinds = [kind for kind in num if kind.startswith(starts)]
        if not kinds:
            continue
        share = 100 * sum(hits[kind] for kind in kinds) / sum(num[kind] for kind in kinds)
        bound = "at most" if "wrongly" in name else "at least"
        if share > target if bound == "at most" else share < target:
            missed.append(f"{'held-out' if held_out else 'seen'} families, {name}")
        goal = f"target: {bound} {target:g} %" if target else "no target"
        print(f"  {name:42} {sum(num[kind] for kind in kinds):6} {share:7.2f} %   {goal}")
        for kind in kinds:
            worst = [(count, family) for (of, family), count in mistakes.items() if of == kind and count]
            if worst:
                names = ", ".join(f"{family} {count}" for count, family in sorted(worst, reverse=True)[:4])
                print(f"    {kind:40} {num[kind]:6} {100 * hits[kind] / num[kind]:7.2f} %   mistakes: {names}")
    return missed
