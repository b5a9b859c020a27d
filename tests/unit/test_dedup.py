"""Duplicates: exact up to typing, near ones by MinHash, and who stands for whom."""

import random

import numpy as np
import pytest

from stillhouse.pipeline.dedup import (
    Duplicate,
    clusters,
    exact_duplicates,
    group_numbers,
    near_duplicate_problems,
    near_duplicates,
    normalized_text,
    text_digest,
)
from stillhouse.pipeline.overlap.minhash import bands_for, signatures, sketches
from stillhouse.pipeline.overlap.ngrams import ngram_hashes
from stillhouse.pipeline.records import Problem


def rows(*texts):
    return [(key, text_digest(normalized_text(text), group)) for key, text, group in texts]


def test_later_duplicates_name_the_first():
    """A trace learnt five times is overweighted five times; the verdict must lead to the one that stayed."""
    found = exact_duplicates(
        rows(
            ("a", "2 + 2 = 4", "p"),
            ("b", "2 + 2 =\n  4", "p"),
            ("c", "2 + 2 = 4", "other"),
            ("d", "2 + 2 = 5", "p"),
            ("e", "２ + ２ = ４", "p"),  # full-width digits
        )
    )
    verdicts = [dup.verdict() for dup in found]
    assert [(v.trace_key, v.evidence, v.keep, v.check, v.shadow) for v in verdicts] == [
        ("b", "a", False, "exact_dedup", False),
        ("e", "a", False, "exact_dedup", False),
    ]


def test_normal_form_ignores_typing_and_keeps_content():
    """Numbers and signs are content; only form, case and blanks are not."""
    assert normalized_text(" ＡＢ\u00a0c\n\nd ") == "ab c d"
    assert normalized_text("1 - 2") != normalized_text("1 + 2")
    assert normalized_text("12") != normalized_text("1 2")


def ngram_set(text, n=5):
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def jaccard(one, other):
    return len(ngram_set(one) & ngram_set(other)) / len(ngram_set(one) | ngram_set(other))


def edited(draw, text, num_edits):
    words = text.split()
    for _ in range(num_edits):
        words[draw.randrange(len(words))] = f"edit{draw.randrange(10**6)}"
    return " ".join(words)


def prose(draw, num_words):
    return " ".join(f"word{draw.randrange(3000)}" for _ in range(num_words))


def test_ngram_hashes_are_equal_exactly_where_the_words_are():
    """A hash that depends on what stands around a run of words finds no copy anywhere."""
    texts = ["a b c", "", "x", "z a b c d", "ä b c", "a b", "ab c"]
    hashes, starts = ngram_hashes(texts, 3)
    assert np.diff(starts).tolist() == [1, 0, 1, 3, 1, 1, 1]
    assert hashes[starts[3] + 1] == hashes[starts[0]]
    assert len(set(hashes.tolist())) == len(hashes) - 1


def test_signatures_estimate_the_jaccard_similarity():
    """Off by more than chance allows, the threshold in a recipe would not mean what it says."""
    draw = random.Random(3)
    errors = []
    for _ in range(60):
        text = prose(draw, 150)
        other = edited(draw, text, draw.randrange(12))
        one, two = signatures([text, other])
        errors.append(float((one == two).mean()) - jaccard(text, other))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.05  # 0.045 is the standard error at a similarity of one half


def test_near_duplicates_are_put_to_the_first_and_others_stay():
    """Twenty rewordings of one solution are one solution; unrelated ones of the same length are not."""
    draw = random.Random(4)
    originals = [prose(draw, 120) for _ in range(200)]
    copies = [edited(draw, text, 2) for text in originals[:50]]
    texts = originals + copies
    keys = [f"o{i}" for i in range(200)] + [f"c{i}" for i in range(50)]
    sketched = sketches(texts, group_numbers(["p"] * 250), threshold=0.7)
    found = near_duplicates(keys, sketched, threshold=0.7)
    assert {(dup.key, dup.kept_as) for dup in found} == {(f"c{i}", f"o{i}") for i in range(50)}
    assert all(abs(dup.similarity - jaccard(originals[i], copies[i])) < 0.15 for i, dup in enumerate(found))
    apart = sketches(texts, group_numbers(["p"] * 200 + ["q"] * 50), threshold=0.7)
    assert near_duplicates(keys, apart, threshold=0.7) == []


def test_a_chain_of_small_edits_does_not_swallow_what_differs():
    """a is like b and b like c: c goes only where it is like the a that stays."""
    draw = random.Random(5)
    chain = [prose(draw, 150)]
    for _ in range(12):
        chain.append(edited(draw, chain[-1], 3))
    sketched = sketches(chain, group_numbers(["p"] * len(chain)), threshold=0.7)
    found = near_duplicates([str(i) for i in range(len(chain))], sketched, threshold=0.7)
    assert 0 < len(found) < len(chain) - 2
    assert all(jaccard(chain[int(dup.key)], chain[int(dup.kept_as)]) > 0.55 for dup in found)
    assert {dup.kept_as for dup in found}.isdisjoint(dup.key for dup in found)


def test_bands_find_pairs_at_the_threshold():
    """Too few bands miss the duplicates that the threshold promises."""
    for threshold in (0.5, 0.7, 0.8, 0.95):
        num_bands, num_rows = bands_for(threshold)
        assert num_bands * num_rows <= 128
        assert 1 - (1 - threshold**num_rows) ** num_bands >= 0.95
    with pytest.raises(ValueError, match="over 0 and at most 1, got 80"):
        sketches(["a"], group_numbers(["p"]), threshold=80)


def problem(prompt, answer="1"):
    return Problem(prompt, answer, "math", "s", "train")


def test_problems_of_one_template_are_no_duplicates_and_rewordings_are():
    """A template's thousand problems share all words but the numbers; a rewording of one shares the numbers too."""
    text = "A farmer walks to the market with {} hens and sells {} of them before noon. How many hens does the farmer {} home?"
    numbered = [problem(text.format(a, b, "carry")) for a in range(10, 20) for b in range(2, 8)]
    reworded = problem(text.format(10, 2, "bring"))
    (found,) = near_duplicate_problems([*numbered, reworded])
    assert (found.key, found.kept_as, found.how) == (reworded.id, numbered[0].id, "prompt_dedup")
    assert near_duplicate_problems([]) == []


def test_clusters_name_the_one_that_stays_in_the_end():
    """An exact copy of a near copy must not be filed under a trace that is gone."""
    chain = [
        Duplicate("b", "a", 0.9, "near_dedup"),
        Duplicate("c", "b", 1.0, "exact_dedup"),
        Duplicate("y", "x", 1.0, "exact_dedup"),
    ]
    found = clusters(chain)
    assert [(cluster.kept, [dup.key for dup in cluster.duplicates]) for cluster in found] == [("a", ["b", "c"]), ("x", ["y"])]


def test_problems_of_one_template_with_other_words_are_no_duplicates():
    """Puzzles whose few own words stand in a long text are nearly all the same text; each is a problem all the same."""
    text = (
        "Two strings are isomorphic if the letters of one can be replaced to get the other one. All occurrences of a letter "
        "must be replaced by another letter while the order stays. No two letters may become the same one. True or false: {} {}"
    )
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefgh") for _ in range(4)) for _ in range(60)]
    puzzles = [problem(text.format(one, other)) for one, other in zip(words[::2], words[1::2])]
    assert near_duplicate_problems(puzzles) == []
    story = (
        "A farmer walks to the market with many hens and sells some of them before noon. On the way back it rains, and a "
        "neighbour with a cart offers a lift as far as the old mill by the river. Does the farmer {} any of the hens home?"
    )
    (found,) = near_duplicate_problems([*puzzles, problem(story.format("carry")), problem(story.format("bring"))])
    assert found.kept_as == problem(story.format("carry")).id
