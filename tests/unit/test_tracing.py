"""Keys, seeds and revisions: what tells one planned trace from another before anything is generated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.pipeline.records import Completion, Problem, Sampling, Trace, from_table, to_table
from stillhouse.teachers.tracing import folder_revision, make_trace, render_for_teacher, trace_requests

PROBLEM = Problem("What is 2 + 3?", "5", "math", "hand", "train")
PLAN = {
    "prompt": "<|user|>What is 2 + 3?<|assistant|>",
    "teacher": "org/teacher",
    "teacher_revision": "abc",
    "served": "float32",
    "temperature": 0.6,
    "top_p": 0.95,
    "max_new_tokens": 64,
    "seed": 0,
}


def _requests(samples_per_problem: int = 1, **changes):
    plan = PLAN | changes
    return trace_requests(
        [PROBLEM],
        [plan["prompt"]],
        teacher=plan["teacher"],
        teacher_revision=plan["teacher_revision"],
        served=plan["served"],
        sampling=Sampling(plan["temperature"], plan["top_p"], plan["max_new_tokens"]),
        samples_per_problem=samples_per_problem,
        seed=plan["seed"],
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "<|user|>What is 2 + 4?<|assistant|>"),
        ("teacher", "org/other"),
        ("teacher_revision", "abd"),
        ("served", "bfloat16"),
        ("temperature", 0.7),
        ("top_p", 0.9),
        ("max_new_tokens", 65),
        ("seed", 1),
    ],
)
def test_the_key_changes_with_all_that_a_completion_depends_on(field, value):
    """If it failed, a changed recipe would take another teacher's or another temperature's traces for its own."""
    assert _requests(**{field: value})[0].key != _requests()[0].key


def test_samples_of_one_problem_have_keys_and_seeds_of_their_own():
    """If it failed, best of N would be N copies of one completion, or only one would be stored."""
    requests = _requests(samples_per_problem=64)
    assert [request.sample_index for request in requests] == list(range(64))
    assert len({request.key for request in requests}) == 64
    assert len({request.seed for request in requests}) == 64


def test_the_same_plan_gives_the_same_requests():
    """If it failed, a resumed run would pay for every trace again."""
    assert _requests(samples_per_problem=3) == _requests(samples_per_problem=3)
    # A longer plan begins with the shorter one, so that raising samples_per_problem keeps what is there.
    assert _requests(samples_per_problem=5)[:3] == _requests(samples_per_problem=3)


def test_neighbours_in_the_plan_do_not_move_a_request():
    """If it failed, adding a problem to a recipe would throw away the traces of all others."""
    other = Problem("What is 9 - 1?", "8", "math", "hand", "train")
    arguments = {
        "teacher": "t",
        "teacher_revision": "",
        "served": "",
        "sampling": Sampling(1.0, 1.0, 8),
        "samples_per_problem": 2,
        "seed": 0,
    }
    both = trace_requests([other, PROBLEM], ["nine", "two"], **arguments)
    assert both[2:] == trace_requests([PROBLEM], ["two"], **arguments)


def test_a_plan_needs_one_prompt_for_each_problem():
    """If it failed, the tail of the problems would silently not be asked."""
    with pytest.raises(ValueError, match="shorter"):
        trace_requests(
            [PROBLEM, PROBLEM],
            ["one"],
            teacher="t",
            teacher_revision="",
            served="",
            sampling=Sampling(1.0, 1.0, 8),
            samples_per_problem=1,
            seed=0,
        )


def test_seeds_are_spread_over_what_an_int64_column_holds():
    """If it failed, about half of all traces could not be written to Parquet, or seeds would repeat."""
    seeds = [request.seed for request in _requests(samples_per_problem=2000)]
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert max(seeds) > 2**62  # all but certain for 2,000 numbers of 63 bits
    assert len(set(seeds)) == 2000


def test_a_trace_keeps_request_and_completion_and_survives_the_table():
    """If it failed, a training row could not be followed back to what the teacher wrote."""
    request = _requests(samples_per_problem=2)[1]
    completion = Completion("<think>\n2 and 3 make 5\n</think>\n\\boxed{5}", "stop", 9, 14, request.seed)
    sampling = Sampling(0.6, 0.95, 64)
    trace = make_trace(request, completion, teacher="org/teacher", teacher_revision="abc", sampling=sampling, seconds=0.25)
    assert (trace.key, trace.problem_id, trace.sample_index) == (request.key, PROBLEM.id, 1)
    assert (trace.reasoning, trace.answer_text) == ("2 and 3 make 5", "\\boxed{5}")
    assert trace.completion == completion.text
    assert from_table(Trace, to_table(Trace, [trace])) == [trace]


@pytest.mark.parametrize(
    ("prompt", "completion", "reasoning"),
    [
        ("ask<think>\n", "two\n</think>\n5", "two"),  # the prompt opened the block
        ("ask", "two\n</think>\n5", None),  # nobody opened it
        ("ask", "<think>\ntwo", None),  # cut within
    ],
)
def test_reasoning_is_split_as_the_prompt_left_it(prompt, completion, reasoning):
    """If it failed, traces of teachers whose template opens the think block would all be dropped as malformed."""
    request = _requests(prompt=prompt)[0]
    trace = make_trace(
        request,
        Completion(completion, "stop", 1, 1, 0),
        teacher="t",
        teacher_revision="",
        sampling=Sampling(1.0, 1.0, 8),
        seconds=0.0,
    )
    assert trace.reasoning == reasoning


MIB = 1 << 20


def _folder(path: Path, weights_bytes: int) -> Path:
    path.mkdir()
    (path / "config.json").write_text('{"hidden_size": 64}')
    (path / "tokenizer.json").write_bytes(bytes(5 * MIB))
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "model.safetensors").write_bytes(bytes(weights_bytes))
    (path / "README.md").write_text("a model")
    return path


@pytest.mark.parametrize("weights_bytes", [100, MIB + 17, 3 * MIB])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.safetensors", 0),
        ("model.safetensors", -1),
        ("config.json", 5),
        ("tokenizer.json", 2 * MIB + MIB // 2),
        ("chat_template.jinja", -1),
    ],
)
def test_one_flipped_byte_is_another_revision(tmp_path, weights_bytes, name, where):
    """If it failed, traces of a retrained or retemplated teacher would be taken for the old one's."""
    folder = _folder(tmp_path / "model", weights_bytes)
    before = folder_revision(folder)
    content = bytearray((folder / name).read_bytes())
    content[where] ^= 1
    (folder / name).write_bytes(content)
    assert folder_revision(folder) != before


def test_a_revision_knows_files_and_sizes_but_not_places_and_notes(tmp_path):
    """If it failed, moving a model or editing its README would cost every trace, or a lost shard would go unseen."""
    folder = _folder(tmp_path / "here", 3 * MIB)
    before = folder_revision(folder)
    (folder / "README.md").write_text("another text")
    assert folder_revision(folder.rename(tmp_path / "there")) == before
    folder = tmp_path / "there"
    (folder / "model.safetensors").write_bytes(bytes(3 * MIB + 1))
    longer = folder_revision(folder)
    assert longer != before
    (folder / "model.safetensors").unlink()
    assert folder_revision(folder) not in (before, longer)


def test_an_endpoint_gets_messages_and_no_markup():
    """If it failed, an endpoint would wrap our chat markup in its own, and the teacher would read both."""
    texts = render_for_teacher(
        ["2 + 3?", "a “quoted” line\nand more"],
        kind="endpoint",
        model="any",
        revision=None,
        system_prompt="Be brief.",
        prompt_suffix="Box it.",
        opens_think=True,
    )
    assert json.loads(texts[1]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a “quoted” line\nand more\n\nBox it."},
    ]
