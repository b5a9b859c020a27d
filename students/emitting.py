"""Write the checkpoint that is shipped: int4 compressed-tensors safetensors that transformers, vLLM and SGLang load as it is.

Every linear layer but the output head becomes int4 in groups with one float16 scale each. The scales have 8 significant
bits, so a loader that casts them to bfloat16 (transformers does, by ``dtype`` of the config) decodes the same weights.
Embeddings, norms and biases stay in bfloat16. The tensors are read and packed one at a time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stillhouse.kernels.compressed_tensors import quantization_config, to_compressed_tensors
from stillhouse.kernels.formats import dequantize, quantize
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.manifest import read_manifest, write_manifest
from stillhouse.pipeline.store import write_atomic
from stillhouse.students.base_models import load_tokenizer
from stillhouse.students.folders import whole_folder
from stillhouse.students.rendering import template_hash

_MAX_SHARD_SIZE = "4GB"
# What a checkpoint takes over from the student's folder as it is.
_COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
           "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")  # fmt: skip


@dataclass(frozen=True, slots=True)
class EmitResult:
    """What was written and what the rounding cost.

    ``sqnr_db`` is the signal-to-quantization-noise ratio of each packed layer's weight against the 16-bit student, decibels
    (infinite where nothing was rounded away); ``left_in_16_bits`` names the layers that were not packed, with the reason.
    ``size_bytes`` and ``size_16bit_bytes`` are the sums of the safetensors files, after and before.
    """

    path: Path
    manifest_sha256: str
    size_bytes: int
    size_16bit_bytes: int
    sqnr_db: dict[str, float]
    left_in_16_bits: dict[str, str]


def emit_checkpoint(
    student_dir: str | Path,
    output_dir: str | Path,
    *,
    group_size: int = 32,
    symmetric: bool = True,
    skip: Iterable[str] = (),
    provenance: Mapping[str, Any],
    card: str,
) -> EmitResult:
    """Quantize a 16-bit student to int4 and write the checkpoint folder; it appears under its name when it is complete.

    Args:
        student_dir: a bfloat16 model folder, as ``merge_adapter`` leaves it.
        group_size: weights along a row that share a scale; layers whose in_features it does not divide stay in 16 bits.
        symmetric: no zero points (what GGUF Q4_0 and most fast kernels want).
        skip: names of layers that stay in 16 bits, in full or from a dot on (``"mlp.down_proj"``).
        provenance: what the manifest says of the origin: recipe, commits, versions, seeds. ``chat_template_sha256`` (the
            template of training, an Example's ``template_hash``) is filled in from the student's tokenizer when missing.
        card: Markdown of README.md; yaml metadata is put before it unless it begins with some.

    Raises:
        RecipeError: no model in ``student_dir``, or ``skip`` names a layer that is not there.
    """
    from huggingface_hub import save_torch_state_dict

    student_dir, output_dir = Path(student_dir), Path(output_dir)
    tokenizer = load_tokenizer(str(student_dir))
    config = json.loads((student_dir / "config.json").read_text())
    linears, left = _choose_layers(student_dir, group_size=group_size, skip=tuple(skip))

    packed_tensors: dict[str, torch.Tensor] = {}
    sqnr_db: dict[str, float] = {}
    for name, tensor in _read_tensors(student_dir):
        layer = name.removesuffix(".weight")
        if layer not in linears:
            packed_tensors[name] = tensor
            continue
        packed = quantize(tensor, "int4", group_size=group_size, symmetric=symmetric)
        sqnr_db[layer] = _sqnr_db(tensor.float(), dequantize(packed))
        for suffix, part in to_compressed_tensors(packed).items():
            packed_tensors[f"{layer}.{suffix}"] = part
    missing = sorted(linears - set(sqnr_db))
    if missing:
        raise RecipeError(f"{student_dir} has no weight for its layer {missing[0]!r}; merge the student again")

    config["quantization_config"] = quantization_config(group_size=group_size, symmetric=symmetric, ignore=["lm_head", *left])
    with whole_folder(output_dir) as folder:
        save_torch_state_dict(packed_tensors, folder, max_shard_size=_MAX_SHARD_SIZE, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for file in _COPIED:
            if (student_dir / file).is_file():
                shutil.copyfile(student_dir / file, folder / file)
        (folder / "README.md").write_text(_with_metadata(card, provenance), encoding="utf-8")
        size_bytes = _weight_bytes(folder)
        extra = {
            "chat_template_sha256": template_hash(tokenizer),
            "format": f"int4-g{group_size} {'symmetric' if symmetric else 'asymmetric'}, compressed-tensors pack-quantized",
            "left_in_16_bits": left,
            **provenance,
        }
        manifest_sha256 = write_manifest(folder, kind="checkpoint", extra=extra)
    return EmitResult(output_dir, manifest_sha256, size_bytes, _weight_bytes(student_dir), sqnr_db, left)


def replace_card(checkpoint_dir: str | Path, card: str) -> str:
    """Write a new README.md into an emitted folder (results measured after it was written) and seal the folder again.

    Returns:
        sha256 of the new manifest. No weight, tokenizer or configuration file changes.
    """
    checkpoint_dir = Path(checkpoint_dir)
    provenance = read_manifest(checkpoint_dir)["provenance"]
    write_atomic(checkpoint_dir / "README.md", _with_metadata(card, provenance).encode())
    return write_manifest(checkpoint_dir, kind="checkpoint", extra=provenance)


def _choose_layers(student_dir: Path, *, group_size: int, skip: tuple[str, ...]) -> tuple[set[str], dict[str, str]]:
    """Names of the linear layers to pack, and of those left in 16 bits with the reason; the output head is in neither."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student_dir))
    head = model.get_output_embeddings()
    linears, left = set(), {}
    unused = set(skip)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or module is head:
            continue
        asked = {pattern for pattern in skip if name == pattern or name.endswith(f".{pattern}")}
        unused -= asked
        if asked:
            left[name] = "quantize.skip names it"
        elif module.in_features % group_size:
            left[name] = f"in_features={module.in_features} is not a multiple of group_size={group_size}"
        else:
            linears.add(name)
    if unused:
        raise RecipeError(f"quantize.skip names {sorted(unused)}, which no linear layer of {student_dir} is called")
    return linears, left


def _read_tensors(student_dir: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    for path in sorted(student_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield name, file.get_tensor(name)


def _sqnr_db(weight: torch.Tensor, decoded: torch.Tensor) -> float:
    noise = (weight - decoded).double().square().sum().item()
    signal = weight.double().square().sum().item()
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _with_metadata(card: str, provenance: Mapping[str, Any]) -> str:
    if card.startswith("---\n"):
        return card
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["tags:", *(f"- {tag}" for tag in ("distillation", "reasoning", "int4", "compressed-tensors", "stillhouse"))]
    base_model = provenance.get("base_model")
    if base_model:
        lines.append(f"base_model: {json.dumps(base_model)}")  # a JSON string is a YAML string
    return "\n".join(["---", *lines, "---", "", card.rstrip(), ""])
