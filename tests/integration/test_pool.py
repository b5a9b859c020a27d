"""The generator pool on a real local Ray: order, dead workers, errors in the user's terms."""

from __future__ import annotations

import time

import psutil
import pytest

from stillhouse.jobs.generators import GeneratorPool, GeneratorSpec, chunks
from stillhouse.jobs.sources import resolve_teacher
from stillhouse.pipeline.errors import ClusterError, TeacherError
from stillhouse.pipeline.records import Sampling

PROMPT = "<|im_start|>user\nSolve the following multiplication: {} * 12. Give only the result as your final answer.<|im_end|>\n"
SAMPLING = Sampling(0.6, 0.95, 40)


@pytest.fixture
def spec():
    return GeneratorSpec(resolve_teacher("tiny"), dtype="float32", batch_size=4)


def run(pool, prompts, before=lambda batch: None, **options):
    """Completions in the prompts' order; ``before`` is called when a batch is handed out, also for the second time."""
    batches = iter(chunks(list(enumerate(prompts)), 4))
    found = {}

    def next_batch():
        batch = next(batches, ())
        if batch:
            before(batch)
        return batch

    def begin_again(batch):
        before(batch)
        return True

    arriving = pool.map(
        next_batch,
        prompts=lambda batch: [text for _, text in batch],
        seeds=lambda batch: [number for number, _ in batch],
        sampling=SAMPLING,
        begin_again=begin_again,
        **options,
    )
    for batch, completions, seconds in arriving:
        assert seconds > 0
        found.update({number: done.text for (number, _), done in zip(batch, completions)})
    return [found[number] for number in range(len(prompts))]


def prompts(count):
    return [PROMPT.format(number + 10) + "<|im_start|>assistant\n" for number in range(count)]


def test_every_prompt_is_answered_once_whatever_the_number_of_actors(ray, spec):
    """Two actors give what one gives: a row depends on its prompt and seed, not on who generated it."""
    handed = []
    with GeneratorPool(ray, spec, num_actors=1) as pool:
        alone = run(pool, prompts(10), before=handed.append)
    assert [len(batch) for batch in handed] == [4, 4, 2]
    with GeneratorPool(ray, spec, num_actors=2) as pool:
        assert run(pool, prompts(10)) == alone


def kill_workers() -> int:
    """Wait for the actors of this process's own Ray and kill them, and nobody else's; how many there were."""
    deadline = time.monotonic() + 120
    found = 0
    while not found:
        assert time.monotonic() < deadline, "no worker came up"
        for process in psutil.Process().children(recursive=True):
            try:
                if "GeneratorActor" in " ".join(process.cmdline()):
                    process.kill()
                    process.wait()
                    found += 1
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_a_killed_worker_costs_its_batch_and_not_the_run(ray, spec):
    """A worker lost to the kernel's memory killer is started again and its batch handed out again."""
    killed = []

    def kill_once(batch):
        if not killed:
            killed.append(kill_workers())

    with GeneratorPool(ray, spec, num_actors=1) as pool:
        expected = run(pool, prompts(6))
        assert run(pool, prompts(6), before=kill_once) == expected
    assert killed[0], "no worker was killed, so nothing was tested"


def test_a_worker_that_always_dies_ends_the_run_in_words(ray, spec):
    """After some attempts the user is told what to lower."""

    with GeneratorPool(ray, spec, num_actors=1) as pool, pytest.raises(ClusterError, match="batch_size"):
        run(pool, prompts(2), before=lambda batch: kill_workers(), attempts=2)


def test_a_model_that_is_not_there_is_the_teachers_error(ray):
    """What the actor raised while loading comes back as its own sentence."""
    missing = GeneratorSpec("./no/such/model")
    with pytest.raises(TeacherError, match="no/such/model"), GeneratorPool(ray, missing, num_actors=1):
        pass
