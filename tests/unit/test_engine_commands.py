"""The engines' command lines, environments and request bodies, word for word."""

from __future__ import annotations

import json
import shlex

import pytest

from stillhouse.jobs import engines, serve_llm
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.records import Sampling
from stillhouse.teachers.engine_commands import (
    EngineSpec,
    command,
    environment,
    ignored_settings,
    model_name,
    probe_body,
    request_sampling,
    sampling_notes,
)

R1 = "deepseek-ai/DeepSeek-R1"
DISTILL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"
R1_SAMPLING = Sampling(0.6, 0.95, 32_768)


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (
            EngineSpec(
                "vllm", DISTILL, revision="711ad2e", tensor_parallel=2, max_model_len=40_960, max_concurrent=256, python="py"
            ),
            "py -m vllm.entrypoints.openai.api_server --model deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --dtype auto "
            "--generation-config vllm --disable-uvicorn-access-log --revision 711ad2e --tensor-parallel-size 2 "
            "--max-model-len 40960 --max-num-seqs 256 --gpu-memory-utilization 0.9 --host 10.0.0.7 --port 8000",
        ),
        (
            EngineSpec("vllm", "Qwen/QwQ-32B", dtype="bfloat16", python="py", extra_args=("--reasoning-parser", "deepseek_r1")),
            "py -m vllm.entrypoints.openai.api_server --model Qwen/QwQ-32B --dtype bfloat16 --generation-config vllm "
            "--disable-uvicorn-access-log --gpu-memory-utilization 0.9 --host 10.0.0.7 --port 8000 "
            "--reasoning-parser deepseek_r1",
        ),
        (
            EngineSpec(
                "sglang",
                R1,
                tensor_parallel=8,
                max_model_len=40_960,
                max_concurrent=128,
                gpu_memory_utilization=0.85,
                python="py",
            ),
            "py -m sglang.launch_server --model-path deepseek-ai/DeepSeek-R1 --dtype auto --sampling-defaults openai "
            "--log-level-http warning --tp-size 8 --context-length 40960 --max-running-requests 128 --mem-fraction-static 0.85 "
            "--host 10.0.0.7 --port 8000",
        ),
        (
            EngineSpec("transformers_serve", DISTILL, revision="711ad2e", dtype="bfloat16", python="py"),
            "py -m transformers.cli.transformers serve deepseek-ai/DeepSeek-R1-Distill-Qwen-32B@711ad2e --dtype bfloat16 "
            "--host 10.0.0.7 --port 8000",
        ),
        (
            EngineSpec(
                "llama_cpp", "/models/r1 distill.gguf", max_model_len=16_384, python="py", extra_args=("--n_threads", "8")
            ),
            "py -m llama_cpp.server --model '/models/r1 distill.gguf' --interrupt_requests false --verbose false --n_ctx 16384 "
            "--n_gpu_layers -1 --host 10.0.0.7 --port 8000 --n_threads 8",
        ),
    ],
)
def test_the_command_line_of_each_engine(spec, line):
    """A flag that the engine does not know, or a forgotten one, would cost a GPU job's start."""
    assert shlex.join(command(spec, 8000, host="10.0.0.7")) == line


def test_no_engine_adds_sampling_of_its_own():
    """Traces would be drawn from another distribution than their recipe and key say, and nothing would show it."""
    plain, extra = request_sampling(EngineSpec("transformers_serve", DISTILL), R1_SAMPLING)
    assert plain == R1_SAMPLING
    # Its default is top-k 50, and greedy for a model whose generation_config.json does not sample.
    assert json.loads(extra["generation_config"]) == {"do_sample": True, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    # Its defaults are 40, 0.05 and 1.1.
    assert request_sampling(EngineSpec("llama_cpp", "m.gguf"), R1_SAMPLING)[1] == {
        "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0,
    }  # fmt: skip
    for engine in ("vllm", "sglang"):
        assert request_sampling(EngineSpec(engine, DISTILL), R1_SAMPLING) == (R1_SAMPLING, {"skip_special_tokens": False})


def test_settings_beyond_openai_reach_each_engine_under_its_own_name():
    """QwQ's top-k 40 would be refused by transformers serve as a field, and a penalty lost on llama.cpp's other name for it."""
    asked = Sampling(0.6, 0.95, 100, top_k=40, min_p=0.01, repetition_penalty=1.05)
    plain, extra = request_sampling(EngineSpec("transformers_serve", DISTILL), asked)
    assert plain == Sampling(0.6, 0.95, 100)
    assert json.loads(extra["generation_config"]) == {"do_sample": True, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.05}
    plain, extra = request_sampling(EngineSpec("llama_cpp", "m.gguf"), asked)
    assert plain == Sampling(0.6, 0.95, 100)
    assert extra == {"top_k": 40, "min_p": 0.01, "repeat_penalty": 1.05}
    assert request_sampling(EngineSpec("vllm", DISTILL), asked)[0] == asked


@pytest.mark.parametrize(
    ("engine", "model", "setting"),
    [
        ("transformers_serve", DISTILL, {"presence_penalty": 1.0}),
        ("transformers_serve", DISTILL, {"top_logprobs": 5}),
        ("llama_cpp", "m.gguf", {"reasoning_effort": "high"}),
    ],
)
def test_a_setting_that_an_engine_ignores_is_refused(engine, model, setting):
    """A setting that has no effect and is part of every trace's key would be a lie in the data."""
    with pytest.raises(RecipeError, match=next(iter(setting))):
        request_sampling(EngineSpec(engine, model), Sampling(0.6, 0.95, 100, **setting))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"engine": "tgi"}, "there are vllm, sglang, transformers_serve, llama_cpp"),
        ({"engine": "transformers_serve", "tensor_parallel": 2}, "by itself"),
        ({"engine": "llama_cpp"}, "GGUF"),
        ({"engine": "llama_cpp", "model": "m.gguf", "revision": "main"}, "GGUF"),
        ({"engine": "transformers_serve", "extra_args": ("--continuous-batching",)}, "as its first one asked"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_before_it_starts(settings, says):
    """A replica that can never work would otherwise wait for its GPUs first and fail in its own log."""
    with pytest.raises(RecipeError, match=says):
        EngineSpec(**{"model": DISTILL, **settings})


def test_settings_that_are_not_used_are_said():
    """A user who sets a context length believes that it holds."""
    spec = EngineSpec("transformers_serve", DISTILL, max_model_len=4096, max_concurrent=64)
    assert len(ignored_settings(spec)) == 2
    assert "max_model_len=4096" in ignored_settings(spec)[0]
    assert ignored_settings(EngineSpec("vllm", DISTILL, max_model_len=4096, max_concurrent=64)) == []
    assert "dtype=bfloat16" in ignored_settings(EngineSpec("llama_cpp", "m.gguf", dtype="bfloat16"))[0]


def test_llama_cpps_order_of_cuts_is_said():
    """Its traces verified 1.7 points less often at top-p 0.95: another distribution, which the user has to know of."""
    spec = EngineSpec("llama_cpp", "m.gguf")
    assert "before the temperature" in sampling_notes(spec, R1_SAMPLING)[0]
    assert sampling_notes(spec, Sampling(0.6, 1.0, 100)) == []
    assert sampling_notes(EngineSpec("vllm", DISTILL), R1_SAMPLING) == []


def test_another_interpreter_does_not_see_our_packages():
    """Our PYTHONPATH in front of the engine's environment would mix two versions of transformers."""
    base = {"PYTHONPATH": "/ours", "CUDA_VISIBLE_DEVICES": "3", "PORT": "80", "HOST": "0.0.0.0"}
    own = environment(EngineSpec("vllm", DISTILL, python="other/python"), base)
    assert "PYTHONPATH" not in own
    assert own["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment(EngineSpec("vllm", DISTILL), base)["PYTHONPATH"] == "/ours"
    # llama.cpp's server listens where these say, whatever its command line says; a container often has them.
    assert not {"PORT", "HOST"} & environment(EngineSpec("llama_cpp", "m.gguf"), base).keys()


def test_the_probe_asks_as_the_run_will():
    """A server that counts as up and then refuses the run's requests would look healthy and answer nothing."""
    spec = EngineSpec("transformers_serve", DISTILL, revision="711ad2e")
    body = probe_body(spec)
    assert body["model"] == model_name(spec) == f"{DISTILL}@711ad2e"
    assert body["max_tokens"] == 1
    assert "generation_config" in body


def test_plan_shows_the_command_and_where_it_runs():
    """Before GPU hours are spent, a user wants to see what will run."""
    spec = EngineSpec("sglang", DISTILL, tensor_parallel=4, python="other/python")
    lines = engines.describe(spec, replicas=3, gpus_per_replica=4, cpus_per_replica=8)
    assert lines[0] == "3 replicas, each on one node with 4 GPUs and 8 CPUs:"
    assert lines[1].startswith("  other/python -m sglang.launch_server")
    assert lines[1].endswith("--tp-size 4 --mem-fraction-static 0.9 --host NODE --port FREE_PORT")


def test_deepseek_r1_over_two_nodes():
    """671 billion parameters fit no node of eight 80 GB GPUs: the layers are split between two nodes."""
    spec = EngineSpec(
        "vllm", R1, tensor_parallel=8, pipeline_parallel=2, max_model_len=40_960, max_concurrent=256,
        extra_args=("--enable-expert-parallel", "--reasoning-parser", "deepseek_r1", "--kv-cache-dtype=fp8"),
    )  # fmt: skip
    arguments = serve_llm.serving_arguments(spec, replicas=1, accelerator_type="H100")
    assert arguments == {
        "llm_configs": [
            {
                "model_loading_config": {"model_id": R1, "model_source": R1},
                "accelerator_type": "H100",
                "engine_kwargs": {
                    "dtype": "auto",
                    "generation_config": "vllm",
                    "tensor_parallel_size": 8,
                    "pipeline_parallel_size": 2,
                    "gpu_memory_utilization": 0.9,
                    "enable_expert_parallel": True,
                    "reasoning_parser": "deepseek_r1",
                    "kv_cache_dtype": "fp8",
                    "max_model_len": 40_960,
                    "max_num_seqs": 256,
                },
                "placement_group_config": {"bundle_per_worker": {"CPU": 1.0, "GPU": 1}, "strategy": "PACK"},
                "deployment_config": {"num_replicas": 1},
            }
        ],
        "ingress_deployment_config": {
            "ray_actor_options": {"runtime_env": {"env_vars": {"RAY_SERVE_LLM_ROUTER_HTTP_TIMEOUT": "86400"}}}
        },
    }
    assert serve_llm.describe(arguments)[0] == "1 replica of 16 workers each, through Ray Serve LLM:"


@pytest.mark.parametrize(
    "spec",
    [
        EngineSpec("sglang", R1),
        EngineSpec("vllm", R1, python="other/python"),
        EngineSpec("vllm", R1, extra_args=("fp8",)),
    ],
)
def test_what_ray_serve_llm_does_not_take_is_refused(spec):
    """It has vLLM in Ray's own environment only; anything else would fail on the nodes, minutes later."""
    with pytest.raises(RecipeError):
        serve_llm.serving_arguments(spec, replicas=1)
