"""The whole filter stage on records, with real verifiers: what comes out, and where everything else went."""

import pickle
import random
from collections import Counter

import pytest

from stillhouse.pipeline.decontamination import Decontaminator
from stillhouse.pipeline.filters.settings import default_filters
from stillhouse.pipeline.funnel import FunnelRow, filter_traces, settle, survey_batch
from stillhouse.pipeline.problems import reasoning_gym_problems
from stillhouse.pipeline.records import Problem, Trace, Verdict, content_key, from_table, to_table

TRAIN = reasoning_gym_problems("chain_sum", split="train", size=6, seed=1, options={"min_digits": 2})
TEST = reasoning_gym_problems("chain_sum", split="test", size=6, seed=500, options={"min_digits": 2})

FILTERS = default_filters(min_tokens=5, max_tokens=100)


def make_trace(problem, index, completion, *, tokens=40, finish_reason="stop"):
    prompt = f"<|user|>{problem.prompt}<|assistant|>"
    key = content_key(problem.id, index)
    return Trace(
        key, problem.id, "teacher", "r", prompt, completion, None, None, finish_reason, 9, tokens, 0.6, 0.95, 512, index, 1, 0.1
    )


def worked(problem, note="", answer=None):
    return f"<think>\nStep by step{note}.\n</think>\n\\boxed{{{problem.answer if answer is None else answer}}}"


def all_kinds_of_traces():
    """Eight traces of each problem: three good ones, and one for each way to fall out."""
    traces = []
    for problem in TRAIN:
        leak = f": as in this one: {TEST[0].prompt}\nnow mine"
        traces += [
            make_trace(problem, 0, worked(problem), tokens=40),
            make_trace(problem, 1, worked(problem, " again"), tokens=30),
            make_trace(problem, 2, worked(problem, " anew"), tokens=50),
            make_trace(problem, 3, worked(problem).replace("\n", "  ")),  # a duplicate of 0
            make_trace(problem, 4, worked(problem, answer=int(problem.answer) + 1)),
            make_trace(problem, 5, "<think>\nStep", finish_reason="length"),
            make_trace(problem, 6, f"\\boxed{{{problem.answer}}}"),
            make_trace(problem, 7, worked(problem, leak)),
        ]
    return traces


def run(traces, **changes):
    arguments = {"test_problems": TEST, "per_problem": 2, "min_tokens": 5, "max_tokens": 100, "seed": 0} | changes
    return filter_traces(TRAIN, traces, **arguments)


def test_each_trace_is_kept_or_dropped_for_its_own_reason():
    """The funnel is what a user looks at when too little is left; every number in it must be true."""
    result = run(all_kinds_of_traces())
    assert sorted(t.sample_index for t in result.kept) == [0] * 6 + [1] * 6
    assert result.funnel == [
        FunnelRow("format", "no think block", 48, 6),
        FunnelRow("format", "not finished", 48, 6),
        FunnelRow("verification", "wrong", 36, 6),
        FunnelRow("dedup", "duplicate of an earlier trace", 30, 6),
        FunnelRow("decontamination", "the trace holds a test problem", 24, 6),
        FunnelRow("selection", "not among the k best", 18, 6),
    ]


def test_everything_that_goes_in_is_accounted_for():
    """Nothing is deleted: a trace without a final verdict would be lost from the report."""
    traces = all_kinds_of_traces()
    result = run(traces)
    dropped = {v.trace_key for v in result.verdicts if not v.keep and not v.shadow}
    selected = {v.trace_key for v in result.verdicts if v.check == "selected"}
    assert selected == {t.key for t in result.kept}
    assert dropped.isdisjoint(selected)
    assert dropped | selected == {t.key for t in traces}
    assert sum(row.num_dropped for row in result.funnel) == len(dropped)
    verified = [v for v in result.verdicts if v.check == "verify_reasoning_gym"]
    assert len(verified) == 48, "what a filter dropped is verified too, so that the filter's cost is known"
    assert [v.shadow for v in verified].count(False) == 36
    assert {v.outcome for v in verified} == {"correct", "wrong"}
    assert {v.outcome for v in result.verdicts if v.check != "verify_reasoning_gym"} == {""}
    assert not any(v.shadow and v.check not in ("near_dedup", "verify_reasoning_gym") for v in result.verdicts)
    assert from_table(Verdict, to_table(Verdict, result.verdicts)) == result.verdicts


def test_the_order_of_the_traces_changes_nothing():
    """Traces come from many workers; another order must not give another training set or another report."""
    traces = all_kinds_of_traces()
    expected = run(traces)
    for shuffle_seed in range(3):
        assert run(random.Random(shuffle_seed).sample(traces, len(traces))) == expected


def test_a_trace_delivered_twice_counts_once():
    """Stores deliver at least once; the second copy must neither weigh double nor drop the first as its duplicate."""
    traces = all_kinds_of_traces()
    assert run(traces + traces) == run(traces)


def test_a_stage_that_drops_nothing_still_has_a_row():
    """A missing row reads as a stage that did not run."""
    result = run([make_trace(p, 0, worked(p)) for p in TRAIN], per_problem=1)
    stages = ["format", "verification", "dedup", "decontamination", "selection"]
    assert result.funnel == [FunnelRow(stage, "", 6, 0) for stage in stages]
    assert len(result.kept) == 6


def test_no_traces_give_an_empty_result():
    """The runner decides that nothing kept is an error; the stage itself must get that far."""
    result = run([])
    assert (result.kept, result.verdicts) == ([], [])
    assert [row.num_in for row in result.funnel] == [0] * 5


def test_undecided_is_dropped_under_its_own_name():
    """Counted as wrong, an undecidable gold would be blamed on the teacher."""
    problem = Problem("Is it?", "Paris", "choice", "mine", "train")
    result = filter_traces(
        [problem],
        [make_trace(problem, 0, worked(problem, answer="P"))],
        test_problems=[],
        per_problem=1,
        min_tokens=1,
        max_tokens=99,
        seed=0,
    )
    assert FunnelRow("verification", "undecided", 1, 1) in result.funnel
    assert result.kept == []


def test_progress_ends_full():
    """The bar of the slow stage must move and end full."""
    calls = []
    run(all_kinds_of_traces(), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(48, 48)]


def test_batches_may_be_cut_and_come_back_in_any_order():
    """Ray tasks judge batches on any node; the training set and the report must be those of one process."""
    traces = all_kinds_of_traces()
    whole = run(traces)
    by_id = {problem.id: problem for problem in TRAIN}
    decontaminator = pickle.loads(pickle.dumps(Decontaminator(p.prompt for p in TEST)))
    settings = default_filters(min_tokens=5, max_tokens=100)
    for seed, size in ((1, 1), (2, 7), (3, 48)):
        shuffled = random.Random(seed).sample(traces, len(traces))
        batches = [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
        surveys = (pickle.loads(pickle.dumps(survey_batch(by_id, batch, settings, decontaminator))) for batch in batches)
        settled = settle(surveys, by_id, selection={"per_problem": 2, "seed": 0})
        assert [row.key for row in settled.kept] == [trace.key for trace in whole.kept]
        assert settled.funnel == whole.funnel
        assert settled.clusters == whole.clusters


def test_near_duplicates_are_watched_by_default_and_dropped_on_demand():
    """What MinHash takes out is a hypothesis; the report has to show it before a recipe trusts it."""
    problem = TRAIN[0]
    words = " ".join(f"step {i} adds {i * 7}" for i in range(60))
    traces = [make_trace(problem, i, worked(problem, f" {words} {note}")) for i, note in enumerate(("so", "thus", "hence"))]
    watched, dropped = (run(traces, per_problem=9, near_dedup=mode) for mode in ("shadow", "drop"))
    assert len(watched.kept) == 3
    assert [v.trace_key for v in watched.verdicts if v.shadow and v.check == "near_dedup"] == [t.key for t in traces[1:]]
    assert [t.key for t in dropped.kept] == [traces[0].key]
    assert FunnelRow("dedup", "near duplicate of an earlier trace", 3, 2) in dropped.funnel
    (cluster,) = dropped.clusters
    assert (cluster.kept, [dup.key for dup in cluster.duplicates]) == (traces[0].key, [t.key for t in traces[1:]])


def test_the_teachers_own_pass_rate_is_counted_over_all_its_samples():
    """Counted over the correct ones alone, every problem would look easy."""
    result = run(all_kinds_of_traces(), per_problem=9, selection={"teacher_band": (0.0, 0.5)})
    assert result.kept == []
    evidence = {v.evidence for v in result.verdicts if v.check == "pass_rate"}
    assert evidence == {"pass rate 0.75, wanted 0 to 0.5"}, "6 of 8, one of which a filter dropped"
    assert len(run(all_kinds_of_traces(), per_problem=9, selection={"teacher_band": (0.5, 0.9)}).kept) == 18


def test_a_named_evaluation_set_is_kept_out_under_its_name():
    """Whoever reads the report wants to know which benchmark leaked, not that one did."""
    result = run(all_kinds_of_traces(), test_problems=[], evaluation_sets={"sums-500": [TEST[0].prompt]})
    assert FunnelRow("decontamination", "the trace holds an item of sums-500", 24, 6) in result.funnel


def test_contamination_can_be_watched_like_anything_else():
    """A decontamination that takes too much could not be tried out before it costs traces."""
    watched, dropped, off = (run(all_kinds_of_traces(), decontaminate=mode) for mode in ("shadow", "drop", "off"))
    found = {v.trace_key for v in dropped.verdicts if v.check == "decontamination"}
    assert found == {v.trace_key for v in watched.verdicts if v.check == "decontamination" and v.shadow}
    assert not [v for v in off.verdicts if v.check == "decontamination"]
    assert len(found) == 6
    assert [row for row in watched.funnel if row.stage == "decontamination"] == [
        FunnelRow("decontamination", "", watched.funnel[-1].num_in, 0)
    ]


def test_each_check_of_the_whole_run_says_what_it_did_and_all_traces_are_counted_once():
    """The report would show filters and say nothing of duplicates and contamination, or count traces that are not there."""
    settled = settle(
        [survey_batch({p.id: p for p in TRAIN}, all_kinds_of_traces(), FILTERS, Decontaminator({"": [TEST[0].prompt]}))],
        {p.id: p for p in TRAIN},
        prompt_dedup="off",
        selection={"per_problem": 2, "seed": 0},
    )
    assert [(rate.name, rate.mode, rate.num_in, rate.num_against) for rate in settled.rates] == [
        ("exact_dedup", "drop", 30, 6),
        ("near_dedup", "shadow", 24, 0),
        ("decontamination", "drop", 24, 6),
    ]
    fates = Counter()
    for entry, count in settled.tally.items():
        fates[entry.fate, entry.outcome] += count
    assert fates == {
        ("kept", "correct"): 12,
        ("not chosen", "correct"): 18,
        ("not right", "wrong"): 6,
        ("filtered", "wrong"): 6,
        ("filtered", "correct"): 6,
    }


def test_a_problem_without_a_right_trace_stands_for_no_other():
    """The only right traces of a question would be thrown away for a twin that the teacher got wrong."""
    text = (
        "A farmer keeps 12 cows and 7 hens in the old barn behind the mill, where his father kept sheep before the great flood "
        "came down the valley and carried most of them away one night; how many animals does he keep there {}?"
    )
    twins = [Problem(text.format(word), "19", "math", "s", "train") for word in ("today", "now")]
    wrong_first = [make_trace(twins[0], 0, worked(twins[0], answer=20)), make_trace(twins[1], 0, worked(twins[1]))]
    both_right = [make_trace(problem, 0, worked(problem)) for problem in twins]
    for traces, num_kept in ((wrong_first, 1), (wrong_first[::-1], 1), (both_right, 1)):
        arguments = {"test_problems": TEST, "per_problem": 2, "min_tokens": 5, "max_tokens": 100, "seed": 0}
        assert len(filter_traces(twins, traces, prompt_dedup="drop", **arguments).kept) == num_kept


def test_a_trace_of_an_unknown_problem_is_refused():
    """Traces and problems of two different runs must not be mixed in silence."""
    stranger = Problem("?", "1", "math", "other run", "train")
    with pytest.raises(ValueError, match=stranger.id[:12]):
        run([make_trace(stranger, 0, worked(stranger))])
