"""A QLoRA training step of a random model of Qwen2.5-0.5B's shape: tokens/s and peak memory, each contender in its own process.

All train the same thing: LoRA of rank 16 on every linear layer of the decoder through PEFT, AdamW over the adapters, bfloat16
compute, no gradient checkpointing, the same random tokens. Contenders differ in what holds the frozen weights: our
``Linear4bit`` in NF4 or int4, bitsandbytes' NF4 layer, or bfloat16. The vocabulary is cut to 32,000 (of 151,936) and by default
the layers to 12 (of 24), so that all contenders fit into a small machine's memory at once; the tied head stays in bfloat16.

Steps take turns across the processes. The peak is of the steps alone, by resetting Linux's high-water mark after the model is
built; ``loaded_bytes`` is what the process holds before the first step, ``imports_bytes`` what it held before the model.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from stillhouse.kernels.bench import peers, timing, workers
from stillhouse.kernels.bench.workers import Worker

NF4, INT4, BITSANDBYTES, BF16 = "nf4", "int4", "bitsandbytes nf4", "bf16 LoRA"
OURS, PEERS = (NF4, INT4), (BITSANDBYTES, BF16)
TOKENS = ((1, 64), (1, 512), (4, 512))
"""Sequences and tokens of each in a step."""
NUM_LAYERS, VOCAB, RANK = 12, 32000, 16
ROUNDS = 5
HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KEY_VALUE_HEADS = 896, 4864, 14, 2


def run(
    *,
    threads: int,
    num_layers: int = NUM_LAYERS,
    tokens: Sequence[tuple[int, int]] = TOKENS,
    rounds: int = ROUNDS,
    vocab: int = VOCAB,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Measure all contenders that are installed.

    Returns:
        ``num_layers``, ``vocab``, ``rank``, ``memory`` (by contender) and ``rows``, one for each size of a step, in rising
        order: ``contenders`` with tokens/s, quartiles, peak memory and the first loss; ``ratios`` in tokens/s (above 1 ours is
        faster); ``memory_ratios`` of the peaks above the imports, peer over ours (above 1 ours takes less). And why a peer is
        missing.
    """
    missing = {}
    if importlib.util.find_spec("bitsandbytes") is None:
        missing[BITSANDBYTES] = "the package bitsandbytes is not installed (pip install bitsandbytes)"
    names = [name for name in (*OURS, *PEERS) if name not in missing]
    with contextlib.ExitStack() as stack:
        arguments = (str(threads), str(num_layers), str(vocab))
        running = {name: stack.enter_context(Worker("stillhouse.kernels.bench.qlora", name, *arguments)) for name in names}
        memory = {name: worker.ask(op="build") for name, worker in running.items()}
        rows = [_row(running, memory, *size, rounds) for size in tokens]
    return {"num_layers": num_layers, "vocab": vocab, "rank": RANK, "memory": memory, "rows": rows}, missing


def _row(
    running: dict[str, Worker], memory: dict[str, dict[str, int]], num_sequences: int, length: int, rounds: int
) -> dict[str, Any]:
    size = {"num_sequences": num_sequences, "length": length}
    first = {name: worker.ask(op="first_steps", **size) for name, worker in running.items()}
    for name, found in first.items():
        if "peak_bytes" in found:
            found["above_imports_bytes"] = found["peak_bytes"] - memory[name]["imports_bytes"]
    steps = {name: (lambda worker=worker: worker.ask(op="step", **size)["seconds"]) for name, worker in running.items()}
    samples = timing.interleave(steps, rounds)
    rows = {}
    for name, seconds in samples.items():
        median, q1, q3 = timing.median_and_quartiles([num_sequences * length / s for s in seconds])
        rows[name] = {"tokens_per_s": median, "q1": q1, "q3": q3} | first[name]
    speeds = {name: row["tokens_per_s"] for name, row in rows.items()}
    peaks = {name: row["above_imports_bytes"] for name, row in rows.items() if "above_imports_bytes" in row}
    ratios = {"ratios": timing.ratios(speeds, OURS, larger_is_faster=True), "memory_ratios": timing.ratios(peaks, OURS)}
    return size | {"contenders": rows} | ratios


class Trainer:
    """One contender: the model with its adapters, the optimizer, and the steps that are asked for."""

    def __init__(self, name: str, num_layers: int, vocab: int) -> None:
        self.name, self.num_layers, self.vocab = name, num_layers, vocab

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer: ``build``, then ``first_steps`` and ``step`` with ``num_sequences`` and ``length``."""
        if request["op"] == "build":
            import peft  # noqa: F401  (what the imports hold is not the model's)
            import transformers  # noqa: F401

            if self.name == BITSANDBYTES:
                import bitsandbytes  # noqa: F401
            with_memory = workers.can_measure_memory()
            imports = {"imports_bytes": workers.resident_bytes()} if with_memory else {}
            self.model = build(self.name, self.num_layers, self.vocab)
            adapters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            self.optimizer = torch.optim.AdamW(adapters, lr=1e-4)
            return imports | ({"loaded_bytes": workers.resident_bytes()} if with_memory else {})
        ids = self._ids(request["num_sequences"], request["length"])
        if request["op"] == "step":
            started = time.perf_counter()
            self.step(ids)
            return {"seconds": time.perf_counter() - started}
        if not workers.can_measure_memory():
            return {"loss": self.step(ids)}
        workers.resident_bytes()  # gives back what was freed, so that the mark starts low
        workers.reset_peak()
        loss = self.step(ids)
        self.step(ids)  # the second one has the optimizer's state beside the gradients
        return {"loss": loss, "peak_bytes": workers.peak_bytes()}

    def step(self, ids: torch.Tensor) -> float:
        """Forward, backward, AdamW; returns the loss."""
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _ids(self, num_sequences: int, length: int) -> torch.Tensor:
        return torch.randint(0, self.vocab, (num_sequences, length), generator=torch.Generator().manual_seed(3))


def build(name: str, num_layers: int, vocab: int) -> nn.Module:
    """The random model in a contender's format, with adapters, ready to train.

    Weights are drawn layer by layer and packed at once, from one seed, so all contenders stand for the same model and no copy
    in 16 bits of a packed model was ever held.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    from stillhouse.kernels.peft_lora import register_with_peft

    config = Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=num_layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KEY_VALUE_HEADS,
        vocab_size=vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    targets = [key for key, module in model.named_modules() if isinstance(module, nn.Linear) and key != "lm_head"]
    for key in targets:
        linear = model.get_submodule(key)
        weight = torch.randn(linear.out_features, linear.in_features, generator=generator) * linear.in_features**-0.5
        bias = None if linear.bias is None else nn.Parameter(torch.zeros(linear.out_features, dtype=torch.bfloat16))
        model.set_submodule(key, _layer(name, weight.to(torch.bfloat16), bias))
    embedding = (torch.randn(vocab, HIDDEN, generator=generator) * 0.02).to(torch.bfloat16)
    model.model.embed_tokens.weight = nn.Parameter(embedding)
    model.lm_head.weight = model.model.embed_tokens.weight
    for key, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":  # the norms
            owner, _, attribute = key.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(torch.ones(parameter.shape, dtype=torch.bfloat16)))
    model.model.rotary_emb = Qwen2RotaryEmbedding(config)
    model.requires_grad_(False)
    torch.manual_seed(0)  # the adapters
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, register_with_peft(lora)).train()


def _layer(name: str, weight_NK: torch.Tensor, bias: nn.Parameter | None) -> nn.Module:
    from stillhouse.kernels.formats import quantize
    from stillhouse.kernels.linear import Linear4bit

    if name == NF4:
        return Linear4bit(quantize(weight_NK, "nf4", block_size=64, double_quant=True), bias, dtype=torch.bfloat16)
    if name == INT4:
        return Linear4bit(quantize(weight_NK, "int4", group_size=32), bias, dtype=torch.bfloat16)
    if name == BITSANDBYTES:
        return peers.bitsandbytes_layer(weight_NK, bias)
    with torch.device("meta"):
        layer = nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=bias is not None)
    layer.weight, layer.bias = nn.Parameter(weight_NK), bias
    return layer


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    workers.serve(Trainer(sys.argv[1], int(sys.argv[3]), int(sys.argv[4])).answer)
