"""Properties of dedup, decontamination and selection that no table of examples covers."""

import re
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.pipeline.decontamination import Decontaminator
from stillhouse.pipeline.dedup import exact_duplicates, group_numbers, near_duplicates, normalized_text, text_digest
from stillhouse.pipeline.filters.repetition import Repetition
from stillhouse.pipeline.overlap.minhash import sketches
from stillhouse.pipeline.overlap.ngrams import mixed, ngram_hashes, ngram_hashes_of, run_hashes, single_blanks, window_hashes
from stillhouse.pipeline.overlap.words import plain_text, to_words
from stillhouse.pipeline.selection import Candidate, select

WORD = st.sampled_from(["ant", "bee", "cow", "4", "17", "é", "数"])
TEXT = st.lists(WORD, max_size=14).map(" ".join)
PIECES = [
    *("\\frac{3}{4}", "\\dfrac{", "}{", "\\text{", "}", "\\times", "\\div", "\\begin{x}", "\\,", "\\left(", "\\sqrt", "$", "~"),
    *("1,000", "1{,}000", ",", "000", "x²", "½", "<think>", "</p>", "a<b", "(4 points)", "(4", "12", ".", "5", "-", "*", "—"),
    *("ab", "é", "数", "૦", "٣", " ", "\n"),
]
MARKUP = st.one_of(st.lists(st.sampled_from(PIECES), max_size=20).map("".join), st.text(max_size=40))
SENTENCE = st.lists(
    st.sampled_from(["how", "many", "legs", "have", "3", "5", "12", "dogs", "hens", "if", "sell", "7", "the", "farm"]),
    max_size=30,
)


@given(st.lists(TEXT, max_size=6), st.integers(1, 6))
def test_ngram_hashes_are_a_function_of_the_words_alone(texts, n):
    """Hashes that depend on the batch would find another set of duplicates each time the batches are cut otherwise."""
    hashes, starts = ngram_hashes(texts, n) if texts else (np.zeros(0), [0])
    for i, text in enumerate(texts):
        alone, _ = ngram_hashes([text], n)
        assert hashes[starts[i] : starts[i + 1]].tolist() == alone.tolist()
        words = text.split()
        grams = [tuple(words[k : k + n]) for k in range(max(1, len(words) - n + 1))] if words else []
        assert len(alone) == len(grams)
        assert len(set(alone.tolist())) == len(set(grams))
        if len(words) >= n:
            assert mixed(ngram_hashes_of(text, n)).tolist() == alone.tolist()
        else:
            assert len(ngram_hashes_of(text, n)) == 0


@settings(max_examples=400)
@given(MARKUP)
def test_the_quick_words_are_the_exact_ones(text):
    """A copy whose quick words differ from its exact ones would never be looked at closely."""
    exact = re.findall(r"[^\W\d_]+|\d+", " ".join(to_words(text).words))
    hashes, _ = run_hashes([plain_text(text)])
    assert hashes.tolist() == run_hashes([" ".join(exact)])[0].tolist()
    assert len(window_hashes(hashes, 3)) == max(0, len(exact) - 2)


@given(st.text(alphabet="ab \n\t\r", max_size=40))
def test_single_blanks_is_split_and_join(text):
    """The repetition filter counts words by it."""
    assert single_blanks(text) == " ".join(text.split())


@given(st.text(max_size=80))
def test_a_normal_form_is_normal(text):
    """Normalized twice, a text must stay; else the second pass finds duplicates that the first did not."""
    assert normalized_text(normalized_text(text)) == normalized_text(text)


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXT.filter(bool), min_size=1, max_size=25), st.sampled_from([0.5, 0.8]))
def test_dedup_is_idempotent_and_keeps_one_of_each(texts, threshold):
    """A resumed filter stage must come to the same rows, and no text may lose its last copy."""
    keys = [str(i) for i in range(len(texts))]

    def passed_over(rows):
        dropped = {dup.key for dup in exact_duplicates((keys[i], text_digest(texts[i])) for i in rows)}
        rows = [i for i in rows if keys[i] not in dropped]
        sketched = sketches([texts[i] for i in rows], group_numbers(["p"] * len(rows)), threshold=threshold)
        near = near_duplicates([keys[i] for i in rows], sketched, threshold=threshold)
        gone = {dup.key for dup in near}
        assert all(dup.kept_as not in gone and dup.similarity >= threshold for dup in near)
        return [i for i in rows if keys[i] not in gone]

    left = passed_over(range(len(texts)))
    assert left[0] == 0
    assert passed_over(left) == left


@settings(max_examples=60, deadline=None)
@given(
    st.lists(SENTENCE.map(" ".join), min_size=1, max_size=8), st.sampled_from(["{}", "Task.\n{}\nGo.", "**{}**", "<p>{}</p>"])
)
def test_no_item_gets_through_verbatim_whatever_the_other_items_are(items, around):
    """What other items share with it must not hide an item that stands there word for word."""
    decontaminator = Decontaminator({"set": items})
    for item in items:
        num_words = len(to_words(item).words)
        if num_words >= 8:
            assert decontaminator.check("What is a leap year?", "<think>So: " + around.format(item) + "</think>4") is not None
        if num_words >= 3:
            assert decontaminator.check(around.format(item), "") is not None


@settings(max_examples=60, deadline=None)
@given(st.lists(SENTENCE, min_size=1, max_size=5), st.integers(13, 99))
def test_another_number_is_another_problem(sentences, number):
    """Templates give a thousand problems that differ in numbers alone; all but the test's must stay."""
    decontaminator = Decontaminator([" ".join(words) for words in sentences])
    for words in sentences:
        places = [i for i, word in enumerate(words) if word.isdigit()]
        for place in places:
            swapped = " ".join([*words[:place], str(number), *words[place + 1 :]])
            if len(words) >= 8 and all(len(other) >= 8 for other in sentences):
                assert decontaminator.check(swapped, f"<think>{swapped}</think>") is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["one", "two", "three"]), min_size=30, max_size=120), st.integers(2, 9))
def test_repeated_runs_are_counted_exactly(words, limit):
    """The filter counts by hash; a loop must be found at its limit and not one time before."""
    never = 10**6
    loops = Repetition(never, never, never, never, ngram=4, max_same_ngram=limit, min_share=0, compress_from_bytes=never)
    text = " ".join(words)
    hashes = ngram_hashes_of(text, 4)
    gram, times = Counter(tuple(words[i : i + 4]) for i in range(len(words) - 3)).most_common(1)[0]
    drop = loops._ngrams(text, hashes, np.sort(hashes))
    assert (drop is not None) == (times >= limit)
    if drop:
        assert drop.evidence == f"{times} times: {' '.join(gram)}"


CANDIDATES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 50), st.sampled_from("abc"), st.sampled_from("xy")), max_size=40
).map(lambda rows: [Candidate(f"k{i}", f"p{p}", f"s{p % 3}", n, i, t) for i, (p, n, _, t) in enumerate(rows)])


@settings(max_examples=60, deadline=None)
@given(
    CANDIDATES, st.randoms(), st.integers(1, 4), st.sampled_from(["shortest", "mixed", "random"]), st.integers(1, 20),
    st.sampled_from(["equal", "proportional"]),
)  # fmt: skip
def test_selection_accounts_for_all_and_does_not_look_at_the_order(rows, random, k, strategy, cap, balance):
    """Nothing may be lost or kept twice, no bound be broken, and no Ray schedule decide what is learnt."""
    arguments = {"per_problem": k, "seed": 3, "strategy": strategy, "per_source": cap, "max_total": 2 * cap, "balance": balance}
    kept, verdicts = select(rows, **arguments)
    assert sorted([row.key for row in kept] + [v.trace_key for v in verdicts]) == sorted(row.key for row in rows)
    assert max(Counter(row.problem_id for row in kept).values(), default=0) <= k
    assert max(Counter(row.source for row in kept).values(), default=0) <= cap
    assert len(kept) <= 2 * cap
    shuffled = random.sample(rows, len(rows))
    assert select(shuffled, **arguments) == (kept, verdicts)
