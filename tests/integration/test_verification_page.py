"""The page about verifying and filtering: its commands print what it says, its recipes load, its tables name what there is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from stillhouse.jobs.recipe_filters import Filters, Select
from stillhouse.pipeline.filters.settings import FILTERS, default_filters
from stillhouse.pipeline.verification import KINDS

PAGE = (Path(__file__).parents[2] / "pipeline" / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_commands_print_what_the_page_says(tmp_path):
    """A newcomer who pastes the first example and sees something else trusts nothing that follows."""
    pairs = [pair for block in blocks("console") for pair in re.findall(r"^\$ (.*)\n(.*)$", block, re.MULTILINE)]
    assert len(pairs) >= 8
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def printed(pair: tuple[str, str]) -> str:
        done = subprocess.run(
            ["sh", "-c", pair[0]],
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout.strip() or done.stderr

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(printed, pairs)) == [expected for _, expected in pairs]


def test_tables_name_every_kind_and_every_filter_with_its_options():
    """A filter or an option that the page leaves out is one that nobody uses."""
    for kind in KINDS:
        assert f"| `{kind}` |" in PAGE
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)\|$", PAGE, re.MULTILINE))
    assert [step.name for step in default_filters()] == [name for name in rows if name in FILTERS]
    for name in ("length", "control_tokens", "system_prompt_leak", "language"):
        assert re.findall(r"`(\w+)`", rows[name].rpartition("|")[2]) == list(FILTERS[name].__dataclass_fields__)


def test_filters_and_the_function_of_the_page_work(tmp_path, monkeypatch):
    """A recipe copied from the page would be refused."""
    (recipe,) = (yaml.safe_load(block) for block in blocks("yaml"))
    (function,) = blocks("python")
    (tmp_path / "my_filters.py").write_text(function)
    monkeypatch.syspath_prepend(str(tmp_path))
    filters = Filters.model_validate_json(json.dumps(recipe["filters"]))
    assert filters.list[-1].name == "my_filters:no_apologies"
    for key in re.findall(r"^\| `(.*?)` \|", PAGE.partition("## Selection")[2], re.MULTILINE):
        for name in re.findall(r"\b[a-z_]+\b(?=:|$|`)", key):
            assert name in Select.model_fields
