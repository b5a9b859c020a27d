"""Merge a LoRA adapter into the weights it was trained over, and save the student in 16 bits.

The adapter was trained over the *decoded 4-bit* base, so that is what it is added to. Added to the original 16-bit weights
instead, the student would carry the base's quantization error, which is many times an adapter's size.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from stillhouse.pipeline.errors import RecipeError
from stillhouse.students.base_models import BaseWeights, DType, dequantized_weight, load_base, load_tokenizer, resolve_model
from stillhouse.students.folders import whole_folder
from stillhouse.students.rendering import choose_pad_token, stop_token_ids

_PEFT_PREFIX = "base_model.model."


def merge_adapter(
    model_path: str,
    adapter_dir: str | Path,
    output_dir: str | Path,
    *,
    base_weights: BaseWeights,
    dtype: DType,
    group_size: int = 32,
    block_size: int = 64,
    double_quant: bool = True,
    revision: str | None = None,
) -> Path:
    """Save ``decoded base + alpha / rank * B @ A`` as a bfloat16 model that anything can load.

    The sum is formed in float32 and rounded once. Tokenizer and chat template are the base's; the generation config stops
    at every token of ``stop_token_ids`` and pads with ``choose_pad_token``.

    Args:
        model_path, base_weights, dtype, group_size, block_size, double_quant, revision: as the adapter was trained with.
        adapter_dir: what ``train_lora`` left.
        output_dir: appears when it is complete.

    Returns:
        output_dir.

    Raises:
        RecipeError: no such model, or an adapter that is not plain LoRA over this model.
    """
    from transformers import AutoModelForCausalLM

    output_dir = Path(output_dir)
    updates = _read_updates(Path(adapter_dir))
    tokenizer = load_tokenizer(model_path, revision=revision)
    base = load_base(
        model_path,
        base_weights=base_weights,
        dtype=dtype,
        group_size=group_size,
        block_size=block_size,
        double_quant=double_quant,
        revision=revision,
        device="cpu",
    )
    student = AutoModelForCausalLM.from_pretrained(
        resolve_model(model_path), revision=revision, dtype=torch.bfloat16, use_safetensors=True
    )
    trained_over = dict(base.named_modules())
    unknown = sorted(set(updates) - set(trained_over))
    if unknown:
        raise RecipeError(f"the adapter in {adapter_dir} has weights for {unknown[0]!r}, which {model_path!r} does not have")
    head = student.get_output_embeddings()
    with torch.no_grad():
        for name, module in student.named_modules():
            if not isinstance(module, torch.nn.Linear) or (module is head and name not in updates):
                continue
            weight = dequantized_weight(trained_over[name])  # float32 [N, K]
            if name in updates:
                lora_a, lora_b, scale = updates[name]
                weight += scale * (lora_b @ lora_a)  # [N, r] @ [r, K]
            module.weight.copy_(weight)
    stops = list(stop_token_ids(tokenizer))
    student.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    student.generation_config.pad_token_id = choose_pad_token(tokenizer)
    student.config.use_cache = True  # trainers switch it off in the base's config
    student.config.eos_token_id = stops[0]
    student.config.pad_token_id = choose_pad_token(tokenizer)
    with whole_folder(output_dir) as folder:
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return output_dir


def _read_updates(adapter_dir: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """A, B (float32) and scale of every adapted layer, by the layer's name in the base model."""
    from safetensors.torch import load_file

    try:
        config = json.loads((adapter_dir / "adapter_config.json").read_text())
        tensors = load_file(adapter_dir / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise RecipeError(f"{adapter_dir} is not an adapter: {Path(error.filename or '').name or error} is missing") from error
    extra = [name for name in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias") if config.get(name)]
    if config.get("peft_type") != "LORA" or extra or config.get("bias", "none") != "none":
        raise RecipeError(
            f"the adapter in {adapter_dir} is {config.get('peft_type')} with {', '.join(extra) or 'a bias'}; "
            "merging knows plain LoRA without these"
        )
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    names = {
        name.removeprefix(_PEFT_PREFIX).removesuffix(".lora_A.weight") for name in tensors if name.endswith("lora_A.weight")
    }
    updates = {}
    for name in sorted(names):
        lora_a = tensors.pop(f"{_PEFT_PREFIX}{name}.lora_A.weight").float()
        lora_b = tensors.pop(f"{_PEFT_PREFIX}{name}.lora_B.weight").float()
        updates[name] = (lora_a, lora_b, scale)
    if tensors:
        raise RecipeError(f"the adapter in {adapter_dir} holds {sorted(tensors)[0]!r}, which is not part of plain LoRA")
    return updates
