"""Make the tiny base student that the package ships: ``python -m stillhouse.students.tiny.make --out FOLDER --seed 0``.

A Qwen3 of 0.85 M parameters, 128 wide and 4 layers, instruction-tuned from scratch on single steps, restating, copying
and direct answers (`stillhouse.pipeline.tinyworld.lesson`). It has never seen a think block or two chained steps, so it
cannot reason; it has what reasoning is made of. About 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

ROW_LENGTH = 256
ROWS_PER_STEP = 32


def make(out: Path, *, seed: int, num_steps: int) -> dict[str, float]:
    """Train the tokenizer and the model and write them into ``out``; returns the facts for the model card."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

    from stillhouse.pipeline.tiny_corpus import chats, packed_rows, tokenizer_texts
    from stillhouse.pipeline.tiny_tokenizer import train_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    vocab_size = train_tokenizer(tokenizer_texts(), out, vocab_size=512, max_length=512)
    tokenizer = AutoTokenizer.from_pretrained(out)
    symbols = tuple(tokenizer.decode([i]) for i in range(vocab_size) if i not in tokenizer.all_special_ids)
    symbols = tuple(s for s in symbols if s.isprintable() and not s.isspace())

    started = time.monotonic()
    # A row of 256 tokens holds 2.8 chats on average: three a row are a few more than num_steps can use.
    num_chats = num_steps * ROWS_PER_STEP * 3
    rows = packed_rows(chats(seed=seed, size=num_chats, worked_share=0.0, symbols=symbols), tokenizer, row_length=ROW_LENGTH)
    if len(rows) < num_steps * ROWS_PER_STEP:
        raise ValueError(f"{num_chats} chats fill {len(rows)} rows, {num_steps} steps need {num_steps * ROWS_PER_STEP}")
    data = Dataset.from_dict({name: [getattr(row, name) for row in rows] for name in ("input_ids", "labels", "position_ids")})

    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    trainer = Trainer(
        model=model,
        train_dataset=data,
        args=TrainingArguments(
            output_dir=str(out / "trainer"),
            max_steps=num_steps,
            per_device_train_batch_size=ROWS_PER_STEP,
            learning_rate=3e-3,
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
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=192
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2_400, help="optimizer steps of 8,192 tokens")
    arguments = parser.parse_args()
    print(json.dumps(make(arguments.out, seed=arguments.seed, num_steps=arguments.steps), indent=2))


if __name__ == "__main__":
    main()
