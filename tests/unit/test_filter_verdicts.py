r"""What teachers write and what goes wrong with it: completions that each default filter has to keep, and some to drop."""

import json
import random

import pytest

from stillhouse.pipeline.filters.settings import default_filters, make_filter
from stillhouse.pipeline.records import Trace

FILTERS = {setting.name: make_filter(setting) for setting in default_filters()}


def verdict(name, completion, prompt="?"):
    trace = Trace("k", "p", "t", "", prompt, completion, None, None, "stop", 1, 30, 0.6, 0.95, 512, 0, 1, 0.1)
    return FILTERS[name](trace)


def answered(text):
    return f"<think>\nOkay, so let me see.\n</think>\n\n{text}"


@pytest.mark.parametrize(
    "answer",
    [
        "The letter could read: \"I'm sorry, but I can't attend the meeting.\" \\boxed{B}",
        "“I’m sorry, I cannot help you,” said the clerk, so he is the liar. \\boxed{clerk}",
        "> I'm sorry, Dave. I'm afraid I can't do that.\n\nThe film is from \\boxed{1968}",
        '```python\nraise ValueError("I cannot help with that")\n```',
        "I'm sorry for the confusion above; we can't divide by zero, so \\boxed{3}",
        "I cannot help but notice the symmetry; hence \\boxed{12}",
        "I won't provide every intermediate step, but the sum is \\boxed{5050}.",
        "I can't solve this cubic by hand, so I use Newton's method: \\boxed{1.3247}",
        "I will not continue the expansion past the third term. \\boxed{20}",
        "抱歉，之前算错了，正确答案是 \\boxed{5}",
    ],
)
def test_an_answer_that_refuses_nothing(answer):
    """A right answer that quotes an apology, or leaves a step out, is worth its tokens."""
    assert verdict("refusal", answered(answer)) is None


@pytest.mark.parametrize(
    "answer",
    [
        "I apologize, but I cannot provide an answer to this question. \\boxed{?}",
        "I won't be able to help with this.",
        "I'm unable to answer.\n\\boxed{}",
        "I cannot continue with this.",
        "I'm not able to provide a solution to this problem.",
        "对不起,我不能提供帮助。",
        "作为一个AI语言模型，我没有观点。\\boxed{A}",
    ],
)
def test_a_refusal_in_other_words(answer):
    """Learnt once, a refusal comes out at every hard question."""
    assert verdict("refusal", answered(answer)) is not None


@pytest.mark.parametrize(
    "text",
    ["<|v|> is the mean speed", "P(0<|X|<1)", "re.compile(r'(?P<s>\\d+)')", "std::bitset<mask> b; f<s>(3);", "p <|> q <|> r"],
)
def test_code_and_formulas_hold_no_control_token(text):
    """A named group of a regular expression is what was asked for, not a chat template's leftover."""
    assert verdict("control_tokens", answered(text)) is None


@pytest.mark.parametrize("text", ["<|/user|>", "<|fim_prefix|>", "the end</s>", "<s>[INST] hi", "word<eos>", "<mask>"])
def test_leftovers_of_templates_are_control_tokens(text):
    """Each of these is one in some tokenizer."""
    assert verdict("control_tokens", answered(text)) is not None


WORDS = "the area of each factor is even so both sides drop when we look at them modulo seven and count again"


def prose(num_sentences, seed=0):
    draw = random.Random(seed)
    return "\n\n".join(
        " ".join(draw.choices(WORDS.split(), k=draw.randint(8, 16))) + f" {draw.randint(2, 999)}." for _ in range(num_sentences)
    )


def boards():
    draw = random.Random(3)
    grid = [[draw.choice("........123456789") for _ in range(9)] for _ in range(9)]
    for step in range(9):
        yield (
            "So now the grid is:\n" + "\n".join(" ".join(row) for row in grid) + f"\nNext comes row {step + 1}, where a 7 fits."
        )
        grid[step][step] = "7"


NO_LOOPS = {
    "a sudoku drawn nine times": prose(20) + "\n\n" + "\n\n".join(boards()) + prose(20, 1),
    "an empty board": prose(40) + "\n" + ". . . . . . . . .\n" * 9,
    "rows of zeros": prose(10) + "\n\\begin{pmatrix}\n" + "0 & 0 & 0 & 0 & 0 & 0 \\\\\n" * 8 + "\\end{pmatrix}",
    "a table of zeros": prose(10) + "\n" + "| 0 | 0 | 0 | 0 | 0 | 0 |\n" * 9,
    "a program's output": prose(10) + "\nOutput:\n" + "0\n" * 12 + "NO\n" * 10,
    "a list of checks": prose(8)
    + "".join(f"\n\nn = {n}: n^2 = {n * n}.\n\nStill not greater than 1000." for n in range(1, 16))
    + prose(12, 4),
    "cases with one heading": prose(20)
    + "".join(f"\n\nCase {i}.\n\nBring all terms to one side:\n\n$$x^2 - {i}x + {i * 3} = 0$$" for i in range(12)),
    "signs on intervals": prose(40)
    + "\n\n"
    + "\n".join(" ".join(f"(x - {b}) is {'positive' if b <= a else 'negative'}," for b in range(9)) for a in range(9)),
    "divided by seven": prose(10)
    + "\n"
    + "\n".join(
        f"Bring down the 0. 7 goes into {10 * x} {10 * x // 7} times, remainder {10 * x % 7}." for x in [1, 3, 2, 6, 4, 5] * 3
    ),
    "the question read again": "".join(
        prose(3, i) + "\n\nThe number of ways to choose a committee of five such that no two of its members are neighbours.\n\n"
        for i in range(12)
    )
    + prose(60, 20),
}
LOOPS = {
    "two thoughts in turn": prose(5)
    + "".join(
        f"\n\nAlternatively, perhaps I can think of a graph.\n\nBut that is not necessary here, number {i}." for i in range(40)
    ),
    "one conclusion after another": prose(4)
    + "\n"
    + "So the sum is 7, which we want.\nSo the sum is 8, which we do not want.\n" * 60,
    "the same three paragraphs": prose(8)
    + "\n\nHmm, but what about the other case then?\n\nSo the answer should be 42, right?\n\nNo wait, that contradicts it."
    * 15,
    "an equation that equals itself": prose(3) + "\n" + "= \\frac{20}{36} " * 50,
    "digits without end": "1 " * 3000,
    "a board without end": "0 0 0 0\n" * 200,
    "in Chinese": prose(3) + "我们再检查一遍这个计算过程，看看有没有错误的地方。" * 5,
}


@pytest.mark.parametrize("name", NO_LOOPS)
def test_what_repeats_and_is_no_loop(name):
    """Boards, tables and lists of cases are how teachers work; a filter that takes them for loops drops the hard problems."""
    assert verdict("repetition", NO_LOOPS[name]) is None


@pytest.mark.parametrize("name", LOOPS)
def test_loops_that_ended_by_themselves(name):
    """Nothing else says of a finished completion that most of it went in circles."""
    assert verdict("repetition", LOOPS[name]) is not None


SYSTEM = "You are a careful tutor of the Northwind academy and you must answer in at most three short paragraphs."


def messages(question, system=None):
    """A prompt as it goes out to an endpoint, and as replayed traces have it."""
    parts = [{"role": "system", "content": system}] if system else []
    return json.dumps([*parts, {"role": "user", "content": question}], ensure_ascii=False)


def test_a_system_prompt_is_found_in_messages_too():
    """Endpoints and data sets give messages, no rendered text; their system prompts leak like any other."""
    leak = answered("You must answer in at most three short paragraphs. \\boxed{4}")
    assert verdict("system_prompt_leak", leak, messages("2+2?", SYSTEM)).reason == "repeats its system prompt"
    assert verdict("system_prompt_leak", leak, messages("2+2?")) is None
    assert verdict("system_prompt_leak", leak, messages(SYSTEM)) is None


def test_a_question_about_system_messages_is_no_leak():
    """What the question itself talks of, an answer has to talk of."""
    answer = answered("The system message is printed \\boxed{2} times.")
    question = 'A server prints the system message "OK" twice. How many system messages are there?'
    assert verdict("system_prompt_leak", answer, messages(question)) is None
    assert verdict("system_prompt_leak", answer, messages("2+2?")) is not None


BOXED = " Please reason step by step, and put your final answer within \\boxed{}."


@pytest.mark.parametrize(
    "prompt",
    [
        messages("1+1等于几？" + BOXED),
        messages("求x。" + BOXED, SYSTEM),
        messages("计算 $\\frac{1}{2}+\\frac{1}{3}$。" + BOXED),
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.<|im_end|>\n<|im_start|>user\n解方程 x+1=2。" + BOXED,
    ],
)
def test_a_short_question_beside_long_instructions_says_its_language(prompt):
    """Chinese problems are asked with English instructions around them; their Chinese answers must not be lost."""
    chinese = "<think>我们需要先计算第一项，然后把所有的项加起来，得到答案。</think>答案是 \\boxed{2}"
    assert verdict("language", chinese, prompt) is None
    assert verdict("language", chinese, messages("What is the sum of 3 and 4?" + BOXED)) is not None


@pytest.mark.parametrize(
    ("reasoning", "answer", "contradicts"),
    [
        ("The answer is 50%.", "0.5", False),
        ("The answer is 12\\sqrt{2}.", "12 \\sqrt 2", False),
        ("The answer is 3 \\text{ cm}.", "3", False),
        ("**Final answer: 5**", "6", True),
    ],
)
def test_numbers_that_go_on_are_other_numbers(reasoning, answer, contradicts):
    """12 is not the number that "12√2" states."""
    assert (verdict("contradiction", f"<think>{reasoning}</think>\\boxed{{{answer}}}") is not None) == contradicts


@pytest.mark.parametrize(
    "prompt",
    [
        '[{"role": "user", "content": "What is 2+2?"',
        '[{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}]',
        '[{"role": "user"}, 3] is how chats are stored. What is its length?',
    ],
)
def test_a_prompt_that_only_begins_like_a_chat_stops_nothing(prompt):
    """One question about JSON in a data set would end the filtering of all of it."""
    assert verdict("system_prompt_leak", answered("\\boxed{2}"), prompt) is None
    assert verdict("language", answered("\\boxed{2}"), prompt) is None
