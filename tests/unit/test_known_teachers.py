"""The table of known teachers: what is asked of each, and that nothing else is taken for one of them."""

from __future__ import annotations

import pytest

from stillhouse.pipeline.extraction import strict_answer
from stillhouse.pipeline.records import Sampling
from stillhouse.teachers.known import MOVING_NAMES, known_teacher, known_teachers

R1_FAMILY = (0.6, 0.95, 0, 32_768, True, "deepseek_r1", "deepseek-r1")
QWEN3 = (0.6, 0.95, 20, 32_768, False, "qwen3", "qwen3")
QWEN3_2507 = (0.6, 0.95, 20, 32_768, True, "deepseek_r1", "qwen3-thinking")
GPT_OSS = (1.0, 1.0, 0, 32_768, False, "openai_gptoss", "gpt-oss")
# temperature, top_p, top_k, max_new_tokens, whether the template opens the think block, vLLM's and SGLang's parser
PUBLISHED = {
    "deepseek-ai/DeepSeek-R1": R1_FAMILY,
    "deepseek-ai/DeepSeek-R1-0528": (0.6, 0.95, 0, 65_536, False, "deepseek_r1", "deepseek-r1"),
    **{f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}": R1_FAMILY for size in ("1.5B", "7B", "14B", "32B")},
    **{f"deepseek-ai/DeepSeek-R1-Distill-Llama-{size}": R1_FAMILY for size in ("8B", "70B")},
    "Qwen/QwQ-32B": (0.6, 0.95, 40, 32_768, True, "deepseek_r1", "deepseek-r1"),
    **{f"Qwen/Qwen3-{size}": QWEN3 for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B", "235B-A22B")},
    **{f"Qwen/Qwen3-{size}-Thinking-2507": QWEN3_2507 for size in ("4B", "30B-A3B", "235B-A22B")},
    "openai/gpt-oss-20b": GPT_OSS,
    "openai/gpt-oss-120b": GPT_OSS,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_teacher_is_asked_as_its_publisher_says(name):
    """If it failed, a recipe that names nothing but the model would pay for traces drawn with other settings."""
    teacher = known_teacher(name)
    sampling = teacher.sampling
    assert (
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        sampling.max_new_tokens,
        teacher.opens_think,
        teacher.vllm_parser,
        teacher.sglang_parser,
    ) == PUBLISHED[name]
    assert (sampling.min_p, sampling.presence_penalty, sampling.repetition_penalty) == (0, 0, 1)
    assert sampling.reasoning_effort == ("medium" if "gpt-oss" in name else "")
    assert teacher.system_prompt is None


def test_the_table_has_no_teacher_beyond_those_checked_here():
    """If it failed, a teacher would have been added with settings that no test holds against its card."""
    assert {teacher.name for teacher in known_teachers()} == set(PUBLISHED)


@pytest.mark.parametrize("teacher", known_teachers(), ids=lambda teacher: teacher.name)
def test_a_server_and_our_filters_can_take_what_the_table_says(teacher):
    """If it failed, every request would be refused for its length, or every trace dropped for want of a boxed answer."""
    room_for_a_prompt = 2_048
    assert teacher.sampling.max_new_tokens + room_for_a_prompt <= teacher.context_length
    assert teacher.sampling.max_new_tokens <= (teacher.longest_new_tokens or teacher.sampling.max_new_tokens)
    assert (teacher.longest_new_tokens or 0) <= teacher.context_length
    assert 0 < teacher.active_params <= teacher.total_params
    assert strict_answer(f"</think>{teacher.prompt_suffix.replace('{}', '{7}')}") == "7"
    settings = teacher.settings()
    assert Sampling(**settings["sampling"]) == teacher.sampling
    assert f"https://huggingface.co/{teacher.name}" in teacher.sources


def test_letter_case_and_the_publisher_do_not_matter_and_everything_else_does():
    """If it failed, a host's spelling would be unknown, or a fine-tune would be asked like the model it is not."""
    r1 = known_teacher("deepseek-ai/DeepSeek-R1")
    assert known_teacher("DEEPSEEK-AI/deepseek-r1") is r1
    assert known_teacher("deepseek/deepseek-r1") is r1
    assert known_teacher("qwq-32b") is known_teacher("Qwen/QwQ-32B")
    assert known_teacher("gpt-oss:20b") is known_teacher("openai/gpt-oss-20b")
    assert known_teacher("Qwen/Qwen3-235B-A22B-Thinking-2507-FP8") is known_teacher("Qwen/Qwen3-235B-A22B-Thinking-2507")
    for other in (
        "someone/DeepSeek-R1",
        "deepseek-ai/DeepSeek-R1-Zero",
        "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
        "Qwen/QwQ-32B-Preview",
        "Qwen/Qwen3-4B-Instruct-2507",
        "Qwen/Qwen3-8B-Base",
        "",
    ):
        assert known_teacher(other) is None, other


@pytest.mark.parametrize("name", MOVING_NAMES)
def test_a_name_that_has_meant_several_models_is_not_known(name):
    """If it failed, what an endpoint serves today would be asked like what it served under the same name last year."""
    assert known_teacher(name) is None
    assert "served" in MOVING_NAMES[name]
