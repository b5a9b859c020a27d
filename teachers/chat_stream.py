"""Put a streamed chat completion together from its chunks, as server-sent events bring them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stillhouse.teachers.chat_response import message_text


class ChatStream:
    """Feed it the bytes as they come; `answer` is then the ``chat.completion`` object that would have come whole.

    One event is one ``data:`` line, as every server of this protocol sends it. Comments, which some send to keep a connection
    alive, and blank lines are skipped.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._logprobs: list[Any] = []
        self._finish_reason: Any = None
        self._usage: Any = None
        self._names: dict[str, Any] = {}
        self.num_characters = 0
        """Reasoning and content so far."""
        self.done = False
        """The server said ``[DONE]``: nothing follows."""

    @property
    def complete(self) -> bool:
        """True once the chunk with the finish_reason has come. ``[DONE]`` without it is how a proxy ends a broken stream."""
        return self._finish_reason is not None

    def feed(self, data: bytes) -> str:
        """Take in the next bytes; the text that they add, reasoning and content alike.

        Raises:
            ValueError: an event is no chunk of a chat completion, or says that the server failed.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        return "".join([self._event(line[5:].strip()) for line in lines if line.startswith(b"data:")])

    def _event(self, payload: bytes) -> str:
        if payload == b"[DONE]":
            self.done = True
            return ""
        chunk = json.loads(payload)
        if not isinstance(chunk, Mapping) or not isinstance(choices := chunk.get("choices"), list):
            # Not cut short here: what quotes it takes the key out first, and would not know half of one.
            raise ValueError(f"its stream holds what is no chunk of a chat completion: {payload.decode('utf-8', 'replace')}")
        self._usage = chunk.get("usage") or self._usage
        if not self._names:
            self._names = {name: chunk.get(name) for name in ("id", "model")}
        # Only the first choice, because one is asked for; a chunk with usage has none.
        return self._choice(choices[0]) if choices else ""

    def _choice(self, choice: Any) -> str:
        if not isinstance(choice, Mapping) or not isinstance(delta := choice.get("delta") or {}, Mapping):
            raise ValueError("its stream holds a choice that is no object")
        reasoning = message_text(delta, "reasoning") or message_text(delta, "reasoning_content")
        content = message_text(delta, "content")
        if reasoning:
            self._reasoning.append(reasoning)
        if content:
            self._content.append(content)
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, Mapping) and isinstance(tokens := logprobs.get("content"), list):
            self._logprobs.extend(tokens)
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        self.num_characters += len(reasoning) + len(content)
        return reasoning + content

    def answer(self) -> bytes:
        """What has come so far as one ``chat.completion`` object, JSON in ASCII."""
        message = {"role": "assistant", "content": "".join(self._content)}
        if self._reasoning:
            message["reasoning"] = "".join(self._reasoning)
        choice = {"index": 0, "message": message, "finish_reason": self._finish_reason}
        if self._logprobs:
            choice["logprobs"] = {"content": self._logprobs}
        answer = {**self._names, "object": "chat.completion", "choices": [choice]}
        if self._usage:
            answer["usage"] = self._usage
        return json.dumps(answer).encode()
