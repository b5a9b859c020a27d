"""Format filters: what a student must not learn is dropped, with the reason it is counted by."""

import random

import pytest

from stillhouse.pipeline.filters import (
    AnswerPresent,
    ControlTokens,
    Finished,
    Length,
    Repetition,
    ThinkBlock,
    format_filters,
    run_filters,
)
from stillhouse.pipeline.records import Trace

GOOD = "<think>\n2 + 2 = 4\n4 + 3 = 7\n</think>\n\nThe answer is \\boxed{7}."


def make_trace(
    completion=GOOD, *, key="k0", prompt="<|user|>2+2+3?<|assistant|>", finish_reason="stop", tokens=30, problem="p"
):
    return Trace(
        key=key,
        problem_id=problem,
        teacher="teacher",
        teacher_revision="r",
        rendered_prompt=prompt,
        completion=completion,
        reasoning=None,
        answer_text=None,
        finish_reason=finish_reason,
        num_prompt_tokens=10,
        num_completion_tokens=tokens,
        temperature=0.6,
        top_p=0.95,
        max_new_tokens=512,
        sample_index=0,
        seed=1,
        seconds=0.1,
    )


def reason(trace_filter, completion=GOOD, **fields):
    drop = trace_filter(make_trace(completion, **fields))
    return None if drop is None else drop.reason


@pytest.mark.parametrize(
    ("completion", "prompt", "expected"),
    [
        (GOOD, "?", None),
        ("2 + 2 = 4</think>\\boxed{4}", "?<think>\n", None),
        ("The answer is \\boxed{4}.", "?", "no think block"),
        ("<think>2 + 2 = 4", "?", "think block not closed"),
        ("2 + 2 = 4", "?<think>\n", "think block not closed"),
        ("<think>a</think><think>b</think>4", "?", "more than one think block"),
        ("<think>a</think>4", "?<think>", "more than one think block"),
        ("<think>a</think>4</think>", "?", "more than one think block"),
        ("Sure. <think>a</think>4", "?", "text before the think block"),
        ("</think>a<think>", "?", "text before the think block"),
        ("<think>\n\n</think>\\boxed{4}", "?", "think block empty"),
        ("\n</think>\\boxed{4}", "?<think>", "think block empty"),
    ],
)
def test_think_block(completion, prompt, expected):
    """A student taught on an unclosed, double or empty block reasons without end, twice or not at all."""
    assert reason(ThinkBlock(), completion, prompt=prompt) == expected


def test_a_cut_off_completion_is_dropped():
    """Trained on, a completion cut at the limit teaches the student never to stop."""
    assert reason(Finished()) is None
    assert reason(Finished(), finish_reason="length") == "not finished"


def test_an_answer_must_stand_in_a_box_after_the_block():
    """Without it there is nothing to verify, and nothing to read out of the student later."""
    assert reason(AnswerPresent()) is None
    for completion in ("<think>\\boxed{7}</think>7", "<think>a</think>\\boxed{}", "\\boxed{7}"):
        assert reason(AnswerPresent(), completion) == "no boxed answer after the think block"


def test_length_bounds_are_allowed_themselves():
    """An off-by-one here drops every completion of exactly the size that the recipe allows."""
    bounds = Length(10, 20)
    assert [reason(bounds, tokens=n) for n in (9, 10, 20, 21)] == ["too short", None, None, "too long"]


LONG_SENTENCE = "Let me check this one more time to be sure."


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (GOOD, None),
        ("0 - 0 = 0\n" * 7, None),  # a worked sum may well say so
        ("0 - 0 = 0\n" * 8, "same line repeated"),
        ("0 - 0 = 0\n\n" * 8, "same line repeated"),
        ((LONG_SENTENCE + " ") * 3, None),
        ((LONG_SENTENCE + " ") * 4, "same sentence repeated"),
        ("".join(f"{LONG_SENTENCE} Number {i} is fine, on to the next. " for i in range(40)), "same sentence repeated"),
        ("wait " * 60, "same words in a loop"),
        ("".join(f"{a} + {b} = {a + b}\n" for a in range(40) for b in range(40)), None),
    ],
)
def test_repetition(completion, expected):
    """Loops are learnt faster than anything else; worked steps that look alike are not loops."""
    assert reason(Repetition(), completion) == expected


def test_compression_finds_loops_of_long_blocks_only_in_long_texts():
    """A loop with a period beyond every counter still compresses to nothing; short texts are left alone."""
    rng = random.Random(0)
    block = " ".join(str(rng.randint(0, 10**6)) for _ in range(150))
    counts_only = Repetition(max_same_ngram=10**6, max_same_line=10**6, max_same_sentence=10**6)
    assert reason(counts_only, (block + " ") * 30) == "compresses like a loop"
    assert reason(counts_only, " ".join(str(rng.randint(0, 10**6)) for _ in range(4500))) is None
    assert reason(counts_only, "a" * 3000) is None


@pytest.mark.parametrize(
    "token",
    ["<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<｜end▁of▁sentence｜>", "<end_of_turn>", "</s>", "[INST]", "<<SYS>>"],
)
def test_control_tokens_in_content_are_refused(token):
    """Rendered by a student's tokenizer, such text becomes a real control token in the middle of an answer."""
    assert reason(ControlTokens(), GOOD + token) == "control token in the content"


def test_mathematics_is_not_a_control_token():
    """Absolute values and comparisons must not cost a trace."""
    for text in (r"<think>|x| < |y| and a <b> c</think>\boxed{|x|>2}", "<think>if a < s > b</think>", GOOD):
        assert reason(ControlTokens(), text) is None
    assert reason(ControlTokens(also=("<tool>",)), GOOD + "<tool>") == "control token in the content"


def test_one_verdict_a_trace_and_the_first_reason_decides():
    """The funnel counts these; two verdicts for one trace would drop it twice in the report."""
    cut = make_trace("<think>2", key="cut", finish_reason="length", tokens=512)
    bare = make_trace("7", key="bare", tokens=1)
    traces = [cut, make_trace(key="good"), bare]
    verdicts = run_filters(traces, format_filters(min_tokens=5, max_tokens=100))
    seen = [(v.trace_key, v.keep, v.check, v.reason) for v in verdicts]
    assert seen == [
        ("cut", False, "finished", "not finished"),
        ("good", True, "format", "passed every filter"),
        ("bare", False, "think_block", "no think block"),
    ]
    assert verdicts[0].evidence == "finish_reason=length after 512 tokens"


def test_evidence_is_short_however_long_the_trace():
    """Verdicts are stored for every trace; quoting a 30,000-token loop in each would double the store."""
    trace = make_trace("<think>" + "word " * 50_000)
    (verdict,) = run_filters([trace], [ThinkBlock()])
    assert not verdict.keep
    assert 0 < len(verdict.evidence) <= 200
