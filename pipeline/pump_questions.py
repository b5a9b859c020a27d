"""Questions of a domain of its own, pumps that move water: what the shipped recipe ``pumps`` distils.

``A pump moves 24 litres a minute. How many cubic metres does it move in 35 minutes?`` A rate and a time of two digits each,
three devices, three ways to ask, and the answer in litres or in cubic metres. `worked_solution` writes what the tiny teacher
learns from; the tiny base student never saw a pump. One row of the JSONL files is what a team would write down for questions
of its own: prompt, answer, unit, tolerance, and a topic.

``python -m stillhouse.pipeline.pump_questions --out FOLDER`` writes ``problems.jsonl`` and ``test.jsonl`` as they are shipped
beside the recipe. No pair of rate and time is in both, and no text of either is in the tiny teacher's training data.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from stillhouse.pipeline.tinyworld import THINK_CLOSE, THINK_OPEN, partial_products

TOPICS = {"litres": "L", "cubic_metres": "m^3"}
"""What is asked for, with the unit of the gold answer."""
SHIPPED = {"problems": (600, 8_000_000), "test": (300, 9_000_000)}
"""Size and seed of each shipped file."""
LITRES_ANYWAY = 0.25
"""Share of the cubic-metre questions that are answered in litres: right as well, for a verifier that converts."""
REL_TOL = 1e-4
"""Below one litre in 9,801, the largest answer there is: a slip in the last digit is wrong."""

_DEVICES = (("pump", "move"), ("hose", "deliver"), ("tap", "give"))
_RATES = ("{rate} litres a minute", "{rate} litres per minute")
_ASKED = (
    "A {device} {verb}s {flow}. How many {unit} does it {verb} in {minutes} minutes?",
    "A {device} {verb}s {flow}. How many {unit} does it {verb} during {minutes} minutes?",
    "A {device} {verb}s {flow} and runs for {minutes} minutes. How many {unit} is that?",
)


@dataclass(frozen=True, slots=True)
class PumpQuestion:
    """One question: what it asks for (a key of `TOPICS`), its text, litres a minute, and minutes."""

    topic: str
    text: str
    rate: int
    minutes: int

    @property
    def answer(self) -> str:
        """The gold answer in the topic's unit: litres, or cubic metres without closing zeros."""
        litres = self.rate * self.minutes
        return str(litres) if self.topic == "litres" else _cubic_metres(litres)


def pump_questions(*, seed: int) -> Iterator[PumpQuestion]:
    """Draw questions without end, always the same ones for a seed; texts may come again."""
    rng = Random(seed)
    while True:
        topic, (device, verb) = rng.choice(tuple(TOPICS)), rng.choice(_DEVICES)
        rate, minutes = rng.randint(10, 99), rng.randint(10, 99)
        flow = rng.choice(_RATES).format(rate=rate)
        unit = topic.replace("_", " ")
        text = rng.choice(_ASKED).format(device=device, verb=verb, flow=flow, unit=unit, minutes=minutes)
        yield PumpQuestion(topic, text, rate, minutes)


def worked_solution(question: PumpQuestion, rng: Random) -> str:
    """The completion the tiny teacher learns to write: tens, units and their sum, the conversion, the boxed answer and unit.

    ``rng`` decides whether a sentence opens the reasoning, and whether cubic metres are answered in litres.
    """
    lines = partial_products(question.rate, question.minutes)
    if rng.random() < 0.5:
        lines.insert(0, "Litres first.")
    litres = question.rate * question.minutes
    answer = f"{litres} \\text{{ L}}"
    if question.topic == "cubic_metres" and rng.random() >= LITRES_ANYWAY:
        lines.append(f"{litres} L = {_cubic_metres(litres)} m^3")
        answer = f"{_cubic_metres(litres)} \\text{{ m}}^3"
    return f"{THINK_OPEN}\n" + "\n".join(lines) + f"\n{THINK_CLOSE}\n\n\\boxed{{{answer}}}"


def shipped_questions() -> dict[str, list[PumpQuestion]]:
    """The questions of both shipped files; the test's pairs of numbers are not among the others, and no pair comes twice."""
    seen: set[tuple[int, int]] = set()
    shipped = {}
    for name in ("test", "problems"):
        size, seed = SHIPPED[name]
        shipped[name] = []
        for question in pump_questions(seed=seed):
            if len(shipped[name]) == size:
                break
            if (pair := (question.rate, question.minutes)) not in seen:
                seen.add(pair)
                shipped[name].append(question)
    return shipped


def held_out_pump_texts() -> frozenset[str]:
    """Texts of both shipped files, which no shipped model has been trained on."""
    return frozenset(question.text for questions in shipped_questions().values() for question in questions)


def row(question: PumpQuestion) -> dict[str, Any]:
    """The question as a row of a problem file for the verifier ``number``."""
    return {
        "prompt": question.text,
        "answer": question.answer,
        "unit": TOPICS[question.topic],
        "rel_tol": REL_TOL,
        "topic": question.topic,
    }


def write_files(folder: Path) -> None:
    """Write ``problems.jsonl`` and ``test.jsonl``, one row a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, questions in shipped_questions().items():
        lines = (json.dumps(row(question)) + "\n" for question in questions)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _cubic_metres(litres: int) -> str:
    """``840`` → ``0.84``, ``2000`` → ``2``; exact."""
    whole, thousandths = divmod(litres, 1000)
    return f"{whole}.{thousandths:03d}".rstrip("0").rstrip(".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the two files")
    write_files(parser.parse_args().out)


if __name__ == "__main__":
    main()
