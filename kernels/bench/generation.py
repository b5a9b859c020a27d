"""Whole-model decode and prefill: a random Llama on our kernels, and the same bits in llama.cpp.

Ours is measured twice. ``generate`` is what a user of transformers gets: greedy ``model.generate``, with Python and torch
around every layer, timed from its first new token on, so that the prompt is in neither program's time. ``linears`` calls the
model's packed layers alone, in order, which is what a serving loop without that would pay for them (and nothing for attention,
norms and sampling). llama.cpp is measured whole, through llama-cpp-python.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stillhouse.kernels.bench import models, timing
from stillhouse.kernels.bench.models import LlamaShape
from stillhouse.kernels.bench.workers import Worker

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SHAPES = (
    LlamaShape("24 layers of 1024", 1024, 2816, 24, 16, 8),
    LlamaShape("5 layers of 2048 (Llama-3.2-1B's)", 2048, 8192, 5, 32, 8),
)
TINY = LlamaShape("2 layers of 256", 256, 512, 2, 4, 2, vocab=1024)
LLAMA_CPP = "llama.cpp Q4_0"
MODES = ("int8", "bf16")
PROMPT_TOKENS, NEW_TOKENS, PREFILL_TOKENS, CHECK_TOKENS = 16, 64, 512, 48
ROUNDS = 5


def run(
    shapes: Sequence[LlamaShape] = SHAPES,
    *,
    threads: int,
    rounds: int = ROUNDS,
    new_tokens: int = NEW_TOKENS,
    prefill_tokens: int = PREFILL_TOKENS,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure each shape.

    Returns:
        for each shape its sizes, ``agreement`` of our logits with llama.cpp's, and ``decode`` and ``prefill``: tokens/s of each
        contender with quartiles, and ratios (ours over peer in tokens/s: above 1 ours is faster); and why a peer is missing.
    """
    missing = {}
    for module in ("gguf", "llama_cpp"):
        if importlib.util.find_spec(module) is None:
            missing[LLAMA_CPP] = f"the package {module} is not installed (pip install gguf llama-cpp-python)"
    return [
        _measure(shape, threads, rounds, new_tokens, prefill_tokens, with_llama_cpp=not missing) for shape in shapes
    ], missing


def _measure(
    shape: LlamaShape, threads: int, rounds: int, new_tokens: int, prefill_tokens: int, *, with_llama_cpp: bool
) -> dict[str, Any]:
    model = models.random_llama(shape)
    num_ids = max(prefill_tokens, PROMPT_TOKENS, CHECK_TOKENS)
    ids = torch.randint(models.NUM_SPECIAL, shape.vocab, (num_ids,), generator=torch.Generator().manual_seed(1))
    prompt, long = ids[:PROMPT_TOKENS], ids[:prefill_tokens]
    decode = {f"{mode} generate": (lambda mode=mode: generate_seconds(model, prompt, new_tokens, mode)) for mode in MODES}
    decode |= {f"{mode} linears": linears(model, 1, mode, repeats=new_tokens) for mode in MODES}
    prefill = {f"{mode} forward": _seconds(lambda mode=mode: forward(model, long, mode)) for mode in MODES}
    prefill |= {f"{mode} linears": linears(model, prefill_tokens, mode, repeats=1) for mode in MODES}
    ours = {"decode": list(decode), "prefill": list(prefill)}
    facts: dict[str, Any] = {"shape": shape.name, "packed_bytes": models.packed_bytes(model)}
    with contextlib.ExitStack() as stack:
        if with_llama_cpp:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            models.write_gguf(model, folder / "model.gguf")
            arguments = (str(folder / "model.gguf"), str(threads), str(shape.context))
            worker = stack.enter_context(Worker("stillhouse.kernels.bench.llama_cpp_worker", *arguments))
            facts["agreement"] = agreement(model, ids[:CHECK_TOKENS], worker, folder)
            prompt_list, long_list = prompt.tolist(), long.tolist()
            decode[LLAMA_CPP] = lambda: worker.ask(op="decode", tokens=prompt_list, count=new_tokens)["seconds"]
            prefill[LLAMA_CPP] = lambda: worker.ask(op="prefill", tokens=long_list)["seconds"]
        for name, samplers, num_tokens in (("decode", decode, new_tokens), ("prefill", prefill, prefill_tokens)):
            samples = timing.interleave(samplers, rounds + 1)
            facts[name] = {"tokens": num_tokens} | _tokens_per_s(samples, num_tokens, ours[name])
    return facts


def _tokens_per_s(samples: dict[str, list[float]], num_tokens: int, ours: Sequence[str]) -> dict[str, Any]:
    rows = {}
    for name, seconds in samples.items():
        median, first, third = timing.median_and_quartiles([num_tokens / s for s in seconds[1:]])  # the first round warms up
        rows[name] = {"tokens_per_s": median, "q1": first, "q3": third}
    medians = {name: row["tokens_per_s"] for name, row in rows.items()}
    return {"contenders": rows, "ratios": timing.ratios(medians, ours, larger_is_faster=True)}


def _seconds(call: Callable[[], object]) -> Callable[[], float]:
    return lambda: timing.seconds_per_call(call, 1)


def set_activations(model: torch.nn.Module, mode: str) -> None:
    """Let every packed layer of a model compute with ``int8``, ``bf16`` or ``exact`` activations."""
    for layer in models.linear_layers(model):
        layer.activations = mode


class _Clock:
    """A streamer for ``generate``: notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.no_grad()
def generate_seconds(model: LlamaForCausalLM, prompt: torch.Tensor, new_tokens: int, mode: str) -> float:
    """Seconds of ``new_tokens`` steps of greedy ``model.generate``, from the first new token to the last of one more."""
    set_activations(model, mode)
    clock = _Clock()
    settings = {"max_new_tokens": new_tokens + 1, "min_new_tokens": new_tokens + 1, "do_sample": False}
    model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), streamer=clock, **settings)
    _, first, *_, last = clock.times  # the prompt itself comes first
    return last - first


@torch.no_grad()
def forward(model: LlamaForCausalLM, ids: torch.Tensor, mode: str) -> torch.Tensor:
    """One forward into an empty cache, logits of the last token alone, as llama.cpp evaluates a prompt."""
    set_activations(model, mode)
    return model(ids[None], use_cache=True, logits_to_keep=1).logits


def linears(model: LlamaForCausalLM, batch: int, mode: str, *, repeats: int) -> Callable[[], float]:
    """A sampler of the packed layers alone with ``batch`` tokens (the head with one), ``repeats`` times over."""
    generator = torch.Generator().manual_seed(2)
    layers = models.linear_layers(model)
    inputs = {
        layer.in_features: torch.randn(batch, layer.in_features, generator=generator).to(torch.bfloat16) for layer in layers
    }

    @torch.no_grad()
    def sample() -> float:
        set_activations(model, mode)
        started = time.perf_counter()
        for _ in range(repeats):
            for layer in layers:
                x = inputs[layer.in_features]
                layer(x[:1] if layer is model.lm_head else x)
        return time.perf_counter() - started

    return sample


@torch.no_grad()
def agreement(model: LlamaForCausalLM, ids: torch.Tensor, worker: Worker, folder: Path) -> dict[str, float]:
    """How far our logits after each token are llama.cpp's: correlation, and the share of tokens with the same argmax."""
    import numpy as np

    worker.ask(op="logits", tokens=ids.tolist(), path=str(folder / "logits.npy"))
    theirs = torch.from_numpy(np.load(folder / "logits.npy")).double()
    found = {}
    for mode in MODES:
        set_activations(model, mode)
        ours = model(ids[None]).logits[0].double()
        pair = torch.stack((ours.flatten(), theirs.flatten()))
        found[f"{mode} correlation"] = float(torch.corrcoef(pair)[0, 1])
        found[f"{mode} same argmax"] = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    return found
