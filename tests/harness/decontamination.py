r"""Plant test items in training data in many forms, count what is found and what is wrongly removed, and measure the speed.

    python -m tests.harness.decontamination [--items 60] [--traces 1000] [--unseen 5]

The items are of a dozen reasoning-gym tasks, from "Calculate 5 - 3." to whole stories, and the questions about pumps that ship.
Beside ours stands the plain route that others take (datatrove's: normalize, hash every n-gram, one that any item has is a hit),
on the same cases and texts; datatrove itself is in `tests.harness.decontamination_speed`. The families of
`tests.harness.unseen` are measured and reported apart. Exit code 1 where a target is missed, there or here: 100 % of what is
verbatim or reformatted, 99 % of what is embedded or short, at most 1 % of what has to stay.
"""

from __future__ import annotations

import itertools
import random
import re
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path

import reasoning_gym

from stillhouse.pipeline.decontamination import NGRAM, Decontaminator
from stillhouse.pipeline.overlap.evaluation_sets import evaluation_prompts
from stillhouse.pipeline.overlap.words import to_words
from tests.harness.long_traces import long_traces
from tests.harness.planted import Case, other_numbers
from tests.harness.side_by_side import parser_of
from tests.harness.unseen import report

TASKS = (
    ("chain_sum", {"min_terms": 3, "max_terms": 6}),
    ("chain_sum", {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1}),
    ("basic_arithmetic", {}),
    ("leg_counting", {}),
    ("simple_equations", {}),
    ("fraction_simplification", {}),
    ("gcd", {}),
    ("lcm", {}),
    ("calendar_arithmetic", {}),
    ("time_intervals", {}),
    ("number_sorting", {}),
    ("gsm_symbolic", {}),
)
FULL_WIDTH = str.maketrans("0123456789", "０１２３４５６７８９")
FORMATS: dict[str, Callable[[str], str]] = {
    "blanks and line breaks": lambda s: "  " + s.replace(" ", "\n "),
    "upper case": str.upper,
    "bold": lambda s: f"**{s}**",
    "full-width digits": lambda s: s.translate(FULL_WIDTH),
    "unicode operators": lambda s: s.replace(" - ", " − ").replace(" * ", " × ").replace(" / ", " ÷ "),
    "LaTeX operators": lambda s: s.replace(" * ", r" \times ").replace("(", r"\left(").replace(")", r"\right)"),
    "LaTeX spacing": lambda s: s.replace(" ", r"\, "),
    "no blanks at operators": lambda s: re.sub(r"(?<=\d) ([-+*/]) (?=\d)", r"\1", s),
    "dollars": lambda s: re.sub(r"(\d[\d +*/()-]*\d)", r"$\1$", s),
    "no closing mark": lambda s: re.sub(r"[.?:=\s]+$", "", s),
    "curly quotes and dashes": lambda s: s.replace("'", "’").replace('"', "”").replace("-", "‐"),
    "text command": lambda s: re.sub(r"\b([A-Za-z]{4,})\b", r"\\text{\1}", s, count=1),
}
AROUND = (
    "Here is a task.\n{}\nShow your 2 best attempts.",
    'The user asks: "{}" Let me think.',
    "Problem 17. {} (4 points)",
    "Wait. {}\n\nSo first we look at the 3 numbers.",
)


def cases(items: list[str], siblings: Mapping[str, str], draw: random.Random) -> Iterator[Case]:
    """Every item in all forms, and what is like it and another problem; ``siblings`` are others of the same family."""
    known = {to_words(item).words for item in items}
    for item in items:
        short = len(to_words(item).words) < NGRAM
        yield "verbatim prompt", item, "<think>2</think>", True
        name = draw.choice([name for name, write in FORMATS.items() if write(item) != item])
        yield "format: " + name, FORMATS[name](item), "", True
        around = draw.choice(AROUND).format(item)
        yield f"{'short, ' if short else ''}embedded in the prompt", around, "", True
        if not short:
            yield "verbatim in the trace", "What is a leap year?", f"<think>{item}</think>4", True
            yield "embedded in the trace", "What is a leap year?", f"<think>It is 4. {around} Then 4.</think>4", True
            write = FORMATS[draw.choice(list(FORMATS))]
            long = long_traces(1, num_chars=3_000, seed=draw.randrange(10**6))[0].completion
            middle = long.index("\n", len(long) // 2)
            yield "reformatted, in a long trace", "What?", f"{long[:middle]}\n{write(item)}\n{long[middle:]}", True
            yield "one word changed (no target)", one_word_changed(item, draw), "", True
        for kind, text in other_numbers(item, siblings.get(item, item), draw).items():
            if to_words(text).words not in known:
                yield kind, text, f"<think>{text}</think>{draw.choice(AROUND).format(text)}", False
                yield kind, "What?", f"<think>2</think>{draw.choice(AROUND).format(text)}", False


def questions(task: str, options: dict[str, int], *, size: int, seed: int) -> list[str]:
    return [entry["question"].strip() for entry in reasoning_gym.create_dataset(task, size=size, seed=seed, **options)]


def items_of(num_a_task: int) -> tuple[list[str], dict[str, str], list[str]]:
    """Items of all families, for each of them another of its family, and fresh ones, which a test set does not have."""
    draw = random.Random(0)
    families = [[questions(task, options, size=num_a_task, seed=seed) for seed in (1, 10**6)] for task, options in TASKS]
    pumps = Path(str(files("stillhouse.jobs.recipes"))) / "pumps"
    families.append([evaluation_prompts(str(pumps / name)) for name in ("test.jsonl", "problems.jsonl")])
    families.append([[short_item(draw) for _ in range(num)] for num in (4 * num_a_task, num_a_task)])
    siblings = {item: other for items, fresh in families for item, other in zip(items, itertools.cycle(fresh))}
    return list(siblings), siblings, [text for _, fresh in families for text in fresh]


def short_item(draw: random.Random) -> str:
    """An item of three to seven words, as arithmetic benchmarks have them."""
    a, b, c = (draw.randint(2, 999) for _ in range(3))
    forms = (
        f"What is {a} * {b}?",
        f"Compute {a} + {b} - {c}.",
        f"Is {a} prime?",
        f"Find the square root of {a * a}.",
        f"Solve {a}x = {b}.",
    )
    return draw.choice(forms)


def one_word_changed(item: str, draw: random.Random) -> str:
    words = [m for m in re.finditer(r"[A-Za-z]{3,}", item)]
    word = draw.choice(words)
    return f"{item[: word.start()]}otherwise{item[word.end() :]}"


class PlainRoute:
    """Every n-gram of lower-cased words without punctuation, in one set: what shares one is a hit."""

    def __init__(self, items: list[str], n: int = NGRAM) -> None:
        self.n = n
        self.grams = {gram for item in items for gram in self._grams(item)}

    def _grams(self, text: str) -> Iterator[int]:
        words = re.sub(r"[^\w\s]", " ", unicodedata.normalize("NFD", text.lower())).split()
        for i in range(len(words) - self.n + 1):
            yield hash(" ".join(words[i : i + self.n]))

    def check(self, prompt: str, trace: str) -> bool:
        return any(gram in self.grams for text in (prompt, trace) for gram in self._grams(text))


def missed_targets(found: dict[str, Counter[str]]) -> list[str]:
    """The kinds of cases of which too many were missed or wrongly removed; what has no target says so in its name."""
    missed = []
    for kind, counts in found.items():
        share = counts["ours"] / counts["num"]
        wanted = 0.99 if "embedded" in kind or "short" in kind else 1.0
        good = share >= wanted if counts["wanted"] else share <= 0.01
        if not good and "no target" not in kind:
            missed.append(kind)
    return missed


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--items", type=int, default=60, help="items a task")
    parser.add_argument("--traces", type=int, default=1000, help="traces of 12,000 characters for the speed")
    parser.add_argument("--unseen", type=int, default=5, help="items a family of the seen and held-out families; 0 for none")
    arguments = parser.parse_args()
    draw = random.Random(0)
    items, siblings, fresh = items_of(arguments.items)
    known = {to_words(item).words for item in items}
    planted = list(cases(items, siblings, draw))
    planted += [("fresh, of the same templates", text, text, False) for text in fresh if to_words(text).words not in known]
    planted += [("unrelated long trace", "?", trace.completion, False) for trace in long_traces(200, seed=5)]

    begin = time.process_time()
    ours = Decontaminator({"planted": items})
    built = time.process_time() - begin
    plain = PlainRoute(items)
    found: dict[str, Counter[str]] = {}
    for (kind, prompt, trace, wanted), drop in zip(planted, ours.check_batch([(p, t) for _, p, t, _ in planted])):
        counts = found.setdefault(kind, Counter())
        counts.update(num=1, ours=drop is not None, plain=plain.check(prompt, trace), wanted=wanted)
        if (drop is not None) != wanted and counts["shown"] < 2:
            counts["shown"] += 1
            print(f"  {'missed' if wanted else 'wrongly removed'} ({kind}): {(prompt if drop is None else str(drop))[:300]!r}")
    print(f"\n{len(items)} items (index built in {built:.1f} s), {sum(c['num'] for c in found.values())} cases")
    print(f"{'kind':42} {'cases':>6} {'ours':>8} {'plain':>8}   removed")
    for kind, counts in sorted(found.items(), key=lambda row: (-row[1]["wanted"] / row[1]["num"], row[0])):
        share = [f"{100 * counts[who] / counts['num']:.1f} %" for who in ("ours", "plain")]
        print(f"{kind:42} {counts['num']:6} {share[0]:>8} {share[1]:>8}   {'to remove' if counts['wanted'] else 'to keep'}")

    texts = [("?", trace.completion) for trace in long_traces(arguments.traces, seed=9)]
    size = sum(len(text) for _, text in texts) / 1e6
    for name, check in (
        ("ours", lambda: ours.check_batch(texts)),
        ("plain", lambda: [plain.check(*pair) for pair in texts]),
    ):
        begin = time.process_time()
        hits = sum(bool(hit) for hit in check())
        seconds = time.process_time() - begin
        print(f"speed, {name}: {size / seconds:.1f} MB/s of one core over {size:.0f} MB of clean traces ({hits} hits)")
    of_unseen = [report(held_out, arguments.unseen) for held_out in (False, True)] if arguments.unseen else []
    for kind in (missed := [*missed_targets(found), *(name for names in of_unseen for name in names)]):
        print(f"target missed: {kind}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
