"""What a failed request means: ask again, leave this request alone, or leave the endpoint alone; and how long to wait.

Statuses by RFC 9110 and by what hosted endpoints and engine servers send. Nothing here waits or sends.
"""

from __future__ import annotations

import email.utils
import math
import random
from datetime import UTC, datetime
from typing import Literal

Verdict = Literal["again", "refused", "stop"]
"""Ask again; never ask this request again; ask this endpoint nothing more."""

RETRIED = frozenset({408, 409, 425, 429, *range(500, 600)})
STOPPING = frozenset({401, 402, 403})
"""A key that is wrong, out of credit or not allowed is so for every request; to knock on can lock the account."""
OVERLOADED = frozenset({429, 503, 504, 529})
"""The server has too much to do: fewer requests at once. 529 is what some vendors send for it."""
MAY_HAVE_BEEN_BILLED = frozenset({502, 504, *range(520, 528)})
"""A gateway speaks for a server that did not answer in time, and that may have generated all the same."""
MAX_JITTER_S = 60.0
MAX_RETRY_AFTER_S = 600.0
"""An endpoint that asks for more is out of reach for this run; to knock earlier would only lengthen the ban."""
_OUT_OF_CREDIT = b"insufficient_quota"


def verdict_of(status: int, body: bytes) -> Verdict:
    """What a status other than 2xx means for the request and its endpoint.

    A redirect stops the endpoint: it is not followed, because it would carry prompts to a host that nobody named. So does a
    429 whose body says ``insufficient_quota``: OpenAI's word for an account without credit.
    """
    if status in STOPPING or 300 <= status < 400 or (status == 429 and _OUT_OF_CREDIT in body):
        return "stop"
    return "again" if status in RETRIED else "refused"


def jitter_s(attempt: int) -> float:
    """Seconds to wait after the ``attempt``-th failure (from 1): uniform over the whole of an interval that doubles.

    Full jitter, so that many requests do not come back together.
    """
    return random.uniform(0, min(MAX_JITTER_S, 2.0 ** min(attempt, 16)))


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
