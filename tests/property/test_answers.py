"""Properties of answers that no table of examples covers."""

from fractions import Fraction

from hypothesis import example, given, settings
from hypothesis import strategies as st

from stillhouse.pipeline.dedup import normalized_text
from stillhouse.pipeline.exact_numbers import exact_number
from stillhouse.pipeline.extraction import boxed_answer, split_reasoning, strict_answer
from stillhouse.pipeline.records import Problem
from stillhouse.pipeline.verification import verify
from stillhouse.pipeline.verifiers.equality import same_answer
from stillhouse.pipeline.verifiers.expressions import read
from stillhouse.pipeline.verifiers.latex import Unreadable
from stillhouse.pipeline.verifiers.lenient import lenient_answer, lenient_letter
from stillhouse.pipeline.verifiers.units import unit_of

# Pieces of LaTeX in any order: mostly nonsense, as a model writes it when it goes astray.
VOCABULARY = [
    r"1", r"2", r"3.5", r"x", r"y", r"n", r"e", r"i", r"\pi", r"+", r"-", r"*", r"/", r"^", r"_", r"!", r"%", r"'",
    r"=", r"<", r"\le", r",", r";", r":", r"(", r")", r"[", r"]", r"\{", r"\}", r"{", r"}", r"|", r"\frac{1}{2}",
    r"\frac", r"\sqrt", r"\sin", r"\log_2", r"\text{cm}", r"and", r"or", r"\pm", r"\infty", r"\cup", r"\in",
    r"\approx", r"^\circ", r"\begin{pmatrix}", r"\end{pmatrix}", r"&", r"\\", r"\sum_{k=1}^{n}", r"\binom", r"\left(",
    r"\right)", r"$", r"f(x)", r"\boxed{", r"\overline", r"cm", r"1,000", r"1,22", r"\$",
]  # fmt: skip
PIECES = st.lists(
    st.sampled_from(VOCABULARY),
    min_size=1,
    max_size=12,
)
FRACTIONS = st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=10**6)
BALANCED = st.recursive(
    st.text(alphabet="abc 123+-=,.$\n", max_size=8),
    lambda inner: st.one_of(
        inner.map(lambda s: "{" + s + "}"), inner.map(lambda s: r"\{" + s + r"\}"), st.tuples(inner, inner).map("".join)
    ),
    max_leaves=8,
)


def forms(number: Fraction) -> list[str]:
    """Ways in which a model writes the same number."""
    top, bottom = abs(number.numerator), number.denominator
    sign = "-" if number < 0 else ""
    written = [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}", rf"${sign}\dfrac{{{top}}}{{{bottom}}}$"]
    if bottom == 1:
        written += [f"{sign}{top}", f"{sign}{top}.0", f"{sign}{top:,}", f"{sign.replace('-', '−')}{top}", rf"\({sign}{top}\)"]
    return written


@given(FRACTIONS)
def test_every_way_of_writing_a_number_is_that_number(number):
    """A right answer written otherwise than the gold would be dropped as wrong."""
    for text in forms(number):
        assert exact_number(text) == number


@given(FRACTIONS, FRACTIONS)
def test_equality_of_numbers_is_exact_and_symmetric(left, right):
    """Two numbers are judged equal if and only if they are, whichever of them is the gold and however both are written."""
    expected = "correct" if left == right else "wrong"
    for gold, answer in zip(forms(left), reversed(forms(right))):
        assert verify(Problem("?", gold, "math", "t", "train"), answer).outcome == expected
        assert verify(Problem("?", answer, "math", "t", "train"), gold).outcome == expected


@given(st.text(min_size=1).filter(lambda s: s.strip()))
def test_exact_answers_are_reflexive(text):
    """The gold itself must always be accepted, whatever characters it has."""
    assert verify(Problem("?", text, "exact", "t", "train"), text).outcome == "correct"


@given(BALANCED.filter(lambda s: s.strip()), st.text(alphabet="abc }1\n", max_size=20))
def test_a_balanced_answer_comes_back_out_of_its_box(answer, prose):
    """Whatever stands around it and however it nests, the answer that was boxed is the answer that is judged."""
    completion = f"<think>{prose} \\boxed{{0}}</think>{prose}\\boxed{{{answer}}}{prose}"
    assert strict_answer(completion) == answer.strip()


@given(st.text(max_size=200))
@settings(max_examples=300)
def test_no_text_breaks_the_readers(text):
    """A completion is any text at all; reading it must never raise."""
    for raw in (text, "<think>" + text + "</think>" + text, "\\boxed{" + text + "}"):
        boxed = boxed_answer(raw)
        assert boxed is None or boxed in raw
        parsed = split_reasoning(raw)
        assert (parsed.reasoning is None) == (parsed.answer_text is None)
        number = exact_number(raw)
        assert number is None or isinstance(number, Fraction)


@given(PIECES, PIECES)
@example(["1"], ["1", "<", "1"])
@settings(max_examples=500)
def test_the_reader_takes_or_refuses_any_formula(left, right):
    """A formula that breaks the reader, or sends it round in circles, would stop the run that it stands in."""
    trees = []
    for pieces in (left, right):
        text = " ".join(pieces)
        assert lenient_answer(text) is None or isinstance(lenient_answer(text), str)
        try:
            trees.append(read(text))
        except Unreadable:
            return
    try:
        for tree in trees:
            assert same_answer(tree, tree)
        same_answer(*trees)
    except ArithmeticError:  # it cannot be decided, and says so
        return


@given(st.text(max_size=200))
def test_no_text_breaks_the_lenient_reader(text):
    """Other people's outputs hold anything; reading them must never raise."""
    for raw in (text, f"The answer is {text}", f"\\boxed{{{text}"):
        lenient_answer(raw)
        letter = lenient_letter(raw)
        assert letter is None or letter in "ABCDEFGHIJ"
    unit_of(text)


@given(st.text())
def test_normalizing_twice_changes_nothing(text):
    """Dedup would find new duplicates among its own survivors if its normal form were not one."""
    assert normalized_text(normalized_text(text)) == normalized_text(text)
