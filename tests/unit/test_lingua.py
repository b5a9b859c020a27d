"""The language filter with lingua, an optional package: languages that share a script."""

import pickle

import pytest

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.filters.language import Language
from tests.unit.test_filters import make_trace

pytest.importorskip("lingua", reason="the language extra is not installed")

TEXTS = {
    "en": "First we add the two numbers, and then we divide by three, because the question asks for the average of them.",
    "fr": "D'abord nous additionnons les deux nombres, puis nous divisons le résultat par trois pour avoir la moyenne.",
    "de": "Zuerst addieren wir die beiden Zahlen, dann teilen wir das Ergebnis durch drei, um den Durchschnitt zu erhalten.",
    "es": "Primero sumamos los dos números y luego dividimos el resultado entre tres, porque se pide el promedio.",
}
OF_NO_LANGUAGE = ["x = 3 + 4 = 7. 7*2 = 14; 14/7 = 2. \\frac{1}{2}", "def f(n): return n*f(n-1) if n else 1", "", "ok 7"]


def said(languages, reasoning):
    drop = Language(languages=languages)(make_trace(f"<think>\n{reasoning}\n</think>\n\n\\boxed{{7}}"))
    return drop and drop.reason


@pytest.mark.parametrize("wanted", TEXTS)
def test_the_wanted_language_is_kept_and_the_others_are_dropped(wanted):
    """A student of an English teacher would learn to think in French, or every French trace of a French one be lost."""
    codes = (wanted, *(code for code in TEXTS if code != wanted))
    assert {code for code, text in TEXTS.items() if said(codes, text) is None} == {wanted}
    assert said(codes, TEXTS["fr" if wanted != "fr" else "en"]) == "another language"
    assert said(tuple(code.upper() for code in codes), TEXTS[wanted]) is None


@pytest.mark.parametrize("text", OF_NO_LANGUAGE)
def test_what_is_in_no_language_is_kept(text):
    """Formulas and code have no language; dropped, the shortest and clearest traces would be gone."""
    assert said(("en", "fr", "de", "es"), text) is None


@pytest.mark.parametrize(
    ("languages", "message"), [(("en",), "names one language"), (("en", "EN"), "names one"), (("xx", "en"), "no language 'xx'")]
)
def test_codes_that_cannot_work_are_refused_at_once(languages, message):
    """One language alone is always the likeliest, so the filter would pass everything and look as if it worked."""
    with pytest.raises(RecipeError, match=message):
        Language(languages=languages)


def test_the_filter_travels_to_a_worker():
    """Ray sends filters between processes; lingua's own detector does not pickle."""
    there = pickle.loads(pickle.dumps(Language(languages=("en", "fr"))))
    assert there(make_trace(f"<think>\n{TEXTS['fr']}\n</think>\n\n7")).reason == "another language"
