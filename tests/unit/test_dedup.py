"""Exact duplicates, up to typing."""

from stillhouse.pipeline.dedup import exact_duplicates, normalized_text
from stillhouse.pipeline.records import Trace


def make_trace(key, completion, problem="p"):
    return Trace(key, problem, "t", "r", "prompt", completion, None, None, "stop", 1, 9, 0.6, 0.95, 64, 0, 1, 0.1)


def test_later_duplicates_name_the_first():
    """A trace learnt five times is overweighted five times; the verdict must lead to the one that stayed."""
    traces = [
        make_trace("a", "2 + 2 = 4"),
        make_trace("b", "2 + 2 =\n  4"),
        make_trace("c", "2 + 2 = 4", problem="other"),
        make_trace("d", "2 + 2 = 5"),
        make_trace("e", "２ + ２ = ４"),  # full-width digits
    ]
    verdicts = exact_duplicates(traces)
    assert [(v.trace_key, v.evidence, v.keep, v.check) for v in verdicts] == [
        ("b", "a", False, "exact_dedup"),
        ("e", "a", False, "exact_dedup"),
    ]


def test_a_second_pass_finds_nothing():
    """A resumed filter stage must come to the same rows."""
    traces = [make_trace(str(i), f"answer {i % 3}") for i in range(9)]
    dropped = {v.trace_key for v in exact_duplicates(traces)}
    assert len(dropped) == 6
    assert exact_duplicates([t for t in traces if t.key not in dropped]) == []


def test_normal_form_ignores_typing_and_keeps_content():
    """Numbers and signs are content; only form, case and blanks are not."""
    assert normalized_text(" ＡＢ\u00a0c\n\nd ") == "ab c d"
    assert normalized_text("1 - 2") != normalized_text("1 + 2")
    assert normalized_text("12") != normalized_text("1 2")
