"""A team's recipe through the command: programs in the sandbox, a verifier and a filter of their own, an HTTP teacher."""

from __future__ import annotations

import json
import threading

import pytest

from stillhouse.pipeline.records import Problem, Trace, Verdict
from stillhouse.pipeline.store import RunStore
from stillhouse.pipeline.trace_store.store import TraceStore
from tests.chat_server import ChatServer
from tests.endpoint_run import answer

pytestmark = pytest.mark.slow

OWN_CHECKS = """
def in_any_case(answer, gold, entry):
    if not answer.isalpha():
        return "undecided", "not a word"
    return answer.casefold() == gold.casefold()


def no_shouting(trace):
    return ("shouting", "!!!") if "!!!" in trace.completion else None
"""
RECIPE = """
name: checks
problems:
  train:
    - {{source: file, path: programs.jsonl, kind: code}}
    - {{source: file, path: words.jsonl, kind: "python:own_checks:in_any_case"}}
  test: [{{source: file, path: held_out.jsonl, kind: code}}]
teacher:
  kind: endpoint
  base_url: {base_url}
  model: canned
  api_key_env: TEACHER_KEY
  samples_per_problem: 5
  opens_think: false
  sampling: {{temperature: 0.6, top_p: 0.95, max_new_tokens: 400}}
filters:
  list: [{{name: finished}}, {{name: "own_checks:no_shouting"}}, {{name: think_block}}, {{name: answer_present}}]
select: {{per_problem: 5}}
student: {{base_model: tiny, base_weights: int4, dtype: float32}}
train: {{learning_rate: 4e-3, num_steps: 4, tokens_per_step: 1024, max_length: 512}}
"""


def program(source: str, thought: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n```python\n{source}\n```"


def word(text: str, thought: str = "backwards") -> str:
    return f"<think>\n{thought}\n</think>\n\n\\boxed{{{text}}}"


TOTAL = "Read numbers from one line and print their sum."
ADD = "Write a function add(a, b) that returns the sum."
WORD = "Write the word stressed backwards."
# What the teacher says to each prompt, why each is kept or dropped, and by which check.
COMPLETIONS = {
    TOTAL: [
        (program("print(sum(map(int, input().split())))", "sum them"), "correct"),
        (program("print(max(map(int, input().split())))", "largest?"), "line 1 is '2', expected '3'"),
        (program("import sys\nsys.exit(0)", "leave"), "line 1 is nothing, expected '3'"),
        (program("print(3)", "guess the first"), "test 2 of 2"),
        (program("while True:\n    pass", "wait for ever"), "killed"),
    ],
    ADD: [
        (program("def add(a, b):\n    return a + b", "plus"), "correct"),
        (program("def add(a, b):\n    return a - b", "minus"), "assert"),
        (program("import os\ndef add(a, b):\n    os._exit(0)", "leave early"), "before it had answered"),
        (program("def minus(a, b):\n    return a", "another name"), "add"),
        (program("def add(a, b):\n    while True:\n        pass", "never"), "killed"),
    ],
    WORD: [
        (word("Desserts"), "correct"),
        (word("desserts", "BACKWARDS!!!"), "shouting"),
        (word("stressed"), "in_any_case said False"),
        (word("1234"), "not a word"),
        ("desserts", "no think block"),
    ],
}


class Canned(ChatServer):
    """Gives each prompt its completions in turn."""

    def __init__(self):
        super().__init__(None)
        self.left = {prompt: [text for text, _ in texts] for prompt, texts in COMPLETIONS.items()}
        self.taking = threading.Lock()
        self.fault_for_all = self.give

    def give(self, handler, body):
        asked = body["messages"][-1]["content"]
        with self.taking:
            text = next(texts for prompt, texts in self.left.items() if prompt in asked).pop()
        handler.send_text(200, answer(text))


@pytest.fixture
def folder(tmp_path):
    numbers = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "4 5\n", "stdout": "9\n"}]
    files = {
        "programs.jsonl": [
            {"prompt": TOTAL, "answer": "print(sum(map(int, input().split())))", "tests": numbers},
            {"prompt": ADD, "tests": "assert add(1, 2) == 3\nassert add(0, 5) == 5", "entry_point": "add"},
        ],
        "words.jsonl": [{"prompt": WORD, "answer": "desserts"}],
        "held_out.jsonl": [{"prompt": "Print what you read.", "tests": [{"stdin": "7\n", "stdout": "7\n"}]}],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own_checks.py").write_text(OWN_CHECKS)
    return tmp_path


def test_programs_and_own_checks_go_through_a_run(folder, stillhouse, environment, monkeypatch):
    """A kind that verifies on its own and not in a run is found out after the teacher was paid."""
    monkeypatch.setitem(environment, "TEACHER_KEY", "any")
    with Canned() as server:
        (folder / "recipe.yaml").write_text(RECIPE.format(base_url=server.base_url))
        for step in ("generate", "filter"):
            done = stillhouse(step, "recipe.yaml", "--out", "run")
            assert done.returncode == 0, done.stderr
    run = RunStore(folder / "run")
    problems = {problem.id: problem for problem in run.read("problems", Problem)}
    expected = {text: said for texts in COMPLETIONS.values() for text, said in texts}
    kept = run.read("kept", Trace)
    assert {trace.completion for trace in kept} == {text for text, said in expected.items() if said == "correct"}
    assert {problems[trace.problem_id].kind for trace in kept} == {"code", "python:own_checks:in_any_case"}
    text_of = {trace.key: trace.completion for trace in TraceStore(folder / "run" / "traces").traces()}
    assert len(text_of) == len(expected)
    dropped = {text_of[v.trace_key]: v.reason for v in run.read("verdicts", Verdict) if not v.keep and not v.shadow}
    assert dropped.keys() == {text for text, said in expected.items() if said != "correct"}
    assert not [(text, reason, expected[text]) for text, reason in dropped.items() if expected[text] not in reason]
