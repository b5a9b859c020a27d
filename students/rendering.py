"""Turn a problem and a trace into the exact tokens that a student learns from, and the exact prompt it meets later.

The prompt comes from the tokenizer's chat template; the completion never does. Chat templates edit assistant turns
(R1-Distill's deletes the reasoning, Qwen3's may add an empty think block, several give an all-zero assistant mask), so
the completion is appended here, token for token, behind the very prompt that inference will send. Prompt and completion
are tokenized apart, as they are at inference: the prompt alone is what the model is given, and what it then writes are
tokens of its own.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stillhouse.pipeline.errors import RecipeError, SupervisionError
from stillhouse.pipeline.extraction import THINK_CLOSE, THINK_OPEN
from stillhouse.pipeline.integrity import chat_template_sha256
from stillhouse.pipeline.prompts import opens_think_block, render_prompt
from stillhouse.pipeline.records import Example, Problem, Trace, content_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Known padding tokens that nothing is ever trained on, by family: Qwen, Llama-3.1 and 3.2, Llama-3.
_PAD_TOKENS = ("<|fim_pad|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_5|>")


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Token ids of a piece of rendered text, nothing added at either end and nothing cut."""
    return tuple(tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"])


def tokenize_completion(tokenizer: PreTrainedTokenizerBase, completion: str) -> tuple[int, ...]:
    """Token ids of a completion, each think tag always the same tokens.

    A vocabulary without the tags (Qwen2.5, Llama-3) spells them, and would merge a tag's last character with the line
    break behind it; tokenized apart they are one pattern to learn, and one to find.
    """
    pieces = re.split(f"({THINK_OPEN}|{THINK_CLOSE})", completion)
    return tuple(token for piece in pieces if piece for token in tokenize(tokenizer, piece))


def think_open_ids(tokenizer: PreTrainedTokenizerBase, rendered_prompt: str) -> tuple[int, ...]:
    """The tokens that open the think block: the prompt's own last ones where it opens the block, else those of the tag."""
    if opens_think_block(rendered_prompt):
        prompt_ids = tokenize(tokenizer, rendered_prompt)
        for start in range(len(prompt_ids) - 1, -1, -1):
            if THINK_OPEN in tokenizer.decode(list(prompt_ids[start:]), skip_special_tokens=False):
                return prompt_ids[start:]
    return tokenize(tokenizer, THINK_OPEN)


def render_completion(rendered_prompt: str, completion: str) -> str:
    """The text that follows ``rendered_prompt`` for a teacher's completion: exactly one think block is opened.

    The teacher's own template may or may not have opened the block, and so may the student's; the opening tag is
    therefore taken off the completion and put back only where the prompt does not hold it.
    """
    body = completion.lstrip()
    body = body.removeprefix(THINK_OPEN).lstrip("\n")
    if not opens_think_block(rendered_prompt):
        return f"{THINK_OPEN}\n{body}"
    return body if rendered_prompt.endswith("\n") else f"\n{body}"


def render_example(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    trace: Trace,
    *,
    system_prompt: str | None = None,
    prompt_suffix: str = "",
    opens_think: bool = False,
) -> Example:
    """Make the training row of one trace: rendered prompt (not learnt), completion and end of turn (learnt).

    ``input_ids`` is ``tokenize(prompt) + tokenize_completion(completion) + [end of turn]``; ``labels`` is -100 over the
    prompt and the ids after it. The last token is the one the chat template closes a turn with (:func:`end_of_turn_token_id`):
    generation stops there, so a student that never sees it as a label never stops.

    The row is never cut, because a trace cut in the middle teaches to end without an answer: the supervision check and the
    trainer refuse rows that are too long.

    Raises:
        SupervisionError: the trace is of another problem, or has no closed think block.
        RecipeError: see :func:`render_prompt`.
    """
    if trace.problem_id != problem.id:
        raise SupervisionError(f"trace {trace.key} answers problem {trace.problem_id}, not {problem.id}")
    if trace.reasoning is None or trace.answer_text is None:
        raise SupervisionError(
            f"trace {trace.key} has no closed think block, so there is no reasoning to learn. "
            "Filter the traces (check 'format') before examples are made of them."
        )
    prompt = render_prompt(
        tokenizer, problem.prompt, system_prompt=system_prompt, prompt_suffix=prompt_suffix, opens_think=opens_think
    )
    prompt_ids = tokenize(tokenizer, prompt)
    learnt_ids = (*tokenize_completion(tokenizer, render_completion(prompt, trace.completion)), end_of_turn_token_id(tokenizer))
    template = template_hash(tokenizer)
    return Example(
        key=content_key("example", trace.key, template, system_prompt, prompt_suffix, opens_think)[:32],
        trace_key=trace.key,
        problem_id=problem.id,
        input_ids=prompt_ids + learnt_ids,
        labels=(Example.IGNORE_INDEX,) * len(prompt_ids) + learnt_ids,
        template_hash=template,
    )


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name the tokenizer's chat template: the ``chat_template_sha256`` that a checkpoint's manifest has to repeat."""
    return chat_template_sha256(tokenizer.chat_template)


def end_of_turn_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the chat template closes an assistant turn with, for example ``<|im_end|>`` or ``<|eot_id|>``.

    It is read off the template (an assistant turn is rendered, and the first special token behind its content taken),
    because a base model's ``eos_token`` is often another one: Qwen2.5's base says ``<|endoftext|>`` while its template
    closes turns with ``<|im_end|>``. A template that closes a turn with no special token leaves ``eos_token``.

    Raises:
        RecipeError: neither the template nor the tokenizer has an end token.
    """
    marker = "stillhouse-turn"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    closing = text.rpartition(marker)[2].lstrip()
    special = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    matches = [content for content in special if closing.startswith(content)]
    if matches:
        return special[max(matches, key=len)]
    if tokenizer.eos_token_id is None:
        raise RecipeError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no eos_token and its chat template closes a turn with "
            f"{closing[:40]!r}, which is no special token: generation could not stop. Set eos_token in tokenizer_config.json."
        )
    return tokenizer.eos_token_id


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token that generation has to stop at: the template's end of turn first, then the tokenizer's own EOS."""
    ids = [end_of_turn_token_id(tokenizer)]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return tuple(ids)


def choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills short rows; never one that generation stops at.

    With ``pad = eos`` a collator that masks padding masks the EOS as well, and the student never learns to stop.

    Raises:
        RecipeError: the tokenizer has no token to spare for it.
    """
    stops = stop_token_ids(tokenizer)
    vocabulary = tokenizer.get_vocab()
    for token in (*_PAD_TOKENS, tokenizer.pad_token):
        if token is not None and token in vocabulary and vocabulary[token] not in stops:
            return vocabulary[token]
    raise RecipeError(
        f"the tokenizer of {tokenizer.name_or_path!r} has no pad token apart from its end tokens "
        f"{tokenizer.convert_ids_to_tokens(list(stops))}; looked for {', '.join(_PAD_TOKENS)} and its own pad_token "
        f"({tokenizer.pad_token!r}). Set pad_token in tokenizer_config.json to a token that is never written."
    )


_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Training rows</title><style>
body{{font:14px/1.5 system-ui,sans-serif;margin:2rem;max-width:70rem}}pre{{white-space:pre-wrap;word-break:break-word;
border:1px solid #ccc;padding:.6rem}}.learnt{{background:#d8f0d8}}.masked{{background:#eee;color:#555}}</style></head><body>
<h1>Training rows</h1><p><span class="learnt">learnt</span>, <span class="masked">not learnt (prompt)</span>;
special tokens are shown as they are.</p>{rows}</body></html>"""


def render_page(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> str:
    """A self-contained HTML page that shows which tokens of each row are learnt and which are not."""
    rows = []
    for example in examples:
        spans = []
        start = 0
        for end in range(1, len(example.labels) + 1):
            masked = example.labels[start] == Example.IGNORE_INDEX
            if end < len(example.labels) and (example.labels[end] == Example.IGNORE_INDEX) == masked:
                continue
            text = tokenizer.decode(list(example.input_ids[start:end]), skip_special_tokens=False)
            spans.append(f'<span class="{"masked" if masked else "learnt"}">{html.escape(text)}</span>')
            start = end
        counts = f"{len(example.input_ids)} tokens, {example.num_supervised_tokens} learnt"
        rows.append(f"<h2>{html.escape(example.key)}: {counts}</h2><pre>{''.join(spans)}</pre>")
    return _PAGE.format(rows="\n".join(rows))
