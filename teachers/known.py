"""Teachers whose publishers say how to ask them: sampling, prompt, where the reasoning arrives, each with its source.

A teacher that is sampled otherwise than its publisher measured it writes worse traces, and loops more often, for the same
money. What a recipe leaves out is filled from this table; a teacher that is not in it needs its settings said.

Values are those of the model cards, config.json and generation_config.json under ``sources``. Where a publisher gives none,
the setting is ours and named in ``not_published``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from stillhouse.pipeline.records import Sampling

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
"""The sentence that the cards of DeepSeek-R1, QwQ and Qwen3 and the evaluations of gpt-oss put to mathematical problems."""
NEEDED_SAMPLING = ("temperature", "top_p", "max_new_tokens")

MOVING_NAMES = {
    "deepseek-reasoner": "DeepSeek's API has served R1, R1-0528, V3.1, V3.2 and V4 under it, with sampling settings ignored",
    "deepseek-r1": "hosts have served both R1 and R1-0528 under it, which are asked differently",
}
"""Names of endpoints that have meant several models; none of them is known, because a table cannot say which one answers."""


@dataclass(frozen=True, slots=True)
class KnownTeacher:
    """How one published teacher is asked, and what it is.

    Args:
        name: its name on the hub. The part after the slash is known as well, and letter case does not matter.
        sampling: the published sampling settings.
        opens_think: the chat template's generation prompt already ends with ``<think>``.
        reasoning: how the model marks its reasoning: ``think_tags``, or ``harmony`` (gpt-oss: an analysis channel, which
            servers hand over as a field of the message).
        vllm_parser, sglang_parser: value of each server's ``--reasoning-parser``. vLLM then answers with
            ``message.reasoning`` (``reasoning_content`` in older versions), SGLang with ``message.reasoning_content``.
        context_length: longest prompt and completion together that a server allows without further flags, tokens.
        total_params, active_params: billions, as its publisher counts them; all, and those a token passes through.
        also: further exact names: official quantizations, and names that hosts use for this model and no other.
        system_prompt: sent before the problem; None sends none.
        prompt_suffix: follows every problem.
        longest_new_tokens: the limit its publisher sets for the hardest problems, where that is another.
        not_published: settings that no publisher's page gives and that are therefore ours.
        note: what else its publisher says that matters to whoever collects its traces.
    """

    name: str
    sampling: Sampling
    opens_think: bool
    reasoning: Literal["think_tags", "harmony"]
    vllm_parser: str
    sglang_parser: str
    context_length: int
    license: str
    total_params: float
    active_params: float
    sources: tuple[str, ...]
    also: tuple[str, ...] = ()
    system_prompt: str | None = None
    prompt_suffix: str = BOXED
    longest_new_tokens: int | None = None
    not_published: tuple[str, ...] = ()
    note: str = ""

    def settings(self) -> dict[str, Any]:
        """What a recipe's teacher section says of it: ``sampling`` (only what is set), prompts and ``opens_think``."""
        plain = {name: getattr(self.sampling, name) for name in NEEDED_SAMPLING}
        return {
            "sampling": plain | self.sampling.extras(),
            "system_prompt": self.system_prompt,
            "prompt_suffix": self.prompt_suffix,
            "opens_think": self.opens_think,
        }


def known_teacher(name: str) -> KnownTeacher | None:
    """Look a teacher up by its exact name on the hub or at an endpoint, in any letter case; None where it is not known.

    Only whole names count: a fine-tune whose name contains ``DeepSeek-R1`` is another model.
    """
    return _BY_NAME.get(name.strip().lower())


_R1_PAGE = "https://github.com/deepseek-ai/DeepSeek-R1"
_VLLM_PAGE = "https://docs.vllm.ai/en/latest/features/reasoning_outputs.html"
_SGLANG_PAGE = "https://docs.sglang.ai/advanced_features/separate_reasoning.html"


def _hub(name: str, *files: str) -> tuple[str, ...]:
    return (f"https://huggingface.co/{name}", *(f"https://huggingface.co/{name}/blob/main/{file}" for file in files))


def _r1(name: str, params: tuple[float, float], license: str, also: tuple[str, ...] = ()) -> KnownTeacher:
    return KnownTeacher(
        name=name,
        sampling=Sampling(temperature=0.6, top_p=0.95, max_new_tokens=32_768),
        opens_think=True,
        reasoning="think_tags",
        vllm_parser="deepseek_r1",
        sglang_parser="deepseek-r1",
        context_length=131_072,
        license=license,
        total_params=params[0],
        active_params=params[1],
        sources=(_R1_PAGE, *_hub(name, "generation_config.json"), _VLLM_PAGE, _SGLANG_PAGE),
        also=also,
        note="No system prompt: all instructions belong into the user's turn. Without a forced <think> it may not think.",
    )


def _r1_0528() -> KnownTeacher:
    name = "deepseek-ai/DeepSeek-R1-0528"
    return KnownTeacher(
        name=name,
        sampling=Sampling(temperature=0.6, top_p=0.95, max_new_tokens=65_536),
        opens_think=False,
        reasoning="think_tags",
        vllm_parser="deepseek_r1",
        sglang_parser="deepseek-r1",
        context_length=131_072,
        license="MIT",
        total_params=671,
        active_params=37,
        sources=(*_hub(name), _VLLM_PAGE, _SGLANG_PAGE),
        also=("deepseek/deepseek-r1-0528",),
        note="Takes a system prompt and needs no forced <think>. Writes 23,000 tokens for an AIME problem, R1 12,000.",
    )


def _qwq() -> KnownTeacher:
    name = "Qwen/QwQ-32B"
    return KnownTeacher(
        name=name,
        sampling=Sampling(temperature=0.6, top_p=0.95, max_new_tokens=32_768, top_k=40),
        opens_think=True,
        reasoning="think_tags",
        vllm_parser="deepseek_r1",
        sglang_parser="deepseek-r1",
        context_length=131_072,
        license="Apache-2.0",
        total_params=32.5,
        active_params=32.5,
        sources=(*_hub(name, "generation_config.json"), _VLLM_PAGE, _SGLANG_PAGE),
        note="top_k between 20 and 40. YaRN has to be switched on for prompts beyond 8,192 tokens.",
    )


def _qwen3(size: str, params: tuple[float, float]) -> KnownTeacher:
    name = f"Qwen/Qwen3-{size}"
    return KnownTeacher(
        name=name,
        sampling=Sampling(temperature=0.6, top_p=0.95, max_new_tokens=32_768, top_k=20),
        opens_think=False,
        reasoning="think_tags",
        vllm_parser="qwen3",
        sglang_parser="qwen3",
        context_length=40_960,
        license="Apache-2.0",
        total_params=params[0],
        active_params=params[1],
        sources=(*_hub(name), _VLLM_PAGE, _SGLANG_PAGE),
        also=(f"{name}-FP8",),
        longest_new_tokens=38_912,
        note="Thinks unless enable_thinking=False or /no_think is said. Never greedy; presence_penalty 0 to 2 against loops.",
    )


def _qwen3_thinking(size: str, params: tuple[float, float]) -> KnownTeacher:
    name = f"Qwen/Qwen3-{size}-Thinking-2507"
    return KnownTeacher(
        name=name,
        sampling=Sampling(temperature=0.6, top_p=0.95, max_new_tokens=32_768, top_k=20),
        opens_think=True,
        reasoning="think_tags",
        vllm_parser="deepseek_r1",
        sglang_parser="qwen3-thinking",
        context_length=262_144,
        license="Apache-2.0",
        total_params=params[0],
        active_params=params[1],
        sources=(*_hub(name), _VLLM_PAGE, _SGLANG_PAGE),
        also=(f"{name}-FP8",),
        longest_new_tokens=81_920,
        note="Always thinks. presence_penalty 0 to 2 against loops.",
    )


def _gpt_oss(size: str, params: tuple[float, float]) -> KnownTeacher:
    name = f"openai/gpt-oss-{size}"
    return KnownTeacher(
        name=name,
        sampling=Sampling(temperature=1.0, top_p=1.0, max_new_tokens=32_768, reasoning_effort="medium"),
        opens_think=False,
        reasoning="harmony",
        vllm_parser="openai_gptoss",
        sglang_parser="gpt-oss",
        context_length=131_072,
        license="Apache-2.0",
        total_params=params[0],
        active_params=params[1],
        sources=(
            "https://github.com/openai/gpt-oss",
            "https://github.com/openai/gpt-oss/blob/main/gpt_oss/evals/aime_eval.py",
            *_hub(name),
            f"https://developers.openai.com/api/docs/models/gpt-oss-{size}",
            _SGLANG_PAGE,
        ),
        also=(f"gpt-oss:{size}",),
        longest_new_tokens=131_072,
        not_published=("max_new_tokens", "reasoning_effort"),
        note=(
            "Only in the harmony format: a server with its parser hands the reasoning over as a field of the message. "
            "reasoning_effort low, medium or high goes into the system message. OpenAI's own evaluations allow 131,072 tokens, "
            "the whole context."
        ),
    )


_DISTILL = "deepseek-ai/DeepSeek-R1-Distill"
_TEACHERS = (
    _r1("deepseek-ai/DeepSeek-R1", (671, 37), "MIT", also=("deepseek/deepseek-r1",)),
    _r1_0528(),
    *(_r1(f"{_DISTILL}-Qwen-{size:g}B", (size, size), "MIT (from Qwen2.5, Apache-2.0)") for size in (1.5, 7, 14, 32)),
    _r1(f"{_DISTILL}-Llama-8B", (8, 8), "MIT (from Llama 3.1, its licence)"),
    _r1(f"{_DISTILL}-Llama-70B", (70, 70), "MIT (from Llama 3.3, its licence)"),
    _qwq(),
    *(_qwen3(f"{size:g}B", (size, size)) for size in (0.6, 1.7, 4)),
    _qwen3("8B", (8.2, 8.2)),
    _qwen3("14B", (14.8, 14.8)),
    _qwen3("32B", (32.8, 32.8)),
    _qwen3("30B-A3B", (30.5, 3.3)),
    _qwen3("235B-A22B", (235, 22)),
    _qwen3_thinking("4B", (4, 4)),
    _qwen3_thinking("30B-A3B", (30.5, 3.3)),
    _qwen3_thinking("235B-A22B", (235, 22)),
    _gpt_oss("20b", (21, 3.6)),
    _gpt_oss("120b", (117, 5.1)),
)


def _all_names(teacher: KnownTeacher) -> set[str]:
    whole = {teacher.name, *teacher.also}
    return {name.lower() for name in whole | {name.rpartition("/")[2] for name in whole}} - MOVING_NAMES.keys()


_BY_NAME = {name: teacher for teacher in _TEACHERS for name in _all_names(teacher)}


def known_teachers() -> tuple[KnownTeacher, ...]:
    """All of them, in families."""
    return _TEACHERS
