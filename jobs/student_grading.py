"""A student on Ray, asked problems and graded: for the evaluation of all students, and for what the base can do already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from stillhouse.jobs import remote
from stillhouse.jobs.generators import GeneratorPool, GeneratorSpec, chunks
from stillhouse.jobs.judged_by import judged_by
from stillhouse.jobs.recipe import Recipe
from stillhouse.jobs.run_state import RunState
from stillhouse.jobs.sources import evaluation_spec
from stillhouse.pipeline.records import Completion, Graded, Problem, Sampling


def grading_settings(recipe: Recipe, sampling: Sampling, samples_per_problem: int) -> dict[str, Any]:
    """What decides a student's grades beside the student and the problems."""
    return asdict(sampling) | {
        "samples_per_problem": samples_per_problem,
        "dtype": recipe.student.dtype,
        "seed": recipe.seed,
        **judged_by(recipe),
        "system_prompt": recipe.teacher.system_prompt,
        "prompt_suffix": recipe.teacher.prompt_suffix,
    }


def base_identity(recipe: Recipe) -> dict[str, str]:
    """The base student's name, and its content or revision."""
    student = recipe.student
    return {"base_model": student.base_model, "base": remote.model_revision(student.base_model, student.revision)}


@contextmanager
def student_pool(run: RunState, model: str, *, revision: str | None, kernels: bool = False) -> Iterator[StudentPool]:
    """Ray actors that hold a student, loaded as it is evaluated.

    Args:
        model: shipped name, folder or hub name.
        kernels: put a 4-bit checkpoint's layers on our own kernels.

    Raises:
        RecipeError: there is no such model, or it cannot be asked.
    """
    from stillhouse.students.base_models import resolve_model

    spec = evaluation_spec(run.recipe, resolve_model(model), revision=revision, kernels=kernels)
    with GeneratorPool(run.ray, spec, num_actors=max(1, run.recipe.cluster.train_workers)) as pool:
        yield StudentPool(run, spec, pool)


@dataclass(frozen=True)
class StudentPool:
    """A pool that answers problems; each finished completion moves the progress on by one."""

    run: RunState
    spec: GeneratorSpec
    pool: GeneratorPool

    def grade(self, problems: Sequence[Problem], *, model_name: str, num_samples: int, sampling: Sampling) -> list[Graded]:
        """Grade ``num_samples`` answers to every problem: all of the first problem, then of the second, and so on."""
        from stillhouse.pipeline.verification import verify
        from stillhouse.students.evaluating import evaluate

        teacher = self.run.recipe.teacher
        prompts = remote.render_for_student(
            self.spec.model,
            self.spec.revision,
            [problem.prompt for problem in problems],
            teacher.system_prompt,
            teacher.prompt_suffix,
        )

        def generate(prompts: list[str], seeds: list[int]) -> list[Completion]:
            return self._complete(prompts, seeds, sampling)

        return evaluate(
            generate,
            problems,
            model_name=model_name,
            rendered_prompts=prompts,
            num_samples=num_samples,
            seed=self.run.recipe.seed,
            verify=verify,
        )

    def served(self) -> dict[str, str]:
        """Which code computed the completions, and where; ask after the work."""
        return self.pool.served()

    def _complete(self, prompts: list[str], seeds: list[int], sampling: Sampling) -> list[Completion]:
        """Completions in the prompts' order, generated in batches of like length."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, Completion] = {}
        batches = iter(chunks(order, self.spec.batch_size))
        arriving = self.pool.map(
            lambda: next(batches, ()),
            prompts=lambda batch: [prompts[i] for i in batch],
            seeds=lambda batch: [seeds[i] for i in batch],
            sampling=sampling,
        )
        for batch, completions, _ in arriving:
            found.update(zip(batch, completions))
            self.run.reporter.advance(len(batch))
        return [found[i] for i in range(len(prompts))]
