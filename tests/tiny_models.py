"""Tiny random models and a small real tokenizer, made on the spot: what the tests train, merge, emit and load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
ARCHITECTURES = ("Qwen2", "Qwen3", "Llama")

_CORPUS = [
    "What is 3 + 4 - 2? Put the answer in \\boxed{}.",
    "<think>\n3 + 4 = 7\n7 - 2 = 5\n</think>\n\\boxed{5}",
    "user assistant system step by step the answer is",
]
# Qwen2's split, digits single.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_tokenizer(
    chat_template: str = CHAT_TEMPLATE,
    *,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    eos_token: str = "<|im_end|>",
    pad_token: str | None = "<|pad|>",
    bos_token: str | None = None,
    think_tags: bool = True,
):
    """A byte-level BPE tokenizer of about 300 tokens with special tokens, a chat template and, if asked, think tags."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens(list(special_tokens))
    if think_tags:
        tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos_token, pad_token=pad_token, bos_token=bos_token)
    fast.chat_template = chat_template
    return fast


def make_model(folder: Path, architecture: str, *, tied: bool = False, seed: int = 0, hidden_size: int = 64) -> Path:
    """Save a random-weight model of two layers with its tokenizer into ``folder`` and return it."""
    import torch
    import transformers

    tokenizer = make_tokenizer()
    sizes = {
        "vocab_size": -(-len(tokenizer) // 32) * 32,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        # Wide enough for the frozen output head to tell tokens apart, so that an adapter can lower the loss.
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if architecture == "Qwen3":
        sizes["head_dim"] = hidden_size // 2
    config = getattr(transformers, f"{architecture}Config")(**sizes)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
