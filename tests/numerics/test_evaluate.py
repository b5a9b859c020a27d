"""Grading completions: what counts as correct, and which draws models share."""

from __future__ import annotations

import pytest
import torch

from stillhouse.pipeline.prompts import render_prompt
from stillhouse.pipeline.records import Completion, Problem
from stillhouse.pipeline.verification import verify
from stillhouse.students.base_models import load_base, load_tokenizer
from stillhouse.students.evaluating import evaluate, evaluation_seed
from stillhouse.students.rendering import stop_token_ids, tokenize
from tests.tiny_models import make_model

PROBLEMS = [Problem(f"What is {i} + {i}?", str(2 * i), "exact", "unit", "test") for i in range(4)]
CLOSED = "<|im_start|>assistant\n"


def answering(*texts: str, finish_reason: str = "stop"):
    """A generator that gives these texts in turn."""

    def generate(prompts, seeds):
        chosen = [texts[i % len(texts)] for i in range(len(prompts))]
        return [Completion(text, finish_reason, 3, 7, seed) for text, seed in zip(chosen, seeds)]

    return generate


def grade_one(text: str, *, prompt: str = CLOSED, finish_reason: str = "stop"):
    (graded,) = evaluate(
        answering(text, finish_reason=finish_reason), PROBLEMS[1:2], model_name="m", rendered_prompts=[prompt], seed=0,
        verify=verify,
    )  # fmt: skip
    return graded


def test_only_a_box_behind_the_closed_think_block_counts():
    """If this failed, scores would count right answers that no user of the model would be given."""
    right = grade_one("<think>\n1 + 1 = 2\n</think>\n\\boxed{2}")
    assert (right.correct, right.outcome, right.think_closed, right.answer_found) == (True, "correct", True, True)
    inside = grade_one("<think>\n\\boxed{2}\n", finish_reason="length")
    assert (inside.correct, inside.think_closed, inside.answer_found) == (False, False, False)
    assert inside.finish_reason == "length"
    prose = grade_one("<think>\nsum\n</think>\nThe answer is 2.")
    assert (prose.correct, prose.think_closed, prose.answer_found) == (False, True, False)
    wrong = grade_one("<think>\nsum\n</think>\n\\boxed{3}")
    assert (wrong.correct, wrong.outcome, wrong.answer_found) == (False, "wrong", True)


def test_a_prompt_that_opens_the_block_needs_only_the_closing_tag():
    """If this failed, R1-like students would look as if they never closed their reasoning."""
    text = "1 + 1 = 2\n</think>\n\\boxed{2}"
    assert grade_one(text, prompt=f"{CLOSED}<think>\n").think_closed
    assert not grade_one(text).think_closed


def test_samples_come_problem_by_problem_with_seeds_of_their_own():
    """If this failed, paired comparisons would pair other draws, or all samples of a problem would be one."""
    asked = []

    def generate(prompts, seeds):
        asked.append((prompts, seeds))
        return answering("<think>\nx\n</think>\n\\boxed{2}")(prompts, seeds)

    prompts = [f"prompt {i}" for i in range(4)]
    graded = evaluate(generate, PROBLEMS, model_name="m", rendered_prompts=prompts, num_samples=3, seed=5, verify=verify)
    assert [(g.problem_id, g.sample_index) for g in graded] == [(p.id, s) for p in PROBLEMS for s in range(3)]
    (sent, seeds) = asked[0]
    assert sent == [prompt for prompt in prompts for _ in range(3)]
    assert len(set(seeds)) == 12
    assert seeds[3] == evaluation_seed(5, PROBLEMS[1].id, 0), "depends on the problem, not on its place"
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert [g.correct for g in graded] == [False] * 3 + [True] * 3 + [False] * 6


def test_a_generator_that_loses_completions_is_an_error():
    """If this failed, answers would be graded against other problems."""

    def generate(prompts, seeds):
        return answering("x")(prompts, seeds)[1:]

    with pytest.raises(ValueError, match="3 completions for 4 prompts"):
        evaluate(generate, PROBLEMS, model_name="m", rendered_prompts=["p"] * 4, seed=0, verify=verify)
    with pytest.raises(ValueError, match="one prompt a problem"):
        evaluate(answering("x"), PROBLEMS, model_name="m", rendered_prompts=["p"], seed=0, verify=verify)


def test_a_real_model_is_asked_and_graded(tmp_path):
    """If this failed, the pieces (model, tokenizer, prompt, verifier) would not fit together."""
    folder = str(make_model(tmp_path / "model", "Qwen3"))
    tokenizer, model = load_tokenizer(folder), load_base(folder, base_weights="int4", dtype="float32")

    def generate(prompts, seeds):
        completions = []
        for prompt, seed in zip(prompts, seeds):
            ids = torch.tensor([tokenize(tokenizer, prompt)])
            torch.manual_seed(seed % 2**32)
            out = model.generate(ids, max_new_tokens=8, do_sample=True, eos_token_id=list(stop_token_ids(tokenizer)))
            new = out[0, ids.shape[1] :].tolist()
            stopped = new[-1] in stop_token_ids(tokenizer)
            text = tokenizer.decode(new[:-1] if stopped else new, skip_special_tokens=False)
            completions.append(Completion(text, "stop" if stopped else "length", ids.shape[1], len(new), seed))
        return completions

    prompts = [render_prompt(tokenizer, p.prompt, system_prompt=None, prompt_suffix="", opens_think=False) for p in PROBLEMS]
    first, second = (
        evaluate(generate, PROBLEMS, model_name="tiny", rendered_prompts=prompts, num_samples=2, seed=1, verify=verify)
        for _ in range(2)
    )
    assert first == second
    assert len({graded.completion for graded in first}) > 4
    assert not any(graded.correct for graded in first)
