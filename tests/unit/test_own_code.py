"""A team's own verifiers and filters beside the recipe: found from any folder, and sent along with a job."""

import json
import shutil
import subprocess
import sys

import pytest

from stillhouse.jobs.own_code import judging_names, modules_of, own_code
from stillhouse.jobs.plan import plan
from stillhouse.jobs.recipe import load_recipe
from stillhouse.jobs.sources import evaluation_set_identities, file_hashes, filter_settings
from stillhouse.jobs.submit import with_files
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.verifiers.rows import judge_row

RECIPE = """
name: own
problems:
  test: [{source: file, path: test.jsonl, kind: "python:own_side_checks.words:in_any_case"}]
teacher: {kind: replay, layout: jsonl, path: traces.jsonl, problem_kind: "python:own_side_checks.words:in_any_case"}
filters:
  list: [{name: finished}, {name: "own_side_filters:no_shouting"}, {name: "operator:not_", mode: off}]
  evaluation_sets: [{name: held_out.jsonl}]
student: {base_model: tiny}
train: {learning_rate: 4e-3, num_steps: 4, tokens_per_step: 1024, max_length: 512}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe with its files and a team's package and module beside it; the test works in another folder."""
    folder = tmp_path / "team"
    (folder / "own_side_checks").mkdir(parents=True)
    (folder / "own_side_checks" / "__init__.py").write_text("")
    (folder / "own_side_checks" / "words.py").write_text(
        "def in_any_case(answer, gold, entry):\n    return answer.casefold() == gold.casefold()\n"
    )
    (folder / "own_side_filters.py").write_text("def no_shouting(trace):\n    return None\n")
    (folder / "test.jsonl").write_text(json.dumps({"prompt": "Say yes.", "answer": "yes"}) + "\n")
    (folder / "held_out.jsonl").write_text(json.dumps({"prompt": "Say no."}) + "\n")
    row = {"prompt": "Say so.", "answer": "so", "completion": "<think>\nwell\n</think>\n\n\\boxed{So}"}
    (folder / "traces.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "own.yaml").write_text(RECIPE)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder / "own.yaml"


def test_modules_beside_the_recipe_are_found_from_any_folder(recipe):
    """Whoever calls the command from another folder is told that his own function is not there."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "stillhouse.jobs.cli.main", "verify", "--self-test", str(recipe)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "test: test.jsonl     1 of 1 golds accepted, 2 of 2 altered ones refused" in done.stdout
    assert "train: traces.jsonl  1 of 1 golds accepted" in done.stdout


def test_what_is_the_teams_own_travels_and_what_is_installed_does_not(recipe, tmp_path):
    """A submitted job would stop on the cluster at its first own function, or at a file that stayed at home."""
    loaded = load_recipe(recipe)
    assert modules_of(loaded) == [recipe.parent / "own_side_checks", recipe.parent / "own_side_filters.py"]
    (tmp_path / "job").mkdir()
    sent = with_files(loaded, tmp_path / "job")
    names = (sent.problems.test[0].path, sent.teacher.path, sent.filters.evaluation_sets[0].name)
    assert names == ("test-0/test.jsonl", "traces/traces.jsonl", "evaluation-0/held_out.jsonl")
    for name in names:
        assert (tmp_path / "job" / name).read_bytes() == (recipe.parent / name.rpartition("/")[2]).read_bytes()


def test_another_module_of_an_own_modules_name_is_refused(recipe, tmp_path):
    """A notebook that runs a second recipe would judge by the first one's rules, a recipe beside `requests.py` by a library."""
    load_recipe(recipe)
    second = tmp_path / "second"
    shutil.copytree(recipe.parent, second)
    with pytest.raises(RecipeError, match=r"'own_side_checks' lies at .*second.own_side_checks, but Python takes .*team.own_s"):
        load_recipe(second / "own.yaml")
    (second / "own.yaml").write_text((second / "own.yaml").read_text().replace("own_side_filters:no_shouting", "yaml:dump"))
    (second / "yaml.py").write_text("def dump(trace):\n    return None\n")
    shutil.rmtree(second / "own_side_checks")
    with pytest.raises(
        RecipeError, match=r"'yaml' lies at .*second.yaml.py, but Python takes .*packages.yaml, which comes first"
    ):
        load_recipe(second / "own.yaml")
    (recipe.parent / "own_side_filters.py").write_text("def no_shout(trace):\n    return None\n")
    del sys.modules["own_side_filters"]
    with pytest.raises(RecipeError, match=r"there is no 'no_shouting' in .*team.own_side_filters.py"):
        load_recipe(recipe)


def test_a_folder_that_only_has_the_name_hides_nothing(recipe, tmp_path, monkeypatch):
    """A project's folder above its installed package, or a folder of data beside the recipe, would stop a sound recipe."""
    installed = tmp_path / "own_side_checks"  # the project, in the working folder; the package is below it
    shutil.move(recipe.parent / "own_side_checks", tmp_path / "package")
    installed.mkdir()
    (installed / "setup.py").write_text("")
    shutil.move(tmp_path / "package", installed / "own_side_checks")
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.chdir(tmp_path)
    (recipe.parent / "own_side_checks").mkdir()
    (recipe.parent / "own_side_checks" / "table.csv").write_text("1,2\n")
    assert modules_of(load_recipe(recipe))[0] == installed / "own_side_checks"


def test_a_function_of_the_running_program_is_refused_in_words(recipe):
    """A notebook's own function would be missed by the workers, after the teacher was asked."""
    for override in ("problems.test.0.kind='python:__main__:f'", "filters.list=[{name: finished}, {name: '__main__:f'}]"):
        with pytest.raises(RecipeError, match=r"__main__:f'.*give it a module"):
            load_recipe(recipe, [override])


def test_a_module_is_found_that_came_to_the_path_after_the_workers_started(tmp_path, monkeypatch):
    """A notebook that judged anything before it read the recipe could not use the recipe's own verifier."""
    names = [f"own_late_{i}" for i in range(2)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text("def same(answer, gold, entry):\n    return answer == gold\n")
        monkeypatch.syspath_prepend(str(tmp_path / name))
        row = {"gold": "a", "pred": "a"}
        assert judge_row(f"python:{name}:same", row)["verdict"] == "correct"


def test_a_folder_without_init_travels_too_and_an_edited_module_is_another_one(recipe):
    """The job would miss it; a corrected verifier's verdicts would be those of the one before."""
    before = own_code(judging_names(load_recipe(recipe)))
    assert before.keys() == {
        "own_side_checks/__init__.py",
        "own_side_checks/words.py",
        "team/own_side_filters.py",
    }
    (recipe.parent / "own_side_filters.py").write_text("def no_shouting(trace):\n    return ('loud', '!')\n")
    after = own_code(judging_names(load_recipe(recipe)))
    assert {name for name in after if after[name] != before[name]} == {"team/own_side_filters.py"}
    (recipe.parent / "own_bare").mkdir()
    (recipe.parent / "own_bare" / "words.py").write_text("def f(answer, gold, entry):\n    return True\n")
    changed = load_recipe(recipe, ["problems.test.0.kind='python:own_bare.words:f'", "teacher.problem_kind=math"])
    assert modules_of(changed)[0] == recipe.parent / "own_bare"


def test_evaluation_sets_count_by_their_content_and_are_missed_before_the_teacher_is_asked(recipe, tmp_path):
    """New items of a set would stay in the training rows; a set that is not there would be found out after all was paid."""
    first = evaluation_set_identities(load_recipe(recipe))
    joined = load_recipe(recipe, ["filters.evaluation_sets.0.field=[question, choices]"])
    assert evaluation_set_identities(joined)[0]["field"] == ["question", "choices"]
    moved = tmp_path / "elsewhere" / "held_out.jsonl"
    moved.write_bytes((recipe.parent / "held_out.jsonl").read_bytes())
    assert evaluation_set_identities(load_recipe(recipe, [f"filters.evaluation_sets.0.name={moved}"])) == first
    moved.write_text(json.dumps({"prompt": "Say perhaps."}) + "\n")
    assert evaluation_set_identities(load_recipe(recipe, [f"filters.evaluation_sets.0.name={moved}"])) != first
    absent = load_recipe(recipe, ["filters.evaluation_sets.0.name=nope.jsonl"])
    with pytest.raises(RecipeError, match=r"nope\.jsonl"):
        evaluation_set_identities(absent)
    assert [line for line in plan(absent).missing if "nope.jsonl" in line]


def test_files_of_one_name_are_two_files(recipe):
    """An edited training file would not be noticed beside a test file of the same name."""
    (recipe.parent / "other").mkdir()
    other = recipe.parent / "other" / "test.jsonl"
    other.write_text(json.dumps({"prompt": "Say no.", "answer": "no"}) + "\n")
    overrides = [f"problems.validation=[{{source: file, path: {other}, kind: exact}}]"]
    before = file_hashes(load_recipe(recipe, overrides))
    other.write_text(json.dumps({"prompt": "Say no.", "answer": "No"}) + "\n")
    assert len([name for name, value in file_hashes(load_recipe(recipe, overrides)).items() if before[name] != value]) == 1


def test_a_cut_off_trace_is_never_kept_and_no_filter_is_listed_twice(recipe):
    """A list of one's own without it would train on completions that were cut, and teach no end of turn."""
    loaded = load_recipe(recipe, ["filters.list=[{name: repetition}]"])
    assert [(step.name, step.mode) for step in filter_settings(loaded)] == [("finished", "drop"), ("repetition", "drop")]
    for steps in ("[{name: finished, mode: shadow}]", "[{name: length}, {name: length, mode: shadow}]"):
        with pytest.raises(RecipeError, match=r"filters"):
            load_recipe(recipe, [f"filters.list={steps}"])


def test_a_module_that_is_nowhere_is_a_mistake_of_the_recipe(recipe):
    """The run would find out in its first stage, with another exit code, or after the teacher was paid."""
    with pytest.raises(RecipeError, match=r"problems\.test\.0.*'python:not_there:f'.*no such module"):
        load_recipe(recipe, ["problems.test.0.kind='python:not_there:f'"])


def test_yaml_reads_off_as_false_and_the_recipe_does_not(recipe):
    """``mode: off``, written as everybody writes it, would be refused."""
    loaded = load_recipe(recipe, ["filters.near_prompts=off", "filters.decontaminate=on"])
    assert [step.mode for step in loaded.filters.list] == ["drop", "drop", "off"]
    assert (loaded.filters.near_prompts, loaded.filters.decontaminate) == ("off", "drop")
    with pytest.raises(RecipeError, match="evaluation_sets"):
        load_recipe(recipe, ["filters.decontaminate=off"])
