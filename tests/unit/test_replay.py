"""Replayed data sets: small files in the public schemas, read into problems and traces and judged like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.jobs.replaying import REPLAYED_FILES
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.filters.judging import judge_batch
from stillhouse.pipeline.filters.settings import default_filters
from stillhouse.pipeline.records import Trace, from_table, to_table
from stillhouse.pipeline.row_files import rows_of_dataset, rows_of_file
from stillhouse.pipeline.verification import verify
from stillhouse.teachers.replay import ReplayCounts, replay_rows, to_problem_and_trace

OPEN_R1 = pa.schema(
    [
        ("problem", pa.string()),
        ("solution", pa.string()),
        ("answer", pa.string()),
        ("problem_type", pa.string()),
        ("question_type", pa.string()),
        ("source", pa.string()),
        ("uuid", pa.string()),
        ("is_reasoning_complete", pa.list_(pa.bool_())),
        ("generations", pa.list_(pa.string())),
        ("correctness_math_verify", pa.list_(pa.bool_())),
        ("correctness_llama", pa.list_(pa.bool_())),
        ("finish_reasons", pa.list_(pa.string())),
        ("correctness_count", pa.int64()),
        ("messages", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
    ]
)
"""The features of open-r1/OpenR1-Math-220k, from its card."""


def open_r1_row(**changes):
    row = {
        "problem": "What is 6 times 7?",
        "solution": "It is $\\boxed{42}$.",
        "answer": "42",
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": "u-1",
        "is_reasoning_complete": [True, True, False],
        "generations": [
            "<think>\nSix sevens are 42.\n</think>\n\nThe answer is $\\boxed{42}$.",
            "<think>\nSix sevens are 48.\n</think>\n\nThe answer is $\\boxed{48}$.",
            "<think>\nSix sevens, let me see, that is seven and seven and",
        ],
        "correctness_math_verify": [True, True, False],  # the second is wrong, whatever the data set says
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": 2,
        "messages": [{"content": "What is 6 times 7?", "role": "user"}, {"content": "…", "role": "assistant"}],
    }
    return row | changes


def write_open_r1(path: Path, *rows: dict) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows), schema=OPEN_R1), path)
    return path


def replayed(layout, rows, **changes):
    counts = ReplayCounts()
    arguments = {"dataset": "open-r1/OpenR1-Math-220k", "revision": "abc", "counts": counts} | changes
    return list(replay_rows(layout, rows, **arguments)), counts


def rows_of(path: Path) -> list[dict]:
    return [row for _, row in rows_of_file(str(path), what="traces", endings=REPLAYED_FILES)]


def test_open_r1_gives_a_trace_a_generation_with_its_provenance(tmp_path):
    """If it failed, 220,000 paid problems could not be used, or nobody could say where a training row came from."""
    path = write_open_r1(tmp_path / "train.parquet", open_r1_row())
    found, counts = replayed("open_r1", rows_of(path))
    assert [trace.origin for trace in found] == [f"open-r1/OpenR1-Math-220k@abc#u-1/{index}" for index in range(3)]
    assert [trace.finish_reason for trace in found] == ["stop", "stop", "length"]
    assert {trace.teacher for trace in found} == {"deepseek-ai/DeepSeek-R1"}
    assert {trace.answer for trace in found} == {"42"}
    assert found[0].completion == "<think>\nSix sevens are 42.\n</think>\n\nThe answer is $\\boxed{42}$."
    assert found[2].claimed == "correctness_math_verify=false, is_reasoning_complete=false"
    assert (counts.num_rows, counts.num_traces, counts.num_without_gold, counts.unusable) == (1, 3, 0, {})


def test_the_run_judges_for_itself_what_a_data_set_calls_correct(tmp_path):
    """If it failed, a wrong answer that a data set marked as right would be trained on."""
    path = write_open_r1(tmp_path / "train.parquet", open_r1_row())
    pairs = [to_problem_and_trace(trace) for trace in replayed("open_r1", rows_of(path))[0]]
    assert len({problem.id for problem, _ in pairs}) == 1
    by_id = {problem.id: problem for problem, _ in pairs}
    verdicts = judge_batch(by_id, [trace for _, trace in pairs], default_filters(min_tokens=1, max_tokens=100))
    assert [(v.check, v.outcome, v.keep) for v in verdicts if not v.shadow] == [
        ("verify_math", "correct", True),
        ("verify_math", "wrong", False),
        ("finished", "", False),
    ]


def test_a_replayed_trace_is_stored_like_any_other_and_says_what_is_not_known(tmp_path):
    """If it failed, replayed traces would be lost in the store, counted twice, or pass estimates off as measured."""
    path = write_open_r1(tmp_path / "train.parquet", open_r1_row())
    first, again = ([to_problem_and_trace(t)[1] for t in replayed("open_r1", rows_of(path))[0]] for _ in range(2))
    assert first == again
    assert len({trace.key for trace in first}) == 3
    assert from_table(Trace, to_table(Trace, first)) == first
    trace = first[0]
    assert (trace.reasoning, trace.answer_text) == ("Six sevens are 42.", "The answer is $\\boxed{42}$.")
    assert json.loads(trace.rendered_prompt) == [{"role": "user", "content": "What is 6 times 7?"}]
    assert not trace.usage_counted
    assert trace.num_completion_tokens == -(-len(trace.completion) // 4)
    assert (trace.temperature, trace.top_p, trace.max_new_tokens) == (0, 0, 0)
    elsewhere = replayed("open_r1", rows_of(path), revision="def")[0]
    assert to_problem_and_trace(elsewhere[0])[1].key != trace.key


def test_the_same_rows_come_from_a_file_and_from_datasets(tmp_path):
    """If it failed, a data set streamed from the hub would be read otherwise than its downloaded file."""
    path = write_open_r1(
        tmp_path / "train.parquet", open_r1_row(), open_r1_row(uuid="u-2", finish_reasons=["stop", "length", None])
    )
    stream = rows_of_dataset(str(tmp_path), what="traces", subset=None, split="train", revision=None, streaming=True)
    from_stream, _ = replayed("open_r1", [row for _, row in stream])
    from_file, _ = replayed("open_r1", rows_of(path))
    assert from_stream == from_file
    assert [trace.finish_reason for trace in from_stream[3:]] == ["stop", "length", "length"]


def test_what_cannot_be_used_is_counted_with_its_reason(tmp_path):
    """If it failed, rows would vanish, and a yield of a tenth would look like a small data set."""
    path = write_open_r1(
        tmp_path / "train.parquet",
        open_r1_row(uuid="a", answer="proof"),
        open_r1_row(uuid="b", generations=None),
        open_r1_row(uuid="c", problem=" "),
        open_r1_row(uuid="d", generations=["", "<think>\nHm.\n</think>\n\n$\\boxed{42}$"], is_reasoning_complete=None),
    )
    found, counts = replayed("open_r1", rows_of(path))
    assert counts.unusable == {"no generations": 1, "no prompt": 3, "no completion": 1}
    assert (counts.num_rows, counts.num_traces, counts.num_without_gold) == (4, 4, 3)
    assert [trace.answer for trace in found] == ["", "", "", "42"]
    assert found[-1].origin.endswith("#d/1")
    assert found[-1].finish_reason == "stop"


def test_reasoning_that_a_data_set_calls_incomplete_is_not_finished(tmp_path):
    """If it failed, a completion that OpenR1 marks as cut off would be trained on where its tags happen to be closed."""
    path = write_open_r1(tmp_path / "train.parquet", open_r1_row(is_reasoning_complete=[True, False, None]))
    found, _ = replayed("open_r1", rows_of(path))
    assert [trace.finish_reason for trace in found] == ["stop", "length", "length"]


SYSTEM = "Your role as an assistant involves thoroughly exploring questions"
MARKED = (
    "<|begin_of_thought|>\n\nSix sevens are 42.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nIt is \\boxed{42}.\n\n<|end_of_solution|>"
)
OUR_FORM = "<think>\nSix sevens are 42.\n</think>\n\nIt is \\boxed{42}."


def conversation(completion, *, roles=("user", "assistant"), **columns):
    turns = [{"from": roles[0], "value": "What is 6 times 7?"}, {"from": roles[1], "value": completion}]
    return {**columns, "conversations": turns}


@pytest.mark.parametrize(
    ("layout", "row", "teacher"),
    [
        ("openthoughts", conversation(MARKED, system=SYSTEM), "deepseek-ai/DeepSeek-R1"),
        (
            "openthoughts",
            conversation("<think>\nSix sevens are 42.\n</think>\n\nIt is \\boxed{42}.", source="math", id=3),
            "deepseek-ai/DeepSeek-R1",
        ),
        (
            "openthoughts",
            conversation(
                "<think>Six sevens are 42.</think>It is \\boxed{42}.",
                roles=("human", "gpt"),
                difficulty=6,
                source="ai2-adapt-dev/openmath-2-math",
                domain="math",
            ),
            "Qwen/QwQ-32B",
        ),
        ("sky_t1", conversation(MARKED, system=SYSTEM), "Qwen/QwQ-32B-Preview"),
    ],
    ids=["OpenThoughts-114k", "OpenThoughts2-1M", "OpenThoughts3-1.2M", "Sky-T1_data_17k"],
)
def test_each_conversation_layout_comes_into_our_form(layout, row, teacher):
    """If it failed, a data set's own marks would be learnt as text, or its traces would be put down to another teacher."""
    (trace,), counts = replayed(layout, [row], dataset="the/set")
    assert trace.completion == OUR_FORM
    assert (trace.prompt, trace.finish_reason, trace.teacher) == ("What is 6 times 7?", "stop", teacher)
    assert (trace.answer, counts.num_without_gold, trace.origin) == ("", 1, "the/set@abc#1")
    asked = json.loads(to_problem_and_trace(trace)[1].rendered_prompt)
    assert asked[:-1] == ([{"role": "system", "content": SYSTEM}] if "system" in row else [])


@pytest.mark.parametrize(
    ("completion", "ours", "finish_reason"),
    [
        ("<|begin_of_thought|>\n\nSix and six and", "<think>\nSix and six and", "length"),
        (MARKED.partition("\n\n<|end_of_solution|>")[0], OUR_FORM, "length"),
        ("<think>\nSix and six and", "<think>\nSix and six and", "length"),
        ("Six sevens are 42.\n</think>\n\nIt is \\boxed{42}.", OUR_FORM, "stop"),
        ("It is \\boxed{42}.", "It is \\boxed{42}.", "stop"),
        ("<think>a</think><think>b</think>c", "<think>a</think><think>b</think>c", "stop"),
    ],
    ids=["cut thought", "cut solution", "cut block", "opened by the prompt", "no block", "two blocks"],
)
def test_what_was_cut_off_is_not_made_whole(completion, ours, finish_reason):
    """If it failed, half an answer would be trained on as if the teacher had meant to end there."""
    (trace,), _ = replayed("sky_t1", [conversation(completion)])
    assert (trace.completion, trace.finish_reason) == (ours, finish_reason)


def test_a_gold_answer_and_a_token_count_are_taken_where_a_conversation_has_them():
    """If it failed, open-r1's OpenThoughts-114k-math could not be verified although it says what is right."""
    row = conversation(MARKED, solution="So it is $\\boxed{42}$.", generated_token_count=321, correct=True)
    (trace,), counts = replayed("openthoughts", [row])
    assert (trace.answer, trace.num_completion_tokens, trace.claimed) == ("42", 321, "correct=true")
    assert counts.num_without_gold == 0
    assert to_problem_and_trace(trace)[1].num_completion_tokens == 321


def test_a_conversation_of_several_turns_is_counted_and_not_guessed_at():
    """If it failed, the second question would be taken for the answer to the first."""
    long = conversation(MARKED)
    long["conversations"] += [{"from": "user", "value": "And 6 times 8?"}, {"from": "assistant", "value": MARKED}]
    found, counts = replayed("openthoughts", [conversation(MARKED), long, {"conversations": None}])
    assert len(found) == 1
    assert counts.unusable == {"not one question and one answer": 1, "conversations are not a list of turns": 1}


def test_plain_rows_say_what_they_know(tmp_path):
    """If it failed, one's own traces would need a converter of their own, or lose what they cost and how they ended."""
    rows = [
        {"prompt": "6*7?", "completion": OUR_FORM, "answer": 42, "teacher": "me/mine", "tokens": 17, "id": "x7"},
        {"prompt": "6*7?", "reasoning": "Six sevens are 42.", "answer": "It is \\boxed{42}.", "gold": 42.0},
        {"prompt": "6*7?", "reasoning": "Six sevens", "finish_reason": "length"},
        {"prompt": "6*7?", "completion": OUR_FORM, "finish_reason": "abort"},
        {"prompt": "6*7?", "completion": OUR_FORM, "answer": [42]},
        {"prompt": "6*7?"},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows).replace("42.0", "42.00") + "\n\n")
    found, counts = replayed("jsonl", rows_of(path), dataset="mine.jsonl", revision="", teacher="acme/thinker")
    assert [trace.answer for trace in found] == ["42", "42.00", "", ""]
    assert [trace.finish_reason for trace in found] == ["stop", "stop", "length", "truncated"]
    assert [trace.teacher for trace in found] == ["me/mine", *["acme/thinker"] * 3]
    assert [trace.origin for trace in found] == ["mine.jsonl#x7", "mine.jsonl#2", "mine.jsonl#3", "mine.jsonl#4"]
    assert [trace.completion for trace in found[:3]] == [OUR_FORM, OUR_FORM, "<think>\nSix sevens"]
    assert found[0].num_completion_tokens == 17
    assert counts.unusable == {"the gold answer is not text": 1, "no completion": 1}


def test_a_json_array_is_read_as_sky_t1_ships_it(tmp_path):
    """If it failed, the file that Sky-T1 publishes would have to be converted before it can be replayed."""
    path = tmp_path / "Sky-T1_data_17k.json"
    path.write_text(json.dumps([conversation(MARKED, system=SYSTEM)] * 2))
    assert len(replayed("sky_t1", rows_of(path))[0]) == 2


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        (
            "open_r1",
            conversation(MARKED),
            "needs the column problem, answer, uuid, generations.*look like openthoughts or sky_t1",
        ),
        ("openthoughts", {"prompt": "?", "completion": "!"}, "needs the column conversations; .* look like jsonl"),
        ("jsonl", {"prompt": "?"}, r"needs the column completion \(or reasoning\)"),
        ("parquet", {}, "replay knows no layout 'parquet'; the layouts are open_r1"),
    ],
)
def test_the_wrong_layout_is_named_before_anything_is_read(layout, row, message):
    """If it failed, a whole data set would be walked and end as "0 traces"."""
    with pytest.raises(RecipeError, match=message):
        replayed(layout, [row])


def test_a_file_of_ones_own_brings_along_what_its_verifier_needs():
    """Traces of a domain with units could be generated and not be replayed: every one would be verified without its unit."""
    row = {
        "prompt": "How many m^3?",
        "answer": "1.8",
        "completion": "<think>\na\n</think>\n\n\\boxed{1800 L}",
        "topic": "pumps",
    }
    (found,) = replay_rows("jsonl", [row | {"unit": "m^3", "rel_tol": 0.01}], dataset="d", revision="", counts=ReplayCounts())
    problem, _ = to_problem_and_trace(found, kind="number")
    assert (json.loads(problem.entry), problem.topic) == ({"rel_tol": 0.01, "unit": "m^3"}, "pumps")
    assert verify(problem, "1800 L").outcome == "correct"
    assert to_problem_and_trace(found, kind="math")[0].entry == ""
