"""Run programs on a sandbox service over HTTP instead of on this machine: the ``/run_code`` call of SandboxFusion.

Request, a POST of JSON to ``URL/run_code``::

    {"code": "print(input())", "language": "python", "stdin": "3\\n", "compile_timeout": 10, "run_timeout": 10,
     "files": {"data.txt": "<base64>"}, "fetch_files": []}

Answer::

    {"status": "Success" | "Failed" | "SandboxError", "message": "", "compile_result": null, "files": {},
     "run_result": {"status": "Finished" | "TimeLimitExceeded" | "Error", "execution_time": 0.02, "return_code": 0,
                    "stdout": "3\\n", "stderr": ""}}

How well a program is shut off there is the service's affair and is not probed. One call is one program from start to end, so
only stdin/stdout tests can be judged this way; function-style tests need two sandboxes that talk (``exchange.py``).
"""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stillhouse.pipeline.sandbox.records import Limits, SandboxResult, SandboxUnavailable

_GRACE_S = 30.0
"""How long an answer may take beyond the program's own time: the service's queue."""


@dataclass(frozen=True, slots=True)
class SandboxService:
    """A service that speaks SandboxFusion's ``/run_code``; ``url`` without the path, for example ``http://sandbox:8080``."""

    url: str

    def run_program(
        self,
        source: str,
        stdin: str = "",
        *,
        files: Mapping[str, bytes] | None = None,
        limits: Limits = Limits(),  # noqa: B008
    ) -> SandboxResult:
        """Run one Python program there. Of the limits only ``wall_s`` is passed on; the service has its own.

        Raises:
            SandboxUnavailable: the service cannot be reached, refuses, or answers something else.
        """
        request = {
            "code": source,
            "language": "python",
            "stdin": stdin,
            "compile_timeout": limits.wall_s,
            "run_timeout": limits.wall_s,
            "files": {name: base64.b64encode(content).decode() for name, content in (files or {}).items()},
            "fetch_files": [],
        }
        began = time.monotonic()
        answer = self._post(request, limits.wall_s + _GRACE_S)
        took = time.monotonic() - began
        ran = answer.get("run_result") or {}
        if answer.get("status") not in ("Success", "Failed") or ran.get("status") not in ("Finished", "TimeLimitExceeded"):
            said = answer.get("message") or ran.get("stderr") or json.dumps(answer)
            raise SandboxUnavailable(f"the sandbox service at {self.url} did not run the program: {str(said)[:300]}")
        timed_out = ran["status"] == "TimeLimitExceeded"
        status = ran.get("return_code")
        if status is None and not timed_out:
            raise SandboxUnavailable(
                f"the sandbox service at {self.url} answered without a return_code: {json.dumps(ran)[:300]}"
            )
        seconds = float(ran.get("execution_time") or 0.0)
        stdout, stderr = ((ran.get(name) or "").encode(errors="surrogatepass") for name in ("stdout", "stderr"))
        killed_for = "time" if timed_out else ""
        return SandboxResult(
            stdout, stderr, 137 if status is None else status, timed_out, killed_for, seconds, max(0.0, took - seconds)
        )

    def _post(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        url = self.url.rstrip("/") + "/run_code"
        if not url.startswith(("http://", "https://")):
            raise SandboxUnavailable(f"a sandbox service is named by an http or https address, got {self.url!r}")
        order = urllib.request.Request(url, json.dumps(request).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(order, timeout=timeout_s) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace")
            raise SandboxUnavailable(f"{url} answered {error.code} {error.reason}: {said}") from error
        except (OSError, ValueError) as error:
            raise SandboxUnavailable(f"{url} cannot be reached or does not answer in JSON: {error}") from error
        if not isinstance(answer, dict):
            raise SandboxUnavailable(f"{url} answered {type(answer).__name__}, expected a JSON object")
        return answer
