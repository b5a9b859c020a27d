"""The shipped tiny teacher as a GGUF file, for llama.cpp: same weights in float32, same tokenizer, same chat template."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def write_gguf(model: Path, target: Path) -> Path:
    """Write a Llama-architecture model folder whose tokenizer splits as Qwen2's does into ``target``, and return it."""
    import torch
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    num_heads, num_kv_heads, head_dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))

    writer = GGUFWriter(str(target), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config["vocab_size"])

    tokens = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([tokens[number] for number in range(config["vocab_size"])])
    writer.add_token_types([types[number] for number in range(config["vocab_size"])])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((model / "chat_template.jinja").read_text())

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in load_file(model / "model.safetensors").items():
        values = weight.to(torch.float32).numpy()
        if "q_proj" in name or "k_proj" in name:
            values = _interleave(values, num_heads if "q_proj" in name else num_kv_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows in GGUF's order for rotary embeddings: pairs side by side, where transformers has half after half.

    Args:
        weight: shape (num_heads · head_dim, hidden).
    """
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
