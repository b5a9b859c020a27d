"""How fast a device runs a model, from its data sheet: the formulas behind a plan's hours.

A roofline with one efficiency factor, right within a factor of two or so. No measurement is made and torch is not imported.
"""

from __future__ import annotations

from dataclasses import dataclass

from stillhouse.jobs.model_facts import ModelFacts


@dataclass(frozen=True)
class Device:
    """Peak figures of what runs the models: dense 16-bit FLOP/s, memory bytes/s, memory bytes; one GPU or one CPU core."""

    name: str
    flops: float
    bandwidth: float
    memory_bytes: float
    efficiency: float
    """Share of the peaks that real kernels reach, over a whole stage."""
    overhead_s: float
    """Time of one decoding step that no hardware shortens: launches, sampling, Python."""
    is_gpu: bool = True


# Peaks from the vendors' data sheets. 0.35 of them is what vLLM reaches in published throughput tests of 32 B models on
# H100 (2,000 to 4,000 tok/s), and what packed LoRA training reaches.
GPUS = {
    "H200": Device("H200", 989e12, 4.8e12, 141e9, 0.35, 0.005),
    "H100": Device("H100", 989e12, 3.35e12, 80e9, 0.35, 0.005),
    "A100": Device("A100", 312e12, 2.0e12, 80e9, 0.35, 0.005),
    "L40S": Device("L40S", 362e12, 0.86e12, 48e9, 0.35, 0.005),
    "4090": Device("RTX 4090", 165e12, 1.0e12, 24e9, 0.35, 0.005),
}
# One core of a current x86 server, in float32. Set so that the demo's stages come out within a factor of two of what two
# cores took: 28 s for its traces, 170 to 215 s for its training, 15 s for its validation.
CPU_CORE = Device("CPU core", 70e9, 20e9, 16e9, 0.5, 0.003, is_gpu=False)


def decoding_tokens_per_s(
    facts: ModelFacts, device: Device, *, batch_size: int, num_devices: int = 1, weight_bytes: float = 2.0
) -> float:
    """Tokens a second that one copy of a model on ``num_devices`` devices decodes, for ``batch_size`` sequences at once.

    For an engine that fills the place of a finished sequence with the next one, as vLLM does.

    One step reads all weights once and does 2 FLOPs per active parameter and sequence:
    ``step_s = overhead + (weights / bandwidth + batch · 2 · active / flops) / (devices · efficiency)``. A mixture of experts
    reads all of its experts once the batch is large, so all parameters count for the reading.
    """
    reading = facts.num_params * weight_bytes / device.bandwidth
    computing = batch_size * 2 * facts.num_active_params / device.flops
    return batch_size / (device.overhead_s + (reading + computing) / (num_devices * device.efficiency))


def batched_decoding_s(
    facts: ModelFacts,
    device: Device,
    *,
    num_sequences: int,
    batch_size: int,
    num_tokens: float,
    max_new_tokens: int,
    num_devices: float = 1,
    weight_bytes: float = 2.0,
) -> float:
    """Seconds in which one copy of a model decodes ``num_tokens`` in batches that each go on until their longest row ends.

    A batch is taken to have a row that reaches ``max_new_tokens``, so its steps, each of which reads all weights once, are that
    many; finished rows leave the batch, so only written tokens are computed.
    """
    steps = -(-num_sequences // batch_size) * max_new_tokens
    reading = steps * facts.num_params * weight_bytes / device.bandwidth
    computing = num_tokens * 2 * facts.num_active_params / device.flops
    return steps * device.overhead_s + (reading + computing) / (num_devices * device.efficiency)


def training_tokens_per_s(
    facts: ModelFacts, device: Device, *, gradient_checkpointing: bool, num_adapter_params: int = 0
) -> float:
    """Tokens a second that one device trains an adapter with.

    A frozen layer needs 2 FLOPs per parameter and token forward and 2 for the gradient of its input, none for its weights;
    checkpointing runs the forward pass twice: 4 or 6 in all. The adapter's own weights get a gradient, which is 2 more.
    """
    frozen = 6 if gradient_checkpointing else 4
    flops_per_token = frozen * facts.num_active_params + (frozen + 2) * num_adapter_params
    return device.efficiency * device.flops / flops_per_token
