"""The wheel and the sdist: one top-level name, every file, and a package that works without the repository."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # the C++ kernels are compiled

ROOT = Path(__file__).parents[2]
ROOMS = ("pipeline", "teachers", "students", "kernels", "jobs")
NOT_SHIPPED = {".so", ".pyc"}


def project_files() -> list[Path]:
    """Paths of the project's files: as git lists them, or by a walk where this is not a git checkout."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [Path(name) for name in listed.stdout.split("\0") if name]
    else:
        skipped = {".git", ".venv", "runs", "build", "dist", "__pycache__"}
        paths = [p.relative_to(ROOT) for p in ROOT.rglob("*") if not skipped & set(p.relative_to(ROOT).parts)]
    return sorted(path for path in paths if (ROOT / path).is_file() and path.suffix not in NOT_SHIPPED)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist and the wheel, built from a copy of the project's files; the wheel from the sdist, as installers do."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in project_files():
        (source / path.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, source / path)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def wheel_names(built):
    with zipfile.ZipFile(built[0]) as wheel:
        return wheel.namelist()


def test_only_top_level_name_is_stillhouse(wheel_names):
    """An installed `kernels` or `jobs` folder would shadow somebody else's package."""
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"stillhouse"}


def test_every_source_and_data_file_ships(built, wheel_names):
    """A recipe, a template or a tiny model would be missing after `pip install`, and only there."""
    expected = {f"stillhouse/{path}" for path in project_files() if path.parts[0] in ROOMS}
    assert any(name.endswith(".yaml") for name in expected)
    shipped = {name for name in wheel_names if name.startswith("stillhouse/")}
    compiled = {name for name in shipped if name.endswith(".so")}
    assert {Path(name).name.partition(".")[0] for name in compiled} >= {"_cpu_generic"}
    assert shipped - compiled == expected
    with tarfile.open(built[1]) as sdist:
        in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
    assert {name.removeprefix("stillhouse/") for name in expected} <= in_sdist
    assert {"LICENSE", "README.md", "pyproject.toml"} <= in_sdist


def test_metadata(built):
    """pip would install without a licence, under a wrong Python, or without the extras that the messages name."""
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(wheel.read(name))
        entry_points = wheel.read(name.replace("METADATA", "entry_points.txt")).decode()
        license_text = wheel.read(name.replace("METADATA", "licenses/LICENSE")).decode()
    assert metadata["Name"] == "stillhouse"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"vllm", "gguf", "eval", "sign", "test", "lint"} <= set(metadata.get_all("Provides-Extra"))
    assert any(line.startswith("torch") for line in metadata.get_all("Requires-Dist"))
    assert metadata.get_payload().startswith("# Stillhouse")
    assert "stillhouse = stillhouse.jobs.cli.main:main" in entry_points
    assert "Apache License" in license_text


def test_unpacked_wheel_works_without_the_repository(built, tmp_path):
    """Code that finds its files through the repository would pass every other test and fail for everybody else."""
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path / "site")
    code = (
        "from stillhouse.jobs import recipe; import stillhouse.pipeline.records as records\n"
        "print(recipe.__file__, records.__file__, sorted(recipe.shipped_recipes()), recipe.load_recipe('demo').name, sep='|')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60
    )
    assert answer.returncode == 0, answer.stderr
    recipe_file, records_file, names, demo = answer.stdout.strip().split("|")
    assert Path(recipe_file).is_relative_to(tmp_path / "site")
    assert Path(records_file).is_relative_to(tmp_path / "site")
    assert "r1-qwen2.5-1.5b" in names
    assert demo == "demo"
