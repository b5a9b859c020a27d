"""The plan says how the verifiers do on the recipe's own answers, and refuses what the run would refuse."""

import json

import pytest
import yaml

from stillhouse.jobs.plan import plan, render_text
from stillhouse.jobs.recipe import load_recipe


@pytest.fixture
def recipe_of(tmp_path):
    """A recipe whose test problems are given rows, under a kind."""

    def make(rows, kind):
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = {
            "name": "r",
            "problems": {
                "train": [{"source": "reasoning_gym", "task": "chain_sum", "size": 400, "seed": 1}],
                "test": [{"source": "file", "path": "test.jsonl", "kind": kind}],
            },
            "teacher": {
                "kind": "transformers",
                "model": "tiny",
                "samples_per_problem": 1,
                "sampling": {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 64},
                "opens_think": False,
            },
            "student": {"base_model": "tiny"},
            "train": {"learning_rate": 1e-3, "num_steps": 2, "tokens_per_step": 1024, "max_length": 512},
        }
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
        return load_recipe(tmp_path / "r.yaml")

    return make


def test_measured_rates_stand_in_the_plan(recipe_of):
    """A team would pay for traces before it learns that its answers do not verify themselves."""
    rows = [{"prompt": f"How many litres are {n} m^3?", "answer": str(1000 * n), "unit": "L"} for n in range(1, 70)]
    found = plan(recipe_of(rows, "number"))
    assert "test: test.jsonl: 50 of 50 golds accepted, 100 of 100 altered ones refused" in found.verifiers
    assert "train: reasoning_gym/chain_sum: 50 of 50 golds accepted, 100 of 100 altered ones refused" in found.verifiers
    assert all(line in render_text(found) for line in found.verifiers)
    assert not [line for line in found.missing if "gold" in line]


@pytest.mark.parametrize(
    ("rows", "kind", "expected"),
    [
        ([{"prompt": f"Why {n}?", "answer": "because"} for n in range(9)], "number", "9 of 9 gold answers do not verify"),
        ([{"prompt": f"Say {n}", "answer": "x", "pattern": "(?s).*"} for n in range(9)], "regex", "accepts 9 of 9 altered"),
        ([{"prompt": "A question", "answer": ""}], "math", "answer"),
    ],
)
def test_what_the_run_would_refuse_is_missing_in_the_plan(recipe_of, rows, kind, expected):
    """`stillhouse plan` would find nothing missing, and the run would stop in its first stage."""
    assert [line for line in plan(recipe_of(rows, kind)).missing if expected in line]
