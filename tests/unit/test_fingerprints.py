"""A recipe key that decides a stage's output has to change that stage's fingerprint; else an old output is served for it."""

from __future__ import annotations

import sys

import pytest

from stillhouse.jobs.environment import worker_environment
from stillhouse.jobs.progress import LineReporter
from stillhouse.jobs.recipe import load_recipe
from stillhouse.jobs.run_state import RunState
from stillhouse.jobs.runner import STAGES
from stillhouse.pipeline.store import RunStore, StageManifest, fingerprint


class Fingerprints(RunState):
    """A run that does no work and only names it."""

    def stage(self, name, *, kind, code_version, settings, inputs, work):
        manifest = StageManifest(name, fingerprint(name, code_version, settings, inputs))
        self.manifests[name] = manifest
        return manifest


def fingerprints(folder, *overrides):
    with Fingerprints(load_recipe("demo", overrides), RunStore(folder), LineReporter(quiet=True)) as run:
        for stage in STAGES:
            stage(run)
        return {name: manifest.fingerprint for name, manifest in run.manifests.items()}


ENDPOINT = "teacher={{kind: endpoint, base_url: 'http://{host}/v1', model: Qwen/QwQ-32B, samples_per_problem: 2}}"
ADAPTIVE = "teacher={{kind: endpoint, base_url: 'http://a/v1', model: Qwen/QwQ-32B, adaptive: {{verified: {verified}}}}}"
VLLM = "teacher={{kind: vllm, model: Qwen/QwQ-32B, replicas: 2, max_model_len: {length}, revision: {revision}}}"


@pytest.mark.parametrize(
    ("stage", "before", "after"),
    [
        ("problems", "problems.train.0.size=600", "problems.train.0.size=601"),
        ("problems", "problems.test.0.seed=9000000", "problems.test.0.seed=9000001"),
        ("traces", "seed=0", "seed=1"),
        ("traces", "teacher.samples_per_problem=2", "teacher.samples_per_problem=3"),
        ("traces", "teacher.sampling.temperature=0.6", "teacher.sampling.temperature=0.7"),
        ("traces", "teacher.sampling.top_p=0.95", "teacher.sampling.top_p=0.9"),
        ("traces", "teacher.sampling.max_new_tokens=192", "teacher.sampling.max_new_tokens=100"),
        ("traces", "teacher.sampling.top_k=0", "teacher.sampling.top_k=20"),
        ("traces", "teacher.budget.max_tokens=null", "teacher.budget.max_tokens=1000"),
        ("traces", ADAPTIVE.format(verified=1), ADAPTIVE.format(verified=2)),
        ("traces", "teacher.dtype=float32", "teacher.dtype=bfloat16"),
        ("traces", "teacher.prompt_suffix=''", "teacher.prompt_suffix=x"),
        ("traces", "teacher.system_prompt=null", "teacher.system_prompt=x"),
        ("traces", "teacher.opens_think=false", "teacher.opens_think=true"),
        ("traces", ENDPOINT.format(host="a"), ENDPOINT.format(host="b")),
        ("traces", VLLM.format(length=1024, revision="r"), VLLM.format(length=4096, revision="r")),
        ("traces", VLLM.format(length=1024, revision="r"), VLLM.format(length=1024, revision="s")),
        ("evaluate-teacher", "teacher.dtype=float32", "teacher.dtype=bfloat16"),
        ("evaluate-teacher", "gate.teacher_problems=120", "gate.teacher_problems=60"),
        ("filter", "filters.min_tokens=1", "filters.min_tokens=2"),
        ("filter", "filters.decontaminate=true", "filters.decontaminate=false"),
        ("filter", "select.max_examples=null", "select.max_examples=5"),
        ("examples", "train.max_length=512", "train.max_length=400"),
        ("examples", "student.base_model=tiny", "student.base_model=some/model"),
        ("train", "train.learning_rate=1e-3", "train.learning_rate=2e-3"),
        ("train", "student.base_weights=int4", "student.base_weights=nf4"),
        ("train", "student.lora.rank=32", "student.lora.rank=16"),
        ("quantize", "quantize.group_size=32", "quantize.group_size=64"),
        ("evaluate-checkpoint", "quantize.skip=[]", "quantize.skip=[q_proj]"),
        ("evaluate-base", "student.base_model=some/model-1.5B", "student.base_model=some/model-7B"),
        ("evaluate-base", "gate.temperature=0", "gate.temperature=0.6"),
        ("evaluate-base", "gate.max_new_tokens=192", "gate.max_new_tokens=100"),
        ("evaluate-base", "gate.num_problems=null", "gate.num_problems=30"),
    ],
)
def test_what_decides_an_output_is_in_its_fingerprint(tmp_path, stage, before, after):
    """Otherwise a changed recipe is answered with what the old one made."""
    old, new = fingerprints(tmp_path, before), fingerprints(tmp_path, after)
    assert old[stage] != new[stage]


@pytest.mark.parametrize(
    "change",
    ["teacher.batch_size=7", "cluster.num_teacher_actors=1", "gate.min_accuracy=0.1", "gate.batch_size=3", "description=x"],
)
def test_what_decides_no_output_is_in_no_fingerprint(tmp_path, change):
    """Otherwise a changed batch size or threshold costs the whole run again."""
    assert fingerprints(tmp_path) == fingerprints(tmp_path, change)


BAND = "select.student_band=[0, 0.5]"


@pytest.mark.parametrize(
    ("change", "asked_again"),
    [
        ("select.student_samples=8", True),
        ("select.student_temperature=0.7", True),
        ("gate.max_new_tokens=100", True),
        ("student.base_model=some/model", True),
        ("student.dtype=bfloat16", True),
        ("select.student_band=[0, 0.75]", False),
        ("select.max_examples=5", False),
        ("teacher.samples_per_problem=3", False),
        ("student.lora.rank=16", False),
        ("gate.batch_size=3", False),
    ],
)
def test_the_base_is_asked_again_only_where_its_answers_would_be_others(tmp_path, change, asked_again):
    """Each try of a band would cost an evaluation, or a band would go by the answers of another base."""
    old, new = fingerprints(tmp_path, BAND), fingerprints(tmp_path, BAND, change)
    assert (old["probe"] != new["probe"]) is asked_again
    if asked_again:
        assert old["filter"] != new["filter"]


def test_without_a_band_the_base_is_not_asked(tmp_path):
    """A setting of the probe would filter and train again where nothing is probed."""
    old = fingerprints(tmp_path)
    assert "probe" not in old
    assert old == fingerprints(tmp_path, "select.student_samples=8", "select.student_temperature=0.7")


def test_a_problem_file_counts_by_its_content_and_not_by_its_folder(tmp_path):
    """A moved project, or a job's own copy of the file, is the same run; an edited file is another."""
    prints = []
    for folder, text in (("a", '{"prompt": "1", "answer": "1"}'), ("b", '{"prompt": "1", "answer": "1"}'), ("c", "{}")):
        path = tmp_path / folder / "mine.jsonl"
        path.parent.mkdir()
        path.write_text(text)
        prints.append(fingerprints(tmp_path / "run", f"problems.train=[{{source: file, path: {path}}}]")["problems"])
    assert prints[0] == prints[1] != prints[2]


def test_what_programs_may_import_decides_their_verdicts_and_reaches_the_workers(tmp_path, monkeypatch):
    """Programs judged without numpy would stay undecided after their owner allowed it, here or on a cluster's nodes."""
    (tmp_path / "code.jsonl").write_text('{"prompt": "Print 1.", "tests": [{"stdin": "", "stdout": "1"}]}')
    code = f"problems.test=[{{source: file, path: {tmp_path / 'code.jsonl'}, kind: code}}]"
    runs = [fingerprints(tmp_path, *change) for change in ([code], [])]
    monkeypatch.setenv("STILLHOUSE_SANDBOX_PACKAGES", "numpy")
    assert worker_environment()["STILLHOUSE_SANDBOX_PACKAGES"] == "numpy"
    judged_again = {"problems", "filter", "evaluate-teacher", "evaluate-base", "evaluate-checkpoint"}
    shown = fingerprints(tmp_path, code)
    assert judged_again <= {stage for stage, print_ in shown.items() if print_ != runs[0][stage]}
    assert fingerprints(tmp_path) == runs[1]
    monkeypatch.setenv("STILLHOUSE_SANDBOX", "unsafe-limits")
    unsafe = fingerprints(tmp_path, code)
    assert judged_again <= {stage for stage, print_ in unsafe.items() if print_ != shown[stage]}


def test_a_corrected_own_verifier_judges_everything_again(tmp_path, monkeypatch):
    """The teacher's score would be by the old rules, the students' by the new ones."""
    (tmp_path / "one.jsonl").write_text('{"prompt": "Say so.", "answer": "so"}')
    monkeypatch.syspath_prepend(str(tmp_path))
    own = f"problems.test=[{{source: file, path: {tmp_path / 'one.jsonl'}, kind: 'python:own_rules_of_tests:same'}}]"
    prints = []
    for rule in ("answer == gold", "answer.lower() == gold.lower()"):
        (tmp_path / "own_rules_of_tests.py").write_text(f"def same(answer, gold, entry):\n    return {rule}\n")
        prints.append(fingerprints(tmp_path, own))
    for stage in ("problems", "filter", "evaluate-teacher", "evaluate-checkpoint"):
        assert prints[0][stage] != prints[1][stage]


def test_an_edited_own_filter_filters_again_and_does_nothing_before_that_again(tmp_path, monkeypatch):
    """`stillhouse filter` would refuse for want of problems, and send its user to `generate` for one line of his own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    prints = []
    for rule in ("None", "('short', '')"):
        (tmp_path / "own_steps_of_tests.py").write_text(f"def long_enough(trace):\n    return {rule}\n")
        sys.modules.pop("own_steps_of_tests", None)
        prints.append(fingerprints(tmp_path, "filters.list=[{name: finished}, {name: 'own_steps_of_tests:long_enough'}]"))
    assert prints[0]["filter"] != prints[1]["filter"]
    before = ("problems", "traces", "evaluate-teacher", "evaluate-base")
    assert [prints[0][stage] for stage in before] == [prints[1][stage] for stage in before]
