"""What of a rendered prompt is the deployment's and what the question's, whichever way it was rendered."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

_SYSTEM_BLOCK = re.compile(
    r"<\|im_start\|>system\n(?P<chatml>.*?)<\|im_end\|>"
    r"|<\|start_header_id\|>system<\|end_header_id\|>\n\n(?P<llama>.*?)<\|eot_id\|>"
    r"|<<SYS>>\n?(?P<llama2>.*?)<</SYS>>"
    r"|<\|system\|>\n?(?P<plain>.*?)(?:<\|end\|>|</s>|<\|user\|>)"
    r"|<｜begin▁of▁sentence｜>(?P<deepseek>[^<]+?)<｜User｜>",
    re.DOTALL,
)


class PromptParts(NamedTuple):
    """The system prompt, "" where there is none, and the rest."""

    system: str
    rest: str


def prompt_parts(rendered_prompt: str) -> PromptParts:
    """Take a prompt apart that a chat template rendered, or that went out as a JSON list of messages."""
    if (messages := _messages(rendered_prompt)) is not None:
        of_system = [content for role, content in messages if role == "system"]
        return PromptParts("\n".join(of_system), "\n".join(content for role, content in messages if role != "system"))
    block = _SYSTEM_BLOCK.search(rendered_prompt)
    if block is None:
        return PromptParts("", rendered_prompt)
    system = next(part for part in block.groups() if part is not None)
    return PromptParts(system, rendered_prompt[: block.start()] + rendered_prompt[block.end() :])


def _messages(rendered_prompt: str) -> list[tuple[str, str]] | None:
    """(role, content) of each message; None where the prompt is no list of messages, however it begins."""
    if not rendered_prompt.startswith('[{"'):
        return None
    try:
        messages = json.loads(rendered_prompt)
    except ValueError:
        return None
    pairs = [(row.get("role"), row.get("content")) for row in messages if isinstance(row, dict)]
    sound = len(pairs) == len(messages) and all(isinstance(text, str) for pair in pairs for text in pair)
    return pairs if sound else None
