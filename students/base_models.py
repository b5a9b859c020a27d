"""Find, load and read base models: plain 16/32-bit weights, our own int4 or NF4, or bitsandbytes NF4."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from stillhouse.pipeline.errors import RecipeError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BaseWeights = Literal["int4", "nf4", "bitsandbytes", "bf16"]
DType = Literal["float32", "bfloat16"]
BASE_WEIGHTS: tuple[BaseWeights, ...] = ("int4", "nf4", "bitsandbytes", "bf16")
# The output head stays in 16 bits: TRL multiplies by ``lm_head.weight`` directly, and it is often tied to the embedding.
KEPT_IN_16_BITS = ["lm_head"]


def resolve_model(name: str) -> str:
    """The folder of the shipped tiny base student for ``"tiny"``; any other name unchanged."""
    if name != "tiny":
        return name
    return str(resources.files("stillhouse.students.tiny") / "model")


def _looks_local(model_path: str) -> bool:
    return model_path.startswith((".", "/", "~")) or Path(model_path).is_dir()


def _not_found(model_path: str, revision: str | None, cause: Exception | None) -> RecipeError:
    if _looks_local(model_path):
        what = f"{model_path!r} is not a model folder: it has to hold config.json, *.safetensors and tokenizer files"
        todo = "Correct the path, or name a model of the Hugging Face hub."
    else:
        at = f" at revision {revision!r}" if revision else ""
        what = f"no model {model_path!r}{at} in this folder, in the local Hugging Face cache or on the hub"
        todo = "Check the name and the connection (and HF_TOKEN for a gated model), or give the path of a local folder."
    reason = f" ({first_line(cause)})" if cause else ""
    return RecipeError(f"{what}{reason}. {todo}")


def _load_config(model_path: str, revision: str | None):
    from huggingface_hub.errors import HFValidationError
    from transformers import AutoConfig

    if _looks_local(model_path) and not (Path(model_path).expanduser() / "config.json").is_file():
        raise _not_found(model_path, revision, None)
    try:
        return AutoConfig.from_pretrained(
            str(Path(model_path).expanduser()) if _looks_local(model_path) else model_path, revision=revision
        )
    except (OSError, ValueError, HFValidationError) as error:
        raise _not_found(model_path, revision, error) from error


def load_tokenizer(model_path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer with its chat template.

    Raises:
        RecipeError: nothing to load under that name.
    """
    from transformers import AutoTokenizer

    model_path = resolve_model(model_path)
    _load_config(model_path, revision)
    try:
        return AutoTokenizer.from_pretrained(model_path, revision=revision)
    except (OSError, ValueError) as error:
        raise _not_found(model_path, revision, error) from error


def load_base(
    model_path: str,
    *,
    base_weights: BaseWeights,
    dtype: DType,
    group_size: int = 32,
    block_size: int = 64,
    double_quant: bool = True,
    revision: str | None = None,
    device: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model with its weights frozen, ready for LoRA.

    Args:
        model_path: a folder, a hub name, or ``"tiny"``.
        base_weights: ``int4`` (groups of ``group_size``, symmetric) and ``nf4`` (blocks of ``block_size``, absmax nested
            when ``double_quant``) are our kernels, quantized while loading; ``bitsandbytes`` is its NF4 (blocks of 64);
            ``bf16`` keeps the weights as they are, in ``dtype``.
        dtype: what the layers compute in, and what the unquantized tensors are held in.
        device: ``"cpu"`` or ``"cuda"``; None takes the GPU that torch sees, else the CPU.

    Raises:
        RecipeError: no such model, or an unknown ``base_weights``.
    """
    from transformers import AutoModelForCausalLM

    model_path = resolve_model(model_path)
    if base_weights not in BASE_WEIGHTS:
        raise RecipeError(f"base_weights={base_weights!r} is none of {', '.join(BASE_WEIGHTS)}")
    config = _load_config(model_path, revision)
    quantization = None
    if base_weights == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
            llm_int8_skip_modules=KEPT_IN_16_BITS,
        )
    elif base_weights != "bf16":
        from stillhouse.kernels.huggingface import StillhouseConfig, register

        register()
        quantization = StillhouseConfig(
            format=base_weights,
            group_size=group_size,
            block_size=block_size,
            double_quant=double_quant,
            modules_to_not_convert=KEPT_IN_16_BITS,
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    placement = {"device_map": {"": torch.cuda.current_device()}} if device == "cuda" else {}
    if quantization is not None:
        placement["quantization_config"] = quantization
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_path, config=config, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True, **placement
        )
    except OSError as error:
        raise _not_found(model_path, revision, error) from error
    model.requires_grad_(False)
    return model


def dequantized_weight(module: nn.Module) -> torch.Tensor:
    """The weight that a linear layer multiplies by, decoded: shape (out_features, in_features), float32, on the CPU.

    Raises:
        TypeError: not a linear layer of one of the four kinds of ``base_weights``.
    """
    from stillhouse.kernels.linear import Linear4bit

    if isinstance(module, Linear4bit):
        return module.dequantize_weight(torch.float32).cpu()
    if type(module).__module__.startswith("bitsandbytes."):
        import bitsandbytes

        weight = module.weight
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float().cpu()
    if isinstance(module, nn.Linear):
        return module.weight.detach().float().cpu()
    raise TypeError(f"no rule to decode the weight of {type(module).__module__}.{type(module).__qualname__}")
