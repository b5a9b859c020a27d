"""Duplicates among traces and among prompts: exact up to typing, and near ones by MinHash; who stands for whom is recorded.

Everything here works on what is small of a text (a digest, a sketch), made batch by batch, so that no texts are held.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from stillhouse.pipeline.records import Problem, Verdict

if TYPE_CHECKING:
    import numpy as np

    from stillhouse.pipeline.overlap.minhash import Sketches

DEDUP_VERSION = 3
NEAR_THRESHOLD = 0.8
"""Estimated Jaccard similarity of the sets of 5-word runs from which two texts are near duplicates."""

_RUN = 3  # words of a run by which prompts are compared
_MAX_PROMPTS = 8  # that have a run which is no template's

How = Literal["exact_dedup", "near_dedup", "prompt_dedup"]
_REASONS: dict[str, str] = {
    "exact_dedup": "duplicate of an earlier trace",
    "near_dedup": "near duplicate of an earlier trace",
    "prompt_dedup": "its prompt nearly repeats another problem's",
}


def normalized_text(text: str) -> str:
    """Bring text to one form for comparison: NFKC, case folded, whitespace collapsed to single blanks."""
    if text.isascii():
        return " ".join(text.lower().split())
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def text_digest(normalized: str, group: str = "") -> bytes:
    """16 bytes that name a normalized text within a group (the problem that it answers)."""
    return blake2b(normalized.encode(), digest_size=16, key=blake2b(group.encode(), digest_size=32).digest()).digest()


@dataclass(frozen=True, slots=True)
class Duplicate:
    """One text that another stands for. ``similarity`` is 1 for exact ones, else the estimate that `near_dedup` went by."""

    key: str
    kept_as: str
    similarity: float
    how: How

    def verdict(self, *, shadow: bool = False) -> Verdict:
        evidence = self.kept_as if self.how == "exact_dedup" else f"{self.similarity:.2f} like {self.kept_as}"
        return Verdict(self.key, self.how, DEDUP_VERSION, False, _REASONS[self.how], evidence, shadow=shadow)


@dataclass(frozen=True, slots=True)
class DuplicateCluster:
    """Texts that say the same: the one kept, which is the first in the order given, and those it stands for."""

    kept: str
    duplicates: tuple[Duplicate, ...]


def exact_duplicates(rows: Iterable[tuple[str, bytes]]) -> list[Duplicate]:
    """Find the rows (key, digest) whose digest an earlier row has; a second pass over what is left finds nothing."""
    first: dict[bytes, str] = {}
    found = []
    for key, digest in rows:
        original = first.setdefault(digest, key)
        if original != key:
            found.append(Duplicate(key, original, 1.0, "exact_dedup"))
    return found


def near_duplicates(keys: Sequence[str], sketched: Sketches, *, threshold: float = NEAR_THRESHOLD) -> list[Duplicate]:
    """Find the texts that nearly repeat an earlier kept one of their group.

    Args:
        keys: in the order of preference: the earlier of two near duplicates is kept.
        sketched: of the texts, in the order of the keys, made for the same threshold.
    """
    from stillhouse.pipeline.overlap import minhash

    kept_as, similarity = minhash.near_duplicates(sketched, threshold=threshold)
    return [
        Duplicate(keys[i], keys[int(kept_as[i])], round(float(similarity[i]), 4), "near_dedup")
        for i in (kept_as != range(len(keys))).nonzero()[0].tolist()
    ]


def near_duplicate_problems(problems: Sequence[Problem], *, threshold: float = NEAR_THRESHOLD) -> list[Duplicate]:
    """Find the problems whose prompt nearly repeats an earlier one's and has the same numbers in the same order.

    Problems of one template with other numbers are other problems, and so are those with other words in their places: what more
    than ``_MAX_PROMPTS`` of the prompts that look alike share is a template's, and the rest is compared by itself. Keys are
    problem ids.
    """
    from stillhouse.pipeline.overlap import minhash
    from stillhouse.pipeline.overlap.words import to_words

    unique = list({problem.id: problem for problem in problems}.items())
    groups = group_numbers([" ".join(to_words(problem.prompt).numbers) for _, problem in unique])
    texts = [normalized_text(problem.prompt) for _, problem in unique]
    kept_as, _ = minhash.near_duplicates(
        minhash.sketches(texts, groups, threshold=threshold, num_words=_RUN), threshold=threshold
    )
    alike = sorted({row for i, kept in enumerate(kept_as.tolist()) if kept != i for row in (i, kept)})
    own = _without_template([texts[i] for i in alike])
    sketched = minhash.sketches(own, groups[alike], threshold=threshold, num_words=_RUN)
    found = near_duplicates([unique[i][0] for i in alike], sketched, threshold=threshold)
    return [Duplicate(dup.key, dup.kept_as, dup.similarity, "prompt_dedup") for dup in found]


def _without_template(texts: Sequence[str]) -> list[str]:
    """The words of each text that stand in a run which few of the texts have; all of them where there are none."""
    words_of = [text.split() for text in texts]
    runs_of = [[tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)] for words in words_of]
    num_texts = Counter(run for runs in {tuple(runs) for runs in runs_of} for run in set(runs))
    own = []
    for text, words, runs in zip(texts, words_of, runs_of):
        kept = sorted({i + k for i, run in enumerate(runs) if num_texts[run] <= _MAX_PROMPTS for k in range(_RUN)})
        own.append(" ".join(words[i] for i in kept) or text)
    return own


def group_numbers(names: Sequence[str]) -> np.ndarray:
    """A uint64 for each group's name, for `stillhouse.pipeline.overlap.minhash.sketches`."""
    import numpy as np

    return np.array([int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") for name in names], np.uint64)


def clusters(duplicates: Iterable[Duplicate]) -> list[DuplicateCluster]:
    """Gather duplicates by the text that stands for them in the end (an exact copy of a near copy belongs to the last kept)."""
    found = list(duplicates)
    kept_as = {dup.key: dup.kept_as for dup in found}
    members: dict[str, list[Duplicate]] = defaultdict(list)
    for dup in found:
        kept = dup.kept_as
        while kept in kept_as:
            kept = kept_as[kept]
        members[kept].append(dup)
    return [DuplicateCluster(kept, tuple(of_kept)) for kept, of_kept in sorted(members.items())]
