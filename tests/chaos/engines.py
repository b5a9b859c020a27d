"""One recipe on every engine: do traces verify at the same rate whatever server wrote them?

    python -m tests.chaos.engines --problems 300

The demo's problems are put to the tiny teacher in process, behind ``transformers serve``, behind llama.cpp's server and behind
vLLM on the CPU: the last two where STILLHOUSE_LLAMA_CPP_PYTHON and STILLHOUSE_VLLM_PYTHON name the interpreter of an
environment that has them (teachers/README.md says how to make one). Prints rates with their Wilson intervals and the 95 %
interval of each difference to in-process generation; exit code 1 where one does not cover 0, or an answer is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from stillhouse.pipeline.extraction import strict_answer
from stillhouse.pipeline.problems import reasoning_gym_problems
from stillhouse.pipeline.records import Problem, Sampling, Trace
from stillhouse.pipeline.statistics import paired_difference, wilson
from stillhouse.pipeline.verification import verify
from stillhouse.teachers.chat_response import call_context, parse_chat
from stillhouse.teachers.endpoint import ChatClient, Endpoints
from stillhouse.teachers.engine_commands import EngineSpec, model_name, request_sampling
from stillhouse.teachers.engine_process import EngineServer
from stillhouse.teachers.local import TransformersGenerator
from stillhouse.teachers.tracing import TraceRequest, render_for_teacher, trace_requests
from tests.tiny_gguf import write_gguf

TINY = Path(str(files("stillhouse.teachers.tiny") / "model"))
INTERPRETERS = {"llama_cpp": "STILLHOUSE_LLAMA_CPP_PYTHON", "vllm": "STILLHOUSE_VLLM_PYTHON"}
VLLM_ON_THE_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


@dataclass
class OpenLedger:
    """Lets every call go out and parses what comes; the writer's own tests are elsewhere."""

    contexts: list[bytes] = field(default_factory=list)
    """By call id."""

    def begin(self, intents: Sequence[Any]) -> Future[list[int]]:
        first = len(self.contexts)
        self.contexts += [intent.request for intent in intents]
        return _done(list(range(first, len(self.contexts))))

    def answered(self, call_id: int, raw: bytes) -> Future[Trace]:
        return _done(parse_chat(self.contexts[call_id], raw))

    def failed(self, call_id: int, **_: Any) -> Future[None]:
        return _done(None)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def demo_problems(count: int) -> tuple[list[Problem], Sampling]:
    """The demo recipe's test families in equal parts, and its teacher's sampling."""
    recipe = yaml.safe_load((files("stillhouse.jobs.recipes") / "demo.yaml").read_text())
    sources = recipe["problems"]["test"]
    problems = [
        problem
        for source in sources
        for problem in reasoning_gym_problems(
            source["task"], split="test", size=-(-count // len(sources)), seed=source["seed"], options=source["options"]
        )
    ]
    return problems, Sampling(**recipe["teacher"]["sampling"])


def requests_for(problems: Sequence[Problem], sampling: Sampling, *, kind: str, samples: int = 1) -> list[TraceRequest]:
    """``samples`` requests a problem, rendered as ``kind`` of teacher takes it."""
    prompts = render_for_teacher(
        [problem.prompt for problem in problems], kind=kind, model=str(TINY), revision=None, system_prompt=None,
        prompt_suffix="", opens_think=False,
    )  # fmt: skip
    return trace_requests(
        problems, prompts, teacher="tiny", teacher_revision="", served=kind, sampling=sampling,
        samples_per_problem=samples, seed=0,
    )  # fmt: skip


def in_process(problems: Sequence[Problem], sampling: Sampling) -> list[str]:
    """What the model writes without a server in between."""
    asked = requests_for(problems, sampling, kind="transformers")
    generator = TransformersGenerator(TINY, dtype="float32", batch_size=64)
    return [c.text for c in generator.complete([r.rendered_prompt for r in asked], [r.seed for r in asked], sampling)]


async def through_endpoints(
    spec: EngineSpec,
    endpoints: Endpoints,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    max_concurrent: int,
    samples: int = 1,
    stream: bool = False,
    on_trace: Callable[[int], object] = lambda _: None,
) -> list[Trace]:
    """Traces of ``samples`` requests a problem, in their order.

    Args:
        on_trace: hears how many traces there are, 0 at first, in a thread of its own.
    """
    asked = requests_for(problems, sampling, kind="endpoint", samples=samples)
    sent, extra = request_sampling(spec, sampling)
    client = ChatClient(
        endpoints, model_name(spec), ledger=OpenLedger(), max_concurrent=max_concurrent, extra_body=extra, stream=stream
    )
    num_traces = 0

    async def one(request: TraceRequest) -> Trace:
        nonlocal num_traces
        context = call_context(request, teacher="tiny", teacher_revision="", sampling=sampling)
        trace = await client.complete(request, sent, context)
        num_traces += 1
        await asyncio.to_thread(on_trace, num_traces)
        return trace

    await asyncio.to_thread(on_trace, 0)
    async with client:
        return await asyncio.gather(*(one(request) for request in asked))


def engine_spec(engine: str, folder: Path) -> EngineSpec:
    """The tiny teacher behind ``engine``; a GGUF file for llama.cpp is written into ``folder``.

    Raises:
        LookupError: the environment variable that names the engine's interpreter is not set.
    """
    if engine == "transformers_serve":
        return EngineSpec("transformers_serve", str(TINY), dtype="float32")
    python = os.environ.get(INTERPRETERS[engine])
    if not python:
        raise LookupError(f"{INTERPRETERS[engine]} is not set")
    if engine == "llama_cpp":
        return EngineSpec("llama_cpp", str(write_gguf(TINY, folder / "tiny.gguf")), python=python)
    return EngineSpec(
        "vllm", str(TINY), dtype="float32", max_model_len=512, max_concurrent=32, python=python,
        extra_args=("--enforce-eager",),
    )  # fmt: skip


def serve(spec: EngineSpec, folder: Path) -> EngineServer:
    """A server on this machine's CPU."""
    return EngineServer(spec, log_folder=folder, start_limit_s=300, variables={**os.environ, **VLLM_ON_THE_CPU})


def correct(problems: Sequence[Problem], completions: Sequence[str]) -> dict[str, bool]:
    """Whether each problem's completion verifies, by problem id."""
    return {
        problem.id: verify(problem, strict_answer(completion)).outcome == "correct"
        for problem, completion in zip(problems, completions, strict=True)
    }


def compare(count: int, engines: Sequence[str], top_p: float | None = None) -> dict[str, Any]:
    """Measure every engine; one entry each, with the difference to in-process generation."""
    problems, sampling = demo_problems(count)
    if top_p is not None:
        sampling = replace(sampling, top_p=top_p)
    started = time.monotonic()
    reference = correct(problems, in_process(problems, sampling))
    report = {"in_process": _entry(reference, time.monotonic() - started)}
    with tempfile.TemporaryDirectory() as name:
        for engine in engines:
            try:
                spec = engine_spec(engine, Path(name))
            except LookupError as error:
                report[engine] = {"skipped": str(error)}
                continue
            with serve(spec, Path(name)) as server:
                started = time.monotonic()
                asking = through_endpoints(spec, Endpoints([server.url]), problems, sampling, max_concurrent=32)
                traces = asyncio.run(asking)
            verdicts = correct(problems, [trace.completion for trace in traces])
            difference = paired_difference(verdicts, reference)
            report[engine] = _entry(verdicts, time.monotonic() - started) | {
                "difference": [round(x, 4) for x in (difference.value, difference.low, difference.high)],
                "covers_0": difference.low <= 0 <= difference.high,
                "finished": sum(trace.finish_reason == "stop" for trace in traces),
                "with_reasoning": sum(trace.reasoning is not None for trace in traces),
                "usage_counted": all(trace.usage_counted for trace in traces),
            }
    return report


def _entry(verdicts: dict[str, bool], seconds: float) -> dict[str, Any]:
    rate = wilson(sum(verdicts.values()), len(verdicts))
    return {
        "problems": len(verdicts),
        "verified": [round(x, 4) for x in (rate.value, rate.low, rate.high)],
        "seconds": round(seconds, 1),
    }


def main() -> int:
    """Measure, print one JSON object, and say by the exit code whether all agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--engines", default="transformers_serve,llama_cpp,vllm")
    parser.add_argument("--top-p", type=float, help="in the place of the demo recipe's 0.95")
    arguments = parser.parse_args()
    report = compare(arguments.problems, arguments.engines.split(","), arguments.top_p)
    print(json.dumps(report, indent=2))
    return 0 if all(entry.get("covers_0", True) for entry in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
