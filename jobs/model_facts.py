"""What a plan has to know of a model without the network: its size, where its weights lie on this machine.

Sizes come from a local config.json where there is one, from a small table of published models otherwise, and at last from
the number in the model's name.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelFacts:
    """Size of one model and where that is known from.

    Args:
        num_params: all parameters.
        num_active_params: those that one token passes through; smaller for mixtures of experts.
        num_embedding_params: input embedding and output head, which stay in 16 bits.
        hidden_size, num_layers: of the transformer.
        folder: local folder with its weights, None where they are not on this machine.
        origin: ``config.json``, ``published``, ``name`` or ``guess``.
    """

    num_params: int
    num_active_params: int
    num_embedding_params: int
    hidden_size: int
    num_layers: int
    folder: Path | None
    origin: str


# (parameters, active, embedding and head, hidden size, layers), from the model cards and their config.json.
_PUBLISHED = {
    "deepseek-ai/DeepSeek-R1": (671_000_000_000, 37_000_000_000, 1_853_000_000, 7168, 61),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": (32_764_000_000, 32_764_000_000, 1_557_000_000, 5120, 64),
    "Qwen/QwQ-32B": (32_764_000_000, 32_764_000_000, 1_557_000_000, 5120, 64),
    "Qwen/Qwen2.5-1.5B": (1_544_000_000, 1_544_000_000, 233_000_000, 1536, 28),
    "Qwen/Qwen2.5-7B": (7_616_000_000, 7_616_000_000, 1_090_000_000, 3584, 28),
    "meta-llama/Llama-3.2-3B": (3_213_000_000, 3_213_000_000, 394_000_000, 3072, 28),
}


def hub_cache() -> Path:
    """The folder that huggingface_hub caches in, by the same environment variables."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def cached_snapshot(repo: str, *, kind: str = "models") -> Path | None:
    """A snapshot folder of a hub repository in the local cache, or None. ``kind`` is ``models`` or ``datasets``."""
    snapshots = hub_cache() / f"{kind}--{repo.replace('/', '--')}" / "snapshots"
    found = sorted(snapshots.iterdir()) if snapshots.is_dir() else []
    return next((folder for folder in reversed(found) if any(folder.iterdir())), None)


def is_path(name: str) -> bool:
    """True where a model's name in a recipe is a path: it starts with a dot, a slash or ``~``."""
    return name[:1] in (".", "/", "~")


def weights_folder(name: str, *, role: str) -> Path | None:
    """The local folder with config.json and weights behind a shipped name, a path or a hub name; None where there is none.

    ``role`` is ``teachers`` or ``students``: which of the two shipped models ``tiny`` means.
    """
    if name == "tiny":
        spec = importlib.util.find_spec(f"stillhouse.{role}.tiny")
        roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
        folders = [path.parent for root in roots for path in sorted(root.glob("**/config.json"))]
    else:
        folder = Path(name).expanduser() if is_path(name) else cached_snapshot(name)
        folders = [folder] if folder else []
    weights = ("*.safetensors", "*.bin")
    return next((f for f in folders if (f / "config.json").is_file() and any(p for w in weights for p in f.glob(w))), None)


def _params_of_config(config: dict[str, Any]) -> tuple[int, int]:
    """Parameters of a dense Llama-like decoder (Llama, Qwen2, Qwen3), and those of embedding and head."""
    hidden, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    embedding = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return layers * (attention + 3 * hidden * inner + 2 * hidden) + hidden + embedding, embedding


def model_facts(name: str, *, role: str) -> ModelFacts:
    """Everything a plan needs to know of a model; see ``weights_folder`` for the names. Reads local files only."""
    folder = weights_folder(name, role=role)
    if folder:
        config = json.loads((folder / "config.json").read_text())
        if "num_experts" not in config and "n_routed_experts" not in config and "intermediate_size" in config:
            params, embedding = _params_of_config(config)
            return ModelFacts(
                params, params, embedding, config["hidden_size"], config["num_hidden_layers"], folder, "config.json"
            )
    if name in _PUBLISHED:
        return ModelFacts(*_PUBLISHED[name], folder, "published")
    in_name = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)[ -]?([bBmM])(?![a-zA-Z])", name)
    number, unit = in_name[-1] if in_name else ("2", "M") if name == "tiny" else ("7", "B")
    params = int(float(number) * (1e9 if unit in "bB" else 1e6))
    # Width and depth of a decoder grow with about the cube root of its size: 3,584 and 28 at 7 B.
    scale = (params / 7e9) ** (1 / 3)
    hidden, layers = max(64, int(3584 * scale)), max(2, int(28 * scale))
    return ModelFacts(
        params, params, min(150_000 * hidden, params // 4), hidden, layers, folder, "name" if in_name else "guess"
    )
