"""What is read out of a completion decides what is judged and what is learnt."""

import pytest

from stillhouse.pipeline.extraction import (
    ParsedCompletion,
    boxed_answer,
    fenced_block,
    graded_answer_of,
    split_reasoning,
    strict_answer,
    strict_answer_of,
)
from stillhouse.pipeline.prompts import opens_think_block

NOTHING = ParsedCompletion(None, None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{42}", "42"),
        (r"first \boxed{1}, then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{5} and then \boxed{6", "5"),  # cut off in the middle of the second
        (r"a stray } and { around \boxed{8}", "8"),
        (r"line\\\boxed{9}", "9"),
        ("\\boxed{two\nlines}", "two\nlines"),
        (r"\boxed{1} \boxed{ }", None),  # the last box says nothing: the model did not answer
        (r"\boxed{1", None),
        (r"\boxed 5", None),
        ("42", None),
        ("", None),
    ],
)
def test_last_balanced_box_is_the_answer(text, answer):
    """A nested, escaped or cut-off box read wrongly would turn right answers into wrong ones."""
    assert boxed_answer(text) == answer


def test_many_open_boxes_are_read():
    """A degenerate completion of nothing but opened boxes would stall the filter stage (hours) if the scan were quadratic."""
    assert boxed_answer("\\boxed{" * 200_000) is None


def test_answer_counts_only_after_the_last_closing_tag():
    """A box inside the reasoning is a thought, not an answer; taking it would label unfinished traces as correct."""
    assert strict_answer(r"<think>maybe \boxed{1}</think>so \boxed{2}") == "2"
    assert strict_answer(r"<think>maybe \boxed{1}</think>so 2") is None
    assert strict_answer(r"<think>maybe \boxed{1}") is None
    assert strict_answer(r"\boxed{1}") is None
    assert strict_answer(r"<think>a</think>\boxed{1}<think>b</think>\boxed{3}") == "3"


@pytest.mark.parametrize(
    ("completion", "in_prompt", "parsed"),
    [
        ("<think>\nsum\n</think>\n\nSo 3.", False, ParsedCompletion("sum", "So 3.")),
        ("\n<think>sum</think>3", False, ParsedCompletion("sum", "3")),
        ("sum</think>3", True, ParsedCompletion("sum", "3")),
        ("<think></think>3", False, ParsedCompletion("", "3")),
        ("<think>sum</think>", False, ParsedCompletion("sum", "")),
        ("sum</think>3", False, NOTHING),
        ("<think>sum</think>3", True, NOTHING),  # a second opening tag after the prompt's own
        ("<think>sum", False, NOTHING),
        ("<think>a</think><think>b</think>3", False, NOTHING),
        ("<think>a<think>b</think>3", False, NOTHING),
        ("3 <think>sum</think>", False, NOTHING),
        ("</think>sum<think>", False, NOTHING),
        ("", False, NOTHING),
    ],
)
def test_exactly_one_closed_think_block_is_split(completion, in_prompt, parsed):
    """A double or unclosed block taken for reasoning would teach the student never to close its own."""
    assert split_reasoning(completion, prompt_opens_think=in_prompt) == parsed


def test_prefilled_think_tag_is_seen_at_the_prompts_end_only():
    """R1-Distill's template opens the block in the prompt; a system prompt that merely mentions the tag does not."""
    assert opens_think_block("<|User|>2+2?<|Assistant|><think>\n")
    assert not opens_think_block("Reason inside <think> tags. 2+2?")


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"\boxed{7}", "7"),
        (r"<think>7? \boxed{7}</think>It is \boxed{8}", "8"),
        (r"<think>so \boxed{7}", None),
        (r"so \boxed{7}</think>\boxed{8}", "8"),
        (r"so \boxed{7}</think>", None),
        ("seven", None),
    ],
)
def test_a_score_counts_a_direct_answer_and_no_unfinished_thought(completion, answer):
    """The base, which never thinks, is measured by its answers; a student that never stops thinking gets nothing."""
    assert graded_answer_of("math", completion) == answer


def test_a_score_reads_each_kind_as_it_is_written():
    """Students of code and JSON problems would be graded 0: their answers stand in no box."""
    for program in ("```python\nprint(1)\n```", "<think>a</think>\n```python\nprint(1)\n```"):
        assert graded_answer_of("code", program) == "print(1)\n"
    assert graded_answer_of("code", "<think>so\n```python\nprint(1)\n```") is None
    assert graded_answer_of("json", "```json\n[1]\n```") == graded_answer_of("json", "a</think>```json\n[1]\n```") == "[1]"


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("```json\n[1]\n```", "[1]"),
        ("```json\n[1]\n```\nor\n```\n[2]\n```\n", "[2]"),
        ("```json\n[1]\n```\n```python\nx\n```", "[1]"),
        ("```json\n[1]", None),
        ("```json\n\n```", None),
        ("[1]", None),
    ],
)
def test_the_last_closed_fenced_block_of_a_language_counts(text, block):
    """JSON of a block that was cut off, or of an example before the answer, would be judged as the answer."""
    assert fenced_block(text, "json") == block


def test_each_kind_finds_its_answer_where_it_is_written():
    """JSON inside a box breaks on its own braces, and a program has none; both stand in fenced blocks."""
    json_block = "<think>```json\n[0]\n```</think>```json\n[1]\n```"
    assert strict_answer_of("json", json_block) == "[1]"
    assert strict_answer_of("json", "<think>a</think>\\boxed{[2]}") == "[2]"
    assert strict_answer_of("json", '<think>a</think>\n{"x": [2]}\n') == '{"x": [2]}'
    assert strict_answer_of("json", "<think>a</think>so [2]") is None
    assert strict_answer_of("json", "```json\n[1]\n```") is None
    assert strict_answer_of("code", "<think>a</think>\n```python\nprint(1)\n```") == "print(1)\n"
    assert strict_answer_of("code", "```python\nprint(1)\n```") is None
    assert strict_answer_of("math", "<think>a</think>\\boxed{3}") == "3"
