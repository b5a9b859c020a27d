"""Measure an emitted checkpoint as a stranger would: transformers, compressed-tensors and reasoning-gym, without Stillhouse.

    python tests/standalone_eval.py runs/demo/checkpoint --seed 9500000 --size 120

prints accuracy, its 95 % Wilson interval and the number of problems as JSON. The problems are the demo's three families at
the seed given; the answer is what stands in the last box after ``</think>``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys

FAMILIES = {
    "chain_sum": {"min_terms": 4, "max_terms": 6, "min_digits": 1, "max_digits": 2},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
    "leg_counting": {"min_animals": 3, "max_animals": 5, "min_instances": 1, "max_instances": 9},
}


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    p, d = correct / n, 1 + z * z / n
    centre, half = (p + z * z / (2 * n)) / d, z * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5 / d
    return centre - half, centre + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--seed", type=int, default=9_500_000)
    parser.add_argument("--size", type=int, default=120, help="problems of each family")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--max-new-tokens", type=int, default=192)
    arguments = parser.parse_args()

    import reasoning_gym
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=getattr(torch, arguments.dtype)).eval()
    correct: dict[str, int] = {}
    for family, options in FAMILIES.items():
        data = reasoning_gym.create_dataset(family, size=arguments.size, seed=arguments.seed, **options)
        entries = list(data)
        correct[family] = 0
        for start in range(0, len(entries), 60):
            batch = entries[start : start + 60]
            texts = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": entry["question"]}], add_generation_prompt=True, tokenize=False
                )
                for entry in batch
            ]
            encoded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            with torch.inference_mode():
                written = model.generate(**encoded, do_sample=False, max_new_tokens=arguments.max_new_tokens)
            for row, entry in zip(written[:, encoded["input_ids"].shape[1] :], batch):
                text = tokenizer.decode(row, skip_special_tokens=True)
                boxes = re.findall(r"\\boxed\{([^{}]*)\}", text.rpartition("</think>")[2]) if "</think>" in text else []
                correct[family] += bool(boxes) and data.score_answer(answer=boxes[-1].strip(), entry=entry) == 1.0
    n = arguments.size * len(FAMILIES)
    low, high = wilson(sum(correct.values()), n)
    print(json.dumps({
        "accuracy": sum(correct.values()) / n, "low": low, "high": high, "n": n,
        "by_family": {family: count / arguments.size for family, count in correct.items()},
        "seed": arguments.seed, "stillhouse_imported": any(name.split(".")[0] == "stillhouse" for name in sys.modules),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
