"""The stages of a run, each bound to the recipe, the store and Ray. What a stage does lives in the other rooms.

``CODE_VERSIONS`` names each stage's behaviour: raise a number when a change makes old outputs wrong, and runs do that stage
(and what follows) again. Traces are not thrown away by it: they are found by their own keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillhouse.jobs import remote
from stillhouse.jobs.judged_by import judged_by
from stillhouse.jobs.recipe import Recipe
from stillhouse.jobs.recipe_problems import FileSource
from stillhouse.jobs.recipe_teacher import ReplayTeacher
from stillhouse.jobs.run_state import RunState, StageOutput, read_problems
from stillhouse.jobs.sources import evaluation_set_identities, file_hashes, gate_sampling, load_problems, test_problems
from stillhouse.jobs.student_grading import base_identity, grading_settings, student_pool
from stillhouse.jobs.trace_plan import FixedPlan
from stillhouse.jobs.traces import (
    TeacherRequests,
    ask_teacher,
    completion_of,
    left_of_budget,
    note_how_it_ended,
    open_writer,
    teacher_identity,
)
from stillhouse.jobs.training import train_on_ray
from stillhouse.pipeline.records import Example, Graded, Problem, Trace, content_key
from stillhouse.pipeline.trace_store.store import TraceStore

CODE_VERSIONS = {"problems": 2, "examples": 2, "train": 2, "quantize": 1, "evaluate": 2}
"""`stillhouse.jobs.traces`, `stillhouse.jobs.probing` and `stillhouse.jobs.filtering` have their own."""
SELF_TEST_FILE = "verifiers.json"
"""How the verifiers did on each source's own golds, before any teacher was asked."""
SHOWN_FAILURES = 5
EVALUATED = ("teacher", "base", "student", "checkpoint", "checkpoint_kernels")


def problems_stage(run: RunState) -> None:
    """Problems of every split, with disjoint texts and golds that verify themselves."""
    evaluation_set_identities(run.recipe)  # what is not there is said before the teacher is asked

    def work(_: str) -> StageOutput:
        kept, left_out, self_checks = load_problems(run.recipe)
        for name, count in left_out.items():
            if count:
                run.reporter.note(f"  {name.removeprefix('num_').replace('_', ' in ')}: {count}, left out")
        rows = [problem for split in ("train", "validation", "test") for problem in kept[split]]
        files = run.store.replace_shards("problems", Problem, rows)
        checks = {name: check.as_json(max_failures=SHOWN_FAILURES) for name, check in self_checks.items()}
        files.append(run.store.write_json(SELF_TEST_FILE, checks))
        return StageOutput(tuple(files), {f"num_{split}": len(kept[split]) for split in kept} | left_out)

    run.stage(
        "problems",
        kind="problems",
        code_version=CODE_VERSIONS["problems"],
        settings={
            "problems": _without_folders(run.recipe),
            "files": file_hashes(run.recipe),
            **judged_by(run.recipe),
        },
        inputs={},
        work=work,
    )


def _without_folders(recipe: Recipe) -> dict[str, Any]:
    """The recipe's problems, files by their names alone: what is in them counts, not where they lie."""
    section = recipe.problems.model_dump(mode="json")
    for split in ("train", "validation", "test"):
        for source, entry in zip(getattr(recipe.problems, split), section[split]):
            if isinstance(source, FileSource):
                entry["path"] = Path(source.path).name
    return section


def examples_stage(run: RunState) -> None:
    """Kept traces rendered into tokens and labels, and checked before any training."""
    recipe = run.recipe

    def work(_: str) -> StageOutput:
        kept = run.store.read("kept", Trace, key="key")
        wanted = {trace.problem_id for trace in kept}
        problems = [problem for problem in read_problems(run) if problem.id in wanted]
        examples = run.on_worker(
            remote.make_examples,
            recipe.student.base_model,
            recipe.student.revision,
            problems,
            kept,
            recipe.teacher.system_prompt,
            recipe.teacher.prompt_suffix,
            recipe.train.max_length,
        )
        files = run.store.replace_shards("examples", Example, examples)
        return StageOutput(
            tuple(files),
            {
                "num_examples": len(examples),
                "num_tokens": sum(len(example.input_ids) for example in examples),
                "num_supervised_tokens": sum(example.num_supervised_tokens for example in examples),
            },
        )

    run.stage(
        "examples",
        kind="examples",
        code_version=CODE_VERSIONS["examples"],
        settings={
            "base_model": recipe.student.base_model,
            "revision": remote.model_revision(recipe.student.base_model, recipe.student.revision),
            "system_prompt": recipe.teacher.system_prompt,
            "prompt_suffix": recipe.teacher.prompt_suffix,
            "max_length": recipe.train.max_length,
        },
        inputs={"filter": run.manifests["filter"].fingerprint},
        work=work,
    )


def train_stage(run: RunState) -> None:
    """LoRA over the frozen base, through Ray Train; a training that was cut off goes on from its last checkpoint."""
    recipe = run.recipe

    def work(print_: str) -> StageOutput:
        manifest = run.manifests["examples"]
        result = train_on_ray(run, folder=f"train/{print_[:12]}", num_tokens=int(manifest.counts["num_tokens"]))
        history = run.store.write_json("loss.json", result["history"])
        served = run.store.write_json(served_file("train"), result["served"])
        adapter = run.store.path("train", print_[:12], "adapter")
        return StageOutput(
            (history, served, *sorted(path for path in adapter.iterdir() if path.is_file())),
            {name: result[name] for name in ("num_steps", "num_tokens", "num_supervised_tokens", "final_loss")},
        )

    run.stage(
        "train",
        kind="train",
        code_version=CODE_VERSIONS["train"],
        settings={
            "student": recipe.student.model_dump(mode="json"),
            "train": recipe.train.model_dump(mode="json"),
            "workers": max(1, recipe.cluster.train_workers),
            "seed": recipe.seed,
        },
        inputs={"examples": run.manifests["examples"].fingerprint},
        work=work,
    )


def served_file(stage: str) -> str:
    """Where a stage notes which code computed its model, as its worker said."""
    return f"served/{stage}.json"


def adapter_folder(run: RunState) -> Path:
    return run.store.path("train", run.manifests["train"].fingerprint[:12], "adapter")


def quantize_stage(run: RunState) -> None:
    """Merge the adapter into the base it was trained over, then write the 4-bit checkpoint."""
    recipe = run.recipe

    def work(_: str) -> StageOutput:
        result = run.on_worker(
            remote.merge_and_emit,
            recipe.student.model_dump(mode="json"),
            recipe.quantize.model_dump(mode="json"),
            str(adapter_folder(run)),
            str(run.store.path("student")),
            str(run.store.path("checkpoint")),
            {
                "recipe": recipe.name,
                "recipe_sha256": content_key(recipe.to_yaml()),
                "seed": recipe.seed,
                "base_model": recipe.student.base_model,
                "teacher": teacher_identity(run),
                "traces": run.manifests["traces"].fingerprint,
                "examples": run.manifests["examples"].fingerprint,
                "training": run.manifests["train"].fingerprint,
                "versions": remote.library_versions(),
            },
            num_cpus=recipe.cluster.cpus_per_train_worker,
        )
        run.store.write_json("quantization.json", result)
        files = [run.store.path("quantization.json")]
        for folder in ("student", "checkpoint"):
            # README.md and the manifest are sealed again once the results are known: see report.
            files += [p for p in sorted(run.store.path(folder).iterdir()) if p.is_file() and p.suffix == ".safetensors"]
        return StageOutput(tuple(files), {"size_bytes": result["size_bytes"], "size_16bit_bytes": result["size_16bit_bytes"]})

    run.stage(
        "quantize",
        kind="quantize",
        code_version=CODE_VERSIONS["quantize"],
        settings={"quantize": recipe.quantize.model_dump(mode="json")},
        inputs={"train": run.manifests["train"].fingerprint},
        work=work,
    )


def evaluate_stages(run: RunState) -> None:
    """Grade teacher, base, 16-bit student and the emitted checkpoint on the same test problems.

    The checkpoint twice: as a user loads it, with transformers and compressed-tensors alone, and on our own kernels.
    """
    recipe = run.recipe
    student_settings = grading_settings(recipe, gate_sampling(recipe), recipe.gate.samples_per_problem) | {
        "num_problems": recipe.gate.num_problems
    }
    models = {
        "base": (recipe.student.base_model, base_identity(recipe)),
        "student": (str(run.store.path("student")), {"quantize": run.manifests["quantize"].fingerprint}),
        "checkpoint": (str(run.store.path("checkpoint")), {"quantize": run.manifests["quantize"].fingerprint}),
    }
    if recipe.gate.kernels:
        models["checkpoint_kernels"] = models["checkpoint"]
    problems = run.manifests["problems"].fingerprint
    if recipe.gate.teacher_problems and not isinstance(recipe.teacher, ReplayTeacher):
        _evaluate_stage(
            run,
            "teacher",
            settings=teacher_identity(run) | {"num": recipe.gate.teacher_problems} | judged_by(recipe),
            inputs={"problems": problems},
        )
    for name, (model, inputs) in models.items():
        _evaluate_stage(run, name, model=model, settings=student_settings, inputs=inputs | {"problems": problems})


def _evaluate_stage(
    run: RunState, name: str, *, settings: dict[str, Any], inputs: dict[str, str], model: str | None = None
) -> None:
    def work(_: str) -> StageOutput:
        graded, served = _grade_teacher(run) if model is None else _grade_student(run, name, model)
        files = run.store.replace_shards(f"evaluations/{name}", Graded, graded)
        return StageOutput(
            (*files, run.store.write_json(served_file(f"evaluate-{name}"), served)),
            {
                "num_graded": len(graded),
                "num_correct": sum(row.correct for row in graded),
                "num_completion_tokens": sum(row.num_completion_tokens for row in graded),
            },
        )

    run.stage(
        f"evaluate-{name}",
        kind="evaluate",
        code_version=CODE_VERSIONS["evaluate"],
        settings=settings | {"model": name},
        inputs=inputs,
        work=work,
    )


def _grade_teacher(run: RunState) -> tuple[list[Graded], dict[str, str]]:
    """The teacher's own score: sampled as its traces are, on the test problems, with seeds of their own.

    Its completions may be paid for, so they go through a ledger and a store too; not into the traces' own, from which somebody
    may train. What is left of the budget holds for them.
    """
    from stillhouse.pipeline.verification import verify
    from stillhouse.students.evaluating import grade

    problems = test_problems(read_problems(run), run.recipe.gate.teacher_problems)
    requests = TeacherRequests(run, problems, samples=1, seed=run.recipe.seed + 1)
    root = run.store.path("evaluations", "teacher-traces")
    with open_writer(run, root, root / "spool", left_of_budget(run)) as writer:
        committed = writer.keys()
        run.reporter.begin("teacher", len(requests), sum(request.key in committed for request in requests))
        asked, served = ask_teacher(run, FixedPlan(requests, committed), writer, lambda _: run.reporter.advance(1))
    note_how_it_ended(run, asked, "The teacher's score is of the test problems that it answered.")
    by_id = {problem.id: problem for problem in problems}
    prompts = {request.key: request for request in requests}
    graded = [
        grade(
            completion_of(trace),
            by_id[prompts[trace.key].problem_id],
            trace.rendered_prompt,
            model_name="teacher",
            sample_index=0,
            verify=verify,
        )
        for trace in TraceStore(root).traces(prompts)
    ]
    order = {problem.id: place for place, problem in enumerate(problems)}
    graded.sort(key=lambda row: order[row.problem_id])
    return graded, served or {"path": "not known: every answer was committed by an earlier run", "device": "not known"}


def _grade_student(run: RunState, name: str, model: str) -> tuple[list[Graded], dict[str, str]]:
    recipe = run.recipe
    revision = recipe.student.revision if name == "base" else None
    problems = test_problems(read_problems(run), recipe.gate.num_problems)
    samples = recipe.gate.samples_per_problem
    run.reporter.begin(name, len(problems) * samples)
    with student_pool(run, model, revision=revision, kernels=name == "checkpoint_kernels") as pool:
        graded = pool.grade(problems, model_name=name, num_samples=samples, sampling=gate_sampling(recipe))
        return graded, pool.served()
