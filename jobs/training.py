"""Training through Ray Train: `students.training.train_lora` in one worker or several, and its progress brought back."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.jobs.cluster import meant_error
from stillhouse.jobs.remote import base_arguments
from stillhouse.pipeline.records import Example
from stillhouse.pipeline.store import RunStore, write_atomic

if TYPE_CHECKING:
    from stillhouse.jobs.run_state import RunState

RESULT = "result.json"
STEP = "step.json"
WORKER_FAILURES = 2
"""How often Ray Train starts workers again after one died; they go on from the newest checkpoint."""


def num_steps_of(train: dict[str, Any], num_tokens: int) -> int:
    """Optimizer steps of a recipe's train section: given, or as many as its epochs take at ``tokens_per_step``."""
    if train["num_steps"] is not None:
        return train["num_steps"]
    return max(1, math.ceil(train["epochs"] * num_tokens / train["tokens_per_step"]))


def train_on_ray(run: RunState, *, folder: str, num_tokens: int) -> dict[str, Any]:
    """Train the adapter into ``folder`` of the run and return what `TrainResult` says, as plain values.

    Args:
        folder: relative to the run; a training that was cut off left its checkpoints there and goes on.
        num_tokens: tokens of all training rows, which turns epochs into steps.

    Raises:
        StillhouseError: what failed in the worker, as it was raised there.
    """
    recipe = run.recipe
    train, cluster = recipe.train.model_dump(mode="json"), recipe.cluster
    num_steps = num_steps_of(train, num_tokens)
    settings = {
        "run": str(run.store.root),
        "folder": folder,
        "student": recipe.student.model_dump(mode="json"),
        "train": train | {"num_steps": num_steps},
        "seed": recipe.seed,
        "cpus": max(1, round(cluster.cpus_per_train_worker)),
    }
    run.reporter.begin("steps", num_steps)
    finished = threading.Event()
    watcher = threading.Thread(target=_watch, args=(run, run.store.path(folder, STEP), finished), daemon=True)
    watcher.start()
    try:
        if cluster.train_workers == 0:
            run.on_worker(
                _fit_in_process, settings, num_cpus=cluster.cpus_per_train_worker, num_gpus=cluster.gpus_per_train_worker
            )
        else:
            # Started first, so that Ray Train finds the session of this run.
            assert run.ray.is_initialized()
            _fit(settings, cluster.train_workers, cluster.cpus_per_train_worker, cluster.gpus_per_train_worker)
    finally:
        finished.set()
        watcher.join()
    return json.loads(run.store.path(folder, RESULT).read_text())


def _fit_in_process(settings: dict[str, Any]) -> None:
    """Ray Train's local mode inside one Ray task: no process group, one process's memory."""
    _fit(settings, 0, 0, 0)


def _fit(settings: dict[str, Any], num_workers: int, num_cpus: float, num_gpus: float) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": num_cpus} | ({"GPU": num_gpus} if num_gpus else {})
    scaling = (
        ScalingConfig(num_workers=num_workers, use_gpu=num_gpus > 0, resources_per_worker=resources)
        if num_workers
        else ScalingConfig(num_workers=0)
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=settings,
        scaling_config=scaling,
        run_config=RunConfig(
            name="ray-train",
            storage_path=str(Path(settings["run"], settings["folder"])),
            failure_config=FailureConfig(max_failures=WORKER_FAILURES if num_workers else 0),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray Train wraps whatever a worker raises; the user's error is inside
        raise meant_error(error) from error


def train_worker(settings: dict[str, Any]) -> None:
    """One training worker: read the examples, train, and leave the result beside the adapter."""
    import torch
    from transformers import TrainerCallback

    from stillhouse.students.training import train_lora

    class StepFile(TrainerCallback):
        """Says in a file how far the training is: the driver may sit on another node, the run's folder is shared."""

        def on_log(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                write_atomic(Path(settings["run"], settings["folder"], STEP), json.dumps(state.global_step).encode())

    torch.set_num_threads(settings["cpus"])
    store = RunStore(settings["run"])
    student, train = settings["student"], settings["train"]
    lora = student["lora"]
    passed = (
        *("learning_rate", "num_steps", "tokens_per_step", "max_length", "scheduler", "warmup_ratio"),
        *("weight_decay", "max_grad_norm", "save_steps", "packing", "accumulation_steps", "gradient_checkpointing"),
    )
    result = train_lora(
        student["base_model"],
        store.read("examples", Example, key="key"),
        store.path(settings["folder"]),
        **base_arguments(student),
        rank=lora["rank"],
        alpha=lora["alpha"],
        dropout=lora["dropout"],
        target_modules=lora["target_modules"],
        **{name: train[name] for name in passed},
        seed=settings["seed"],
        extra_callbacks=[StepFile()],
    )
    history = [[point.step, point.loss, point.learning_rate, point.seconds] for point in result.history]
    value = {
        "served": {"path": result.served, "device": result.device},
        "num_steps": result.num_steps,
        "num_tokens": result.num_tokens,
        "num_supervised_tokens": result.num_supervised_tokens,
        "final_loss": result.final_loss,
        "history": history,
    }
    write_atomic(store.path(settings["folder"], RESULT), json.dumps(value).encode())


def _watch(run: RunState, path: Path, finished: threading.Event) -> None:
    """Bring the step file's count to the progress bar until the training is over."""
    shown = 0
    while not finished.wait(1.0):
        if path.exists():
            step = json.loads(path.read_text())
            run.reporter.advance(step - shown)
            shown = step
