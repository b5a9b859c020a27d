"""Rendered prompts, completions and masks of one conversation for each template family, as files to review."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.pipeline.records import Example, Problem, Trace
from stillhouse.students.rendering import (
    choose_pad_token,
    render_completion,
    render_example,
    render_prompt,
    stop_token_ids,
)
from tests.tiny_models import make_tokenizer

FOLDER = Path(__file__).parent
# What each family's tokenizer has: its special tokens, EOS, pad (R1-Distill ships with pad = EOS) and BOS.
FAMILIES = {
    "qwen2_5": {
        "special_tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>"],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    },
    "qwen3": {
        "special_tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>"],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    },
    "llama3": {
        "special_tokens": [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|finetune_right_pad_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ],
        "eos_token": "<|eot_id|>",
        "pad_token": None,
        "bos_token": "<|begin_of_text|>",
    },
    "r1_distill": {
        "special_tokens": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<|fim_pad|>"],
        "eos_token": "<｜end▁of▁sentence｜>",
        "pad_token": "<｜end▁of▁sentence｜>",
        "bos_token": "<｜begin▁of▁sentence｜>",
    },
}
REASONING = "3 + 4 = 7\n7 - 2 = 5"
COMPLETION = f"<think>\n{REASONING}\n</think>\n\n\\boxed{{5}}"
PROBLEM = Problem("What is 3 + 4 - 2?", "5", "exact", "golden", "train")
SUFFIX = "Put the answer in \\boxed{}."


def _tokenizer(family: str):
    template = (FOLDER / "templates" / f"{family}.jinja").read_text(encoding="utf-8").rstrip("\n")
    return make_tokenizer(template, **FAMILIES[family])


def _trace() -> Trace:
    return Trace(
        key="golden", problem_id=PROBLEM.id, teacher="t", teacher_revision="r", rendered_prompt="p", completion=COMPLETION,
        reasoning=REASONING, answer_text="\\boxed{5}", finish_reason="stop", num_prompt_tokens=1, num_completion_tokens=1,
        temperature=0.6, top_p=0.95, max_new_tokens=64, sample_index=0, seed=0, seconds=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("opens_think", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_each_family_stay_as_reviewed(family, opens_think, request):
    """If this failed, students of that family would be trained or prompted with other tokens than before."""
    tokenizer = _tokenizer(family)
    prompt = render_prompt(tokenizer, PROBLEM.prompt, system_prompt=None, prompt_suffix=SUFFIX, opens_think=opens_think)
    example = render_example(tokenizer, PROBLEM, _trace(), prompt_suffix=SUFFIX, opens_think=opens_think)
    masked = [label == Example.IGNORE_INDEX for label in example.labels]
    tokens = tokenizer.convert_ids_to_tokens(list(example.input_ids))
    content = {
        "prompt": prompt,
        "completion": render_completion(prompt, COMPLETION),
        "stops_at": tokenizer.convert_ids_to_tokens(list(stop_token_ids(tokenizer))),
        "pad": tokenizer.convert_ids_to_tokens(choose_pad_token(tokenizer)),
        "masked": [token for token, mask in zip(tokens, masked) if mask],
        "learnt": [token for token, mask in zip(tokens, masked) if not mask],
    }
    path = FOLDER / "rendered" / f"{family}{'.opens_think' if opens_think else ''}.json"
    if request.config.getoption("--refresh-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    reviewed = json.loads(path.read_text(encoding="utf-8"))
    assert content == reviewed, f"{path.name} changed: write it anew with --refresh-golden and review the diff"


@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_survives_and_one_think_block_is_open(family):
    """If this failed, the student would learn the answers without the reasoning, or a doubled or empty think block."""
    tokenizer = _tokenizer(family)
    for opens_think in (False, True):
        example = render_example(tokenizer, PROBLEM, _trace(), prompt_suffix=SUFFIX, opens_think=opens_think)
        text = tokenizer.decode(list(example.input_ids), skip_special_tokens=False)
        assert text.count("<think>") == text.count("</think>") == 1
        assert REASONING in text
        learnt = [label for label in example.labels if label != Example.IGNORE_INDEX]
        assert REASONING in tokenizer.decode(learnt)
        assert learnt[-1] == tokenizer.convert_tokens_to_ids(FAMILIES[family]["eos_token"])


def test_the_templates_themselves_lose_or_double_the_think_block():
    """If this failed, the template files would no longer hold the traps that explicit rendering is there for."""
    turns = [{"role": "user", "content": PROBLEM.prompt}, {"role": "assistant", "content": COMPLETION}]
    through_r1 = _tokenizer("r1_distill").apply_chat_template(turns, tokenize=False)
    through_qwen3 = _tokenizer("qwen3").apply_chat_template(turns, tokenize=False)
    assert REASONING not in through_r1
    assert through_qwen3.count("</think>") == 2
