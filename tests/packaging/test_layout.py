"""The repository's layout: what must and must not be where, and lists that have to agree with each other."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from stillhouse.jobs.doctor import TESTED_VERSIONS

ROOT = Path(__file__).parents[2]
ROOMS = ("pipeline", "teachers", "students", "kernels", "jobs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


OTHER_NAMES = {"llama_cpp": "llama-cpp-python", "lingua": "lingua-language-detector"}
"""Optional packages that the tests run without, and whose distribution is not named as they are imported."""


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_have_no_init(room):
    """`kernels/__init__.py` on a worker's path would shadow PyPI's kernels and break every transformers model."""
    assert (ROOT / room).is_dir()
    assert not (ROOT / room / "__init__.py").exists()


def test_every_package_is_listed():
    """A new nested folder of code would be missing in the wheel, and only there."""
    holding = {path.parent.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted("stillhouse." + ".".join(folder.parts) for folder in holding) == sorted(listed)


def test_folders_of_data_have_an_init():
    """importlib.resources cannot open a namespace folder under an editable install: no recipe, no tiny model would be found."""
    data = [
        path
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file()
        and path.suffix not in {".py", ".pyc", ".so", ".cpp", ".h"}  # no Python opens the C++ sources
        and path.parent != ROOT / room
    ]
    assert any(path.suffix == ".yaml" for path in data)
    for path in data:
        nested = [
            folder for folder in path.parents if folder.is_relative_to(ROOT) and folder.parent not in (ROOT, *ROOT.parents)
        ]
        assert any((folder / "__init__.py").is_file() for folder in nested), (
            f"no __init__.py on the way to {path.relative_to(ROOT)}"
        )


def test_names_of_test_files_differ():
    """Two files of one name hide each other's results in a report."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_constraints_lie_within_the_ranges():
    """`pip install -c constraints.txt` would find no solution on a fresh machine."""
    pins = constraints()
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["test"], *extras["lint"]]:
        requirement = Requirement(text)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins, f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(Version(pins[name])), f"{name}=={pins[name]} is outside of {requirement}"


def test_every_import_is_declared():
    """A package that is only here by accident, as another's dependency, would be missing on a fresh machine some day."""
    extras = PROJECT["project"]["optional-dependencies"]
    texts = [
        *PROJECT["project"]["dependencies"],
        *(text for name in extras if name not in ("test", "lint") for text in extras[name]),
    ]
    declared = {re.sub(r"[-_.]+", "-", Requirement(text).name).lower() for text in texts}
    distributions = importlib.metadata.packages_distributions()
    undeclared = set()
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"stillhouse", "__future__"}:
                providers = {
                    re.sub(r"[-_.]+", "-", name).lower() for name in distributions.get(top, [OTHER_NAMES.get(top, top)])
                }
                if not providers & declared:
                    undeclared.add(f"{top} in {path.relative_to(ROOT)}")
    assert sorted(undeclared) == []


def test_constraints_serve_any_machine():
    """A file:// path, a CPU-only build tag or the project itself among the pins installs on one machine alone."""
    text = (ROOT / "constraints.txt").read_text()
    assert "@" not in text
    assert "+" not in "".join(line for line in text.splitlines() if not line.startswith("#"))
    assert "stillhouse" not in constraints()


def test_doctor_compares_with_the_constraints():
    """`stillhouse doctor` would call an untested set of versions tested."""
    pins = constraints()
    assert {name: pins[name] for name in TESTED_VERSIONS} == TESTED_VERSIONS


def test_license_is_the_whole_apache_text():
    """The package would claim a licence that it does not carry."""
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text) > 11_000


def make(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], capture_output=True, text=True, timeout=60, cwd=cwd)


@pytest.fixture
def checkout(tmp_path):
    """A folder with what `make` decides by, and a set-up that counts as done."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    bin_folder = tmp_path / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    (bin_folder / "python").write_text("#!/bin/sh\n")
    (tmp_path / ".venv" / ".setup-done").touch()
    return tmp_path


def test_make_lists_its_targets(checkout):
    """`make` alone would start something instead of saying what there is."""
    words = make(cwd=checkout).stdout
    for target in ("demo", "test", "test-fast", "lint", "bench", "clean", "help"):
        assert re.search(rf"^  make {target} +\S", words, re.MULTILINE)


def test_setup_is_skipped_when_up_to_date_and_only_then(checkout):
    """Every `make test` would wait for pip, or new requirements would not be installed."""
    assert make("-q", ".venv/.setup-done", cwd=checkout).returncode == 0
    (checkout / "constraints.txt").write_text("torch==2.13.0\n")
    assert make("-q", ".venv/.setup-done", cwd=checkout).returncode == 1


def test_old_python_is_refused_in_words(tmp_path):
    """On a machine with Python 3.10 set-up would fail somewhere inside pip."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.9" && exit 0\nexit 1\n')
    old.chmod(0o755)
    answer = make("test", f"PYTHON={old}", cwd=tmp_path)
    assert answer.returncode != 0
    assert "Stillhouse needs Python 3.11 or newer" in answer.stderr
    assert "is Python 3.10.9" in answer.stderr
    assert "make PYTHON=python3.12 test" in answer.stderr
    assert not (tmp_path / ".venv").exists()


def test_clean_keeps_runs_and_environment(checkout):
    """`make clean` would delete hours of a teacher's work."""
    keep = [checkout / "runs" / "demo" / "__pycache__" / "x", checkout / ".venv" / "lib" / "__pycache__" / "y.so"]
    drop = [checkout / "build" / "x", checkout / "a.egg-info" / "x", checkout / "jobs" / "__pycache__" / "x", checkout / "k.so"]
    for path in keep + drop:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert make("clean", cwd=checkout).returncode == 0
    assert [path.exists() for path in keep + drop] == [True] * len(keep) + [False] * len(drop)
