"""Prompts, completions, masks, end and pad tokens: what a student is trained on and prompted with."""

from __future__ import annotations

import dataclasses

import pytest

from stillhouse.pipeline.errors import RecipeError, SupervisionError
from stillhouse.pipeline.records import Example, Problem, Trace
from stillhouse.students.examples import make_examples
from stillhouse.students.rendering import (
    choose_pad_token,
    end_of_turn_token_id,
    render_completion,
    render_example,
    render_page,
    render_prompt,
    stop_token_ids,
    template_hash,
    tokenize,
)
from tests.tiny_models import CHAT_TEMPLATE, make_tokenizer

PROBLEM = Problem("What is 3 + 4 - 2?", "5", "exact", "unit", "train")
TRACE = Trace(
    key="k1",
    problem_id=PROBLEM.id,
    teacher="t",
    teacher_revision="r",
    rendered_prompt="p",
    completion="<think>\n3 + 4 = 7\n7 - 2 = 5\n</think>\n\\boxed{5}",
    reasoning="3 + 4 = 7\n7 - 2 = 5",
    answer_text="\\boxed{5}",
    finish_reason="stop",
    num_prompt_tokens=1,
    num_completion_tokens=1,
    temperature=0.6,
    top_p=0.95,
    max_new_tokens=64,
    sample_index=0,
    seed=0,
    seconds=0.0,
)
STYLES = [(None, "", False), ("Be brief.", "Box it.", True)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize(("system_prompt", "prompt_suffix", "opens_think"), STYLES)
def test_training_prefix_is_the_inference_prompt_token_for_token(tokenizer, system_prompt, prompt_suffix, opens_think):
    """If this failed, a student would be prompted with tokens that it never saw in training."""
    style = {"system_prompt": system_prompt, "prompt_suffix": prompt_suffix, "opens_think": opens_think}
    prompt_ids = tokenize(tokenizer, render_prompt(tokenizer, PROBLEM.prompt, **style))
    example = render_example(tokenizer, PROBLEM, TRACE, **style)
    assert example.input_ids[: len(prompt_ids)] == prompt_ids
    assert set(example.labels[: len(prompt_ids)]) == {Example.IGNORE_INDEX}
    assert example.labels[len(prompt_ids) :] == example.input_ids[len(prompt_ids) :]
    assert example.labels[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize(
    ("prompt_end", "completion", "expected"),
    [
        ("assistant\n", "<think>\nA\n</think>\nB", "<think>\nA\n</think>\nB"),
        ("assistant\n", "A\n</think>\nB", "<think>\nA\n</think>\nB"),
        ("assistant\n<think>\n", "<think>\nA\n</think>\nB", "A\n</think>\nB"),
        ("assistant\n<think>\n", "A\n</think>\nB", "A\n</think>\nB"),
        ("assistant<think>", "<think>A</think>B", "\nA</think>B"),
    ],
)
def test_exactly_one_think_block_is_opened(prompt_end, completion, expected):
    """If this failed, a teacher whose template opens the block would give students a missing or a doubled tag."""
    assert render_completion(prompt_end, completion) == expected


def test_end_of_turn_is_the_templates_and_not_the_base_models_eos():
    """If this failed, a base model's student would learn to end with a token that chat servers do not stop at."""
    base = make_tokenizer(eos_token="<|endoftext|>")
    assert end_of_turn_token_id(base) == base.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(base) == (base.convert_tokens_to_ids("<|im_end|>"), base.convert_tokens_to_ids("<|endoftext|>"))


def test_template_without_an_end_marker_leaves_the_tokenizers_eos():
    """If this failed, such a student would have no end token at all."""
    plain = make_tokenizer(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", eos_token="<|endoftext|>"
    )
    assert stop_token_ids(plain) == (plain.convert_tokens_to_ids("<|endoftext|>"),)


def test_pad_is_never_an_end_token():
    """If this failed, padding would mask the end of turn and the student would never stop."""
    spare = make_tokenizer(
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>"], pad_token="<|im_end|>"
    )
    assert choose_pad_token(spare) == spare.convert_tokens_to_ids("<|fim_pad|>")
    assert choose_pad_token(make_tokenizer()) == make_tokenizer().convert_tokens_to_ids("<|pad|>")
    none_left = make_tokenizer(special_tokens=["<|im_start|>", "<|im_end|>"], pad_token="<|im_end|>")
    with pytest.raises(RecipeError, match="no pad token apart from its end tokens"):
        choose_pad_token(none_left)


def test_a_tokenizer_without_a_template_is_refused_in_words():
    """If this failed, a base model without a template would be prompted with whatever the library makes up."""
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(RecipeError, match="chat template"):
        render_prompt(bare, PROBLEM.prompt, system_prompt=None, prompt_suffix="", opens_think=False)


def test_traces_that_cannot_be_learnt_from_are_refused(tokenizer):
    """If this failed, cut-off reasoning or another problem's answer would become a training row."""
    with pytest.raises(SupervisionError, match="no closed think block"):
        render_example(tokenizer, PROBLEM, dataclasses.replace(TRACE, reasoning=None, answer_text=None))
    with pytest.raises(SupervisionError, match="answers problem"):
        render_example(tokenizer, dataclasses.replace(PROBLEM, prompt="Another?"), TRACE)


def test_template_hash_names_the_template():
    """If this failed, a checkpoint with a changed template would pass for the one that was trained."""
    assert template_hash(make_tokenizer()) == template_hash(make_tokenizer())
    assert template_hash(make_tokenizer(CHAT_TEMPLATE + " ")) != template_hash(make_tokenizer())


def test_page_shows_learnt_and_masked_text_and_escapes_it(tokenizer):
    """If this failed, the page for reviewing rows would hide a wrong mask, or run what a trace contains."""
    trace = dataclasses.replace(TRACE, completion=TRACE.completion.replace("3 + 4", "<b>3 + 4"))
    page = render_page(tokenizer, [render_example(tokenizer, PROBLEM, trace)])
    assert 'class="masked">&lt;|im_start|&gt;user\nWhat is 3 + 4 - 2?' in page
    assert 'class="learnt">&lt;think&gt;\n&lt;b&gt;3 + 4 = 7' in page
    assert "<b>" not in page


@pytest.mark.parametrize(("system_prompt", "prompt_suffix", "opens_think"), STYLES)
@pytest.mark.parametrize("think_tags", [True, False])
def test_rendered_rows_pass_the_supervision_checks(system_prompt, prompt_suffix, opens_think, think_tags):
    """If this failed, sound traces would be refused, for example with Qwen2.5 or Llama, which spell the think tags."""
    tokenizer = make_tokenizer(think_tags=think_tags)
    style = {"system_prompt": system_prompt, "prompt_suffix": prompt_suffix, "opens_think": opens_think}
    (example,) = make_examples(tokenizer, [PROBLEM], [TRACE], max_length=128, **style)
    assert example == render_example(tokenizer, PROBLEM, TRACE, **style)


def test_a_row_beyond_max_length_is_refused_and_not_cut(tokenizer):
    """If this failed, long traces would lose their answers without a word."""
    with pytest.raises(SupervisionError):
        make_examples(tokenizer, [PROBLEM], [TRACE], system_prompt=None, prompt_suffix="", opens_think=False, max_length=40)


def test_a_trace_without_its_problem_is_refused(tokenizer):
    """If this failed, a mix-up of two runs' files would train on unchecked rows."""
    with pytest.raises(SupervisionError, match="not among the problems"):
        make_examples(tokenizer, [], [TRACE], system_prompt=None, prompt_suffix="", opens_think=False, max_length=128)


def test_rows_do_not_depend_on_the_order_in_which_traces_arrived(tokenizer):
    """The same recipe run twice would train two students: its teacher's workers finish in another order each time."""
    other = Problem("What is 9 - 4?", "5", "exact", "unit", "train")
    traces = [
        TRACE,
        dataclasses.replace(TRACE, key="k0", sample_index=1),
        dataclasses.replace(TRACE, key="k2", problem_id=other.id),
    ]
    style = {"system_prompt": None, "prompt_suffix": "", "opens_think": False, "max_length": 128}
    rows = make_examples(tokenizer, [PROBLEM, other], traces, **style)
    assert rows == make_examples(tokenizer, [PROBLEM, other], traces[::-1], **style)
    assert [row.trace_key for row in rows if row.problem_id == PROBLEM.id] == ["k1", "k0"]
