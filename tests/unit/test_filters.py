"""Format filters: what a student must not learn is dropped, with the reason it is counted by."""

import importlib.util
import random

import pytest

from stillhouse.pipeline.errors import RecipeError
from stillhouse.pipeline.filters.content import Contradiction, Refusal, SystemPromptLeak
from stillhouse.pipeline.filters.format import AnswerPresent, ControlTokens, Finished, Length, ThinkBlock
from stillhouse.pipeline.filters.judging import judge_batch
from stillhouse.pipeline.filters.language import Language
from stillhouse.pipeline.filters.rates import filter_rates
from stillhouse.pipeline.filters.repetition import Repetition
from stillhouse.pipeline.filters.settings import FilterSetting, default_filters, make_filter, with_percentiles
from stillhouse.pipeline.records import Problem, Trace

GOOD = "<think>\n2 + 2 = 4\n4 + 3 = 7\n</think>\n\nThe answer is \\boxed{7}."


def make_trace(
    completion=GOOD, *, key="k0", prompt="<|user|>2+2+3?<|assistant|>", finish_reason="stop", tokens=30, problem="p"
):
    return Trace(
        key=key,
        problem_id=problem,
        teacher="teacher",
        teacher_revision="r",
        rendered_prompt=prompt,
        completion=completion,
        reasoning=None,
        answer_text=None,
        finish_reason=finish_reason,
        num_prompt_tokens=10,
        num_completion_tokens=tokens,
        temperature=0.6,
        top_p=0.95,
        max_new_tokens=512,
        sample_index=0,
        seed=1,
        seconds=0.1,
    )


def reason(trace_filter, completion=GOOD, **fields):
    drop = trace_filter(make_trace(completion, **fields))
    return None if drop is None else drop.reason


@pytest.mark.parametrize(
    ("completion", "prompt", "expected"),
    [
        (GOOD, "?", None),
        ("2 + 2 = 4</think>\\boxed{4}", "?<think>\n", None),
        ("The answer is \\boxed{4}.", "?", "no think block"),
        ("<think>2 + 2 = 4", "?", "think block not closed"),
        ("2 + 2 = 4", "?<think>\n", "think block not closed"),
        ("<think>a</think><think>b</think>4", "?", "more than one think block"),
        ("<think>a</think>4", "?<think>", "more than one think block"),
        ("<think>a</think>4</think>", "?", "more than one think block"),
        ("Sure. <think>a</think>4", "?", "text before the think block"),
        ("</think>a<think>", "?", "text before the think block"),
        ("<think>\n\n</think>\\boxed{4}", "?", "think block empty"),
        ("\n</think>\\boxed{4}", "?<think>", "think block empty"),
    ],
)
def test_think_block(completion, prompt, expected):
    """A student taught on an unclosed, double or empty block reasons without end, twice or not at all."""
    assert reason(ThinkBlock(), completion, prompt=prompt) == expected


def test_a_cut_off_completion_is_dropped():
    """Trained on, a completion cut at the limit teaches the student never to stop."""
    assert reason(Finished()) is None
    assert reason(Finished(), finish_reason="length") == "not finished"
    for other in ("truncated", "loop", "content_filter", "an unknown one"):
        assert reason(Finished(), finish_reason=other) is not None


def test_an_answer_must_stand_in_a_box_after_the_block():
    """Without it there is nothing to verify, and nothing to read out of the student later."""
    assert reason(AnswerPresent()) is None
    for completion in ("<think>\\boxed{7}</think>7", "<think>a</think>\\boxed{}", "\\boxed{7}"):
        assert reason(AnswerPresent(), completion) == "no boxed answer after the think block"
    assert reason(AnswerPresent(), "<think>a</think>```json\n{}\n```") is None


def test_length_bounds_are_allowed_themselves():
    """An off-by-one here drops every completion of exactly the size that the recipe allows."""
    bounds = Length(10, 20)
    assert [reason(bounds, tokens=n) for n in (9, 10, 20, 21)] == ["too short", None, None, "too long"]


LONG_SENTENCE = "Let me check this one more time to be sure."


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (GOOD, None),
        ("0 - 0 = 0\n" * 7, None),  # a worked sum may well say so
        ("0 - 0 = 0\n" * 8, "same line repeated"),
        ("0 - 0 = 0\n\n" * 8, "same line repeated"),
        ((LONG_SENTENCE + " ") * 3, None),
        ((LONG_SENTENCE + " ") * 4, "same sentence repeated"),
        ("".join(f"{LONG_SENTENCE} Number {i} is fine, on to the next. " for i in range(40)), "same sentence repeated"),
        ("wait " * 60, "same words in a loop"),
        ("".join(f"So that is the same as before.\nStep {i}\n\nWe go on with step {i}.\n\n" for i in range(9)), None),
        ("".join(f"The same paragraph as ever.\n\nWe go on with step {i}.\n\n" for i in range(10)), "same paragraph repeated"),
        ("".join(f"{a} + {b} = {a + b}\n" for a in range(40) for b in range(40)), None),
    ],
)
def test_repetition(completion, expected):
    """Loops are learnt faster than anything else; worked steps that look alike are not loops."""
    assert reason(Repetition(), completion) == expected


def test_compression_finds_loops_of_long_blocks_only_in_long_texts():
    """A loop with a period beyond every counter still compresses to nothing; short texts are left alone."""
    rng = random.Random(0)
    block = " ".join(str(rng.randint(0, 10**6)) for _ in range(150))
    counts_only = Repetition(max_same_ngram=10**6, max_same_line=10**6, max_same_sentence=10**6)
    assert reason(counts_only, (block + " ") * 30) == "compresses like a loop"
    assert reason(counts_only, " ".join(str(rng.randint(0, 10**6)) for _ in range(4500))) is None
    assert reason(counts_only, "a" * 3000) is None
    long_block = " ".join(str(rng.randint(0, 10**6)) for _ in range(1500))
    assert reason(counts_only, " ".join([long_block] * 40)) == "compresses like a loop"
    counted = "".join(
        f"Step {i}: nothing at all has changed since the step before, so that we must look at it again. " for i in range(300)
    )
    assert reason(counts_only, counted) == "compresses like a loop"


@pytest.mark.parametrize(
    "token",
    ["<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<｜end▁of▁sentence｜>", "<end_of_turn>", "</s>", "[INST]", "<<SYS>>"],
)
def test_control_tokens_in_content_are_refused(token):
    """Rendered by a student's tokenizer, such text becomes a real control token in the middle of an answer."""
    assert reason(ControlTokens(), GOOD + token) == "control token in the content"


def test_mathematics_is_not_a_control_token():
    """Absolute values and comparisons must not cost a trace."""
    for text in (r"<think>|x| < |y| and a <b> c</think>\boxed{|x|>2}", "<think>if a < s > b</think>", GOOD):
        assert reason(ControlTokens(), text) is None
    assert reason(ControlTokens(also=("<tool>",)), GOOD + "<tool>") == "control token in the content"


SUM = Problem("2+2+3?", "7", "math", "sums", "train")


def judged(traces, settings, **options):
    return judge_batch({"p": SUM}, traces, settings, **options)


def test_one_deciding_verdict_a_trace_and_the_first_reason_decides():
    """The funnel counts these; two verdicts for one trace would drop it twice in the report."""
    cut = make_trace("<think>2", key="cut", finish_reason="length", tokens=512)
    bare = make_trace("7", key="bare", tokens=1)
    wrong = make_trace(GOOD.replace("{7}", "{8}"), key="wrong")
    verdicts = judged([cut, make_trace(key="good"), bare, wrong], default_filters(min_tokens=5, max_tokens=100))
    seen = [(v.trace_key, v.keep, v.check, v.outcome or v.reason) for v in verdicts if not v.shadow]
    assert seen == [
        ("cut", False, "finished", "not finished"),
        ("good", True, "verify_math", "correct"),
        ("bare", False, "think_block", "no think block"),
        ("wrong", False, "verify_math", "wrong"),
    ]
    assert verdicts[0].evidence == "finish_reason=length after 512 tokens"


def test_evidence_is_short_however_long_the_trace():
    """Verdicts are stored for every trace; quoting a 30,000-token loop in each would double the store."""
    (verdict,) = judged([make_trace("<think>" + "word " * 50_000)], [FilterSetting("think_block")])
    assert not verdict.keep
    assert 0 < len(verdict.evidence) <= 200


def test_shadow_mode_says_what_it_would_do_and_does_nothing():
    """A filter is tried on real data before it is trusted; a shadow that drops would cost the run its rows."""
    traces = [make_trace(key="short", tokens=3), make_trace(key="long", tokens=50)]
    length = {"min_tokens": 10}
    assert [v.keep for v in judged(traces, [FilterSetting("length", "off", length)])] == [True, True]
    seen = judged(traces, [FilterSetting("length", "shadow", length), FilterSetting("finished")])
    assert [(v.trace_key, v.check, v.keep, v.shadow) for v in seen] == [
        ("short", "length", False, True),
        ("short", "verify_math", True, False),
        ("long", "verify_math", True, False),
    ]


def test_the_order_of_the_list_is_the_order_of_the_filters():
    """A recipe that puts its own reason first must see it counted."""
    both = make_trace("7 <|im_end|>")
    names = ["control_tokens", "think_block"]
    for order in (names, names[::-1]):
        assert judged([both], [FilterSetting(name) for name in order])[0].check == order[0]


OWN_FILTERS = """
def no_apologies(trace):
    return ("apologizes", trace.completion[:20]) if "sorry" in trace.completion else None

def text_alone(trace):
    return "no (reason, evidence)"

def broken(trace):
    return trace.no_such_field
"""


def test_a_users_own_filter_is_one_function(tmp_path, monkeypatch):
    """The house's rules are the user's to add, without a class; a mistake in them names the filter and the trace."""
    (tmp_path / "own_filters.py").write_text(OWN_FILTERS)
    monkeypatch.syspath_prepend(tmp_path)
    traces = [make_trace(key="a"), make_trace("sorry " + GOOD, key="b")]
    kept, dropped = judged(traces, [FilterSetting("own_filters:no_apologies")])
    assert (kept.keep, dropped.reason, dropped.check) == (True, "apologizes", "own_filters:no_apologies")
    with pytest.raises(RecipeError, match="two texts"):
        judged(traces, [FilterSetting("own_filters:text_alone")])
    with pytest.raises(RecipeError, match=r"own_filters:broken.* failed on trace a: AttributeError"):
        judged(traces, [FilterSetting("own_filters:broken")])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (FilterSetting("repetitions"), "did you mean 'repetition'"),
        (FilterSetting("length", "loud"), "mode must be one of drop, shadow, off"),
        (FilterSetting("length", options={"min": 3}), "no option 'min'; it takes min_tokens"),
        (FilterSetting("length", options={"max_percentile": 101}), "from 0 to 100"),
        (FilterSetting("repetition", options={"max_same_ngram": 1}), "at least 2"),
        (FilterSetting("no_such_module_anywhere:f"), "cannot be imported"),
        (FilterSetting("math:pi"), "float, not a function"),
        (FilterSetting("language", options={"allowed": ["Klingon"]}), "the scripts are Latin"),
    ],
)
def test_a_mistake_in_the_list_is_named(setting, expected):
    """A misspelt filter that silently does not run is found out after the training."""
    with pytest.raises(RecipeError, match=expected):
        make_filter(setting)


def test_percentile_bounds_become_tokens_of_this_run():
    """Bounds in per cent follow the teacher; they must keep the share of traces that they say."""
    setting = FilterSetting("length", options={"min_percentile": 10, "max_percentile": 90, "max_tokens": 85})
    (resolved,) = with_percentiles([setting], list(range(1, 101)))
    assert resolved.options == {"min_tokens": 11, "max_tokens": 85}
    with pytest.raises(ValueError, match="with_percentiles"):
        judged([make_trace()], [setting])


CHINESE = "我们需要计算这些数字的和，然后写出答案。"


@pytest.mark.parametrize(
    ("completion", "prompt", "expected"),
    [
        (GOOD.replace("2 + 2", CHINESE), "What is the sum of these?", "mixed scripts"),
        (GOOD.replace("2 + 2", "The word 和 means sum; let α and β be angles, naïve or not, with \\alpha"), "What?", None),
        (GOOD.replace("2 + 2", CHINESE), "<|user|>计算这些数字的和", None),
        (GOOD.replace("2 + 2", "Давайте сложим числа по порядку"), "What is the sum of these?", "mixed scripts"),
        (GOOD.replace("2 + 2", CHINESE), "What does the character 和 mean in this list of numbers?", "mixed scripts"),
        (
            GOOD.replace("2 + 2", "\\displaystyle\\operatorname\\displaystyle\\operatorname\\displaystyle\\operatorname да"),
            "Is it?",
            "mixed scripts",
        ),
        (GOOD, "<|user|>计算这些数字的和", None),
        (f"<think>{CHINESE} sin x + cos y</think>答案 \\boxed{{7}}", "计算这些数字的和", None),
        (f"<think>{CHINESE} Это так, и это всё.</think>答案 \\boxed{{7}}", "计算这些数字的和", "mixed scripts"),
    ],
)
def test_a_completion_keeps_to_its_prompts_script(completion, prompt, expected):
    """Teachers slip into Chinese in the middle of a thought; the student would learn to slip too."""
    assert reason(Language(), completion, prompt=prompt) == expected


def test_languages_of_one_script_need_lingua():
    """Without the library, asking for it must fail at once and say what to install, not pass everything."""
    lingua_is_here = importlib.util.find_spec("lingua") is not None
    if not lingua_is_here:
        with pytest.raises(RecipeError, match="pip install lingua-language-detector"):
            Language(languages=("en", "fr"))
        return
    french = "<think>Nous devons ajouter tous les nombres dans cet ordre, puis écrire la somme.</think>\\boxed{7}"
    assert reason(Language(languages=("en", "fr")), french) == "another language"
    assert reason(Language(languages=("fr", "en")), french) is None


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I cannot answer this question. \\boxed{0}", True),
        ("As an AI language model, I do not know. \\boxed{0}", True),
        ("I must decline. \\boxed{no}", True),
        ("抱歉，我无法回答。\\boxed{0}", True),
        ("We cannot divide by zero, so \\boxed{1}", False),
        ("I can't simplify further, so the answer is \\boxed{\\sqrt 2}", False),
        ("I found 7 of them. \\boxed{7}", False),
    ],
)
def test_refusals_are_read_in_the_answer_only(answer, refused):
    """A refusal teaches the student to refuse; mathematics that cannot be done is none."""
    assert (reason(Refusal(), "<think>I cannot help but count.</think>" + answer) is not None) == refused


SYSTEM = "You must answer every question in the voice of an old sailor from Bremen and never name the ship."


@pytest.mark.parametrize(
    "prompt",
    [
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n2+2?",
        f"<|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>",
        f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n2+2?",
        f"<｜begin▁of▁sentence｜>{SYSTEM}<｜User｜>2+2?",
    ],
)
def test_a_leaked_system_prompt_is_found_under_each_template(prompt):
    """Another deployment's instructions, learnt by heart, come out at the student's users."""
    leak = "<think>I must answer EVERY question, in the voice of an\nold sailor.</think>\\boxed{4}"
    assert reason(SystemPromptLeak(), leak, prompt=prompt) == "repeats its system prompt"
    assert reason(SystemPromptLeak(), leak, prompt="<|im_start|>user\n2+2?") is None
    assert reason(SystemPromptLeak(), GOOD, prompt=prompt) is None
    assert reason(SystemPromptLeak(), "<think>My system prompt says so.</think>4") == "talks of its system prompt"


@pytest.mark.parametrize(
    ("reasoning", "final", "contradicts"),
    [
        ("so \\boxed{7}", "8", True),
        ("so \\boxed{7}", "7.0", False),
        ("first \\boxed{8}, no: \\boxed{7}", "7", False),
        ("The answer is 12.", "21", True),
        ("The answer is 1/2", "\\frac{1}{2}", False),
        ("The answer is 12. No: the final answer is 21.", "21", False),
        ("The answer is 2x + 1", "2x+1", False),
        ("so \\boxed{x+1}", "2", False),
        ("we get 12", "21", False),
    ],
)
def test_an_answer_that_its_reasoning_contradicts(reasoning, final, contradicts):
    """Such a trace teaches that the reasoning does not matter."""
    found = reason(Contradiction(), f"<think>{reasoning}</think>\\boxed{{{final}}}")
    assert (found is not None) == contradicts


def test_rates_count_inside_and_outside_of_each_filter():
    """A filter whose outside is as right as its inside throws traces away for nothing; the report must be able to say so."""
    wrong = GOOD.replace("{7}", "{8}")
    traces = [
        make_trace(key="a", tokens=5),
        make_trace(wrong, key="b", tokens=5),
        make_trace(key="c", tokens=50),
        make_trace(GOOD + "</s>", key="d", tokens=50),
        make_trace(wrong + "</s>", key="e", tokens=50),
    ]
    settings = [
        FilterSetting("control_tokens"),
        FilterSetting("refusal", "off"),
        FilterSetting("length", "shadow", {"min_tokens": 10}),
    ]
    verdicts = judged(traces, settings, verify_dropped=True)
    control, length = filter_rates(settings, verdicts)
    assert (control.num_in, control.num_against, control.pass_rate_against) == (5, 2, 0.5)
    assert control.pass_rate_let_through == pytest.approx(2 / 3)
    assert (length.name, length.mode, length.num_in, length.num_against) == ("length", "shadow", 3, 2)
    assert (length.pass_rate_let_through, length.pass_rate_against) == (1.0, 0.5)
    assert sorted(v.trace_key for v in verdicts if not v.shadow) == ["a", "b", "c", "d", "e"]
    control, _ = filter_rates(settings, judged(traces, settings))
    assert control.pass_rate_against is None
