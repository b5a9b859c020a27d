"""The answers of a fault server that stands in front of a real endpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout

from stillhouse.teachers.fault_answers import completion_text
from stillhouse.teachers.fault_breakage import error_content

_PASSED_ON = ("Content-Type", "Retry-After")


class UpstreamRefused(Exception):
    """The upstream did not complete; what it said is passed on as it came."""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        super().__init__(f"the upstream answered {status}")
        self.status, self.body, self.headers = status, body, headers


class Upstream:
    """A real endpoint that writes the answers, for `FaultServer`. Always asked for a whole answer, never redirected."""

    def __init__(self, base_url: str) -> None:
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._session: ClientSession | None = None

    async def __aenter__(self) -> Upstream:
        # A real answer may take an hour; who asks has time limits of its own. No proxy gets to see the prompts unasked.
        self._session = ClientSession(timeout=ClientTimeout(total=None), trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def completion(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
        """Ask; the client's ``Authorization`` is handed on.

        Raises:
            UpstreamRefused: it answered with another status than 200 or with no chat completion, or not at all (then 502).
        """
        asked = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
        key = {"Authorization": headers["Authorization"]} if "Authorization" in headers else {}
        try:
            async with self._session.post(self._url, json=asked, headers=key, allow_redirects=False) as response:
                content = await response.read()
        except (ClientError, OSError) as error:
            said = error_content(502, f"the upstream {self._url} does not answer ({type(error).__name__}: {error})")
            raise UpstreamRefused(502, json.dumps(said).encode(), {"Content-Type": "application/json"}) from error
        passed_on = {name: response.headers[name] for name in _PASSED_ON if name in response.headers}
        if response.status != 200:
            raise UpstreamRefused(response.status, content, passed_on)
        try:
            completion = json.loads(content)
            completion_text(completion)
            completion["choices"][0]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UpstreamRefused(200, content, passed_on) from error
        return completion
