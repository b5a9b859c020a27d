"""How a problem becomes the text that a model continues: one function for teacher, student and evaluation alike.

The tokenizer is passed in, so this needs neither torch nor transformers.
"""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from stillhouse.pipeline.errors import RecipeError

THINK_PREFIX = "<think>\n"
TEMPLATE_DATE = "26 Jul 2024"
"""The date that Llama-3.2's template prints when asked for none. A template that printed today's would make every prompt,
and with it every trace's key, another one tomorrow. Templates without a date ignore it."""


def chat_messages(problem_prompt: str, *, system_prompt: str | None, prompt_suffix: str) -> list[dict[str, str]]:
    """Messages of one problem: the system prompt where there is one, and the problem with the suffix after a blank line."""
    content = f"{problem_prompt}\n\n{prompt_suffix}" if prompt_suffix else problem_prompt
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*messages, {"role": "user", "content": content}]


def render_prompt(
    tokenizer: Any, problem_prompt: str, *, system_prompt: str | None, prompt_suffix: str, opens_think: bool
) -> str:
    """The text that a model continues: the chat template with its generation prompt.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        opens_think: end the prompt with an opened think block. A template that opens one by itself is left as it is.

    Raises:
        RecipeError: the tokenizer has no chat template, or one that refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RecipeError(
            f"the tokenizer of {getattr(tokenizer, 'name_or_path', 'this model')!r} has no chat template, so a problem "
            "cannot be put to it; use an instruct model, or put a chat_template.jinja into the model's folder"
        )
    messages = chat_messages(problem_prompt, system_prompt=system_prompt, prompt_suffix=prompt_suffix)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, date_string=TEMPLATE_DATE)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise RecipeError(
            f"the chat template of {getattr(tokenizer, 'name_or_path', 'this model')!r} refuses messages of the roles {roles} "
            f"({error}); a template without a system role needs teacher.system_prompt: null"
        ) from error
    if opens_think and not text.rstrip().endswith("<think>"):
        text += THINK_PREFIX
    return text


def opens_think_block(rendered_prompt: str) -> bool:
    """True where the completion starts inside a think block because the prompt opened it."""
    return rendered_prompt.rstrip().endswith("<think>")
