"""Say which code multiplies by the weights of a loaded model: our kernels (and which of them), bitsandbytes, or torch.

Asked in the process that holds the model, and after it has worked: what serves is chosen on each machine by its processor
and by what was compiled there, and transformers decodes a compressed-tensors checkpoint in its first forward.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from stillhouse.kernels import cpu
from stillhouse.kernels.linear import Linear4bit


def describe_path(model: nn.Module) -> str:
    """Which code computes a model's linear layers, as layers counted by kind: ``42 × int4 on compiled kernels, AVX-512 …``.

    LoRA's own matrices are not counted. Layers without a weight here (offloaded ones) count as they are declared.
    """
    kinds = Counter(
        kind
        for name, module in model.named_modules()
        if not any(part.startswith("lora_") for part in name.split(".")) and (kind := _kind(module)) is not None
    )
    return "; ".join(f"{count} × {kind}" for kind, count in kinds.items()) or "no linear layer"


def describe_device(model: nn.Module) -> str:
    """Where a model's weights are: ``CPU``, or the GPU's name."""
    tensors = (*model.parameters(), *model.buffers())
    device = tensors[0].device if tensors else torch.device("cpu")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, Linear4bit):
        return f"{module.format} on {_own_kernels(module)}"
    if hasattr(module, "base_layer"):
        return None  # PEFT's wrapper; the layer inside it is counted
    if type(module).__module__.startswith("bitsandbytes."):
        return f"bitsandbytes {type(module).__name__}" if isinstance(module, nn.Linear) else None
    weights = getattr(getattr(module, "quantization_scheme", None), "weights", None)
    packed = f"{getattr(weights.type, 'value', weights.type)}{weights.num_bits}" if weights is not None else "16 bits"
    if hasattr(module, "weight_packed"):
        return f"{packed} that compressed-tensors has not decoded yet"
    if not isinstance(module, nn.Linear):
        return None
    dtype = str(module.weight.dtype).removeprefix("torch.")
    return f"{dtype} in torch" if weights is None else f"{packed} that compressed-tensors decoded to {dtype}, in torch"


def _own_kernels(layer: Linear4bit) -> str:
    """What ``torch.ops.stillhouse`` runs for this layer's device."""
    if layer.codes.device.type == "cpu":
        return cpu.describe()
    operator = "stillhouse::linear_int4" if layer.format == "int4" else "stillhouse::linear_nf4"
    key = layer.codes.device.type.upper()
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)
    return "Triton kernels" if compiled else "plain torch (no kernels for this device)"
