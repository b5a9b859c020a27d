"""The control behind the demo: the same LoRA steps on direct answers instead of reasoning.

``python -m stillhouse.students.tiny.control`` trains the shipped base with the demo's LoRA settings on problems and their
boxed answers, merges, and compares greedy pass@1 on the demo's test problems before and after. What this gains is what more
training alone gains; what distillation gains beyond it is the reasoning. About five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from stillhouse.pipeline.problems import disjoint, reasoning_gym_problems
from stillhouse.pipeline.records import Completion, Example, Problem, content_key
from stillhouse.pipeline.tinyworld import FAMILIES, HELD_OUT_SEEDS

TRAIN_SEED, TRAIN_SIZE, TEST_SIZE = 8_000_000, 600, 120


def demo_problems() -> tuple[list[Problem], list[Problem]]:
    """The demo recipe's training and test problems."""

    def drawn(split, seed: int, size: int) -> list[Problem]:
        return [
            problem
            for task, options in FAMILIES.items()
            for problem in reasoning_gym_problems(task, split=split, size=size, seed=seed, options=options)
        ]

    test, _ = disjoint(drawn("test", HELD_OUT_SEEDS[0], TEST_SIZE), [])
    train, _ = disjoint(drawn("train", TRAIN_SEED, TRAIN_SIZE), test)
    return train, test


def direct_example(tokenizer, problem: Problem) -> Example:
    """A training row that answers at once: prompt (not learnt), the boxed answer and the end of turn (learnt)."""
    from stillhouse.students.rendering import end_of_turn_token_id, render_prompt, template_hash, tokenize

    prompt = tokenize(
        tokenizer, render_prompt(tokenizer, problem.prompt, system_prompt=None, prompt_suffix="", opens_think=False)
    )
    learnt = (*tokenize(tokenizer, f"\\boxed{{{problem.answer}}}"), end_of_turn_token_id(tokenizer))
    return Example(
        key=content_key("direct", problem.id)[:32],
        trace_key="",
        problem_id=problem.id,
        input_ids=prompt + learnt,
        labels=(Example.IGNORE_INDEX,) * len(prompt) + learnt,
        template_hash=template_hash(tokenizer),
    )


def greedy(model_path: str, prompts: Sequence[str], *, max_new_tokens: int = 192, batch_size: int = 60) -> list[Completion]:
    """Greedy completions with transformers' own ``generate``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    completions = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(
            list(prompts[start : start + batch_size]), return_tensors="pt", padding=True, add_special_tokens=False
        )
        with torch.inference_mode():
            written = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)[:, batch["input_ids"].shape[1] :]
        for row in written.tolist():
            stop = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else None
            text = tokenizer.decode(row[:stop], skip_special_tokens=False)
            completions.append(Completion(text, "length" if stop is None else "stop", 0, len(row[:stop]), 0))
    return completions


def accuracy(model_path: str, problems: Sequence[Problem]) -> dict[str, float]:
    """Greedy pass@1, overall and by family, graded as `students.evaluating` grades."""
    from transformers import AutoTokenizer

    from stillhouse.pipeline.gate import accuracy as overall
    from stillhouse.pipeline.gate import accuracy_by_family
    from stillhouse.pipeline.verification import verify
    from stillhouse.students.evaluating import evaluate
    from stillhouse.students.rendering import render_prompt

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    prompts = [
        render_prompt(tokenizer, problem.prompt, system_prompt=None, prompt_suffix="", opens_think=False)
        for problem in problems
    ]
    graded = evaluate(
        lambda texts, seeds: greedy(model_path, texts),
        problems,
        model_name=model_path,
        rendered_prompts=prompts,
        seed=0,
        verify=verify,
    )
    return {"all": overall(graded).value} | {source: found.value for source, found in accuracy_by_family(graded).items()}


def main() -> None:
    from stillhouse.students.base_models import load_tokenizer, resolve_model
    from stillhouse.students.merging import merge_adapter
    from stillhouse.students.training import train_lora

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the base student: tiny, or a folder")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of 4,096 tokens, as in the demo")
    arguments = parser.parse_args()
    base = resolve_model(arguments.model)
    train, test = demo_problems()
    tokenizer = load_tokenizer(base)
    held = {"base_weights": "int4", "dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        result = train_lora(
            base,
            [direct_example(tokenizer, problem) for problem in train],
            Path(folder, "train"),
            **held,
            rank=32,
            alpha=64,
            learning_rate=4e-3,
            num_steps=arguments.steps,
            tokens_per_step=4096,
            max_length=512,
            scheduler="one_cycle",
            warmup_ratio=0.1,
            save_steps=arguments.steps,
        )
        control = merge_adapter(base, result.adapter_dir, Path(folder, "control"), **held)
        print(json.dumps({"base": accuracy(base, test), "control": accuracy(str(control), test)}, indent=2))


if __name__ == "__main__":
    main()
