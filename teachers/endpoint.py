"""A teacher behind an OpenAI-compatible chat endpoint: one request a completion, a bounded number at once.

What is retried and what is not: 408, 409, 429, 5xx and broken connections are, after Retry-After (seconds or a date) or
else full jitter; 400, 401, 403, 404 and 422 never are, because the next answer would be the same. The key comes from an
environment variable and is written nowhere.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from stillhouse.pipeline.errors import TeacherError
from stillhouse.pipeline.extraction import THINK_CLOSE, THINK_OPEN
from stillhouse.pipeline.records import Completion, Sampling

RETRIED = frozenset({408, 409, 429, *range(500, 600)})
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 1800.0
MAX_ATTEMPTS = 6
MAX_WAIT_S = 60.0
CHARACTERS_PER_TOKEN = 4
"""Only for an endpoint that sends no usage: its token counts are then estimates."""


class EndpointGenerator:
    """Completes chats at ``base_url``/chat/completions.

    Args:
        base_url: for example ``https://api.example.com/v1``.
        model: the endpoint's name for the model.
        api_key_env: environment variable that holds the key; None sends none.
        max_concurrent: requests under way at once.
        sleep: what waits between attempts, in seconds.

    Raises:
        TeacherError: the variable is not set.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        max_concurrent: int = 16,
        max_attempts: int = MAX_ATTEMPTS,
        sleep: Callable[[float], None] = time.sleep,
    ):
        import requests
        from requests.adapters import HTTPAdapter

        self._url = f"{base_url}/chat/completions"
        self._model = model
        self._max_concurrent = max_concurrent
        self._max_attempts = max_attempts
        self._sleep = sleep
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy or .netrc gets to see the prompts unasked
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=max_concurrent, max_retries=0)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        if api_key_env is not None:
            key = os.environ.get(api_key_env, "")
            if not key:
                raise TeacherError(
                    f"the endpoint {base_url} needs a key and the environment variable {api_key_env} is not set; export it "
                    "where the run starts (on a cluster: in the job's environment)"
                )
            self._session.headers["Authorization"] = f"Bearer {key}"

    def complete(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        """Complete chats, in their order.

        Args:
            prompts: each the messages as JSON, see `stillhouse.teachers.tracing.render_for_teacher`.
            seeds: sent along modulo 2³¹; whether the endpoint honours them is its business.

        Raises:
            TeacherError: the endpoint cannot be reached, refuses the request, or answers with something else.
        """
        with ThreadPoolExecutor(max_workers=self._max_concurrent) as pool:
            return list(pool.map(lambda pair: self._one(*pair, sampling), zip(prompts, seeds)))

    def _one(self, prompt: str, seed: int, sampling: Sampling) -> Completion:
        body = {
            "model": self._model,
            "messages": json.loads(prompt),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "n": 1,
            "seed": seed % 2**31,
        }
        answer = self._post(body)
        try:
            return read_completion(answer, seed)
        except (KeyError, IndexError, TypeError) as error:
            raise TeacherError(
                f"{self._url} answered with JSON that is no chat completion (no {error}): {json.dumps(answer)[:200]}"
            ) from error

    def _post(self, body: Mapping[str, Any]) -> Any:
        import requests

        for attempt in range(1, self._max_attempts + 1):
            wait_s = None
            try:
                response = self._session.post(self._url, json=body, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S))
            except (requests.ConnectionError, requests.Timeout) as error:
                what = f"cannot be reached ({type(error).__name__})"
                cause: Exception | None = error
            else:
                if response.ok:
                    try:
                        return response.json()
                    except requests.exceptions.JSONDecodeError as error:
                        what, cause = "answered 200 with something that is not JSON", error
                else:
                    what, cause = f"answered {response.status_code}: {response.text[:200]!r}", None
                    if response.status_code not in RETRIED:
                        raise TeacherError(f"the teacher {self._model!r} at {self._url} {what}; this is not retried")
                    wait_s = retry_after_s(response.headers.get("Retry-After"))
            if attempt == self._max_attempts:
                raise TeacherError(
                    f"the teacher {self._model!r} at {self._url} {what}, {attempt} times; everything committed stays, the "
                    "same command goes on from there"
                ) from cause
            # Full jitter: spread over the whole interval, so that many clients do not come back together.
            self._sleep(min(MAX_WAIT_S, wait_s) if wait_s is not None else random.uniform(0, min(MAX_WAIT_S, 2.0**attempt)))
        raise AssertionError("the loop returns or raises")


def retry_after_s(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, in either of its forms (RFC 9110, 10.2.3); None where it has no say."""
    if not header:
        return None
    if header.strip().isdigit():
        return float(header)
    try:
        when = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def read_completion(answer: Mapping[str, Any], seed: int) -> Completion:
    """Turn a chat completion into ours: reasoning is understood as ``reasoning``, ``reasoning_content`` or inline.

    Reasoning with no content is a completion cut at its length, whatever finish_reason says.

    Raises:
        KeyError, IndexError, TypeError: the answer lacks choices or a message.
    """
    choice = answer["choices"][0]
    message = choice["message"]
    content = message.get("content")
    reasoning = message.get("reasoning") or message.get("reasoning_content")
    finish_reason = "stop" if choice.get("finish_reason") == "stop" else "length"
    if reasoning and content is None:
        text, finish_reason = f"{THINK_OPEN}\n{reasoning}", "length"
    elif reasoning:
        text = f"{THINK_OPEN}\n{reasoning.strip()}\n{THINK_CLOSE}\n\n{content.strip()}"
    else:
        text = content or ""
    usage = answer.get("usage") or {}
    return Completion(
        text=text,
        finish_reason=finish_reason,
        num_prompt_tokens=int(usage.get("prompt_tokens") or 0),
        num_completion_tokens=int(usage.get("completion_tokens") or -(-len(text) // CHARACTERS_PER_TOKEN)),
        seed=seed,
    )
