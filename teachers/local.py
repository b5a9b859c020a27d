"""In-process generation with transformers: batched, sampled, each row from its own seed.

Serves the embedded run, tests and evaluation without a socket. A row's tokens depend on its prompt, its seed and the
sampling alone, not on its neighbours in the batch: one uniform number a row and step, hashed from (seed, step), picks the
token by inverse CDF over the top-p set. (Batch composition still moves logits in their last bits, through padding.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillhouse.pipeline.errors import TeacherError, first_line
from stillhouse.pipeline.records import Completion, Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(seeds: np.ndarray, step: int) -> np.ndarray:
    """One number in [0, 1) for each seed at one step: splitmix64 of ``seed + (step + 1) · golden ratio``.

    Args:
        seeds: shape (B,), uint64.

    Returns:
        shape (B,), float64. Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    with np.errstate(over="ignore"):
        z = seeds + np.uint64(step + 1) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def choose_tokens(logits_BV: torch.Tensor, uniform_B: torch.Tensor, *, temperature: float, top_p: float) -> torch.Tensor:
    """Draw one token a row: temperature, then the smallest set of tokens whose probability reaches ``top_p``.

    Args:
        logits_BV: shape (B, V).
        uniform_B: shape (B,), in [0, 1).

    Returns:
        shape (B,), int64.

    Raises:
        TeacherError: a row's logits are not numbers (float16 overflows in models made for bfloat16).
    """
    if logits_BV.amax(dim=-1).isnan().any():
        raise TeacherError("the model's logits are not numbers (NaN); load it in bfloat16 or float32")
    if temperature == 0:
        return logits_BV.argmax(dim=-1)
    probs_BV, order_BV = torch.softmax(logits_BV.double() / temperature, dim=-1).sort(dim=-1, descending=True, stable=True)
    cumulative_BV = probs_BV.cumsum(dim=-1)
    # The set is every token before which less than top_p has been gathered: the first one is always in it.
    inside_BV = cumulative_BV - probs_BV < top_p
    mass_B = torch.where(inside_BV, probs_BV, 0).sum(dim=-1)
    drawn_B = (cumulative_BV < (uniform_B.to(mass_B) * mass_B)[:, None]).sum(dim=-1)
    drawn_B = torch.minimum(drawn_B, inside_BV.sum(dim=-1) - 1)
    return order_BV.gather(-1, drawn_B[:, None])[:, 0]


def load_tokenizer(model_path: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a model that will generate: padding goes to the left.

    Raises:
        TeacherError: there is none to load.
    """
    from transformers import AutoTokenizer

    if str(model_path).startswith((".", "/", "~")) and not Path(model_path).is_dir():
        raise _cannot_load(model_path, "there is no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_path), revision=revision, padding_side="left")
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(model_path, error) from error
    # Without tokenizer files transformers makes one with an empty vocabulary, which reads every prompt as nothing.
    if not tokenizer.encode("a", add_special_tokens=False):
        raise _cannot_load(model_path, "there are no tokenizer files")
    return tokenizer


def _cannot_load(model_path: str | Path, reason: Exception | str) -> TeacherError:
    why = reason if isinstance(reason, str) else first_line(reason)
    return TeacherError(
        f"the model {str(model_path)!r} cannot be loaded ({why}); give a folder with config.json, safetensors and a "
        "tokenizer, or a hub name that this machine can reach or has cached"
    )


class TransformersGenerator:
    """A causal language model that completes rendered prompts.

    Args:
        model_path: a folder or hub name that ``from_pretrained`` takes.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        batch_size: rows generated at once; more wait.
        revision: commit or tag on the hub.
        adapt: called with the loaded model before it moves to its device, to change layers in place.

    Raises:
        TeacherError: the model cannot be loaded; the message says what was looked for.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str = "bfloat16",
        batch_size: int = 16,
        revision: str | None = None,
        adapt: Callable[[Any], object] | None = None,
    ):
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        self.batch_size = batch_size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = load_tokenizer(model_path, revision=revision)
        try:
            self.model = AutoModelForCausalLM.from_pretrained(str(model_path), revision=revision, dtype=getattr(torch, dtype))
        # RuntimeError: weights of other shapes than config.json's. ImportError: a format whose package is missing.
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise _cannot_load(model_path, error) from error
        if adapt is not None:
            adapt(self.model)
        self.model.to(self.device).eval()
        ids = self.model.generation_config.eos_token_id
        configured = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        self.stop_ids = sorted(
            {*configured, *([self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else [])}
        )
        if not self.stop_ids:
            raise TeacherError(f"the model {str(model_path)!r} names no EOS token, so it would never stop; set eos_token_id")
        self.pad_id = self.tokenizer.pad_token_id
        if self.pad_id is None:
            # Left padding is masked, so any id does; generation never reads it back.
            self.pad_id = self.stop_ids[0]
            self.tokenizer.pad_token_id = self.pad_id

    def complete(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: Sampling,
        on_batch: Callable[[int], Any] | None = None,
    ) -> list[Completion]:
        """Complete rendered prompts, in their order.

        Args:
            prompts: texts with chat markup; BOS is not added again.
            seeds: one 64-bit seed a prompt.
            on_batch: called with the number of rows after each batch.
        """
        # Rows of a like length side by side: less padding, and they end at about the same step.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self._complete_batch([prompts[i] for i in chosen], [seeds[i] for i in chosen], sampling)
            completions.update(zip(chosen, batch))
            if on_batch:
                on_batch(len(chosen))
        return [completions[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def _complete_batch(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        from transformers import DynamicCache

        encoded = self.tokenizer(list(prompts), return_tensors="pt", padding=True, add_special_tokens=False).to(self.device)
        mask_BT = encoded["attention_mask"]
        prompt_lengths = mask_BT.sum(dim=1)
        seeds_B = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)
        alive = torch.arange(len(prompts), device=self.device)  # rows of the batch that have not stopped yet
        generated: list[list[int]] = [[] for _ in prompts]
        stops = torch.tensor(self.stop_ids, device=self.device)
        cache = DynamicCache(config=self.model.config)
        inputs_BT, positions_BT = encoded["input_ids"], (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
        for step in range(sampling.max_new_tokens):
            logits_BV = self.model(
                input_ids=inputs_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            numbers = torch.from_numpy(uniform(seeds_B[alive.cpu().numpy()], step))
            tokens_B = choose_tokens(logits_BV, numbers, temperature=sampling.temperature, top_p=sampling.top_p)
            for row, token in zip(alive.tolist(), tokens_B.tolist()):
                generated[row].append(token)
            going = ~torch.isin(tokens_B, stops)
            if not going.any():
                break
            if not going.all():
                # Stopped rows leave the batch: the rest costs less, and keeps its numbers.
                keep = going.nonzero()[:, 0]
                alive, tokens_B = alive[keep], tokens_B[keep]
                mask_BT, positions_BT = mask_BT[keep], positions_BT[keep]
                cache.batch_select_indices(keep)
            inputs_BT = tokens_B[:, None]
            positions_BT = positions_BT[:, -1:] + 1
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(alive), 1)], dim=1)
        return [
            self._completion(ids, int(length), seed) for ids, length, seed in zip(generated, prompt_lengths.tolist(), seeds)
        ]

    def _completion(self, ids: list[int], num_prompt_tokens: int, seed: int) -> Completion:
        stopped = ids[-1] in self.stop_ids
        # clean_up_tokenization_spaces=False: tokenizer files may ask for it, and it would delete spaces that were written.
        text = self.tokenizer.decode(
            ids[:-1] if stopped else ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return Completion(text, "stop" if stopped else "length", num_prompt_tokens, len(ids), seed)
