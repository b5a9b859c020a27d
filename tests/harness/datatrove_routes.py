"""datatrove's own steps on lists of texts: decontamination by word n-grams, MinHash deduplication, quality filters.

Each is the class that datatrove's pipelines are made of, with its English word tokenizer (spaCy). What is set otherwise than
it ships is said where it is. N-grams are hashed by SHA-1, its second choice: its first, xxhash, raises on text with xxhash 4,
which is pinned here. Import this module only where `side_by_side.missing("datatrove", "spacy")` is "".
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.decont import NGramsDecontFilter, NGramsDecontIndexer
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import TextNormConfig, split_into_words
from loguru import logger

logger.disable("datatrove")

NUM_BUCKETS = 14
HASHES = HashConfig(hash_fc="sha1")


def documents(texts: Iterable[str]) -> list[Document]:
    return [Document(text=text, id=str(number)) for number, text in enumerate(texts)]


class Contamination:
    """Its NGramsDecontFilter over an index of the items' own n-grams, in ``folder``.

    Args:
        num_words: words of an n-gram; 12 as it ships. An item shorter than that has none, and is not looked for.
        numbers_as_zero: every number becomes 0 before the comparison; so it ships.
    """

    def __init__(self, items: Iterable[str], folder: Path, *, num_words: int = 12, numbers_as_zero: bool = True) -> None:
        config = NGramsDecontConfig(
            n_grams=num_words,
            find_query_ngrams=True,
            norm_config=TextNormConfig(norm_numbers=numbers_as_zero),
            hash_config=HASHES,
        )
        # The indexer's constructor and run ask for lighteval, which they need for its own benchmarks only; the hashes do not.
        indexer = object.__new__(NGramsDecontIndexer)
        indexer.__init__(str(folder), config=config)
        hashes = {value for item in items for value in indexer.compute_hashes(item)}
        np.array(sorted(hashes), np.uint64).tofile(folder / "items.index.hashes")
        self._filter = NGramsDecontFilter(str(folder), config=config)

    def check(self, prompt: str, trace: str) -> bool:
        """Whether the prompt and the trace, as one document, hold an n-gram of an item."""
        return self._filter.filter(Document(text=f"{prompt}\n{trace}", id="")) is not True


def quality_filters() -> dict[str, GopherRepetitionFilter | GopherQualityFilter | C4QualityFilter]:
    """Its three cheap filters as they ship, but for C4's rule that drops every text with a curly bracket: LaTeX has them."""
    return {
        "Gopher repetition": GopherRepetitionFilter(),
        "Gopher quality": GopherQualityFilter(),
        "C4 quality": C4QualityFilter(filter_curly_bracket=False),
    }


def words(text: str) -> Sequence[str]:
    return split_into_words(text)


def minhash_removed(texts: Iterable[str], folder: Path) -> set[int]:
    """The rows that its MinHash pipeline removes: signatures, buckets and clusters on one worker, over files in ``folder``.

    14 buckets of 8 hashes of 5 words, as it ships: equal in one bucket is a duplicate, half of the pairs at a similarity of 0.7
    and 92 in 100 at 0.8; no estimate is looked at. Numbers are kept, where it ships with every number as 0.
    """
    config = MinhashConfig(norm_config=TextNormConfig(norm_numbers=False), hash_config=HASHES)
    signed, pairs, removed = (str(folder / name) for name in ("signatures", "pairs", "removed"))
    rows = (Document(text=text, id="") for text in texts)
    MinhashDedupSignature(signed, config=config).run(rows, 0, 1)
    for bucket in range(NUM_BUCKETS):
        MinhashDedupBuckets(signed, pairs, config=config).run(None, bucket, NUM_BUCKETS)
    MinhashDedupCluster(pairs, removed, config=config).run(None, 0, 1)
    found = folder / "removed" / "000000.remove"
    return set(np.fromfile(found, np.uint32).tolist()) if found.exists() else set()
