"""Intervals for accuracies and for differences of accuracies, and how many items would decide an open question.

Every interval here is a score interval or a Laplace-adjusted one, none is the textbook ``p ± z·sqrt(p(1−p)/n)``: that one
has zero width at 0 % and 100 % and covers too seldom near them, which is where evaluations of small models live.
Standard library only.

Sources
    Wilson, JASA 22 (1927) 209; Newcombe, Statistics in Medicine 17 (1998) 857 (one proportion) and 873 (two);
    Bonett and Price, J. Educational and Behavioral Statistics 37 (2012) 479, recommended for paired proportions at any
    sample size by Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014) 2850; Franco, Little, Louis and Slud,
    J. Survey Statistics and Methodology 7 (2019) 334 (Wilson with an effective sample size); McNemar, Psychometrika 12
    (1947) 153.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its two-sided confidence interval; ``n`` is the number of items behind it, not of samples."""

    value: float
    low: float
    high: float
    n: int


def wilson(num_correct: float, n: float, confidence: float = 0.95) -> Interval:
    """Give a success rate its Wilson score interval, for one sample an item.

    Raises:
        ValueError: no item, or more successes than items.
    """
    if not (n > 0 and 0 <= num_correct <= n):
        raise ValueError(f"a rate needs 0 <= num_correct <= n and n > 0; got num_correct={num_correct}, n={n}")
    z2 = _z(confidence) ** 2
    p = num_correct / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2) / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if num_correct == 0 else max(0.0, centre - half)  # exact at the ends, where rounding would leave 1e-18
    high = 1.0 if num_correct == n else min(1.0, centre + half)
    return Interval(p, low, high, int(n))


def clustered(correct_by_item: Mapping[str, Sequence[bool]], confidence: float = 0.95) -> Interval:
    """Give the mean over items of each item's share of right samples, with an interval that knows samples are not items.

    Ten samples of one problem succeed and fail together, so they are worth less than ten problems. The variance of the
    mean is taken between items, turned into the number of independent answers it is worth, and Wilson's formula is used
    with that number (Franco et al. 2019). With one sample an item this is exactly ``wilson``. Where the samples show no
    variance (all right, or all wrong) every item counts as one answer.

    Raises:
        ValueError: no item, or an item without a sample.
    """
    if not correct_by_item:
        raise ValueError("an accuracy needs at least one item; got none")
    empty = [item for item, samples in correct_by_item.items() if not samples]
    if empty:
        raise ValueError(
            f"an accuracy needs at least one sample an item; {len(empty)} items have none, the first is {empty[0]!r}"
        )
    rates = [fmean(samples) for samples in correct_by_item.values()]
    num_items, num_samples = len(rates), sum(len(samples) for samples in correct_by_item.values())
    p = fmean(rates)
    if p in (0.0, 1.0):
        worth = float(num_items)
    else:
        variance = sum((rate - p) ** 2 for rate in rates) / num_items**2
        # Not more than the samples there are: items that are all at the same rate would be worth infinitely many.
        worth = min(p * (1 - p) / variance, num_samples) if variance > 0 else float(num_samples)
    interval = wilson(p * worth, worth, confidence)
    return Interval(p, interval.low, interval.high, num_items)


def paired_difference(a: Mapping[str, float], b: Mapping[str, float], confidence: float = 0.95) -> Interval:
    """Estimate the mean of ``a − b`` over the same items, for right/wrong scores and for shares of right samples alike.

    Bonett and Price's interval: one pseudo-item at +1 and one at −1 are added, then the normal interval of the mean is
    taken. Chosen over Newcombe's paired interval because it needs no 2×2 table and so also takes an item's mean over
    several samples (the interval is then clustered by item), and over the bootstrap and the t interval because neither
    says anything sensible when no item differs: here two identical models get ±2.8/(n+2), not ±0.

    Args:
        a, b: item → score in [0, 1].

    Raises:
        ValueError: no item, different items, or a score outside [0, 1].
    """
    if a.keys() != b.keys():
        raise ValueError(
            f"a paired difference needs the same items on both sides; {len(a.keys() - b.keys())} are only in a, "
            f"{len(b.keys() - a.keys())} only in b"
        )
    if not a:
        raise ValueError("a paired difference needs at least one item; got none")
    for scores in (a, b):
        for item, score in scores.items():
            if not 0 <= score <= 1:
                raise ValueError(f"item {item!r} has the score {score}; a score lies in [0, 1]")
    differences = [a[item] - b[item] for item in a]
    n = len(differences)
    value = math.fsum(differences) / n
    centre = math.fsum(differences) / (n + 2)
    variance = (math.fsum(d * d for d in differences) + 2) / (n + 2) - centre * centre
    half = _z(confidence) * math.sqrt(variance / (n + 2))
    return Interval(value, max(-1.0, min(value, centre - half)), min(1.0, max(value, centre + half)), n)


def newcombe_difference(k1: int, n1: int, k2: int, n2: int, confidence: float = 0.95) -> Interval:
    """Estimate ``k1/n1 − k2/n2`` of two independent samples: Newcombe's hybrid score interval (his method 10).

    ``n`` of the result is the smaller sample's.
    """
    first, second = wilson(k1, n1, confidence), wilson(k2, n2, confidence)
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Interval(value, max(-1.0, low), min(1.0, high), min(n1, n2))


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p value that two models differ, from the items only one of them got right (``b`` and ``c``)."""
    if b < 0 or c < 0:
        raise ValueError(f"discordant counts are at least 0; got b={b}, c={c}")
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1))
    return min(1.0, 2 * tail / 2 ** (b + c))  # integers up to the last division: exact for any count


def items_to_decide(interval: Interval, threshold: float) -> int | None:
    """Say how many items in all would put the threshold outside the interval, if the estimate stays where it is.

    The width of an interval falls with the square root of the items. Returns None when the estimate is on the threshold,
    where no number decides, and ``interval.n`` when the interval decides already. It is a planning figure: since the
    estimate itself will move, a run with that many items decides about every second time.
    """
    gap = abs(interval.value - threshold)
    if not interval.low <= threshold <= interval.high:
        return interval.n
    if gap < 1e-12:
        return None
    half = interval.value - interval.low if interval.value > threshold else interval.high - interval.value
    return math.ceil(interval.n * (half / gap) ** 2)


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1, for example 0.95; got {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)
