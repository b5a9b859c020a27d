"""A teacher behind an OpenAI-compatible chat endpoint: one request a completion, a bounded number at once.

What is retried and what is not: 408, 409, 429, 5xx, broken connections and bodies cut off or not JSON are, after
Retry-After (seconds or a date) or else full jitter; every other status (400, 401, 403, 404, 422, a redirect) never is,
because the next answer would be the same. The key comes from an environment variable, is sent to the one host alone, and
is taken out of whatever an error quotes.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from stillhouse.pipeline.errors import PartialTeacherError, TeacherError
from stillhouse.pipeline.extraction import THINK_CLOSE, THINK_OPEN
from stillhouse.pipeline.records import Completion, Sampling

RETRIED = frozenset({408, 409, 429, *range(500, 600)})
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 1800.0
MAX_ATTEMPTS = 6
MAX_JITTER_S = 60.0
MAX_RETRY_AFTER_S = 600.0
"""An endpoint that asks for more is out of reach for this run; to knock earlier would only lengthen the ban."""
CHARACTERS_PER_TOKEN = 4
"""Only for an endpoint that sends no usage: its token counts are then estimates."""


class EndpointGenerator:
    """Completes chats at ``base_url``/chat/completions.

    Args:
        base_url: for example ``https://api.example.com/v1``.
        model: the endpoint's name for the model.
        api_key_env: environment variable that holds the key; None sends none.
        max_concurrent: requests under way at once.
        max_attempts: requests made for one completion before it is given up.
        sleep: what waits between attempts, in seconds; None waits on the clock, and no longer than the others go on.

    Raises:
        TeacherError: the variable is not set, or holds what cannot be a key.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        max_concurrent: int = 16,
        max_attempts: int = MAX_ATTEMPTS,
        sleep: Callable[[float], object] | None = None,
    ):
        import requests
        from requests.adapters import HTTPAdapter

        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._model = model
        self._max_concurrent = max_concurrent
        self._max_attempts = max_attempts
        self._sleep = sleep
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy or .netrc gets to see the prompts unasked
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=max_concurrent, max_retries=0)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        self._key = _key_from(api_key_env, base_url) if api_key_env is not None else ""
        if self._key:
            self._session.headers["Authorization"] = f"Bearer {self._key}"

    def complete(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> list[Completion]:
        """Complete chats, in their order. After one that fails for good, no further request goes out.

        Args:
            prompts: each the messages as JSON, see `stillhouse.teachers.tracing.render_for_teacher`.
            seeds: sent along modulo 2³¹; whether the endpoint honours them is its business.

        Raises:
            PartialTeacherError: the endpoint cannot be reached, refuses a request, or answers with something else; what it
                answered before is in the error.
        """
        failures: list[Exception] = []
        failed = threading.Event()

        def one(prompt: str, seed: int) -> Completion | None:
            try:
                return self._one(prompt, seed, sampling, failed)
            except Exception as error:  # raised below, in the caller's thread; the first one tells what went wrong
                failures.append(error)
                failed.set()
                return None

        with ThreadPoolExecutor(max_workers=self._max_concurrent) as pool:
            completions = list(pool.map(one, prompts, seeds))
        if failures:
            if not isinstance(failures[0], TeacherError):
                raise failures[0]
            completed = {index: completion for index, completion in enumerate(completions) if completion is not None}
            raise PartialTeacherError(str(failures[0]), completed) from failures[0]
        return completions

    def _one(self, prompt: str, seed: int, sampling: Sampling, failed: threading.Event) -> Completion:
        body = {
            "model": self._model,
            "messages": json.loads(prompt),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "n": 1,
            "seed": seed % 2**31,
        }
        answer = self._post(body, failed)
        try:
            return read_completion(answer, seed, num_prompt_characters=sum(len(m["content"]) for m in body["messages"]))
        except (KeyError, IndexError, TypeError) as error:
            raise TeacherError(
                f"{self._url} answered with JSON that is no chat completion ({type(error).__name__}: {error}): "
                f"{self._quote(json.dumps(answer))}"
            ) from error

    def _post(self, body: Mapping[str, Any], failed: threading.Event) -> Any:
        import requests

        # What a connection that breaks can raise; the last two where it breaks within the body.
        broken = (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
            requests.exceptions.ContentDecodingError,
        )
        who = f"the teacher {self._model!r} at {self._url}"
        for attempt in range(1, self._max_attempts + 1):
            if failed.is_set():
                raise TeacherError(f"{who} was not asked again, because another request of the same call had failed")
            wait_s: float | None = None
            cause: Exception | None = None
            try:
                # A redirect would make a POST a GET, or carry the prompts to a host that nobody named.
                response = self._session.post(
                    self._url, json=body, timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S), allow_redirects=False
                )
            except broken as error:
                what, cause = f"cannot be reached ({type(error).__name__})", error
            except requests.RequestException as error:
                raise TeacherError(f"{who} cannot be asked ({type(error).__name__}); correct teacher.base_url") from error
            else:
                if 200 <= response.status_code < 300:
                    try:
                        return response.json()
                    except requests.exceptions.JSONDecodeError as error:
                        quoted = self._quote(response.text)
                        what, cause = f"answered {response.status_code} with something that is not JSON: {quoted}", error
                else:
                    what = f"answered {response.status_code}: {self._quote(response.text)}"
                    if response.is_redirect:
                        what += f", a redirect to {self._quote(response.headers['Location'])}; correct teacher.base_url"
                    if response.status_code not in RETRIED:
                        raise TeacherError(f"{who} {what}; this is not retried")
                    wait_s = retry_after_s(response.headers.get("Retry-After"))
            if attempt == self._max_attempts:
                raise TeacherError(
                    f"{who} {what}, {attempt} times; everything committed stays, the same command goes on from there"
                ) from cause
            if wait_s is not None and wait_s > MAX_RETRY_AFTER_S:
                raise TeacherError(
                    f"{who} {what}, and asks to be left alone for {wait_s:.0f} s; everything committed stays, the same command "
                    "goes on from there, then"
                )
            # Full jitter: spread over the whole interval, so that many clients do not come back together.
            if wait_s is None:
                wait_s = random.uniform(0, min(MAX_JITTER_S, 2.0**attempt))
            (self._sleep or failed.wait)(wait_s)
        raise AssertionError("the loop returns or raises")

    def _quote(self, text: str) -> str:
        """The start of what the endpoint said, without the key: some repeat it in their refusals."""
        return repr((text.replace(self._key, "[key]") if self._key else text)[:200])


def _key_from(variable: str, base_url: str) -> str:
    key = os.environ.get(variable, "").strip()  # a mounted secret often ends in a newline
    if not key:
        raise TeacherError(
            f"the endpoint {base_url} needs a key and the environment variable {variable} is not set; export it where the run "
            "starts (a submitted job: in the environment of `ray start`)"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise TeacherError(
            f"the environment variable {variable} holds what cannot be a key: it has blanks, line ends or characters beyond "
            "ASCII in it; export the key alone"
        )
    return key


def retry_after_s(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, in either of its forms (RFC 9110, 10.2.3); None where it has no say."""
    if not header:
        return None
    try:
        seconds = float(header)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass  # then it is a date
    try:
        when = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    if when.tzinfo is None:  # how email.utils gives a zone of -0000: UTC without a word about the place
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def read_completion(answer: Mapping[str, Any], seed: int, *, num_prompt_characters: int = 0) -> Completion:
    """Turn a chat completion into ours: reasoning is understood as ``reasoning``, ``reasoning_content`` or inline.

    Reasoning with no content is a completion cut at its length, whatever finish_reason says. Inline reasoning may lack its
    opening tag, which is then in the endpoint's prompt template; it is put back.

    Args:
        num_prompt_characters: to estimate the prompt's tokens where the endpoint does not count them.

    Raises:
        KeyError, IndexError, TypeError: the answer lacks choices or a message, or its text is no text.
    """
    choice = answer["choices"][0]
    message = choice["message"]
    if not isinstance(message, Mapping):
        raise TypeError(f"the message is a {type(message).__name__}, not an object")
    content = message.get("content") or ""
    reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
    for name, text in (("content", content), ("reasoning", reasoning)):
        if not isinstance(text, str):
            raise TypeError(f"the message's {name} is a {type(text).__name__}, not text")
    finish_reason = "stop" if choice.get("finish_reason") == "stop" else "length"
    if reasoning.strip() and not content.strip():
        text, finish_reason = f"{THINK_OPEN}\n{reasoning}", "length"
    elif reasoning.strip() and THINK_CLOSE not in content:
        text = f"{THINK_OPEN}\n{reasoning.strip()}\n{THINK_CLOSE}\n\n{content.strip()}"
    elif THINK_CLOSE in content and THINK_OPEN not in content:
        text = f"{THINK_OPEN}\n{content}"
    else:
        text = content
    usage = answer.get("usage") or {}
    # JSON may carry half a surrogate pair, which no file can hold.
    text = text.encode("utf-8", "replace").decode("utf-8")
    return Completion(
        text=text,
        finish_reason=finish_reason,
        num_prompt_tokens=int(usage.get("prompt_tokens") or -(-num_prompt_characters // CHARACTERS_PER_TOKEN)),
        num_completion_tokens=int(usage.get("completion_tokens") or -(-len(text) // CHARACTERS_PER_TOKEN)),
        seed=seed,
    )
