"""The filter that finds completions drifting into another script or language than their prompt's."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.extraction import split_reasoning
from stillhouse.pipeline.filters.drop import Drop
from stillhouse.pipeline.filters.prompt_parts import prompt_parts
from stillhouse.pipeline.overlap.boilerplate import BOILERPLATE
from stillhouse.pipeline.prompts import opens_think_block
from stillhouse.pipeline.records import Trace

# Greek is left out: alpha and sigma are mathematics in every language.
_SCRIPTS = {
    "Latin": "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f",
    "CJK": "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "Hangul": "\u1100-\u11ff\uac00-\ud7a3",
    "Cyrillic": "\u0400-\u052f",
    "Arabic": "\u0600-\u06ff\u0750-\u077f",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
}
_RUNS = {name: re.compile(f"[{characters}]+") for name, characters in _SCRIPTS.items()}
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
_SAMPLE_CHARS = 2_000


def script_letters(text: str) -> dict[str, int]:
    """How many letters of each script a text has; scripts with none are left out."""
    if text.isascii():
        return {"Latin": sum(map(len, _RUNS["Latin"].findall(text)))}
    counts = {name: sum(map(len, run.findall(text))) for name, run in _RUNS.items()}
    return {name: count for name, count in counts.items() if count}


def _script_words(text: str) -> dict[str, int]:
    """How many words of each script a text has; an ideograph is one, so that a short question counts beside instructions."""
    counts = {name: len(run.findall(text)) for name, run in _RUNS.items()} | {"CJK": len("".join(_RUNS["CJK"].findall(text)))}
    return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True)
class Language:
    """Drop a completion that mixes in a script, or is written in a language, that its prompt does not ask for.

    The script comes first and is exact: the share of letters in scripts that make up less than a tenth of the question's words
    (an ideograph is one; the system prompt and instructions that stand around many problems do not count).
    Latin is never foreign: variables and function names are Latin in every language.
    The language comes second, by lingua-py, and only where that is asked for.

    Args:
        max_foreign_share: of the letters, without LaTeX commands; 0.05 lets a quoted word or name pass.
        allowed: scripts that are fine whatever the prompt's, of Latin, CJK, Hangul, Cyrillic, Arabic, Hebrew, Devanagari, Thai.
        languages: ISO 639-1 codes, the first being the wanted one, the others those that it is told from; a reasoning that
            lingua takes for one of the others, at least ``min_confidence`` sure, is dropped. Empty does without lingua.

    Raises:
        RecipeError: ``languages`` is set where lingua-language-detector is not installed or names a single one, or a name is
            not known.
    """

    max_foreign_share: float = 0.05
    allowed: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    min_confidence: float = 0.9

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.allowed) - set(_SCRIPTS)):
            raise RecipeError(f"language filter: no script {unknown[0]!r}; the scripts are {', '.join(_SCRIPTS)}")
        if self.languages and importlib.util.find_spec("lingua") is None:
            raise RecipeError(
                "language filter: telling languages apart needs lingua (pip install lingua-language-detector); without "
                "`languages` the filter goes by script alone"
            )
        if self.languages:
            object.__setattr__(self, "languages", tuple(code.lower() for code in self.languages))
            if unknown := [code for code in self.languages if code not in _lingua_languages()]:
                raise RecipeError(
                    f"language filter: lingua knows no language {unknown[0]!r}; it takes ISO 639-1 codes such as en, zh"
                )
            if len(set(self.languages)) < 2:
                raise RecipeError(
                    f"language filter: languages={list(self.languages)} names one language; name the wanted one first and then "
                    "those to tell it from, for example [en, fr, de, es, zh]"
                )

    def __call__(self, trace: Trace) -> Drop | None:
        if not trace.completion.isascii() and (drop := self._foreign_script(trace)):
            return drop
        if not self.languages:
            return None
        parsed = split_reasoning(trace.completion, prompt_opens_think=opens_think_block(trace.rendered_prompt))
        sample = _LATEX_COMMAND.sub(" ", (parsed.reasoning or trace.completion)[:_SAMPLE_CHARS])
        language, confidence = _detector(self.languages)(sample)
        if language == self.languages[0] or confidence < self.min_confidence:
            return None
        return Drop("another language", f"{language} with confidence {confidence:.2f}: {sample[:80]}")

    def _foreign_script(self, trace: Trace) -> Drop | None:
        beyond_ascii = script_letters(_beyond_ascii(trace.completion))
        question = prompt_parts(trace.rendered_prompt).rest
        for phrase in BOILERPLATE:
            question = question.replace(phrase, "")
        prompt = _script_words(_LATEX_COMMAND.sub(" ", question))
        in_prompt = {name for name, count in prompt.items() if count >= sum(prompt.values()) / 10}
        foreign = beyond_ascii.keys() - {"Latin", *self.allowed, *in_prompt}
        if not foreign or not prompt:
            return None
        found = script_letters(_LATEX_COMMAND.sub(" ", trace.completion))
        total = sum(found.values())
        share = sum(found[name] for name in foreign) / total
        if share <= self.max_foreign_share:
            return None
        name = max(sorted(foreign), key=lambda script: found[script])
        start = next(_RUNS[name].finditer(trace.completion)).start()
        return Drop("mixed scripts", f"{share:.1%} of {total} letters foreign, most {name}: {trace.completion[start:][:60]}")


def _beyond_ascii(text: str) -> str:
    """The characters that are not ASCII, joined; most traces have a few arrows and signs."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return codes[codes > 127].tobytes().decode("utf-32-le")


@functools.cache
def _lingua_languages() -> Mapping[str, Any]:
    """What lingua can tell apart, by ISO 639-1 code; no model is loaded."""
    import lingua

    return {language.iso_code_639_1.name.lower(): language for language in lingua.Language.all()}


@functools.lru_cache(maxsize=4)
def _detector(languages: tuple[str, ...]) -> Callable[[str], tuple[str, float]]:
    import lingua

    wanted = [_lingua_languages()[code] for code in languages]
    detector = lingua.LanguageDetectorBuilder.from_languages(*wanted).build()

    def detect(text: str) -> tuple[str, float]:
        best = detector.compute_language_confidence_values(text)[0]
        return best.language.iso_code_639_1.name.lower(), best.value

    return detect
