"""The tokenizer of the embedded world: a real byte-level BPE in Qwen2's manner, trained on the world's own texts.

Qwen2's pre-tokenizer pattern (digits single, words with their leading space), byte-level alphabet, NFC; special tokens
after the merges, as Qwen2 orders them. `<think>` and `</think>` are added tokens that decoding keeps. The files are the
ones that ``transformers.AutoTokenizer`` reads, written without importing transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Source: the tokenizer.json that Qwen/Qwen2-0.5B publishes."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_pad|>")
EOS_TOKEN, PAD_TOKEN = "<|im_end|>", "<|fim_pad|>"
THINK_TOKENS = ("<think>", "</think>")

CHAT_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int, max_length: int) -> int:
    """Train on ``texts`` and write tokenizer.json, tokenizer_config.json and chat_template.jinja into ``folder``.

    Args:
        texts: plain texts without chat markup.
        folder: an existing folder.
        vocab_size: upper bound of the whole vocabulary, special tokens counted; a multiple of 32 fits every format.
        max_length: positions of the models that use it, written as ``model_max_length``.

    Returns:
        The size of the vocabulary that came out.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(THINK_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2TokenizerFast",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": EOS_TOKEN,
        "pad_token": PAD_TOKEN,
        "unk_token": None,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tokenizer.get_vocab_size()
