"""Most failed distillations trained on the wrong tokens; each of their causes is refused here by name."""

import dataclasses
import pickle

import pytest

from stillhouse.pipeline.errors import ExitCode, SupervisionError
from stillhouse.pipeline.records import Example
from stillhouse.pipeline.supervision import check_examples, require_sound

EOS, PAD, OPEN, CLOSE = 2, 0, (50, 51), (60,)
PROMPT = (5, 6, 7)
REASONING = (10, 11, 12, 13)
ANSWER = (20, 21)


def make_example(prompt=PROMPT, completion=(*OPEN, *REASONING, *CLOSE, *ANSWER, EOS), labels=None):
    ids = (*prompt, *completion)
    masked = (*(Example.IGNORE_INDEX for _ in prompt), *completion)
    return Example("e" * 64, "trace-key-of-this-row", "problem", ids, masked if labels is None else labels, "template")


def check(*examples, prompt=PROMPT, pad=PAD, max_length=64):
    return check_examples(
        examples,
        eos_token_id=EOS,
        pad_token_id=pad,
        prompt_ids_by_problem={"problem": prompt},
        think_open_ids=OPEN,
        think_close_ids=CLOSE,
        max_length=max_length,
    )


def test_sound_rows_pass_and_are_counted():
    """A check that refuses sound rows stops every run; the counts go into the report."""
    report = check(make_example(), make_example())
    assert report.problems == []
    assert (report.num_examples, report.num_supervised_tokens, report.num_tokens) == (2, 20, 26)
    require_sound(report)


@pytest.mark.parametrize("tail", [(), (198,), (198, 198)])
def test_a_think_tag_opened_by_the_prompt_is_sound(tail):
    """R1-Distill's template opens the block in the prompt (and breaks the line); only the closing tag is learnt then."""
    prompt = (*PROMPT, *OPEN, *tail)
    example = make_example(prompt, (*REASONING, *CLOSE, *ANSWER, EOS))
    assert check(example, prompt=prompt).problems == []


def test_a_prompt_that_only_mentions_the_tag_has_not_opened_it():
    """A system prompt about <think> tags must not excuse a row whose own block was dropped."""
    prompt = (*OPEN, 8, 9, *PROMPT)
    assert check(make_example(prompt), prompt=prompt).problems == []
    lost = make_example(prompt, (*REASONING, *CLOSE, *ANSWER, EOS))
    assert "no opening think tag" in check(lost, prompt=prompt).problems[0]


SOUND = make_example()
IGNORED = Example.IGNORE_INDEX


@pytest.mark.parametrize(
    ("example", "said"),
    [
        (make_example(labels=(IGNORED,) * 13), "no supervised token"),
        (make_example(labels=(*SOUND.labels[:-1], IGNORED)), "EOS 2 at the end is not supervised"),
        (make_example(completion=(*OPEN, *REASONING, *CLOSE, *ANSWER)), "ends with token 21, not with EOS 2"),
        (make_example(completion=(*ANSWER, EOS)), "no opening think tag is supervised"),
        (make_example(completion=(*OPEN, *REASONING, *ANSWER, EOS)), "no closing think tag is supervised"),
        (make_example(labels=(*(IGNORED,) * 9, *SOUND.labels[9:])), "the reasoning is lost"),
        (make_example(completion=(*OPEN, *CLOSE, *ANSWER, EOS)), "empty think block (0 tokens"),
        (make_example(completion=(*OPEN, 198, *CLOSE, *ANSWER, EOS)), "empty think block (1 tokens"),
        (make_example(completion=(*OPEN, *OPEN, *REASONING, *CLOSE, *ANSWER, EOS)), "double think block (2 opened"),
        (
            make_example(completion=(*OPEN, 198, *CLOSE, *OPEN, *REASONING, *CLOSE, *ANSWER, EOS)),
            "double think block (2 opened, 2 closed)",
        ),
        (make_example(completion=(*CLOSE, *REASONING, *OPEN, *ANSWER, EOS)), "closes before it opens"),
        (make_example(prompt=(5, 6, 8)), "differs from the prompt used at inference at token 2"),
        (make_example(prompt=(5, 6)), "differs from the prompt used at inference at token 2"),
        (make_example(labels=SOUND.input_ids), "the prompt is supervised"),
        (make_example(labels=(*(IGNORED,) * 3, *SOUND.labels[4:], EOS)), "label 51 at position 3 is not the token 50"),
        (make_example(labels=SOUND.labels[:-1]), "13 tokens but 12 labels"),
        (make_example(completion=(*OPEN, *REASONING * 20, *CLOSE, EOS)), "87 tokens would be cut at max_length=64"),
        (dataclasses.replace(SOUND, problem_id="another"), "no prompt is known for its problem another"),
    ],
)
def test_each_fault_is_named_with_its_row(example, said):
    """Each of these trains without an error elsewhere and ends in a student that learnt nothing or never stops."""
    report = check(SOUND, example)
    assert len(report.problems) == 1
    assert said in report.problems[0]
    assert report.problems[0].startswith("row trace-key-of: ")
    with pytest.raises(SupervisionError, match="row trace-key-of"):
        require_sound(report)


def test_a_prefilled_and_repeated_tag_is_a_double_block():
    """The template opens the block and the trace brings its own: qwen3's second, empty block came about like this."""
    prompt = (*PROMPT, *OPEN)
    assert "double think block" in check(make_example(prompt), prompt=prompt).problems[0]


def test_pad_must_not_be_eos():
    """With pad = EOS the collator masks every EOS, and the student never stops (open-r1#492)."""
    (message,) = check(SOUND, pad=EOS).problems
    assert "pad_token_id and eos_token_id are both 2" in message
    assert check(SOUND, pad=None).problems == []


def test_no_rows_are_not_sound():
    """An empty training set must not train zero steps and pass."""
    with pytest.raises(SupervisionError, match="no training rows"):
        require_sound(check())


def test_the_error_is_short_and_survives_ray():
    """Ten thousand bad rows must not print ten thousand lines; Ray pickles what it raises."""
    bad = make_example(completion=(*ANSWER, EOS))
    with pytest.raises(SupervisionError) as caught:
        require_sound(check(*[bad] * 50))
    assert str(caught.value).count("\n") == 6
    assert "and 45 more" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.exit_code) == (str(caught.value), ExitCode.USAGE)


def test_think_tags_must_be_given():
    """Empty tag ids would find a tag everywhere and pass everything."""
    with pytest.raises(ValueError, match="at least one token"):
        check_examples(
            [SOUND],
            eos_token_id=EOS,
            pad_token_id=PAD,
            prompt_ids_by_problem={"problem": PROMPT},
            think_open_ids=(),
            think_close_ids=CLOSE,
            max_length=64,
        )
