"""No test problem in the training traces, and no training problem lost because it looks like one."""

import json
import random
import re
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stillhouse.pipeline.decontamination import Decontaminator
from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.overlap.evaluation_sets import evaluation_prompts
from stillhouse.pipeline.problems import disjoint, reasoning_gym_problems

TASKS = [
    ("chain_sum", {"min_terms": 2, "max_terms": 8}),
    ("chain_sum", {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 1}),
    ("leg_counting", {}),
    ("basic_arithmetic", {}),
]
FULL_WIDTH = str.maketrans("0123456789", "０１２３４５６７８９")

VARIANTS = {
    "verbatim": lambda s: s,
    "blanks": lambda s: "  " + s.replace(" ", "\n "),
    "upper case": str.upper,
    "bold": lambda s: f"**{s}**",
    "full-width digits": lambda s: s.translate(FULL_WIDTH),
    "unicode operators": lambda s: s.replace(" - ", " − ").replace(" * ", " × ").replace(" / ", " ÷ "),
    "latex operators": lambda s: s.replace(" * ", r" \times ").replace("(", r"\left(").replace(")", r"\right)"),
    "latex spacing": lambda s: s.replace(" ", r"\, "),
    "no blanks at operators": lambda s: re.sub(r"(?<=\d) ([-+*/]) (?=\d)", r"\1", s),
    "dollars": lambda s: re.sub(r"(\d[\d +*/()-]*\d)", r"$\1$", s),
    "no closing mark": lambda s: re.sub(r"[.?:=\s]+$", "", s).lower(),
    "embedded": lambda s: f"Here is a task.\n{s}\nShow your 2 best attempts.",
    "exam sheet": lambda s: f"Problem 17. {s} (4 points)",
    "tags": lambda s: f"<p>{s}</p>",
    "quoted": lambda s: f'The user asks: "{s}" Let me think.',
}


def prompts(task, options, *, size, seed, split):
    return reasoning_gym_problems(task, split=split, size=size, seed=seed, options=options)


@pytest.mark.parametrize(("task", "options"), TASKS)
def test_every_verbatim_and_reformatted_copy_is_found(task, options):
    """A copy that slips through because of a blank or a dollar sign makes the report's pass@1 worthless."""
    test_prompts = [p.prompt for p in prompts(task, options, size=150, seed=1, split="test")]
    decontaminator = Decontaminator(test_prompts)
    for name, variant in VARIANTS.items():
        missed = [variant(p) for p in test_prompts if decontaminator.check(variant(p), "<think>2</think>") is None]
        assert missed == [], name


@pytest.mark.parametrize(("task", "options"), TASKS[:3])
def test_a_test_problem_quoted_in_a_trace_is_found(task, options):
    """A teacher that quotes a test problem in its reasoning leaks it as surely as a prompt does."""
    test_prompts = [p.prompt for p in prompts(task, options, size=100, seed=1, split="test")]
    test_prompts = [p for p in test_prompts if len(re.findall(r"\w+", p)) >= 8]
    decontaminator = Decontaminator(test_prompts)
    assert len(test_prompts) == 100
    for prompt in test_prompts:
        drop = decontaminator.check("What is a leap year?", f"<think>It is like this one: {prompt}\nSo, first</think>4")
        assert drop is not None
        assert drop.reason == "the trace holds a test problem"
        span = " ".join(drop.evidence.partition(": ")[2].split())
        assert span in " ".join(prompt.lower().split())  # the item itself, not its surroundings
        assert len(span) > 30


@pytest.mark.parametrize(("task", "options"), TASKS)
@pytest.mark.parametrize("num_test", [1, 2, 150])
def test_problems_of_the_same_template_stay(task, options, num_test):
    """Templated problems share all but their numbers; a rule that drops them would leave nothing to train on."""
    test_problems = prompts(task, options, size=num_test, seed=1, split="test")
    fresh, _ = disjoint(prompts(task, options, size=400, seed=10**6, split="train"), test_problems)
    decontaminator = Decontaminator(p.prompt for p in test_problems)
    wrongly = [p.prompt for p in fresh if decontaminator.check(p.prompt, f"<think>{p.prompt}</think>\\boxed{{{p.answer}}}")]
    assert wrongly == []


@pytest.mark.parametrize(("task", "options"), TASKS)
def test_one_swapped_number_is_another_problem(task, options):
    """The nearest miss there is: every word and all numbers but one are those of a test problem."""
    rng = random.Random(0)
    test_prompts = [p.prompt for p in prompts(task, options, size=150, seed=1, split="test")]
    decontaminator = Decontaminator(test_prompts)
    num_swapped = 0
    for prompt in test_prompts:
        number = rng.choice(list(re.finditer(r"\d+", prompt)))
        swapped = f"{prompt[: number.start()]}{int(number[0]) + rng.randint(1, 9)}{prompt[number.end() :]}"
        if swapped not in test_prompts:
            num_swapped += 1
            assert decontaminator.check(swapped, swapped) is None, swapped
    assert num_swapped > 100


def test_the_pump_questions_for_training_stay():
    """Two numbers in one sentence each: a rule that lets one of them speak for the question would drop what shares a rate."""
    shipped = Path(str(files("stillhouse.jobs.recipes"))) / "pumps"
    test_prompts, train_prompts = (evaluation_prompts(str(shipped / name)) for name in ("test.jsonl", "problems.jsonl"))
    decontaminator = Decontaminator(test_prompts)
    assert [p for p in train_prompts if decontaminator.check(p, f"<think>{p} So we multiply.</think>")] == []
    assert len(train_prompts) == 600
    for prompt in test_prompts:
        assert decontaminator.check(f"Here are 2 tasks. {prompt} And name 3 rivers.", "") is not None


STORY = (
    "When the old miller died, his three sons found a chest with 96 silver coins under the floor, a letter to a cousin in "
    "Bremen and a key that fitted none of the doors. The eldest took half of it. How many were left for the other 2?"
)


def test_a_part_without_all_its_numbers_is_known_by_its_own_words_or_not_at_all():
    """Half a question of a template belongs to any question that has the other half; half a story belongs to this one."""
    tap = "A tap gives 44 litres a minute. How many litres does it give during 42 minutes?"
    decontaminator = Decontaminator([tap, tap.replace("44", "31").replace("42", "17"), tap.replace("44", "25"), WORDY])
    assert decontaminator.check("A tap gives 44 litres a minute. How many cubic metres does it give in 58 minutes?", "") is None
    assert decontaminator.check("A tap gives 44 litres a minute.", "<think>It gives 44 litres a minute.</think>") is None
    cut = STORY[: STORY.index(" How many")]
    assert Decontaminator([STORY]).check(cut, "").reason == "the prompt is a near copy of a test problem"
    assert Decontaminator([STORY]).check(cut + " How long do 7 of them last?", "") is None


def test_what_a_trace_repeats_of_its_own_prompt_is_no_new_evidence():
    """The prompt was judged as a whole; a part of it that the teacher quotes must not be judged more harshly."""
    decontaminator, part = Decontaminator([STORY]), STORY[: STORY.index(" How many")]
    trace = f"<think>\n{part}\n\nThat is all we know.</think>"
    assert decontaminator.check("What is a leap year?", trace).reason == "the trace holds a near copy of a test problem"
    assert decontaminator.check(f"{part} How long do 7 of them last?", trace) is None


WORDY = "A farmer walks to the market with 12 hens and sells 5 of them before noon. How many hens does the farmer carry home?"


def test_a_lightly_edited_copy_is_found():
    """Same story, same numbers, a word changed: still the test problem."""
    drop = Decontaminator([WORDY]).check(WORDY.replace("home", "back"), "")
    assert drop is not None
    assert drop.reason == "the prompt is a near copy of a test problem"
    assert "12 hens and sells 5" in drop.evidence
    assert Decontaminator([WORDY]).check(WORDY.replace("12", "13"), "") is None


def test_a_long_template_that_differs_in_one_word_stays():
    """What many test items share is boilerplate, and so is what has no number in an item with numbers."""
    words = "Read the words below, say which of them comes last in the alphabet, then write it in a box: {}, pear, fig"
    decontaminator = Decontaminator([words.format(w) for w in ("apple", "plum", "cherry", "quince")])
    assert decontaminator.check(words.format("melon"), "") is None
    assert decontaminator.check(words.format("plum"), "") is not None
    count = "Here is a list of animals on a farm; think about each kind in turn, then say how many legs there are: {} {}."
    decontaminator = Decontaminator([count.format(3, "dogs")])
    assert decontaminator.check(count.format(3, "hens"), "") is None
    assert decontaminator.check(count.format(3, "dogs"), "") is not None


def test_an_operator_or_a_longer_list_is_another_problem():
    """A test item that is only the beginning of a longer one, or has another sign in it, says nothing about its answer."""
    decontaminator = Decontaminator(
        ["How many legs are there in total if you have 3 dogs?", "Please work out this little sum: 4 - 1 - 7 ="]
    )
    assert decontaminator.check("How many legs are there in total if you have 3 dogs, 2 cats?", "") is None
    assert decontaminator.check("Please work out this little sum: 4 - 1 + 7 =", "") is None
    assert decontaminator.check("Please work out this little sum: 4 - 1 - 7 + 2 =", "") is None
    assert decontaminator.check("Please work out this little sum: 4 - 1 - 7", "") is not None


def test_short_items_match_whole_prompts_and_clauses_but_not_traces():
    """ "Calculate 5 - 3." is a step of many a trace; dropping each of those would drop the good ones."""
    decontaminator = Decontaminator(["Calculate 5 - 3.", "Why?"])
    assert decontaminator.check("calculate  $5-3$", "").reason == "the prompt is a test problem"
    assert decontaminator.check("Be brief. Calculate 5 - 3. Thank you.", "").reason == "the prompt holds a test problem"
    assert decontaminator.check("Calculate 5 - 3 - 6.", "Calculate 5 - 3. That is 2.") is None
    assert decontaminator.check("It rains. Why? Explain.", "") is None


def test_nothing_to_compare_with_drops_nothing():
    """A run without test problems, or with blank ones, is not contaminated."""
    for empty in ([], ["", " \n"]):
        assert Decontaminator(empty).check(WORDY, WORDY) is None
    assert Decontaminator([WORDY]).check("", "") is None


def test_an_embedded_near_copy_is_found_in_prompt_and_trace():
    """A lightly edited copy with a task around it has other numbers beside its own; it still is the copy."""
    edited = WORDY.replace("home", "back")
    decontaminator = Decontaminator({"farms": [WORDY]})
    prompt = f"Here are 2 tasks. First: {edited} Then name 3 colours."
    assert decontaminator.check(prompt, "").reason == "the prompt is a near copy of an item of farms"
    drop = decontaminator.check("What is a leap year?", f"<think>Step 1. Take this one: {edited} So 12 - 5 = 7.</think>7")
    assert drop.reason == "the trace holds a near copy of an item of farms"
    assert "12 hens and sells 5" in drop.evidence
    swapped = edited.replace("5", "6")
    assert decontaminator.check(f"Here are 2 tasks. First: {swapped} Then name 3 colours.", f"Take this: {swapped} So") is None


def test_a_reworded_copy_is_found_by_minhash():
    """Every few words another one, so that no run of eight is left, and the same numbers in the same places."""
    item = (
        "Lena has 14 red marbles and 23 blue marbles in a box. She gives 9 of the red marbles to her brother Tom, who "
        "already owned 31 marbles of his own. How many more marbles does Tom have than Lena after that?"
    )
    copy = item.replace("in a box", "in the box").replace("her brother Tom", "her cousin Tom").replace("after that", "then")
    drop = Decontaminator([item], min_share=2.0).check(copy, "")
    assert drop is not None
    assert drop.reason == "the prompt is a near copy of a test problem"
    assert "alike: lena has 14 red" in drop.evidence
    assert Decontaminator([item], min_share=2.0).check(copy.replace("23", "24"), "") is None


def test_how_much_may_be_reworded():
    """Above half of all runs of three words it is a copy, under it another problem that happens to have the same numbers."""
    item = (
        "Lena has 14 red marbles and 3 dice, her older sister keeps 23 blue marbles and 5 cards under the bed where nobody "
        "ever looks because of the dust and the spiders that came with the house when the family moved there from Bremen"
    )
    decontaminator = Decontaminator([item], min_share=2.0)
    words, draw = item.split(), random.Random(2)
    free = [i for i in range(len(words)) if not any(word.isdigit() for word in words[max(0, i - 2) : i + 3])]
    seen = {True: 0, False: 0}
    for num_changed in [2] * 15 + [9] * 15:
        changed = list(words)
        for i in draw.sample(free, num_changed):
            changed[i] = f"other{'abcdefghij'[i % 10]}"
        grams = [set(zip(text, text[1:], text[2:])) for text in (words, changed)]
        alike = len(grams[0] & grams[1]) / len(grams[0] | grams[1])
        if not 0.45 < alike < 0.6:
            seen[alike > 0.5] += 1
            assert (decontaminator.check(" ".join(changed), "") is not None) == (alike > 0.5)
    assert min(seen.values()) >= 8


def test_a_template_with_one_number_that_never_changes_is_no_item():
    """Puzzles of names share all but the names, and the 2 in all of them tells nothing."""
    text = "A very special island is inhabited only by {0} and {1}. You meet 2 of them: {2}, and {3}. {2} says that {3} is one."
    names = [
        ("saints", "sinners", "Owen", "Ella"),
        ("heroes", "villains", "Lucas", "Zoe"),
        ("knights", "knaves", "Ava", "Jack"),
    ]
    decontaminator = Decontaminator([text.format(*four) for four in names])
    assert decontaminator.check(text.format("saints", "sinners", "Mia", "Noah"), "") is None
    assert decontaminator.check(text.format(*names[0]), "") is not None


def test_an_item_that_ends_in_a_bracket_ends_there():
    """Nothing but a blank stands behind it, and the text goes on."""
    item = "Find the prime factorization of 537 and write it like this (for 12: 2 * 2 * 3)"
    assert Decontaminator([item]).check(f"I recall a puzzle. {item} I solved it in 2019.", "") is not None
    assert (
        Decontaminator(["Please work out this little sum: (4 - 1)"]).check("Please work out this little sum: (4 - 1) * 7", "")
        is None
    )


def test_instructions_around_an_item_are_no_part_of_it():
    """Benchmarks append how to answer; the copy in the training data comes without it, or with another one."""
    suffix = "Please reason step by step, and put your final answer within \\boxed{}."
    decontaminator = Decontaminator([f"{WORDY}\n{suffix}"])
    assert decontaminator.check(f"{WORDY} Let's think step by step.", "") is not None
    assert decontaminator.check(f"What is 2 + 2? {suffix}", f"<think>I shall {suffix.lower()}</think>4") is None
    choice = "{} The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes). {}"
    asked = Decontaminator([choice.format("Name a city.", "Go on.")], min_share=0.4)
    assert asked.check(choice.format("Which river is longer?", "Think first."), "") is None
    short = Decontaminator([f"Calculate 5 - 3.\n{suffix}"])
    assert short.check("Calculate 5 - 3.", "").reason == "the prompt is a test problem"


def test_batches_say_what_single_traces_do():
    """The quick look-up for whole batches must not lose a single one."""
    test_prompts = [p.prompt for p in prompts("leg_counting", {}, size=60, seed=1, split="test")]
    others = [p.prompt for p in prompts("leg_counting", {}, size=60, seed=10**6, split="train")]
    decontaminator = Decontaminator(test_prompts)
    pairs = [(other, f"<think>{quoted}</think>") for other, quoted in zip(others, test_prompts[:30] + others[30:])]
    drops = decontaminator.check_batch(pairs)
    assert drops == [decontaminator.check(*pair) for pair in pairs]
    assert [drop is not None for drop in drops] == [True] * 30 + [False] * 30
    assert decontaminator.check_batch([]) == []


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_evaluation_sets_are_read_from_files(tmp_path, ending):
    """The set on one's own disk is the one that must not leak; a column that is not there must be named, not skipped."""
    path = tmp_path / f"set.{ending}"
    rows = [{"id": 1, "question": WORDY}, {"id": 2, "question": " "}, {"id": 3, "question": "Why?"}]
    if ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert evaluation_prompts(str(path)) == [WORDY, "Why?"]
    choices = tmp_path / "choices.jsonl"
    choices.write_text(json.dumps({"question": "Which?", "choices": ["this one", "that one"]}) + "\n")
    assert evaluation_prompts(str(choices), field=["question", "choices"]) == ["Which?\nA. this one\nB. that one"]
    with pytest.raises(RecipeError, match="row 1: field 'options' is missing"):
        evaluation_prompts(str(choices), field=["question", "options"])
    with pytest.raises(RecipeError, match=r"row 1: field 'task' is missing; the row has id, question"):
        evaluation_prompts(str(path), field="task")
    with pytest.raises(RecipeError, match=r"row 1: field 'id' holds a int, not text"):
        evaluation_prompts(str(path), field="id")
    path.write_bytes(b"{" if ending == "jsonl" else b"no parquet")
    with pytest.raises(RecipeError, match=r"set\.(jsonl, line 1: not JSON|parquet)"):
        evaluation_prompts(str(path))


def test_an_evaluation_set_that_is_not_there_stops_the_run(tmp_path):
    """Decontaminated against nothing, a run would report clean data."""
    with pytest.raises(RecipeError, match="cannot read the evaluation set"):
        evaluation_prompts(str(tmp_path / "absent.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RecipeError, match="no prompts in it"):
        evaluation_prompts(str(tmp_path / "empty.jsonl"))


MARBLES = (
    "Lena has 14 red marbles in a box. She gives 9 of them to her brother Tom. Tom then owns 31 marbles. How many did he have?"
)


@pytest.mark.parametrize(
    "text",
    [
        'We are told "Lena has 14 red marbles in a box.", and then "She gives 9 of them to her brother Tom." It goes on: '
        '"Tom then owns 31 marbles. How many did he have?"',
        "Lena has 14 red marbles in a box. (So 14 - 9 = 5 later on.) She gives 9 of them to her brother Tom. Hmm, 5 are left. "
        "Tom then owns 31 marbles. How many did he have?",
        "Lena has 14 red mar-\nbles in a box. She gives 9 of them to her brother Tom. Tom then owns 31 mar-\nbles. How many "
        "did he have?",
        MARBLES.removeprefix("Lena has ").removesuffix(" he have?") + "\n",
        "> " + MARBLES.replace(". ", ".\n> "),
    ],
)
def test_an_item_in_pieces_is_found_and_its_numbers_still_count(text):
    """A trace quotes the problem in parts as it thinks; each part alone is short, and together they are the test item."""
    decontaminator = Decontaminator({"box": [MARBLES]})
    drop = decontaminator.check("What?", f"<think>It rains.\n{text}\nSo let us see.</think>4")
    assert drop is not None
    assert drop.reason.startswith("the trace holds")
    assert "red mar" in drop.evidence
    for number, other in (("14 red", "15 red"), ("gives 9", "gives 8"), ("owns 31", "owns 30")):
        assert decontaminator.check(text.replace(number, other), f"<think>{text.replace(number, other)}</think>") is None


def test_boards_and_languages_without_blanks_are_told_apart():
    """Empty cells, emoji and Chinese letters are what such problems consist of; without them all boards would be one."""
    boards = [
        "Place the queens on this board so that none attacks another:\n" + rows
        for rows in ("_ Q _ _\n_ _ _ _", "_ _ _ _\n_ _ Q _")
    ]
    assert Decontaminator(boards[:1]).check(boards[0], "") is not None
    assert Decontaminator(boards[:1]).check(boards[1], "") is None
    grids = [
        "Find the pattern of this grid and fill in what is missing:\n" + rows
        for rows in ("❌✅❌❔\n❌❌✅❌", "✅❌❌❔\n✅❌❌❌")
    ]
    assert Decontaminator(grids[:1]).check(grids[0].replace("\n", " "), "") is not None
    assert Decontaminator(grids[:1]).check(grids[1], "") is None
    chinese = "小明有12个苹果，小红比小明多5个。请问两人一共有多少个苹果？"
    decontaminator = Decontaminator([chinese])
    assert decontaminator.check("?", f"<think>题目说：{chinese}我们来算。</think>") is not None
    assert decontaminator.check(chinese.replace("12", "13"), "") is None
    sudoku = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
    assert Decontaminator([sudoku]).check("?", f"<think>The grid is {sudoku} so the first row</think>") is not None
    assert Decontaminator([sudoku]).check(f"Solve {sudoku.replace('53', '54', 1)} now", "") is None


def test_typography_of_other_tools_is_no_other_text():
    """Copies come out of HTML, Markdown, chat logs and other LaTeX dialects."""
    item = r"Let $x \le 12$ and $\frac{\sqrt{x}}{5} < 3$. How many whole numbers x > 1 are there in all such cases?"
    decontaminator = Decontaminator([item])
    for text in (
        item.replace("<", "&lt;").replace(">", "&gt;"),
        item.replace(" ", " \u200b"),
        re.sub(r"\$([^$]+)\$", r"\\(\1\\)", item).replace(r"\le", r"\leq").replace(r"\frac", r"\dfrac"),
        "> " + item,
        item.replace(" ", "\r\n"),
    ):
        assert decontaminator.check(text, "").reason == "the prompt holds a test problem", text
