"""A random Llama with 4-bit linear layers, and the same model as a GGUF file that llama.cpp loads.

Nothing is quantized: codes are drawn at random and scales are set so that activations keep their size, which makes a model of a
few hundred million parameters in seconds. Every linear layer, the head included, is int4 in groups of 32, which is Q4_0 with
other nibble places (kernels/gguf.py): both programs read the same bits. The embedding is bfloat16 here and float16 there,
drawn so that both hold it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from stillhouse.kernels.formats import PackedWeight
from stillhouse.kernels.gguf import to_q4_0
from stillhouse.kernels.linear import Linear4bit

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

RMS_NORM_EPS = 1e-5
ROPE_THETA = 10000.0
NUM_SPECIAL = 3
LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""A decoder layer's linear layers, and what GGUF calls them."""


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama; all widths multiples of 32."""

    name: str
    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    vocab: int = 32000
    context: int = 1024


def random_packed(shape: tuple[int, int], generator: torch.Generator) -> PackedWeight:
    """Random int4 codes in groups of 32, and scales that make the weight's standard deviation 1 / sqrt(K)."""
    num_rows, num_columns = shape
    codes = torch.randint(0, 256, (num_rows, num_columns // 2), dtype=torch.uint8, generator=generator)
    # Codes 0 … 15 less 8 have a mean square of 21.5; the exponent spreads the scales over a factor of two.
    spread = torch.exp2(torch.rand(num_rows, num_columns // 32, generator=generator) - 0.5)
    scales = (spread / math.sqrt(21.5 * num_columns)).to(torch.float16)
    return PackedWeight("int4", shape, codes, group_size=32, scales=scales)


def random_llama(shape: LlamaShape, *, seed: int = 0) -> LlamaForCausalLM:
    """A transformers Llama in bfloat16 whose linear layers are all ``Linear4bit``; nothing of it is ever held unpacked."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.context,
        rms_norm_eps=RMS_NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            packed = random_packed((module.out_features, module.in_features), generator)
            model.set_submodule(name, Linear4bit(packed, dtype=torch.bfloat16))
    embedding = torch.randn(shape.vocab, shape.hidden, generator=generator).to(torch.bfloat16)
    # bfloat16 numbers below float16's normal range would be rounded in the GGUF file.
    embedding[embedding.abs() < torch.finfo(torch.float16).smallest_normal] = 0
    model.model.embed_tokens.weight = nn.Parameter(embedding, requires_grad=False)
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":  # the norms
            owner, _, attribute = name.rpartition(".")
            ones = torch.ones(parameter.shape, dtype=torch.bfloat16)
            setattr(model.get_submodule(owner), attribute, nn.Parameter(ones, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval()


def linear_layers(model: nn.Module) -> list[Linear4bit]:
    """All packed layers in the order in which a forward calls them."""
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def packed_bytes(model: nn.Module) -> int:
    """Bytes of packed weight that a token's forward reads: every linear layer, the head included."""
    return sum(layer.packed.size_bytes for layer in linear_layers(model))


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """Write a model of :func:`random_llama` as GGUF: linear layers in Q4_0, bit for bit, the embedding in float16.

    The tokenizer is a list of made-up words, there because llama.cpp asks for one. llama.cpp rotates neighbouring pairs of a
    head's dimensions where transformers rotates halves, so the rows of the query and key weights stand in another order.

    Raises:
        ImportError: the gguf package is not installed.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(RMS_NORM_EPS)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, config.vocab_size)

    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.to(torch.float16).numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.float().numpy())
    _add_packed(writer, "output.weight", model.lm_head.packed)
    for index, layer in enumerate(model.model.layers):
        writer.add_tensor(f"blk.{index}.attn_norm.weight", layer.input_layernorm.weight.float().numpy())
        writer.add_tensor(f"blk.{index}.ffn_norm.weight", layer.post_attention_layernorm.weight.float().numpy())
        for ours, theirs in LAYER_NAMES.items():
            packed = layer.get_submodule(ours).packed
            if theirs in ("attn_q", "attn_k"):
                packed = rope_rows(packed, config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads)
            _add_packed(writer, f"blk.{index}.{theirs}.weight", packed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rope_rows(packed: PackedWeight, num_heads: int) -> PackedWeight:
    """The weight with each head's rows from halves (transformers) to neighbouring pairs (llama.cpp)."""
    num_rows = packed.shape[0]
    order = torch.arange(num_rows).view(num_heads, 2, num_rows // num_heads // 2).transpose(1, 2).reshape(-1)
    return replace(packed, codes=packed.codes[order], scales=packed.scales[order])


def _add_packed(writer: Any, name: str, packed: PackedWeight) -> None:
    import gguf

    writer.add_tensor(name, to_q4_0(packed).numpy(), raw_dtype=gguf.GGMLQuantizationType.Q4_0)


def _add_tokenizer(writer: Any, vocab: int) -> None:
    """Three special tokens, the 256 bytes, and words that nobody writes: the least that llama.cpp's tokenizer loads."""
    import gguf

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"word{index}" for index in range(len(tokens), vocab)]
    normal, special, byte = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE
    types = [gguf.TokenType.UNKNOWN, special, special, *[byte] * 256, *[normal] * vocab][:vocab]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens[:vocab])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
