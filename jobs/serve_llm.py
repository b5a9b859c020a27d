"""vLLM through Ray Serve LLM: replicas, health, routing, and one model over the GPUs of several nodes are its business.

For the teacher that no single node holds. DeepSeek-R1 (671 B parameters, FP8) on two nodes of eight H100-80GB is
``EngineSpec("vllm", "deepseek-ai/DeepSeek-R1", tensor_parallel=8, pipeline_parallel=2)``: tensor parallel inside a node, over
NVLink, and pipeline parallel between the nodes. Written against ray 2.60 (``ray.serve.llm``, ``ray.llm._internal.serve``).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stillhouse.pipeline.errors import ClusterError, RecipeError, first_line
from stillhouse.teachers.engine_commands import EngineSpec
from stillhouse.teachers.engine_process import ask_one_token

APPLICATION = "stillhouse-teacher"
DEFAULT_PORT = 8000
_INGRESS_TIMEOUT_S = 24 * 3600
"""Serve LLM's router cuts a request off after 600 s unless told otherwise, and a long chain of thought takes longer."""
_ANSWER_LIMIT_S = 600.0


def serving_arguments(
    spec: EngineSpec,
    *,
    replicas: int,
    gpus: bool = True,
    accelerator_type: str | None = None,
    cpus_per_worker: float = 1.0,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The argument of ``ray.serve.llm.build_openai_app``, as plain data: what ``plan`` shows is what runs.

    Args:
        spec: ``extra_args`` are vLLM's flags with their values; ``max_concurrent`` is ``--max-num-seqs``.
        gpus: False serves on CPUs.
        accelerator_type: Ray's name of the GPU that nodes must have, for example ``H100``; None takes any.
        cpus_per_worker: CPUs that Ray sets aside for each of the model's workers.
        environment: further variables of the engine's processes.

    Raises:
        RecipeError: the engine is not vLLM, or an argument has no place here.
    """
    if spec.engine != "vllm" or spec.python is not None:
        raise RecipeError(
            f"Ray Serve LLM runs vLLM in Ray's own environment; got engine={spec.engine!r}, python={spec.python!r}. Another "
            "engine, or one in an environment of its own, is started as its own server, on one node a replica"
        )
    engine: dict[str, Any] = {
        "dtype": spec.dtype,
        # Sampling is what the request says, and not what the model's generation_config.json would add.
        "generation_config": "vllm",
        "tensor_parallel_size": spec.tensor_parallel,
        "pipeline_parallel_size": spec.pipeline_parallel,
        "gpu_memory_utilization": spec.gpu_memory_utilization,
        **_as_keywords(spec.extra_args),
    }
    if spec.revision is not None:
        engine["revision"] = spec.revision
    if spec.max_model_len is not None:
        engine["max_model_len"] = spec.max_model_len
    if spec.max_concurrent is not None:
        engine["max_num_seqs"] = spec.max_concurrent
    worker = {"CPU": cpus_per_worker} | ({"GPU": 1} if gpus else {})
    model: dict[str, Any] = {
        "model_loading_config": {"model_id": spec.model, "model_source": spec.model},
        "engine_kwargs": engine,
        # PACK: a node takes all the workers that it has GPUs for before the next one is used.
        "placement_group_config": {"bundle_per_worker": worker, "strategy": "PACK"},
        "deployment_config": {"num_replicas": replicas},
    }
    if accelerator_type is not None:
        model["accelerator_type"] = accelerator_type
    if environment:
        model["runtime_env"] = {"env_vars": dict(environment)}
    router = {"RAY_SERVE_LLM_ROUTER_HTTP_TIMEOUT": str(_INGRESS_TIMEOUT_S)}
    return {
        "llm_configs": [model],
        "ingress_deployment_config": {"ray_actor_options": {"runtime_env": {"env_vars": router}}},
    }


@contextmanager
def serving(ray: Any, arguments: dict[str, Any], spec: EngineSpec, *, port: int = DEFAULT_PORT) -> Iterator[str]:
    """Serve for the time of the block; gives the base URL once a chat was answered.

    Args:
        arguments: from `serving_arguments` for the same ``spec``.
        port: of the HTTP proxy on the head node, where Serve does not run yet.

    Raises:
        ClusterError: Serve LLM is not installed, the application does not start, or does not answer.
    """
    try:
        from ray import serve
        from ray.serve.llm import LLMServingArgs, build_openai_app
    except ImportError as error:
        raise ClusterError(
            f"vLLM through Ray Serve LLM needs packages that this environment lacks ({first_line(error)}); on every node, from "
            "the clone: .venv/bin/pip install -e '.[vllm]'"
        ) from error
    host = _head_address(ray)
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    try:
        try:
            serve.run(build_openai_app(LLMServingArgs(**arguments)), name=APPLICATION, route_prefix=f"/{APPLICATION}")
        except (RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
            raise ClusterError(f"Ray Serve could not start {spec.model!r}: {first_line(error)}; see `serve status`") from error
        url = f"http://{host}:{port}/{APPLICATION}/v1"
        _wait_for_a_chat(spec, url)
        yield url
    finally:
        serve.delete(APPLICATION)


def describe(arguments: dict[str, Any]) -> list[str]:
    """What would be served, in lines for ``plan``."""
    model = arguments["llm_configs"][0]
    engine = model["engine_kwargs"]
    workers = engine["tensor_parallel_size"] * engine["pipeline_parallel_size"]
    replicas = model["deployment_config"]["num_replicas"]
    return [
        f"{replicas} replica{'s' if replicas > 1 else ''} of {workers} workers each, through Ray Serve LLM:",
        f"  ray.serve.llm.build_openai_app({json.dumps(arguments)})",
    ]


def _head_address(ray: Any) -> str:
    for node in ray.nodes():
        if node["Alive"] and "node:__internal_head__" in node["Resources"]:
            return node["NodeManagerAddress"]
    raise ClusterError("the Ray cluster shows no head node, so Ray Serve has no place for its HTTP proxy; see `ray status`")


def _wait_for_a_chat(spec: EngineSpec, url: str) -> None:
    deadline = time.monotonic() + _ANSWER_LIMIT_S
    while True:
        status, reason = ask_one_token(spec, url, timeout_s=max(1.0, deadline - time.monotonic()))
        if status == 200:
            return
        if time.monotonic() > deadline or status not in (0, 404, 503):  # the proxy comes up, and then learns of the route
            raise ClusterError(
                f"Ray Serve runs {spec.model!r} and {url} does not answer a chat ({reason}); where Serve ran before on this "
                "cluster, with another host or port, `serve shutdown` first"
            )
        time.sleep(1)


def _as_keywords(extra_args: tuple[str, ...]) -> dict[str, Any]:
    """vLLM's flags as its engine's keywords: ``--enable-expert-parallel`` is True, ``--max-num-seqs 64`` is 64."""
    keywords: dict[str, Any] = {}
    name = ""
    for word in extra_args:
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            keywords[name] = _value(value) if value else True
        elif name and keywords[name] is True:
            keywords[name] = _value(word)
        else:
            raise RecipeError(f"teacher.extra_args: {word!r} follows no flag; write --flag value, or --flag=value")
    return keywords


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
