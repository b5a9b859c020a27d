"""Make the tiny teacher that the package ships, in two stages:

``python -m stillhouse.teachers.tiny.make --out FIRST --seed 1``
``python -m stillhouse.teachers.tiny.make --out FOLDER --seed 2 --start FIRST``

A Llama of 1.7 M parameters, 192 wide and 4 layers, trained from scratch on worked solutions that a program wrote
(`stillhouse.pipeline.tinyworld.worked_solution`) and, for a third of its chats, on the single steps they are made of. The
second stage goes on with more of the same, and a worked pump question (`stillhouse.pipeline.pump_questions`) as every third
chat. It reasons in a think block, one step a line, and slips now and then, which gives the filters their work. About half
an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

ROW_LENGTH = 256
ROWS_PER_STEP = 32
NUM_STEPS, LEARNING_RATE = (1_800, 800), (2e-3, 1e-3)
"""Of the first and of the second stage."""
PUMPS_EVERY = 3
"""In the second stage, one chat in so many is a worked pump question."""
TEMPERATURE, TOP_P = 0.6, 0.95


def make(out: Path, *, seed: int, num_steps: int, start: Path | None = None) -> dict[str, float]:
    """Train the tokenizer and the model and write them into ``out``; returns the facts for the model card.

    Args:
        start: the first stage's model, which the second one goes on from; None is the first stage.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from stillhouse.pipeline.tiny_corpus import chats, packed_rows, tokenizer_texts, with_pumps
    from stillhouse.pipeline.tiny_tokenizer import train_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    vocab_size = train_tokenizer(tokenizer_texts(), out, vocab_size=512, max_length=512)
    tokenizer = AutoTokenizer.from_pretrained(out)

    started = time.monotonic()
    # A row of 256 tokens holds 2.2 of these chats on average: three a row are more than num_steps can use.
    num_chats = num_steps * ROWS_PER_STEP * 3
    num_pumps = num_chats // PUMPS_EVERY if start else 0
    pairs = chats(seed=seed * 1_000_000, size=num_chats - num_pumps, worked_share=0.67, symbols=())
    if start:
        pairs = with_pumps(pairs, seed=seed, every=PUMPS_EVERY)
    rows = packed_rows(pairs, tokenizer, row_length=ROW_LENGTH)
    if len(rows) < num_steps * ROWS_PER_STEP:
        raise ValueError(f"{num_chats} chats fill {len(rows)} rows, {num_steps} steps need {num_steps * ROWS_PER_STEP}")
    data = Dataset.from_dict({name: [getattr(row, name) for row in rows] for name in ("input_ids", "labels", "position_ids")})

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32) if start else LlamaForCausalLM(config)
    trainer = Trainer(
        model=model,
        train_dataset=data,
        args=TrainingArguments(
            output_dir=str(out / "trainer"),
            max_steps=num_steps,
            per_device_train_batch_size=ROWS_PER_STEP,
            learning_rate=LEARNING_RATE[bool(start)],
            warmup_steps=num_steps // 20,
            lr_scheduler_type="cosine",
            adam_beta2=0.98,
            weight_decay=0.01,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            seed=seed,
            disable_tqdm=True,
        ),
    )
    result = trainer.train()
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=192,
    )
    model.config.use_cache = True  # the trainer switched it off
    model.save_pretrained(out)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "chats": num_chats,
        "steps": num_steps,
        "tokens": num_steps * ROWS_PER_STEP * ROW_LENGTH,
        "seconds": round(time.monotonic() - started),
        "final_loss": round(result.metrics["train_loss"], 4),
        "seed": seed,
    }
    (out / "making.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=Path, help="the first stage's model: train the second stage")
    parser.add_argument("--steps", type=int, help="optimizer steps of 8,192 tokens; 1,800 and 800 by default")
    arguments = parser.parse_args()
    num_steps = arguments.steps or NUM_STEPS[bool(arguments.start)]
    facts = make(arguments.out, seed=arguments.seed, num_steps=num_steps, start=arguments.start)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
