"""Problems from a generator, a file or a data set; whatever is wrong with them is said before anything is spent."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.problems import dataset_problems, disjoint, local_problems, reasoning_gym_problems
from stillhouse.pipeline.records import Problem, from_table, to_table
from stillhouse.pipeline.verification import verify


def write_jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def chain_sum(**changes):
    arguments = {"split": "train", "size": 20, "seed": 3, "options": {"min_terms": 3, "max_terms": 3}} | changes
    return reasoning_gym_problems("chain_sum", **arguments)


def test_a_seed_gives_the_same_problems_again():
    """A resumed run that draws other problems would pay for its traces twice."""
    assert chain_sum() == chain_sum()
    assert {p.prompt for p in chain_sum()} != {p.prompt for p in chain_sum(seed=1000)}


def test_options_reach_the_generator_and_the_scorer():
    """An option that is dropped in silence makes other problems than the recipe says."""
    problems = chain_sum()
    assert all(sum(c in "+-" for c in p.prompt) == 2 for p in problems)
    assert {(p.kind, p.source, p.split) for p in problems} == {("reasoning_gym", "reasoning_gym/chain_sum", "train")}
    stored = json.loads(problems[0].entry)
    assert (stored["task"], stored["options"]) == ("chain_sum", {"min_terms": 3, "max_terms": 3})
    assert verify(problems[0], problems[0].answer).outcome == "correct"


@pytest.mark.parametrize(
    ("task", "size", "options", "said"),
    [
        ("chain_sums", 5, {}, "no task 'chain_sums'; the nearest are chain_sum"),
        ("chain_sum", 5, {"max_term": 3}, "no option 'max_term'; the nearest are max_terms"),
        ("chain_sum", 5, {"min_terms": 9, "max_terms": 3}, "max_terms must be >= min_terms"),
        ("chain_sum", 0, {}, "size must be at least 1"),
        ("chain_sum", 5, {"seed": 1}, "no option 'seed'"),
        ("composite", 1, {"datasets": [{"task": "chain_sum"}]}, "takes name, weight and config, not 'task'"),
        ("composite", 1, {}, "needs the option datasets, a list"),
    ],
)
def test_a_wrong_task_is_refused_in_words(task, size, options, said):
    """A user reads this sentence and nothing else; it must name the task and what to write instead."""
    with pytest.raises(RecipeError, match=task) as caught:
        reasoning_gym_problems(task, split="train", size=size, seed=1, options=options)
    assert said in str(caught.value)


def test_jsonl_keeps_numbers_as_written(tmp_path):
    """A gold of 1.50 read as a float and printed as 1.5, or a large one rounded, would be another answer."""
    path = write_jsonl(
        tmp_path / "mine.jsonl",
        {"prompt": "a?", "answer": "1/2"},
        '{"prompt": "b?", "answer": 1.50}',
        "",
        '{"prompt": "c?", "answer": 123456789012345678901234567890}',
    )
    problems = local_problems(path, split="train")
    assert [p.answer for p in problems] == ["1/2", "1.50", "123456789012345678901234567890"]
    assert {(p.kind, p.source, p.split) for p in problems} == {("math", "mine.jsonl", "train")}
    assert len(local_problems(path, split="train", limit=2)) == 2


def test_parquet_and_jsonl_give_the_same_problems(tmp_path):
    """The file format is storage, not content; the ids must agree."""
    rows = [{"question": f"{i}+1?", "gold": str(i + 1)} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    fields = {"split": "test", "prompt_field": "question", "answer_field": "gold", "kind": "exact"}
    from_parquet = local_problems(tmp_path / "p.parquet", **fields)
    from_jsonl = local_problems(write_jsonl(tmp_path / "p.jsonl", *rows), **fields)
    assert [(p.prompt, p.answer) for p in from_parquet] == [(p.prompt, p.answer) for p in from_jsonl]
    assert len(from_parquet) == 5


GOOD = {"prompt": "a?", "answer": "1"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([GOOD, {"prompt": "b?"}], "row 2: field 'answer' is missing; the row has prompt"),
        ([GOOD, GOOD, {"prompt": "b?", "answer": "  "}], "row 3: field 'answer' is empty"),
        ([{"prompt": None, "answer": "1"}], "row 1: field 'prompt' is empty"),
        ([{"prompt": "a?", "answer": ["1"]}], "row 1: field 'answer' holds a list"),
        ([{"prompt": "a?", "answer": True}], "row 1: field 'answer' holds a bool"),
        ([GOOD, "", "{not json"], "line 3: not JSON"),
        ([GOOD, "[1, 2]"], "line 2: expected a JSON object, got list"),
        ([], "no rows"),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, said):
    """Without file, row and field, a user searches a million lines for the one without an answer."""
    path = write_jsonl(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(RecipeError) as caught:
        local_problems(path, split="train")
    assert said in str(caught.value)
    assert "bad.jsonl" in str(caught.value)


def test_a_parquet_row_without_an_answer_is_named(tmp_path):
    """The same sentence for the other file type."""
    pq.write_table(pa.table({"prompt": ["a?", "b?"], "answer": ["1", None]}), tmp_path / "p.parquet")
    with pytest.raises(RecipeError, match=r"p\.parquet, row 2: field 'answer' is empty"):
        local_problems(tmp_path / "p.parquet", split="train")


def test_a_file_that_cannot_be_read_is_a_recipe_error(tmp_path):
    """A missing file, a wrong type or a broken one ends in one sentence and exit code 2, not in a traceback."""
    with pytest.raises(RecipeError, match=r"nowhere\.jsonl") as caught:
        local_problems(tmp_path / "nowhere.jsonl", split="train")
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    (tmp_path / "p.csv").write_text("prompt,answer\n")
    with pytest.raises(RecipeError, match=r"ends in \.jsonl or \.parquet"):
        local_problems(tmp_path / "p.csv", split="train")
    (tmp_path / "p.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(RecipeError, match=r"not a readable Parquet file"):
        local_problems(tmp_path / "p.parquet", split="train")
    with pytest.raises(RecipeError, match="cannot read problems from nosuch://x"):
        local_problems("nosuch://x/p.jsonl", split="train")
    with pytest.raises(RecipeError, match="the kinds are"):
        local_problems(write_jsonl(tmp_path / "ok.jsonl", GOOD), split="train", kind="maths")


DATASET_FIELDS = {"split": "test", "prompt_field": "q", "answer_field": "a", "kind": "math"}


def test_a_dataset_in_a_local_folder_is_loaded(tmp_path, monkeypatch):
    """The same call loads a hub name; limit and split must be honoured, or a run costs more than planned."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table({"q": ["1+1?", "2+2?", "3+3?"], "a": [2, 4, 6]}), folder / "train-0.parquet")
    pq.write_table(pa.table({"q": ["5+5?"], "a": [10]}), folder / "test-0.parquet")
    problems = dataset_problems(str(folder), subset=None, dataset_split="train", limit=2, **DATASET_FIELDS)
    assert [(p.prompt, p.answer, p.split) for p in problems] == [("1+1?", "2", "test"), ("2+2?", "4", "test")]
    only_test = dataset_problems(str(folder), subset=None, dataset_split="test", limit=None, **DATASET_FIELDS)
    assert [p.answer for p in only_test] == ["10"]
    with pytest.raises(RecipeError, match="row 1: field 'gold' is missing; the row has q, a"):
        dataset_problems(
            str(folder), subset=None, dataset_split="test", limit=None, **(DATASET_FIELDS | {"answer_field": "gold"})
        )
    with pytest.raises(RecipeError, match="split 'dev'"):
        dataset_problems(str(folder), subset=None, dataset_split="dev", limit=None, **DATASET_FIELDS)


def test_a_dataset_that_is_not_there_keeps_its_cause(tmp_path):
    """The loader's own words stay attached for whoever has to find out why."""
    name = str(tmp_path / "nothing")
    with pytest.raises(RecipeError, match="cannot read problems from the data set") as caught:
        dataset_problems(name, subset="main", dataset_split="train", limit=None, **DATASET_FIELDS)
    assert caught.value.__cause__ is not None


def test_disjoint_compares_texts_and_keeps_the_first():
    """A test problem in other case or spacing in the training split would make the report's pass@1 a lie."""

    def problem(prompt, answer="1", split="train"):
        return Problem(prompt, answer, "math", "t", split)

    held_out = [problem("What is 2 + 2?", split="test")]
    same = problem("WHAT is\n2 + 2?", answer="4")
    first, again, other = problem("What is 3 + 3?"), problem("what is 3 + 3?", answer="6"), problem("What is 4 + 4?")
    kept, removed = disjoint([same, first, again, other], held_out)
    assert kept == [first, other]
    assert removed == [same, again]
    assert disjoint(kept, held_out) == (kept, [])


def test_the_answer_can_stand_behind_a_marker(tmp_path):
    """GSM8K's gold ends a worked solution: only what follows the last marker is the answer."""
    path = tmp_path / "gsm.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "2 #### no\n#### 1,072"}) + "\n")
    fields = {"split": "train", "prompt_field": "question", "answer_after": "#### "}
    assert [problem.answer for problem in local_problems(str(path), **fields)] == ["1,072"]
    path.write_text(json.dumps({"question": "How many?", "answer": "72"}) + "\n")
    with pytest.raises(RecipeError, match=r"row 1.*'#### '"):
        local_problems(str(path), **fields)


def test_topics_come_from_a_named_column_or_from_one_called_topic(tmp_path):
    """The selection could not share out over topics, or a misspelt column would give every problem the same one."""
    rows = [{**GOOD, "topic": " litres "}, {"prompt": "b?", "answer": "1", "area": 7}, {**GOOD, "area": None, "topic": ["x"]}]
    path = write_jsonl(tmp_path / "p.jsonl", *rows)
    assert [p.topic for p in local_problems(path, split="train")] == ["litres", "", ""]
    path = write_jsonl(tmp_path / "p.jsonl", *rows[1:])
    assert [p.topic for p in local_problems(path, split="train", topic_field="area")] == ["7", ""]
    path = write_jsonl(tmp_path / "p.jsonl", rows[1], GOOD)
    with pytest.raises(RecipeError, match="row 2: field 'area' is missing; the row has prompt, answer"):
        local_problems(path, split="train", topic_field="area")
    path = write_jsonl(tmp_path / "p.jsonl", rows[2])
    with pytest.raises(RecipeError, match="row 1: field 'topic' holds a list, not text"):
        local_problems(path, split="train", topic_field="topic")


def test_a_topic_changes_no_key_and_old_problems_have_none():
    """Traces that were paid for would be lost when somebody sorts the problems into topics."""
    plain, sorted_in = (Problem("1+1?", "2", "math", "mine", "train", topic=topic) for topic in ("", "sums"))
    assert plain.id == sorted_in.id
    assert from_table(Problem, to_table(Problem, [sorted_in])) == [sorted_in]
    assert from_table(Problem, to_table(Problem, [sorted_in]).drop_columns("topic")) == [plain]


def test_an_own_verifier_gets_its_entry_in_a_run_as_on_the_command_line(tmp_path):
    """It would judge with its defaults in the run, and with the row's settings when it was tried out."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer": "a", "entry": {"tol": 2}}) + "\n")
    (problem,) = local_problems(str(path), split="train", kind="python:m:f")
    assert json.loads(problem.entry) == {"tol": 2}
    path.write_text(json.dumps({"prompt": "p", "answer": "a", "entry": "[1"}) + "\n")
    with pytest.raises(RecipeError, match="not JSON"):
        local_problems(str(path), split="train", kind="python:m:f")


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("regex", {"regexp": "a+"}, "'answer' or 'pattern'"),
        ("json", {"scheme": {}}, "'answer' or 'schema'"),
        ("code", {"test": "assert True"}, "'answer' or 'tests'"),
        ("code", {"answer": "pass", "tests": []}, "'tests'"),
    ],
)
def test_a_row_without_what_judges_it_is_refused(tmp_path, kind, row, expected):
    """A misspelt column would leave every answer undecided, and be found out when the traces are paid for."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p"} | row) + "\n")
    with pytest.raises(RecipeError, match=rf"row 1: .*{expected}"):
        local_problems(str(path), split="train", kind=kind)
