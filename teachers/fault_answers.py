"""The answers of a fault server that has no model: chain-of-thought text made up from a seed, as chat completions.

An answer is a pure function of (seed, request): the same request gets the same text however often it is asked. Tokens are
counted as four characters each, for prompts and completions alike, so that anyone can recount them.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

Shape = Literal["inline", "reasoning", "reasoning_content"]
CHARACTERS_PER_TOKEN = 4
_EVENT_CHARACTERS = 64 * CHARACTERS_PER_TOKEN
_CREATED = 1_700_000_000
_FILLER = (
    "Let me write down what is given before anything else.",
    "Wait, that does not look right; let me go through it once more.",
    "Both ways lead to the same number, so this step holds.",
    "Hmm, what if the order of the two were the other way round?",
    "That is smaller than before, as it should be.",
    "So far this agrees with the first estimate.",
    "Let me check the units: they cancel, which is good.",
    "I could also start from the end and work backwards.",
)


def num_tokens(text: str) -> int:
    """Four characters a token, a started token counted."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def num_prompt_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
    """Tokens of all messages' texts."""
    return sum(num_tokens(str(message.get("content") or "")) for message in messages)


def check_request(body: Mapping[str, Any]) -> None:
    """Make sure that a request can be answered.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it is no chat request.
    """
    num_prompt_tokens(body["messages"])
    for name in ("max_tokens", "max_completion_tokens", "top_logprobs"):
        int(body.get(name) or 0)


def completion_text(completion: Mapping[str, Any]) -> str:
    """All that a chat completion's messages say, reasoning and content, to estimate its tokens where they are not counted.

    Raises:
        LookupError, TypeError, AttributeError: it is no chat completion.
    """
    messages = [choice["message"] for choice in completion["choices"]]
    return "".join(message.get(name) or "" for message in messages for name in ("reasoning", "reasoning_content", "content"))


class SyntheticAnswers:
    """Writes chat completions with a think block and an answer in ``\\boxed{}``.

    Args:
        seed: another seed, other texts.
        mean_characters: mean length of a text; lengths are log-normal around it.
        spread: standard deviation of the lengths' logarithm; 0 makes all the same length.
        shape: where the reasoning stands: inline in the content, or in one of the two fields that servers use.
    """

    def __init__(self, seed: int = 0, *, mean_characters: int = 2000, spread: float = 0.5, shape: Shape = "inline"):
        self._seed = seed
        self._mu = math.log(mean_characters) - spread**2 / 2
        self._spread = spread
        self._shape = shape
        chance = random.Random(seed)
        self._steps = [self._step(chance) for _ in range(2000)]
        self._mean_step = sum(map(len, self._steps)) / len(self._steps) + 1

    @staticmethod
    def _step(chance: random.Random) -> str:
        if chance.random() < 0.4:
            return chance.choice(_FILLER)
        a, b = chance.randrange(2, 1000), chance.randrange(2, 1000)
        sign, result = chance.choice([("+", a + b), ("-", a - b), ("*", a * b)])
        return f"The next step is {a} {sign} {b} = {result}."

    def text(self, identity: str) -> tuple[str, str]:
        """Reasoning and answer for a request, see `stillhouse.teachers.fault_plan.request_identity`."""
        chance = random.Random(f"{self._seed} {identity}")
        answer = f"Putting the steps together gives \\boxed{{{chance.randrange(100_000)}}}."
        length = max(1, round(chance.lognormvariate(self._mu, self._spread)) - len(answer) - len("<think>\n\n</think>\n\n"))
        steps = chance.choices(self._steps, k=2 + round(1.3 * length / self._mean_step))
        return "\n".join(steps)[:length].rstrip(), answer

    def completion(self, body: Mapping[str, Any], identity: str, response_id: str) -> dict[str, Any]:
        """The whole ``chat.completion`` object; ``max_tokens`` cuts the text and makes its finish_reason ``length``."""
        reasoning, answer = self.text(identity)
        whole = f"<think>\n{reasoning}\n</think>\n\n{answer}"
        limit = int(body.get("max_completion_tokens") or body.get("max_tokens") or 0)
        finish_reason = "stop"
        if limit and num_tokens(whole) > limit:
            whole, finish_reason = whole[: limit * CHARACTERS_PER_TOKEN], "length"
        message: dict[str, Any] = {"role": "assistant", "content": whole}
        if self._shape != "inline":
            before, closed, after = whole.removeprefix("<think>\n").partition("\n</think>\n\n")
            message |= {"content": after if closed else None, self._shape: before}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": list(_logprobs(whole, int(body.get("top_logprobs") or 0), identity))}
        prompt_tokens, completion_tokens = num_prompt_tokens(body["messages"]), num_tokens(whole)
        return {
            "id": response_id,
            "object": "chat.completion",
            "created": _CREATED,
            "model": body.get("model", ""),
            "choices": [choice],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }


def _logprobs(text: str, top: int, identity: str) -> Iterator[dict[str, Any]]:
    chance = random.Random(f"logprobs {identity}")
    for start in range(0, len(text), CHARACTERS_PER_TOKEN):
        token = text[start : start + CHARACTERS_PER_TOKEN]
        logprob = -chance.expovariate(4)
        others = [{"token": token, "logprob": logprob, "bytes": list(token.encode())}]
        for rank in range(1, top):
            others.append({"token": f"alt{rank}", "logprob": logprob - 2.0 * rank, "bytes": list(f"alt{rank}".encode())})
        yield {**others[0], "top_logprobs": others[:top]}


def stream_events(completion: Mapping[str, Any], *, include_usage: bool) -> list[bytes]:
    """Cut a chat completion into the server-sent events of a stream, ``[DONE]`` included.

    Reasoning comes first, then content; log probabilities are spread over the events in their order; the counts come in a last
    event without a choice where ``include_usage`` asks for them.
    """
    head = {key: completion[key] for key in ("id", "created", "model") if key in completion}
    head["object"] = "chat.completion.chunk"
    usage = {"usage": None} if include_usage else {}

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: %b\n\n" % json.dumps({**head, "choices": choices, **usage, **more}, ensure_ascii=False).encode()

    events = []
    for choice in completion["choices"]:
        message = choice["message"]
        deltas: list[dict[str, Any]] = []
        for name in ("reasoning", "reasoning_content", "content"):
            text = message.get(name) or ""
            deltas += [{name: text[i : i + _EVENT_CHARACTERS]} for i in range(0, len(text), _EVENT_CHARACTERS)]
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        events.append(event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]))
        for i, delta in enumerate(deltas):
            part = {"index": 0, "delta": delta, "finish_reason": None}
            if logprobs:
                cut = slice(len(logprobs) * i // len(deltas), len(logprobs) * (i + 1) // len(deltas))
                part["logprobs"] = {"content": logprobs[cut]}
            events.append(event([part]))
        events.append(event([{"index": 0, "delta": {}, "finish_reason": choice.get("finish_reason")}]))
    if not completion["choices"]:
        events.append(event([]))
    if include_usage and completion.get("usage"):
        events.append(event([], usage=completion["usage"]))
    return [*events, b"data: [DONE]\n\n"]
