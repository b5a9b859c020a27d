"""In a Ray worker that was started from the repository root, `import kernels` is PyPI's package and never our folder."""

import json
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNREACHABLE = ("NewConnectionError", "ConnectTimeout", "Failed to establish", "name resolution", "ProxyError", "timed out")

DRIVER = """
import json, os, ray

@ray.remote
def look():
    import importlib.util, sys
    import kernels
    from transformers import AutoModelForCausalLM, Qwen2Config
    config = Qwen2Config(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1, vocab_size=32)
    model = AutoModelForCausalLM.from_config(config)
    import stillhouse.kernels.formats as ours
    return {"kernels": kernels.__file__, "path": sys.path, "model": type(model).__name__, "ours": ours.__file__}

ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
print(json.dumps(ray.get(look.remote())))
ray.shutdown()
"""


@pytest.fixture(scope="module")
def python_with_kernels(tmp_path_factory):
    """An environment of its own: this one's packages, and PyPI's `kernels` besides."""
    folder = tmp_path_factory.mktemp("kernels-env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    answer = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    # addsitedir, and not the bare path: the editable install of stillhouse is itself a .pth file over there.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
    Path(answer.stdout.strip(), "host.pth").write_text("".join(lines))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", "--retries", "1", "kernels"]
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    if installed.returncode != 0 and any(word in installed.stderr for word in UNREACHABLE):
        pytest.skip("the package index cannot be reached, so PyPI's `kernels` cannot be installed")
    assert installed.returncode == 0, installed.stderr
    return python


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("how", ["command", "script"])
def test_worker_imports_the_installed_kernels(python_with_kernels, tmp_path, how):
    """transformers would take our folder for PyPI's `kernels`, and every model class would fail to import in a worker."""
    environment = {
        **os.environ,
        "HOME": str(tmp_path),  # Ray writes a token there
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
    }
    for name in ("RAY_ADDRESS", "PYTHONPATH"):
        environment.pop(name, None)
    if how == "command":
        command = [str(python_with_kernels), "-c", DRIVER]  # puts the working directory first on the path
    else:
        script = tmp_path / "driver.py"
        script.write_text(DRIVER)
        command = [str(python_with_kernels), str(script)]
        environment["PYTHONPATH"] = str(ROOT)
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
    assert answer.returncode == 0, answer.stderr[-3000:]
    seen = json.loads(answer.stdout.strip().splitlines()[-1])
    roots = [str(Path(entry or ".").resolve()) if entry else str(ROOT) for entry in seen["path"]]
    assert str(ROOT) in roots, "the worker did not get the repository on its path, so this test shows nothing"
    assert Path(seen["kernels"]).is_relative_to(python_with_kernels.parents[1])
    assert seen["model"] == "Qwen2ForCausalLM"
    assert Path(seen["ours"]) == ROOT / "kernels" / "formats.py"
