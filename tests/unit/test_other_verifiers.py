"""Numbers with tolerance and unit, JSON, regular expressions, and a user's own function."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest

from stillhouse.pipeline import judge_process
from stillhouse.pipeline.errors import RecipeError, StillhouseError
from stillhouse.pipeline.exact_numbers import exact_number
from stillhouse.pipeline.records import Problem
from stillhouse.pipeline.verification import judge, require_known_kind, self_check, verify
from stillhouse.pipeline.verifiers.rows import judge_row
from stillhouse.pipeline.verifiers.units import unit_of

ROWS = [json.loads(line) for line in (Path(__file__).parents[1] / "conformance" / "other_kinds.jsonl").read_text().splitlines()]


def problem(kind, gold, entry=None):
    return Problem("?", gold, kind, "mine.jsonl", "train", json.dumps(entry) if entry else "")


@pytest.mark.parametrize(
    ("gold", "answer", "entry", "outcome"),
    [
        ("1800 L", "1800 L", {}, "correct"),
        ("1800 L", "1.8 m^3", {}, "correct"),
        ("1800 L", r"1800 \text{ liters}", {}, "correct"),
        ("1800 L", "1800", {}, "correct"),
        ("1800", "1800 L", {"unit": "L"}, "correct"),
        ("1800", "1.8 m^3", {"unit": "L"}, "correct"),
        ("1800 L", "1800 mL", {}, "wrong"),
        ("1800 L", "1800 kg", {}, "wrong"),
        ("1800 L", "1810 L", {}, "wrong"),
        ("1800 L", "1810 L", {"rel_tol": 0.01}, "correct"),
        ("1800 L", "1810 L", {"abs_tol": 5}, "wrong"),
        ("1800 L", "1804 L", {"abs_tol": "5"}, "correct"),
        ("1800 L", "1.804 m^3", {"abs_tol": 5}, "correct"),
        ("90 km/h", r"25\ \text{m/s}", {}, "correct"),
        ("90 km/h", "25 meters per second", {}, "correct"),
        ("2.5 hours", "150 minutes", {}, "correct"),
        ("3 apples", "3 oranges", {}, "wrong"),
        ("12 %", "0.12", {}, "wrong"),  # a bare number is in the gold's unit
        ("-5", "−5", {}, "correct"),
        (r"\frac{1}{3}", "0.333333", {"rel_tol": 1e-5}, "correct"),
        (r"\sqrt{2} m", "1.41421356 m", {}, "correct"),
        ("5", "about five", {}, "wrong"),
        ("5", "x", {}, "wrong"),
        ("5", "4 or 5", {}, "wrong"),
        ("five", "5", {}, "undecided"),
        ("5", "5", {"rel_tol": "a bit"}, "undecided"),
        ("5", "5", {"abs_tol": -1}, "undecided"),
        ("5", "5", {"rel_tol": "nan"}, "undecided"),
        ("1.8 m³", "1.8", {}, "correct"),
        ("1.8 m^3", "1800", {}, "wrong"),  # a bare number is in the gold's unit
        ("1.8 m^3", "1,800 L", {}, "correct"),
        ("36 km/h", r"10\ \mathrm{m\,s^{-1}}", {}, "correct"),
        ("36 km/h", "10 m·s⁻¹", {}, "correct"),
        ("36 km/h", r"10 \frac{\text{m}}{\text{s}}", {}, "correct"),
        ("20 °C", "293.15 K", {}, "correct"),
        ("20 °C", "68 °F", {}, "correct"),
        ("20 °C", "20 K", {}, "wrong"),
        ("20", r"20^\circ\text{C}", {"unit": "°C"}, "correct"),
        ("20", "20 celsius", {"unit": "K"}, "wrong"),
        ("20 °C", "20.1 °C", {"abs_tol": 0.2}, "correct"),
        ("3e8 m/s", r"3 \times 10^{8}\ \text{m/s}", {}, "correct"),
        ("3e8", "300,000 km/s", {"unit": "m/s"}, "correct"),
        ("3e8", "65.23", {}, "wrong"),  # e is no factor here
        ("6.022e23", "6.022 x 10^23", {}, "correct"),
        ("1.6e-19", r"1.6\times10^{-19}\,\mathrm{C}", {"unit": "C"}, "correct"),
        ("1e6", "1 million", {}, "correct"),
        ("1.5", "1,5", {}, "correct"),
        ("1234.5", "1.234,5", {}, "correct"),
        ("1.234", "1,234", {}, "wrong"),
        ("1.5 hours", "1 hour 30 minutes", {}, "correct"),
        ("10 kΩ", "10000 ohms", {}, "correct"),
        ("10 μF", "1e-5 F", {}, "correct"),
        ("5 J/(kg·K)", "5 J kg^-1 K^-1", {}, "correct"),
        ("5 m", "5 M", {}, "wrong"),
        ("45°", r"\pi/4 rad", {}, "correct"),
        ("25%", "25 percent", {}, "correct"),
        ("€5", "$5", {}, "wrong"),
        ("$1,234.50", "1234.5 dollars", {}, "correct"),
        ("5", r"\approx 5", {}, "correct"),
        ("5", "x = 5", {}, "correct"),
        ("5", "(5, 6)", {}, "wrong"),
    ],
)
def test_numbers_with_tolerance_and_unit(gold, answer, entry, outcome):
    """An engineer's answers carry units; one in another unit is right, one of another quantity is not."""
    assert verify(problem("number", gold, entry), answer).outcome == outcome


@pytest.mark.parametrize("kind", ["number", "choice", "exact", "json", "regex"])
def test_answers_as_data_sets_and_models_write_them(kind):
    """A notation that is misread drops right traces, or trains on wrong ones; each row was judged by hand."""
    rows = [row for row in ROWS if row["kind"] == kind]
    assert len(rows) > 30
    for row in rows:
        said = judge_row(kind, row, extract=row.get("extract", "strict"))
        assert said["verdict"] == row["expected"], (row, said["reason"])


@pytest.mark.parametrize(
    ("unit", "other"),
    [("m/s^2", r"$\frac{\mathrm{m}}{\mathrm{s}^2}$"), ("kJ/mol", r"$\mathrm{~kJ} \mathrm{~mol}^{-1}$"), ("Å", r"\AA"),
     ("μm", r"\mu\text{m}"), ("°C", r"^{\circ}\mathrm{C}"), ("kΩ", r"\mathrm{k}\Omega"), ("kW h", "kilowatt-hour"),
     ("W/(m^2 K^4)", "W/m^2 K^{-4}"), ("J/kg", "(m/s)^2"), ("kg m/s", "kg (m/s)"), ("J/(mol K)", "J/mol K")],
)  # fmt: skip
def test_a_unit_has_many_spellings(unit, other):
    """A data set's unit in LaTeX would be of no kind, and every answer in plain letters wrong."""
    assert unit_of(unit) == unit_of(other)
    assert unit_of(unit).known


def test_a_unit_without_end_is_read_in_time():
    """A field of a hostile row is matched in the process itself, where no deadline kills it."""
    for text in ("$" * 4000, "m/(" * 2000, "(" * 4000, " " * 4000 + "x"):
        assert not unit_of(text).known


@pytest.mark.parametrize("filling", [" ", "\t", "~", "\\, ", " ^", r"\bmod 7", r"B\(\circ*", "\\\\ "])
def test_a_number_without_end_is_read_in_time(filling):
    """An answer is matched in the process itself too: one that takes for ever, or raises, ends the command."""
    hostile = "5" + filling * (3_900 // len(filling)) + "5"
    assert judge("number", "5", hostile, {}).outcome != "correct"
    assert judge_row("number", {"gold": "7 km", "pred": hostile}, extract="lenient")["verdict"] != "correct"
    assert exact_number("5" + filling * 100_000 + "x") is None  # boxes of any length come to the filters


@pytest.mark.parametrize(
    ("left", "right", "factor"),
    [("km", "m", 1000), ("kWh", "J", 3_600_000), ("cm^2", "mm^2", 100), ("miles per hour", "m/s", 0.44704),
     ("N", "kg m/s^2", 1), ("square meters", "m^2", 1), ("ml", "cc", 1), ("dollars", "cents", 100), ("weeks", "days", 7),
     ("μm", "m", 1e-6), ("kJ/(mol K)", "J/mol/K", 1000), ("mg/dL", "g/m^3", 10),
     ("M", "mol/L", 1), ("rad", "degrees", 57.29577951308232)],
)  # fmt: skip
def test_units_convert_exactly(left, right, factor):
    """A wrong factor turns every answer in that unit into a wrong one."""
    one, other = unit_of(left), unit_of(right)
    assert one.dimension == other.dimension
    assert float(one.factor / other.factor) == factor


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}


@pytest.mark.parametrize(
    ("gold", "answer", "entry", "outcome"),
    [
        ('{"a": 1, "b": [2]}', '{"b": [2.0], "a": 1}', {}, "correct"),
        ('{"a": 1}', '{"a": true}', {}, "wrong"),
        ("[1, 2]", "[2, 1]", {}, "wrong"),
        ('{"a": 1}', '{"a": 1, "a": 1}', {}, "wrong"),
        ('{"a": 1}', '{"a": 1} and more', {}, "wrong"),
        ("1", "NaN", {}, "wrong"),
        ('{"age": 3}', '{"age": 4}', {"schema": SCHEMA}, "wrong"),
        ('{"age": 3}', '{"age": 4}', {"schema": SCHEMA, "equal": False}, "correct"),
        ('{"age": 3}', '{"age": -4}', {"schema": SCHEMA, "equal": False}, "wrong"),
        ('{"age": 3}', '{"age": "4"}', {"schema": SCHEMA, "equal": False}, "wrong"),
        ('{"age": 3}', '{"age": 3}', {"schema": {"type": "no such type"}}, "undecided"),
        ("not JSON", "1", {}, "undecided"),
        ('{"age": 3}', '{"age": 4}', {"schema": json.dumps(SCHEMA), "equal": False}, "correct"),
        ('{"age": 3}', '{"age": 4}', {"schema": "{", "equal": False}, "undecided"),
        ("[]", "[" * 3000, {}, "wrong"),
    ],
)
def test_json_by_schema_and_value(gold, answer, entry, outcome):
    """A tool call that only looks right breaks the program that reads it."""
    assert verify(problem("json", gold, entry), answer).outcome == outcome


@pytest.mark.parametrize(
    ("gold", "answer", "entry", "outcome"),
    [
        (r"\d{4}-\d{2}-\d{2}", "2024-02-29", {}, "correct"),
        (r"\d{4}-\d{2}-\d{2}", "on 2024-02-29", {}, "wrong"),
        ("2024-02-29", "1999-01-01", {"pattern": r"\d{4}-\d{2}-\d{2}"}, "correct"),
        ("(", "(", {}, "undecided"),
        ("", "a", {}, "undecided"),
        ("a", "a", {"pattern": 5}, "undecided"),
    ],
)
def test_regular_expressions_match_the_whole_answer(gold, answer, entry, outcome):
    """A pattern that were searched for would be found in a list of guesses."""
    assert verify(problem("regex", gold, entry), answer).outcome == outcome


@pytest.mark.parametrize(
    ("gold", "answer", "outcome"),
    [
        ("B", r"\textbf{(B)}\ 5", "correct"),
        ("B", "B) Paris", "correct"),
        ("B", "Option B", "correct"),
        ("B", "**B**", "correct"),
        ("(B) Paris", "B", "correct"),
        ("(B) Paris", "paris", "correct"),
        ("(B) Paris", "Rome", "wrong"),
        ("B", "C) B", "wrong"),
        ("B", "A or B", "wrong"),
        ("A", "A dog", "wrong"),
        ("Paris", "Paris", "undecided"),
    ],
)
def test_an_option_is_its_letter(gold, answer, outcome):
    """A model that repeats the option's text beside its letter would be marked down for it."""
    assert verify(problem("choice", gold), answer).outcome == outcome


LABELS = ["{}", "({})", "{})", "{}.", "[{}]", "**{}**", r"\text{{{}}}", r"\textbf{{({})}}", "Option {}", "Answer: {}"]
BETWEEN = [" and ", " or ", ", ", "/", " & ", "; ", "\n", " ", " and/or ", " then ", " vs ", " → ", r" \text{ and } "]


@pytest.mark.parametrize("extract", ["strict", "lenient"])
def test_two_letters_never_win(extract):
    """A model that names every option would be always right."""
    for first, between, second in itertools.product(LABELS, BETWEEN, LABELS):
        both = first.format("B") + between + second.format("C")
        for gold, pred in itertools.product("BC", (both, f"<think>x</think> \\boxed{{{both}}}")):
            assert judge_row("choice", {"gold": gold, "pred": pred}, extract=extract)["verdict"] != "correct", pred


@pytest.mark.parametrize("extract", ["strict", "lenient"])
def test_a_letter_wins_whatever_its_option_says(extract):
    """An option's text may hold letters, lists and other options, and is right all the same."""
    texts = ["Paris", "A decrease", "I and II only", "Both A and C", "A and C", "John F. Kennedy", r"$\frac{1}{2}$", "f(A) = 3"]
    for label, text in itertools.product(["({}) ", "{}) ", "{}. ", "{}: ", r"\textbf{{({})}}\ ", "**{}.** "], texts):
        option = label.format("B") + text
        for gold, pred, outcome in (
            ("B", option, "correct"),
            ("C", option, "wrong"),
            (option, "B", "correct"),
            (option, "C", "wrong"),
        ):
            row = {"gold": gold, "pred": f"<think>x</think> \\boxed{{{pred}}}"}
            assert judge_row("choice", row, extract=extract)["verdict"] == outcome, (gold, pred)


@pytest.mark.parametrize(
    ("gold", "answer", "outcome"),
    [
        ("New York", "New  York", "correct"),
        ("New York", r"\text{New York}", "correct"),
        ("café", "cafe\u0301", "correct"),
        ("New York", "new york", "wrong"),
        ("10³", "103", "wrong"),
        ("5", "5.0", "wrong"),
    ],
)
def test_exact_text_differs_in_typing_only(gold, answer, outcome):
    """Text that is judged by more or less than its letters is not exact."""
    assert verify(problem("exact", gold), answer).outcome == outcome


def test_a_pattern_that_never_ends_is_undecided():
    """One pattern with nested repeats would stall the whole stage."""
    judged = verify(problem("regex", r"(a+)+b"), "a" * 40, timeout_s=0.5)
    assert judged.outcome == "undecided"
    assert verify(problem("regex", r"a+"), "aaa").outcome == "correct"


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "my_checks.py").write_text(
        "def even(answer, gold, entry):\n    return int(answer) % 2 == 0\n"
        "def with_reason(answer, gold, entry):\n    return 'wrong', f'{answer} is not {gold}, {entry[\"why\"]}'\n"
        "def hangs(answer, gold, entry):\n    while True: pass\n"
        f"def writes(answer, gold, entry):\n    open({str(tmp_path / 'written')!r}, 'w')\n    return True\n"
        "def says_yes(answer, gold, entry):\n    return 'yes'\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    judge_process.close_workers()
    yield tmp_path
    judge_process.close_workers()


def test_a_users_own_function_judges(own_module):
    """A team's own notion of right is the reason to have this kind; it must count as every other does."""
    assert verify(problem("python:my_checks:even", "2"), "4").outcome == "correct"
    assert verify(problem("python:my_checks:even", "2"), "3").outcome == "wrong"
    said = verify(problem("python:my_checks:with_reason", "2", {"why": "as I say"}), "3")
    assert (said.outcome, said.reason) == ("wrong", "3 is not 2, as I say")


def test_a_users_own_function_cannot_spoil_the_run(own_module):
    """It hangs, raises, writes files or returns nonsense some day; that is one item undecided, not a lost run."""
    assert verify(problem("python:my_checks:hangs", "2"), "4", timeout_s=0.5).outcome == "undecided"
    assert verify(problem("python:my_checks:even", "2"), "four").outcome == "undecided"
    assert verify(problem("python:my_checks:writes", "2"), "4").outcome == "undecided"
    assert not (own_module / "written").exists()
    said = verify(problem("python:my_checks:says_yes", "2"), "4")
    assert said.outcome == "undecided"
    assert "must return" in said.reason
    with pytest.raises(StillhouseError, match=r"cannot start.*no_such"):
        verify(problem("python:my_checks:no_such", "2"), "4")


def test_a_number_of_numpy_says_true_as_well(own_module):
    """Most functions that compare numbers say numpy's own True, and all their verdicts would be undecided."""
    (own_module / "my_numpy_checks.py").write_text(
        "import numpy\ndef close(answer, gold, entry):\n    return numpy.isclose(float(answer), float(gold))\n"
    )
    assert verify(problem("python:my_numpy_checks:close", "2"), "2.0").outcome == "correct"
    assert verify(problem("python:my_numpy_checks:close", "2"), "2.1").outcome == "wrong"


@pytest.mark.parametrize("kind", ["python:os", "python:os:", "python::f", "python:a b:f", "python:os.path:join.x", "python"])
def test_a_name_that_is_no_function_is_refused(kind):
    """A typing error in a recipe must stop it before the teacher is paid."""
    with pytest.raises(RecipeError, match=re.escape(repr(kind))):
        require_known_kind(kind, where="here")


def test_the_other_kinds_pass_their_self_check():
    """A kind whose own gold fails would empty the user's problems in silence."""
    problems = [
        problem("number", "1800 L", {"rel_tol": 0.01}),
        problem("number", "-2.5"),
        problem("json", '{"age": 3}', {"schema": SCHEMA, "equal": False}),
        problem("json", "[1, 2]"),
        problem("regex", "2024-02-29", {"pattern": r"\d{4}-\d{2}-\d{2}"}),
    ]
    report = self_check(problems)
    assert report.failures == []
    assert report.num_mutated >= 2 * len(problems)


def test_sound_problems_are_not_refused_by_the_self_check():
    """A source of sound problems would be refused for altered answers that are no wrong ones."""
    problems = [
        problem("choice", "(C) Paris"),
        problem("choice", "(D) Both (A) and (B)"),
        problem("exact", "f(x) = {x"),
        problem("json", '{"a": "}"}'),
        problem("json", '{"a": 1}', {"schema": {"type": "object"}, "equal": False}),
        problem("json", "", {"schema": {"type": "object"}}),
        problem("regex", "", {"pattern": "[^,]*"}),
    ]
    report = self_check(problems)
    assert (report.failures, report.sound) == ([], True)


@pytest.mark.parametrize(
    ("kind", "entry", "why"),
    [("json", {"schema": {"type": "objct"}}, "no schema"), ("json", {"schema": {"$ref": "#/$defs/a"}}, "leads nowhere"),
     ("json", {"schema": {"properties": {"a": {"$ref": "#/$defs/a"}}}}, "leads nowhere"),
     ("regex", {"pattern": "("}, "no regular expression")],
)  # fmt: skip
def test_what_can_judge_nothing_fails_the_self_check(kind, entry, why):
    """A broken schema without a gold would be found when every trace is undecided, and paid for."""
    broken = problem(kind, "", entry)
    report = self_check([broken])
    assert report.unsound == {broken.id}
    assert why in report.failures[0]
    assert not report.sound


def test_a_schema_alone_judges_a_recipes_problem():
    """Every trace of a source that has schemas and no answers would be undecided."""
    only_schema = problem("json", "", {"schema": {"type": "object", "required": ["a"]}})
    assert verify(only_schema, '{"a": 1}').outcome == "correct"
    assert verify(only_schema, "{}").outcome == "wrong"


@pytest.mark.parametrize(
    ("number", "by_schema", "by_value"),
    [
        ("1e999999999", "undecided", "wrong"),
        ("1e-999999999", "wrong", "wrong"),
        ("1e99999999999999999999", "undecided", "undecided"),
        ("9" * 5000, "undecided", "wrong"),
        ("1e5000", "undecided", "wrong"),
        ("1e-400", "wrong", "wrong"),
        ("1e400", "correct", "wrong"),
    ],
)
def test_json_numbers_without_bounds_are_undecided_at_worst(number, by_schema, by_value):
    """One number would hold up the stage, or end it."""
    said = judge("json", "", number, {"schema": {"multipleOf": 0.5, "minimum": 0}})
    assert said.outcome == by_schema
    assert "raised" not in said.reason
    assert judge("json", "1", number, {}).outcome == by_value
    assert "[<class" not in judge("json", number, "1", {}).reason


@pytest.mark.parametrize(
    ("schema", "answer", "outcome"),
    [
        ({"const": 1e23}, "1e23", "correct"),
        ('{"const": 1e23}', "100000000000000000000000", "correct"),
        ('{"const": 1e400}', "1e400", "correct"),
        ('{"const": 1e400}', "1e401", "wrong"),
        ('{"maximum": 9007199254740992.0}', "9007199254740993", "wrong"),
        ('{"multipleOf": 0.1}', "0.3", "correct"),
        ('{"maxLength": 3.0}', '"abc"', "correct"),
        ({"const": float("inf")}, "1e400", "undecided"),
        ({"format": "regex"}, '"a{99999999999999999999}"', "undecided"),
    ],
)
def test_numbers_of_a_schema_are_exact_too(schema, answer, outcome):
    """A schema whose number is rounded refuses the very number that it names."""
    said = judge("json", "", answer, {"schema": schema})
    assert said.outcome == outcome
    assert "raised" not in said.reason


def test_an_entry_that_is_no_object_is_named():
    """A broken entry read as empty would drop the user's tolerance."""
    with pytest.raises(RecipeError, match="entry"):
        verify(Problem("?", "5", "number", "mine", "train", "[1]"), "5")
    with pytest.raises(RecipeError, match="not JSON"):
        verify(Problem("?", "5", "number", "mine", "train", "{"), "5")


@pytest.mark.parametrize(
    ("unit", "answer", "outcome"),
    [
        ("°C", r"12 \text{ °C}", "correct"),
        ("°C", r"12\,\text{°C}", "correct"),
        ("µm", r"12\,\text{µm}", "correct"),
        ("µm", r"12\,\text{mm}", "wrong"),
        ("m^2", r"12~\text{m}^{2}", "correct"),
        (5, "12 m", "undecided"),
    ],
)
def test_units_as_models_write_them(unit, answer, outcome):
    """Right answers with a degree or a micro sign in text would be dropped, and the self-test would not see it."""
    assert judge("number", "12", answer, {"unit": unit}).outcome == outcome


@pytest.mark.parametrize("tolerance", ["1/0", "1e999999999", float("nan"), [1]])
def test_a_tolerance_that_is_no_number_is_undecided(tolerance):
    """One odd row would end the command, or hang it."""
    assert judge("number", "12", "12", {"rel_tol": tolerance}).outcome == "undecided"
