"""The verdicts that decide what is learnt and what pass@1 is."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from fractions import Fraction

import pytest

from stillhouse.pipeline import judge_process
from stillhouse.pipeline.errors import RecipeError, StillhouseError
from stillhouse.pipeline.exact_numbers import exact_number
from stillhouse.pipeline.judge_worker import decode_entry, encode_entry
from stillhouse.pipeline.problems import reasoning_gym_problems
from stillhouse.pipeline.records import Problem
from stillhouse.pipeline.verification import mutated_golds, self_check, verify


def math_problem(gold):
    return Problem("What is it?", gold, "math", "test", "train")


def gym(task, *, size=1, **options):
    return reasoning_gym_problems(task, split="test", size=size, seed=7, options=options)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", Fraction(42)),
        (" +42. ", Fraction(42)),
        ("−5", Fraction(-5)),
        ("$1{,}234{,}567$", Fraction(1234567)),
        (r"1,\! 234", Fraction(1234)),
        ("007", Fraction(7)),
        (".50", Fraction(1, 2)),
        ("1/2", Fraction(1, 2)),
        ("-3 / 6", Fraction(-1, 2)),
        (r"\frac{1}{3}", Fraction(1, 3)),
        (r"-\dfrac{2}{4}", Fraction(-1, 2)),
        (r"\tfrac12", Fraction(1, 2)),
        (r"\frac{-1}{2}", Fraction(-1, 2)),
        (r"918\frac{1}{2}", Fraction(1837, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        (r"\(3.0\)", Fraction(3)),
        (r"\boxed{9}", Fraction(9)),
        (r"\$12.50", Fraction(25, 2)),
        ("1.5e3", Fraction(1500)),
        (r"1.2 \times 10^{-2}", Fraction(3, 250)),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        ("1,22", None),  # a decimal comma or a pair: not ours to guess
        ("1,2,3", None),
        ("50%", None),
        ("5 cm", None),
        ("1 000", None),
        ("2^{10}", None),
        ("9**9**9**9**9", None),
        ("1e999999999", None),
        ("٣", None),
        ("9" * 5000, None),
        ("__import__('os').system('true')", None),
        ("", None),
        ("nan", None),
        ("inf", None),
    ],
)
def test_numbers_are_read_exactly_or_not_at_all(text, number):
    """A number misread here is a wrong verdict that nothing later corrects."""
    assert exact_number(text) == number


@pytest.mark.parametrize(
    ("gold", "answer", "outcome"),
    [
        ("5", "5.0", "correct"),
        ("1/2", r"\frac{1}{2}", "correct"),
        ("0.1", "1/10", "correct"),
        ("5", "5.001", "wrong"),
        ("100000000000000000001", "100000000000000000002", "wrong"),  # equal as floats
        ("x^2+1", "1 + x^2", "correct"),
        (r"\sqrt{8}", r"2\sqrt{2}", "correct"),
        (r"\{1,2\}", r"\{2,1\}", "correct"),
        ("x+1", "x-1", "wrong"),
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", "wrong"),  # math-verify alone rounds both to zero
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}", "wrong"),
        (r"\text{Even}", "even", "correct"),
        (r"\text{east}", r"\text{seat}", "wrong"),
        ("42", "I cannot solve it, maybe 42", "wrong"),
        ("42", "42 or 43", "wrong"),
        ("42", r"41$ and $42", "wrong"),
        ("42", "", "wrong"),
        ("42", None, "wrong"),
        ("Paris is in France", "Paris is in Spain", "wrong"),
    ],
)
def test_math_verdicts(gold, answer, outcome):
    """Each row is a verdict that a user would call plainly right; another one means false labels."""
    assert verify(math_problem(gold), answer).outcome in ((outcome,) if outcome == "correct" else (outcome, "undecided"))


@pytest.mark.parametrize("answer", [r"10^{10^{10^{10}}}", r"(10^{10^{9}})!", "9**9**9**9**9"])
def test_a_hanging_answer_is_not_correct_and_the_next_one_is_judged(answer):
    """One tower of powers must neither stall the run nor spoil the verdicts after it."""
    assert verify(math_problem("5"), answer, timeout_s=0.5).outcome in ("undecided", "wrong")
    assert verify(math_problem("x+1"), "1+x").outcome == "correct"


def test_a_timeout_says_undecided_and_why():
    """A time-out counted as wrong would blame the model for our limits."""
    judged = verify(math_problem("5"), r"10^{10^{10^{10}}}", timeout_s=0.5)
    assert judged.outcome == "undecided"
    assert "killed" in judged.reason


def test_verdicts_are_the_same_from_many_threads():
    """math-verify by itself raises off the main thread, and a caller then scored every answer as wrong."""
    rows = [("x+1", "1+x", "correct"), ("x+1", "x+2", "wrong"), ("5", r"10^{10^{10^{10}}}", "undecided")] * 2
    outcomes = [None] * len(rows)

    def judge(index):
        gold, answer, expected = rows[index]
        outcomes[index] = verify(math_problem(gold), answer, timeout_s=0.5 if expected == "undecided" else 30).outcome

    threads = [threading.Thread(target=judge, args=(index,)) for index in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [expected for _, _, expected in rows]


def _judge_in_fork(queue):
    outcome = verify(math_problem("x+1"), "1+x").outcome
    queue.put((outcome, judge_process._worker.process.pid))


def test_a_forked_process_judges_for_itself():
    """Two processes on one pipe would read each other's verdicts, and a lock held at the fork would never open again."""
    assert verify(math_problem("x+2"), "2+x").outcome == "correct"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_judge_in_fork, args=(queue,), daemon=True)
    with judge_process._lock:  # as when another thread is being judged at this moment
        child.start()
    outcome, worker_pid = queue.get(timeout=60)
    child.join()
    assert outcome == "correct"
    assert worker_pid != judge_process._worker.process.pid
    assert verify(math_problem("x+3"), "3+x").outcome == "correct"


def test_a_killed_worker_is_replaced():
    """An out-of-memory kill between two items must not turn every later verdict into undecided."""
    assert verify(math_problem("x+1"), "1+x").outcome == "correct"
    judge_process._worker.process.kill()
    judge_process._worker.process.wait()
    assert verify(math_problem("x+1"), "1+x").outcome == "correct"


def test_the_worker_sees_no_secret_of_the_environment(monkeypatch):
    """Text that a model wrote reaches other people's parsers; a token must not be within their reach."""
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-the-user")
    judge_process.close_worker()
    assert verify(math_problem("x+1"), "1+x").outcome == "correct"
    with open(f"/proc/{judge_process._worker.process.pid}/environ", "rb") as file:
        assert b"a-secret-of-the-user" not in file.read()


def test_a_giant_answer_is_refused_in_words():
    """A completion stuck in a loop inside its box must cost nothing."""
    judged = verify(math_problem("5"), "9" * 100_000)
    assert (judged.outcome, "100000 characters" in judged.reason) == ("undecided", True)


@pytest.mark.parametrize(
    ("gold", "answer", "outcome"),
    [
        ("B", "B", "correct"),
        ("B", "(b)", "correct"),
        ("(B)", r"\text{B}", "correct"),
        ("B", "B.", "correct"),
        ("B", "C", "wrong"),
        ("B", "A or B", "wrong"),
        ("B", "Because", "wrong"),
        ("Paris", "P", "undecided"),
    ],
)
def test_choice_verdicts(gold, answer, outcome):
    """Only a single letter is a choice; two letters must not win twice."""
    assert verify(Problem("?", gold, "choice", "test", "train"), answer).outcome == outcome


def test_exact_ignores_form_but_not_content():
    """Width and blanks are typing, letter case and words are the answer."""
    problem = Problem("?", "New  York", "exact", "test", "train")
    assert verify(problem, " New York ").outcome == "correct"
    assert verify(problem, "new york").outcome == "wrong"
    assert verify(problem, "New York City").outcome == "wrong"


def test_unknown_kind_names_the_known_ones():
    """A typing error in a recipe must be told apart from a wrong answer."""
    with pytest.raises(RecipeError, match=r"kind='maths'.*reasoning_gym, math, choice, exact"):
        verify(Problem("?", "1", "maths", "test", "train"), "1")


def test_reasoning_gym_full_marks_only():
    """Scorers give part marks to an answer inside prose; a label needs the whole mark."""
    (problem,) = gym("chain_sum")
    assert verify(problem, problem.answer).outcome == "correct"
    assert verify(problem, f" ${problem.answer}.0$ ").outcome == "correct"
    assert verify(problem, str(int(problem.answer) + 1)).outcome == "wrong"
    assert verify(problem, f"I think {problem.answer}").outcome == "wrong"


@pytest.mark.parametrize("task", ["gsm_symbolic", "knights_knaves", "fraction_simplification", "time_intervals", "survo"])
def test_scorers_that_harvest_prose_do_not_win_with_it(task):
    """These scorers give full marks to prose that contains the gold; trained on, that teaches hedging."""
    for problem in gym(task, size=3):
        assert verify(problem, problem.answer).outcome == "correct"
        assert verify(problem, f"I cannot solve it, maybe {problem.answer}").outcome != "correct"
        assert verify(problem, f"{problem.answer} or something else").outcome != "correct"


@pytest.mark.parametrize("task", ["spiral_matrix", "binary_matrix", "n_queens", "string_insertion"])
@pytest.mark.parametrize("cheat", ['entry["answer"]', "oracle_answer", "entry['answer'].split()", "answer"])
def test_scorers_that_eval_the_answer_do_not_hand_out_the_gold(task, cheat):
    """These scorers eval the model's text with the gold in scope; naming the variable must not be the solution."""
    (problem,) = gym(task)
    assert verify(problem, problem.answer).outcome == "correct"
    assert verify(problem, cheat).outcome != "correct"


def test_scorers_that_eval_the_answer_read_it_as_data():
    """An answer that is an endless expression must be read, not run: it would cost its whole deadline each time."""
    (problem,) = gym("spiral_matrix")
    assert verify(problem, "[1 for _ in iter(int, 1)]", timeout_s=2).outcome == "wrong"


@pytest.mark.parametrize("task", ["countdown", "polynomial_multiplication", "simple_integration", "spiral_matrix"])
def test_an_answer_that_is_a_program_is_not_run(task, tmp_path):
    """Some scorers hand the model's text to eval or sympy; nothing in it may touch the machine."""
    (problem,) = gym(task)
    target = tmp_path / "written"
    for code in (
        f"open({str(target)!r}, 'w').write('x')",
        f"__import__('pathlib').Path({str(target)!r}).touch()",
        f"[c for c in ().__class__.__base__.__subclasses__()][0] or open({str(target)!r}, 'w')",
    ):
        assert verify(problem, code).outcome != "correct"
    assert not target.exists()
    assert verify(problem, problem.answer).outcome == "correct"


def test_the_worker_itself_refuses_files_and_processes(tmp_path):
    """The second line of defence: where program text gets past the first, the worker still writes and starts nothing."""
    (problem,) = gym("polynomial_multiplication")
    target = tmp_path / "written"
    stored = json.loads(problem.entry)
    for code in (f"open({str(target)!r}, 'w')", f"__import__('os').system('touch {target}')", "exit()"):
        message = {"op": "reasoning_gym", "what": "reasoning_gym", "answer": code, "must_be_plain": False, **stored}
        outcome, _ = judge_process.ask(message, 5)
        assert outcome != "correct"
    assert not target.exists()


def test_a_worker_that_cannot_load_what_it_needs_says_so():
    """A verifier that is not there must stop the run; scored as wrong it would empty it in silence."""
    message = {"op": "reasoning_gym", "what": "reasoning_gym", "task": "no_such_task", "options": {}}
    with pytest.raises(StillhouseError, match=r"cannot start.*no_such_task"):
        judge_process.ask({**message, "entry": {}, "answer": "1", "must_be_plain": False}, 5)


def test_entries_survive_storage():
    """Tuples and number keys lost on the way to disk make scorers refuse their own gold (arc_agi, rearc)."""
    entry = {"answer": "1", "metadata": {"pair": (1, (2, 3)), "by_number": {1: "a"}, "list": [None, True, 0.5]}}
    assert decode_entry(json.loads(json.dumps(encode_entry(entry)))) == entry
    with pytest.raises(TypeError, match="set"):
        encode_entry({"x": {1, 2}})


def test_every_demo_like_task_passes_its_self_check():
    """A verifier that refuses its own gold, or takes a wrong answer, must be seen before tokens are spent."""
    problems = gym("chain_sum", size=20) + gym("leg_counting", size=20) + gym("arc_agi", size=2) + gym("spell_backward", size=5)
    problems += [math_problem(r"\frac{3}{4}"), math_problem("x^2+1"), math_problem(r"\text{no solution}")]
    problems += [Problem("?", "C", "choice", "t", "train"), Problem("?", "New York", "exact", "t", "train")]
    report = self_check(problems)
    assert report.failures == []
    assert report.num_problems == report.gold_accepted == len(problems)
    assert report.num_mutated == report.mutated_rejected > report.num_problems


def test_self_check_names_a_gold_that_does_not_verify():
    """The run must stop on it with the problem's name, not train on what is left."""
    broken = Problem("?", "Paris", "choice", "my.jsonl", "train")
    report = self_check([broken, math_problem("4")])
    assert (report.num_problems, report.gold_accepted) == (2, 1)
    assert len(report.failures) == 1
    assert "my.jsonl" in report.failures[0]
    assert broken.id[:12] in report.failures[0]


def test_mutated_golds_differ_from_the_gold():
    """A mutated gold equal to the gold would accuse a sound verifier."""
    for problem in (math_problem("1/2"), math_problem("x"), Problem("?", "Z", "choice", "t", "train"), gym("chain_sum")[0]):
        mutated = mutated_golds(problem)
        assert mutated
        assert problem.answer not in mutated


def test_importing_the_verifier_starts_nothing():
    """`stillhouse --help` would otherwise pay for sympy and a process."""
    code = (
        "import sys, stillhouse.pipeline.funnel as f, stillhouse.pipeline.problems; "
        "from stillhouse.pipeline import judge_process as j; "
        "assert j._worker is None; "
        "bad = {'torch', 'ray', 'sympy', 'math_verify', 'reasoning_gym', 'datasets'} & set(sys.modules); "
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
