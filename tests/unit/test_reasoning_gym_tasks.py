"""Every task that reasoning-gym registers, as a source of problems and as a verifier."""

import json

import pytest
from reasoning_gym.factory import DATASETS

from stillhouse.pipeline.judge_worker import decode_entry, encode_entry
from stillhouse.pipeline.problems import reasoning_gym_problems
from stillhouse.pipeline.verification import gold_as_answer, mutated_golds, verify

OPTIONS = {"composite": {"datasets": [{"name": "chain_sum", "config": {"max_terms": 3}}, {"name": "gsm_symbolic"}]}}
NO_GOLD = {"boxnet", "rush_hour"}
"""Tasks without a gold answer and without an example of one: only their scorers say what is right."""
MANY_RIGHT = {"graph_color", "jugs", "n_queens", "quantum_lock", "sokoban", "simple_integration", "propositional_logic"}
"""Tasks where the answer to another item may be right too."""
SLOW_TO_MAKE = {
    "countdown", "futoshiki", "intermediate_integration", "knight_swap", "number_sequence", "puzzle24", "rubiks_cube",
    "simple_integration", "sokoban", "sudoku", "zebra_puzzles",
}  # fmt: skip


def gym(task, size=1, seed=11, **options):
    return reasoning_gym_problems(task, split="train", size=size, seed=seed, options=options)


def check_task(task, size):
    problems = gym(task, size, **OPTIONS.get(task, {}))
    assert len(problems) == size
    for problem, other in zip(problems, [*problems[1:], problems[0]]):
        entry = json.loads(problem.entry)["entry"]
        assert json.loads(json.dumps(encode_entry(decode_entry(entry)))) == entry
        assert bool(problem.answer) == (task not in NO_GOLD)
        if problem.answer and gold_as_answer(problem) is not None:  # None: braces of its own that do not balance
            said = verify(problem, gold_as_answer(problem), timeout_s=30)
            assert said.outcome == "correct", (problem.answer, said.reason)
        prose = f"I cannot solve it, maybe {problem.answer} or something else"
        altered = [*mutated_golds(problem), "I do not know", prose, "nan", "-17.25"]
        if task not in MANY_RIGHT and other.answer.split() != problem.answer.split():
            altered.append(other.answer)
        for answer in altered:
            said = verify(problem, answer, timeout_s=30)
            constant = task == "simple_integration" and problem.answer == "0 + C"  # any constant is right
            assert said.outcome != "correct" or constant, (problem.answer, answer, said.reason)


@pytest.mark.parametrize("task", sorted(DATASETS.keys() - SLOW_TO_MAKE))
def test_a_task_makes_problems_and_judges_them(task):
    """A task that cannot be stored, refuses its own gold or accepts anything would fail in the middle of a run."""
    check_task(task, 1)


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(DATASETS))
def test_a_task_makes_many_problems_and_judges_them(task):
    """What happens to one item in twenty happens in every run."""
    check_task(task, 4 if task in SLOW_TO_MAKE else 25)


@pytest.mark.parametrize(
    ("task", "wrong", "right"),
    [
        ("coin_flip", ["0", "0.1", "0.17", "1", "nan"], ["0.1719", "11/64", "0.171875"]),
        ("complex_arithmetic", ["nan", "3.0", "nan - 2.0i"], ["3-2i", "3.0 - 2.0i"]),
        ("game_of_life_halting", ["False", "yes or no", "x", "True False"], ["true", "True."]),
        ("gsm_symbolic", ["-405", "406", "maybe 405"], ["405.0", "405"]),
        ("number_sorting", ["['nan', 'nan', 'nan', 'nan', 'nan', 'nan']"], []),
        ("puzzle24", ["(1 + 2 + 3) * 4", "10 + 3 + 4 + 7 + 0", "24"], ["7 + 4 + 3 + 10"]),
    ],
)
def test_what_a_lenient_scorer_takes_is_refused(task, wrong, right):
    """reasoning-gym's own scorers give full marks to each of these wrong answers; trained on, they teach to guess."""
    (problem,) = gym(task)
    if task == "number_sorting":
        numbers = json.loads(problem.answer.replace("'", '"'))
        wrong = [str(["nan"] * len(numbers)), str([str(float(number) + 0.5) for number in numbers])]
        right = [json.dumps([float(number) for number in numbers])]
    assert {answer: verify(problem, answer).outcome for answer in right} == dict.fromkeys(right, "correct")
    assert "correct" not in {verify(problem, answer).outcome for answer in wrong}


@pytest.mark.parametrize(
    ("task", "longer"),
    [
        pytest.param("sokoban", lambda gold: "LR" + gold, marks=pytest.mark.slow),
        ("quantum_lock", lambda gold: gold.replace(" ", "")),
    ],
)
def test_another_right_answer_than_the_gold_is_right(task, longer):
    """These scorers overlook prose, so an answer in other words than the gold's was left undecided, and lost."""
    outcomes = set()
    for problem in gym(task, 4):
        outcomes.add(verify(problem, longer(problem.answer)).outcome)
        assert verify(problem, f"Maybe {problem.answer}").outcome != "correct"
    assert "correct" in outcomes
    assert "undecided" not in outcomes


def test_an_answer_that_the_scorer_cannot_read_is_wrong():
    """Undecided would say that our check failed, and leave the model's unreadable answers out of its pass rate."""
    (problem,) = gym("prime_factorization")
    said = verify(problem, "three times five")
    assert (said.outcome, "cannot read it" in said.reason) == ("wrong", True)


def test_items_without_an_answer_are_replaced():
    """One item in two hundred of this task has an empty answer, and would stop the whole run."""
    problems = gym("ab", 200)
    assert len({problem.prompt for problem in problems}) == 200
    assert all(problem.answer for problem in problems)
    assert gym("ab", 200) == problems
    assert gym("ab", 5) == problems[:5]


def test_a_composite_is_judged_by_its_parts():
    """A recipe that mixes tasks needs each item's own scorer and settings, and the report its own line."""
    problems = gym("composite", 12, **OPTIONS["composite"])
    assert {problem.source for problem in problems} == {"reasoning_gym/chain_sum", "reasoning_gym/gsm_symbolic"}
    settings = {json.loads(problem.entry)["task"]: json.loads(problem.entry)["options"] for problem in problems}
    assert settings == {"chain_sum": {"max_terms": 3}, "gsm_symbolic": {}}


@pytest.mark.parametrize(
    ("task", "options", "right", "wrong"),
    [
        ("rush_hour", {"min_moves": 1, "max_moves": 3}, "B-1 C+3 A+4", "A+4"),
        (
            "boxnet",
            {f"{end}_{what}_num": count for end in ("min", "max") for what, count in (("row", 1), ("column", 2), ("box", 1))},
            """[{"Agent[0.5, 0.5]": "move(box_red, target_red)", "Agent[0.5, 1.5]": "move(box_green, square[0.5, 0.5])"},
            {"Agent[0.5, 0.5]": "move(box_blue, target_blue)"}, {"Agent[0.5, 0.5]": "move(box_green, target_green)"}]""",
            """[{"Agent[0.5, 0.5]": "move(box_red, target_red)"}]""",
        ),
    ],
)
def test_a_task_without_a_gold_is_judged_by_its_scorer(task, options, right, wrong):
    """Puzzles with many solutions name none; a right one must be accepted all the same, and prose around it not."""
    (problem,) = gym(task, **options)
    assert problem.answer == ""
    assert verify(problem, right).outcome == "correct"
    assert verify(problem, wrong).outcome == "wrong"
    assert verify(problem, f"I would say {right}, or not").outcome != "correct"
