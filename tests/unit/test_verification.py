"""The verdicts that decide what is learnt and what pass@1 is."""

import json
import os
import subprocess
import sys
from fractions import Fraction

import pytest

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.exact_numbers import exact_number
from stillhouse.pipeline.judge_worker import decode_entry, encode_entry
from stillhouse.pipeline.problems import reasoning_gym_problems
from stillhouse.pipeline.records import Problem
from stillhouse.pipeline.verification import mutated_golds, self_check, verify
from stillhouse.pipeline.verifiers.math_answer import verify_math


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
        ("32, 349", None),
        ("0,111", None),
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
        # what math-verify takes for equal, or for different, and is not
        (r"1-\frac{1}{e}", r"1+\frac{1}{e}", "wrong"),
        (r"10^{300}", r"10^{300}+1", "wrong"),
        ("5 cm", "5 m", "wrong"),
        (r"5\text{ m}", r"500 \text{ cm}", "correct"),
        ("101_2", "5", "correct"),
        ("101_2", "101", "wrong"),
        ("-5", "−5", "correct"),
        ("12", "7 or 12", "wrong"),
        # kinds of gold
        (r"\sqrt{2}", "1.4142135623730951", "correct"),
        (r"\frac{1}{3}", "0.33", "wrong"),
        ("5", "5.0000000001", "wrong"),
        ("3.1416", r"\pi", "correct"),
        ("0.30000000000000004", "0.3", "correct"),
        ("(1, 2)", "(2, 1)", "wrong"),
        (r"\{1, 2\}", "2, 1", "correct"),
        (r"\{1, 2\}", "(1, 2)", "wrong"),
        ("[0, 1)", "[0, 1]", "wrong"),
        ("(0, 1)", "0 < x < 1", "wrong"),  # the gold's form is part of the question
        ("0 < x < 1", "(0, 1)", "correct"),
        (r"(0,1) \cup (1,2]", r"(1,2] \cup (0,1)", "correct"),
        (r"x \le 5", r"5 \ge x", "correct"),
        ("x < 1", "x > 1", "wrong"),
        ("y = 2x + 1", "2x - y = -1", "correct"),
        ("2x + y = 3", "3", "wrong"),
        ("x = 3", "y = 3", "wrong"),
        ("AB = 4, CD = 5", "5, 4", "wrong"),
        (r"x = 1 \pm \sqrt{2}", r"1-\sqrt{2}, 1+\sqrt{2}", "correct"),
        (r"\pm 3", "3", "wrong"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", "correct"),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", "wrong"),
        ("1:2", "3:6", "correct"),
        ("12:30", "2:05", "wrong"),
        (r"25\%", "0.25", "correct"),
        (r"25\%", r"0.25\%", "wrong"),
        (r"90^\circ", r"\frac{\pi}{2}", "correct"),
        (r"\sin 30^\circ", r"\frac12", "correct"),
        ("2+3i", "2-3i", "wrong"),
        ("|x|", "x", "wrong"),
        ("(-1)^n", "1", "wrong"),
        (r"\lfloor x \rfloor", "x", "wrong"),
        (r"\binom{6}{2}", "15", "correct"),
        (r"0.1\overline{6}", r"\frac16", "correct"),
        (r"\log_2 8", "3", "correct"),
        (r"\sin^2 x + \cos^2 x", "1", "correct"),
        ("ab", "ba", "correct"),
        ("35 apples", "35 oranges", "wrong"),
        ("5", "5'", "wrong"),
        ("1, 22", "1.22", "wrong"),
        ("5", r"\begin{pmatrix} ) \end{pmatrix}", "wrong"),  # once went round in circles
        ("2", r"2 \approx 3", "wrong"),
        (r"25\%", r"\$25", "wrong"),
        ("12", "1 2", "wrong"),
        ("6:00 PM", "6:00 AM", "wrong"),
        ("6:00 PM", r"6:00 \text{ p.m.}", "correct"),
        (r"\frac{7}{3}", "2.3333333333333335", "correct"),
        (r"\tan^{-1} 1", r"\frac{\pi}{4}", "correct"),
    ],
)
def test_math_verdicts(gold, answer, outcome):
    """Each row is a verdict that a user would call plainly right; another one means false labels."""
    assert verify(math_problem(gold), answer).outcome in ((outcome,) if outcome == "correct" else (outcome, "undecided"))


@pytest.mark.parametrize(
    ("gold", "answer", "outcome"),
    [
        ("55", r"\sum_{k=1}^{10} k", "correct"),
        ("54", r"\sum_{k=1}^{10} k", "wrong"),
        (r"\frac{1}{2}", r"\int_0^1 x\,dx", "correct"),
    ],
)
def test_the_second_opinion_is_asked_where_ours_ends(gold, answer, outcome):
    """A right answer that is a sum or an integral would be wrong to a reader that only compares what it can compute."""
    judged = verify(math_problem(gold), answer, timeout_s=30)
    assert (judged.outcome, "math-verify" in judged.reason) == (outcome, True)


def test_a_short_decimal_of_the_gold_is_left_undecided():
    """Called correct, rounding would be learnt; called wrong, the model is blamed for what the question did not say."""
    assert verify(math_problem(r"\frac{2}{3}"), "0.667").outcome == "undecided"
    assert verify(math_problem(r"\frac{2}{3}"), "0.668").outcome == "wrong"


def test_long_numbers_inside_unknown_functions_are_compared():
    """Python refuses to write an integer of 4,300 digits, and one such answer would end the run with a traceback."""
    assert verify(math_problem("f(2^{20000})"), "f(4^{10000})").outcome == "correct"
    assert verify(math_problem("f(2^{20000})"), "f(4^{10001})").outcome == "wrong"


@pytest.mark.parametrize(
    "answer", ["9**9**9**9**9", "5" + "!" * 2000, "2^" * 1500 + "2", "(" * 1500, r"10^{10^{10}}", "1/" * 1500]
)
def test_what_is_too_large_goes_to_nobody(answer):
    """Each would cost the whole deadline in the second opinion, and could only end undecided there."""
    judged = verify_math("5", answer, timeout_s=0.0)
    assert judged.outcome in ("undecided", "wrong")
    assert "killed" not in judged.reason


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
    assert verify(problem, "[1 for _ in iter(int, 1)]", timeout_s=30).outcome == "wrong"


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
        "assert j.worker_pids() == []; "
        "heavy = {'torch', 'ray', 'sympy', 'mpmath', 'jsonschema', 'math_verify', 'reasoning_gym', 'datasets'}; "
        "bad = heavy & set(sys.modules); "
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
