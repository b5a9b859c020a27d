"""Train a LoRA adapter over a frozen base with TRL's SFTTrainer and PEFT, on rows that are already tokens and labels.

What this file adds to the trainer: the rows reach the model exactly as stored (TRL's preparation, which truncates at
1,024 tokens by default, is switched off), the batches hold about the same number of tokens and are planned in advance, a
run that was killed goes on from its last complete checkpoint to the very same adapter, and the loss curve survives that.

The adapter is float32 in every mode (TRL would round it to bfloat16 over bitsandbytes weights, which swallows small
updates); with ``dtype="bfloat16"`` the layers compute under autocast.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stillhouse.pipeline.errors import RecipeError, SupervisionError
from stillhouse.pipeline.records import Example, content_key
from stillhouse.pipeline.store import write_atomic
from stillhouse.students.base_models import BaseWeights, DType, load_base, load_tokenizer
from stillhouse.students.batching import plan_batches
from stillhouse.students.folders import whole_folder
from stillhouse.students.rendering import choose_pad_token

if TYPE_CHECKING:
    from transformers import TrainerCallback

Scheduler = Literal["one_cycle", "cosine", "constant"]

_COMPLETE = "complete.json"
_FINGERPRINT = "training.json"


@dataclass(frozen=True, slots=True)
class LossPoint:
    """One optimizer step: mean loss of its supervised tokens (nats), the rate it used, seconds of training until then."""

    step: int
    loss: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished training left behind. Token counts are over all steps, a row counted each time it was used."""

    adapter_dir: Path
    num_steps: int
    num_tokens: int
    num_supervised_tokens: int
    final_loss: float
    """Mean loss of the last tenth of the steps, nats a supervised token."""
    history: list[LossPoint]
    served: str
    """Which code multiplied by the frozen base's weights: see `describe_path`."""
    device: str


def learning_rate_factor(step: int, *, num_steps: int, scheduler: Scheduler, warmup_ratio: float) -> float:
    """The share of the peak learning rate that optimizer step ``step`` (from 0) uses.

    ``one_cycle`` is torch's OneCycleLR: cosine from 1/25 up to 1 over the warm-up, cosine down to 1/250,000. ``cosine``
    rises linearly and falls by a cosine to 1/10. ``constant`` rises linearly and stays.
    """
    warmup_steps = warmup_ratio * num_steps
    # torch's convention: the peak is at warmup_steps - 1, the end at the last step.
    if scheduler == "one_cycle":
        peak, last = warmup_steps - 1, num_steps - 1
        if step <= peak:
            return _cosine_between(1 / 25, 1.0, step / peak if peak > 0 else 1.0)
        return _cosine_between(1.0, 1 / 250_000, (step - max(peak, 0)) / max(last - max(peak, 0), 1))
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if scheduler == "constant":
        return 1.0
    return _cosine_between(1.0, 0.1, (step - warmup_steps) / max(num_steps - warmup_steps, 1))


def _cosine_between(start: float, end: float, fraction: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0))) / 2


def train_lora(
    model_path: str,
    examples: Sequence[Example],
    output_dir: str | Path,
    *,
    base_weights: BaseWeights,
    dtype: DType,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: str | list[str] = "all-linear",
    learning_rate: float,
    num_steps: int,
    tokens_per_step: int,
    max_length: int,
    scheduler: Scheduler = "one_cycle",
    warmup_ratio: float = 0.1,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    save_steps: int = 100,
    seed: int = 0,
    packing: bool = False,
    accumulation_steps: int = 1,
    gradient_checkpointing: bool = False,
    group_size: int = 32,
    block_size: int = 64,
    double_quant: bool = True,
    revision: str | None = None,
    extra_callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train a LoRA adapter on examples and leave it in ``output_dir/adapter`` as safetensors.

    Called again on the same ``output_dir`` after a kill, it goes on from the newest complete checkpoint; on a CPU the
    adapter is then bit-equal to an uninterrupted run's.

    Args:
        model_path, base_weights, dtype, group_size, block_size, double_quant, revision: see :func:`load_base`.
        examples: the rows; ``labels`` are used as they are, aligned with ``input_ids`` (the model shifts them).
        rank, alpha, dropout: of LoRA; the update is ``alpha / rank * B @ A``.
        target_modules: ``"all-linear"`` (but the output head), or names that module names end with.
        num_steps: optimizer steps; epochs follow from it.
        tokens_per_step: tokens of a step, prompt included, padding not.
        max_length: a row longer than this is an error, never cut.
        warmup_ratio: share of the steps in which the rate rises.
        save_steps: steps between checkpoints; the newest two are kept.
        packing: lay a step's rows behind each other with position ids instead of padding them. For a GPU; on a CPU the
            attention over the whole step costs more than the padding does.
        accumulation_steps: forward passes that a step's rows are spread over, to fit memory.
        extra_callbacks: transformers callbacks, for progress.

    Raises:
        SupervisionError: no rows, a row too long, or a row without a supervised token.
        RecipeError: no such model, or ``output_dir`` holds the checkpoints of another training.
    """
    import torch

    from stillhouse.students.served import describe_device, describe_path

    _check_rows(examples, max_length)
    if scheduler not in ("one_cycle", "cosine", "constant"):
        raise RecipeError(f"scheduler={scheduler!r} is none of one_cycle, cosine, constant")
    output_dir = Path(output_dir)
    checkpoints = output_dir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": Path(model_path).name, "revision": revision, "base_weights": base_weights, "dtype": dtype, "rank": rank,
        "alpha": alpha, "dropout": dropout, "target_modules": target_modules, "learning_rate": learning_rate,
        "num_steps": num_steps, "tokens_per_step": tokens_per_step, "scheduler": scheduler, "warmup_ratio": warmup_ratio,
        "weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "seed": seed, "packing": packing,
        "accumulation_steps": accumulation_steps, "group_size": group_size, "block_size": block_size,
        "double_quant": double_quant, "examples": content_key([(e.input_ids, e.labels) for e in examples]),
    }  # fmt: skip
    _check_same_training(output_dir / _FINGERPRINT, settings)

    tokenizer = load_tokenizer(model_path, revision=revision)
    pad_token_id = choose_pad_token(tokenizer)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
    base = load_base(
        model_path,
        base_weights=base_weights,
        dtype=dtype,
        group_size=group_size,
        block_size=block_size,
        double_quant=double_quant,
        revision=revision,
    )
    # Before the adapter is drawn: its initial weights depend on the seed alone.
    torch.manual_seed(seed)
    model = _add_lora(base, base_weights, rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules)

    arguments = {
        "max_steps": num_steps,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "gradient_accumulation_steps": accumulation_steps,
        "activation_checkpointing": gradient_checkpointing,
        "bf16": dtype == "bfloat16",
        "save_steps": save_steps,
        "seed": seed,
        "padding_free": packing,
    }
    trainer = _make_trainer(
        model,
        tokenizer,
        examples,
        checkpoints,
        arguments=arguments,
        tokens_per_step=tokens_per_step,
        scheduler=scheduler,
        warmup_ratio=warmup_ratio,
        callbacks=extra_callbacks,
    )
    # TRL rounds the adapter to bfloat16 over a model that transformers calls loaded in 4 bits.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    latest = _latest_complete_checkpoint(checkpoints)
    trainer.train(resume_from_checkpoint=str(latest) if latest else None)

    history = [
        LossPoint(int(row["step"]), float(row["loss"]), float(row["learning_rate"]), float(row["seconds"]))
        for row in trainer.state.log_history
        if "loss" in row
    ]
    if not all(math.isfinite(point.loss) for point in history):
        first = next(point.step for point in history if not math.isfinite(point.loss))
        raise SupervisionError(f"the loss is not finite from step {first} on. Lower learning_rate={learning_rate}.")
    adapter_dir = output_dir / "adapter"
    if trainer.is_world_process_zero():
        _save_adapter(model, adapter_dir)
    used = [row for step in trainer.planned_steps for part in step for row in part]
    tail = history[-max(1, len(history) // 10) :]
    return TrainResult(
        adapter_dir=adapter_dir,
        num_steps=trainer.state.global_step,
        num_tokens=sum(len(examples[row].input_ids) for row in used),
        num_supervised_tokens=sum(examples[row].num_supervised_tokens for row in used),
        final_loss=sum(point.loss for point in tail) / len(tail),
        history=history,
        served=describe_path(model),
        device=describe_device(model),
    )


def _check_rows(examples: Sequence[Example], max_length: int) -> None:
    if not examples:
        raise SupervisionError("training got no examples")
    if not any(example.num_supervised_tokens for example in examples):
        raise SupervisionError(f"none of the {len(examples)} examples has a supervised token: every label is -100")
    for example in examples:
        if len(example.input_ids) != len(example.labels):
            raise SupervisionError(
                f"example {example.key}: {len(example.input_ids)} input_ids and {len(example.labels)} labels; "
                "they have to be of one length"
            )
        if len(example.input_ids) > max_length:
            raise SupervisionError(
                f"example {example.key} has {len(example.input_ids)} tokens and train.max_length is {max_length}. "
                "Rows are never cut: raise max_length or filter long traces."
            )
        if not example.num_supervised_tokens:
            raise SupervisionError(f"example {example.key} has no supervised token: every label is -100")


def _check_same_training(path: Path, settings: dict[str, Any]) -> None:
    settings = json.loads(json.dumps(settings))
    if path.exists():
        found = json.loads(path.read_text())
        changed = sorted(name for name in settings if settings[name] != found.get(name))
        if changed:
            raise RecipeError(
                f"{path.parent} holds the checkpoints of a training that differs in {', '.join(changed)}. "
                "Give another folder, or delete this one to start over."
            )
        return
    write_atomic(path, json.dumps(settings, indent=1).encode())


def _add_lora(base, base_weights: BaseWeights, *, rank: int, alpha: float, dropout: float, target_modules: str | list[str]):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, bias="none", task_type="CAUSAL_LM"
    )
    if base_weights in ("int4", "nf4"):
        from stillhouse.kernels.peft_lora import register_with_peft

        register_with_peft(config, base)
    return get_peft_model(base, config)


def _make_trainer(
    model,
    tokenizer,
    examples: Sequence[Example],
    checkpoints: Path,
    *,
    arguments: dict[str, Any],
    tokens_per_step: int,
    scheduler: Scheduler,
    warmup_ratio: float,
    callbacks: Sequence[TrainerCallback],
):
    import datasets
    import torch
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    class PlannedTrainer(SFTTrainer):
        """SFTTrainer whose batches are planned in advance and whose checkpoints say when they are complete."""

        def get_train_dataloader(self):
            # One process takes every world_size-th batch, so a step's parts are adjacent and dealt round.
            batches = [part for step in self.planned_steps for part in step]
            loader = torch.utils.data.DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

        def create_scheduler(self, num_training_steps, optimizer=None):
            if self.lr_scheduler is None:
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                    self.optimizer if optimizer is None else optimizer,
                    lambda step: learning_rate_factor(
                        step, num_steps=num_training_steps, scheduler=scheduler, warmup_ratio=warmup_ratio
                    ),
                )
                self._created_lr_scheduler = True
            return self.lr_scheduler

        def log(self, logs, start_time=None):
            if "loss" in logs:
                if self.seconds_before is None:
                    self.seconds_before = max((row.get("seconds", 0.0) for row in self.state.log_history), default=0.0)
                logs["seconds"] = self.seconds_before + time.monotonic() - self.started
            super().log(logs, start_time)

        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process has its own random state to write
            if self.args.should_save:
                _mark_complete(checkpoints / f"checkpoint-{self.state.global_step}")

        def create_model_card(self, *args, **kwargs):
            """No card for a checkpoint: it is ours alone, and the card of what is emitted is written with its results."""

    config = SFTConfig(
        output_dir=str(checkpoints),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        completion_only_loss=False,
        packing=False,
        use_cpu=not torch.cuda.is_available(),
        per_device_train_batch_size=2,  # not used, the batches are planned; TRL warns of 1
        optim="adamw_torch_fused",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_total_limit=2,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        remove_unused_columns=False,
        accelerator_config={"even_batches": False, "split_batches": False, "use_seedable_sampler": False},
        **arguments,
    )
    rows = datasets.Dataset.from_dict(
        {
            "input_ids": [list(example.input_ids) for example in examples],
            "labels": [list(example.labels) for example in examples],
        }
    )
    trainer = PlannedTrainer(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)  # prints each step's dictionary on stdout, which belongs to data
    trainer.seconds_before = None
    trainer.started = time.monotonic()
    trainer.planned_steps = plan_batches(
        [len(example.input_ids) for example in examples],
        num_steps=config.max_steps,
        tokens_per_step=tokens_per_step,
        num_parts=config.gradient_accumulation_steps * config.world_size,
        seed=config.seed,
    )
    return trainer


def _mark_complete(checkpoint: Path) -> None:
    """Write, last, what a whole checkpoint consists of: a kill in the middle of one leaves no mark."""
    sizes = {str(path.relative_to(checkpoint)): path.stat().st_size for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    write_atomic(checkpoint / _COMPLETE, json.dumps(sizes).encode())


def _latest_complete_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint of the most steps whose files are all there in full; unfinished ones are removed."""
    found: list[tuple[int, Path]] = []
    for checkpoint in checkpoints.glob("checkpoint-*"):
        mark = checkpoint / _COMPLETE
        sizes = json.loads(mark.read_text()) if mark.exists() else None
        if sizes is not None and all(
            (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in sizes.items()
        ):
            found.append((int(checkpoint.name.rpartition("-")[2]), checkpoint))
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)  # several processes may be at it; a rest is never used
    return max(found)[1] if found else None


def _save_adapter(model, adapter_dir: Path) -> None:
    with whole_folder(adapter_dir) as folder:
        model.save_pretrained(str(folder), safe_serialization=True)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
