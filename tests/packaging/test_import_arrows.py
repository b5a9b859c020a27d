"""Who imports whom: the five folders keep to the table in .github/CONTRIBUTING.md, and importing does no heavy work."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "jobs": {"jobs", "teachers", "students", "pipeline", "kernels"},
    "students": {"students", "pipeline", "kernels"},
    "teachers": {"teachers", "pipeline"},
    "pipeline": {"pipeline"},
    "kernels": {"kernels"},
}
NEVER = {
    "jobs": set(),
    "students": {"ray"},
    "teachers": {"ray"},
    "pipeline": {"ray", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "vllm", "triton"},
    "kernels": {"ray", "trl", "datasets", "vllm"},
}
# Libraries of seconds or gigabytes: imported inside the functions that use them.
ONLY_INSIDE_FUNCTIONS = {
    "ray",
    "vllm",
    "trl",
    "peft",
    "bitsandbytes",
    "transformers",
    "datasets",
    "accelerate",
    "reasoning_gym",
}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every imported dotted name with its line, ``from a import b`` as ``a.b``; relative imports as ``.``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." if node.level else f"{node.module}."
            yield from ((node.lineno, prefix + alias.name) for alias in node.names)


def run_at_import(tree: ast.Module) -> ast.Module:
    """The part of a module that runs when it is imported: no function bodies, nothing under ``if TYPE_CHECKING``."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

        def visit_If(self, node):
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(tree)


def violations(room: str, code: str) -> list[str]:
    found = []
    for line, name in imports(ast.parse(code)):
        top, _, rest = name.partition(".")
        if name.startswith("."):
            found.append(f"line {line}: relative import")
        elif top in MAY_IMPORT:
            found.append(f"line {line}: bare {top}, say stillhouse.{top}")
        elif top == "stillhouse" and rest.split(".")[0] not in MAY_IMPORT[room]:
            found.append(f"line {line}: {room} imports {name}")
        elif top in NEVER[room]:
            found.append(f"line {line}: {room} imports {top}")
    for line, name in imports(run_at_import(ast.parse(code))):
        top = name.partition(".")[0]
        if top in ONLY_INSIDE_FUNCTIONS - NEVER[room]:
            found.append(f"line {line}: {top} is imported with the module; import it in the function that uses it")
    return found


SOURCES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_the_table(path):
    """A folder could no longer be used or tested without the others, or `stillhouse --help` would take seconds."""
    room = path.relative_to(ROOT).parts[0]
    assert violations(room, path.read_text()) == []


@pytest.mark.parametrize(
    ("room", "code"),
    [
        ("pipeline", "import torch"),
        ("pipeline", "def f():\n    import torch.nn as nn"),
        ("pipeline", "from stillhouse.kernels import formats"),
        ("pipeline", "from stillhouse import jobs"),
        ("teachers", "import stillhouse.students.training"),
        ("students", "from stillhouse.teachers.local import generate"),
        ("students", "def f():\n    import ray"),
        ("kernels", "from stillhouse.pipeline.records import Problem"),
        ("kernels", "import kernels"),
        ("jobs", "from pipeline.records import Problem"),
        ("jobs", "from . import recipe"),
        ("jobs", "import ray"),
        ("students", "class A:\n    import trl"),
        ("students", "try:\n    from transformers import Trainer\nexcept ImportError:\n    pass"),
    ],
)
def test_the_walk_sees_a_forbidden_import(room, code):
    """The test above would pass whatever is written."""
    assert violations(room, code)


@pytest.mark.parametrize(
    ("room", "code"),
    [
        ("jobs", "def f():\n    import ray\n    from stillhouse.students import training"),
        ("students", "import torch\nfrom stillhouse.kernels.formats import quantize"),
        ("students", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import Trainer"),
        ("pipeline", "import pyarrow\nfrom stillhouse.pipeline.records import Problem"),
    ],
)
def test_the_walk_lets_a_good_import_pass(room, code):
    """Nobody could write anything."""
    assert violations(room, code) == []


def test_pipeline_loads_neither_torch_nor_ray():
    """A machine without torch could not verify or filter; libraries of others may import what our own source does not."""
    names = sorted(f"stillhouse.pipeline.{path.stem}" for path in (ROOT / "pipeline").glob("*.py"))
    assert names
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "print(sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT / "tests")
    assert answer.stdout.strip() == "[]", answer.stderr
