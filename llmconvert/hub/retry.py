"""Retries with backoff: how often, after how long, and after which failures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

__all__ = [
    "TRANSPORT_ERROR",
    "Backoff",
    "is_expired_link",
    "is_transient",
    "is_unreachable",
    "retry_after",
    "retrying",
]

#: The transport's own base class, whichever httpx the client is built on.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
_TRANSIENT = (408, 429, 500, 502, 503, 504)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Backoff:
    """How to repeat a failed request.

    Attributes:
        tries: requests in all.
        first_seconds: wait after the first failure; it doubles from one to the next.
        longest_seconds: what it doubles up to.
        patience_seconds: the longest ``Retry-After`` that is waited for.
    """

    tries: int = 5
    first_seconds: float = 1.0
    longest_seconds: float = 8.0
    patience_seconds: float = 600.0

    def seconds(self, attempt: int, error: Exception) -> float | None:
        """How long to wait after failure number ``attempt`` (from 1); None to give up."""
        if attempt >= self.tries or not is_transient(error):
            return None
        asked = retry_after(error)
        if asked is not None:
            return asked if asked <= self.patience_seconds else None
        return float(min(self.longest_seconds, self.first_seconds * 2 ** (attempt - 1)))


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: no connection, too many requests, or a failing server."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _TRANSIENT or is_expired_link(error)
    return isinstance(error, TRANSPORT_ERROR)


def is_expired_link(error: Exception) -> bool:
    """Whether a storage server refused a link that the Hub had signed; the Hub gives a fresh one when asked again."""
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in (401, 403):
        return False
    hub = urlsplit(huggingface_hub.constants.ENDPOINT)
    return urlsplit(str(error.response.url)).netloc != hub.netloc


def is_unreachable(error: BaseException) -> bool:
    """Whether no connection could be made at all: no network, no such host, or nobody listening there."""
    return type(error).__name__ in ("ConnectError", "ConnectTimeout")  # of whichever httpx the client is built on


def retrying(call: Callable[[], Result], backoff: Backoff) -> Result:
    """``call()``, again after transient failures; for requests that may be repeated safely."""
    attempt = 0
    while True:
        attempt += 1
        try:
            return call()
        except TRANSPORT_ERROR as error:
            seconds = backoff.seconds(attempt, error)
            if seconds is None:
                raise
            time.sleep(seconds)


def retry_after(error: Exception) -> float | None:
    """Seconds that the server asked to wait, from a ``Retry-After`` header in either of its forms."""
    text = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    try:
        return float(text) if text.isdigit() else (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return None
