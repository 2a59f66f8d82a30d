"""What the Hub's client says: errors as one line that says what to do, its log without secrets, and no more noise."""

from __future__ import annotations

import difflib
import errno
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from llmconvert.errors import CapacityError, HubError, LlmconvertError
from llmconvert.hub.retry import TRANSPORT_ERROR, is_expired_link, retry_after

__all__ = ["hub_errors", "without_secrets", "without_tokens"]

_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
# Links to storage carry their permission in the query; whoever reads one may write there until it expires.
_SIGNED = re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>]+")
# What the client logs of its own inner steps; a push without changes is ours to tell.
_NOISE = ("No files have been modified", "No files matched")
# Behind what failed, before the client says that it tries again; what fails in the end is an error of ours.
_FAILED = " thrown while requesting "
# Of the models that a search finds, how many are looked at, and how many are shown.
_LOOKED_AT, _SHOWN = 100, 3


def without_tokens(text: str) -> str:
    """``text`` without anything that looks like, or is, a Hub token."""
    token = huggingface_hub.get_token()
    return _TOKEN.sub("[token]", text.replace(token, "[token]") if token else text)


def without_secrets(text: str) -> str:
    """``text`` without Hub tokens, and without the queries of links, in which storage servers are given permission."""
    return _SIGNED.sub(r"\1?[…]", without_tokens(text))


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn every failure of ``huggingface_hub`` into one line that says what to do, free of tokens; what else it would
    write to the terminal is cleaned, or left out."""
    try:
        with _quiet():
            yield
    except LlmconvertError:
        raise
    except (OSError, ValueError, RuntimeError, RevisionResolutionError, EntryNotFoundError, TRANSPORT_ERROR) as caught:
        # Uploads wrap what went wrong in a RuntimeError that does not say it.
        wrapped = isinstance(caught, RuntimeError) and isinstance(caught.__cause__, (OSError, TRANSPORT_ERROR))
        error = caught.__cause__ if wrapped else caught
        assert isinstance(error, Exception)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or "the cache (HF_HOME)"
            raise CapacityError(f"{repo_id}: the disk that holds {where} is full; free some space") from None
        # Without the cause: its text is the server's, and may quote the request.
        raise HubError(without_secrets(f"{repo_id}: {_explain(error, repo_id, revision)}")) from None


def _explain(error: Exception, repo_id: str, revision: str | None) -> str:
    endpoint = huggingface_hub.constants.ENDPOINT
    match error:
        case RevisionNotFoundError():
            return f"has no revision {revision or 'main'!r}; name a branch, tag or commit that is listed there"
        case GatedRepoError():
            return f"is gated; accept its terms at {endpoint}/{repo_id} and set HF_TOKEN to a token of that account"
        case RepositoryNotFoundError():
            return _explain_not_found(error, repo_id)
        case DisabledRepoError():
            return "was disabled on the Hub"
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set and this needs the Hub; unset it"
        case LocalEntryNotFoundError() | RevisionResolutionError():
            if huggingface_hub.constants.HF_HUB_OFFLINE:
                return "HF_HUB_OFFLINE is set and the model is not (completely) in the cache; fetch it once online"
            if isinstance(error.__cause__, HfHubHTTPError):  # it was reached, and said no
                return _explain(error.__cause__, repo_id, revision)
            cause = type(error.__cause__ or error).__name__
            return f"{endpoint} could not be reached ({cause}), and the model is not in the cache"
        case HFValidationError():
            return f"is no valid repository id: {_first_line(error)}"
        case HfHubHTTPError():
            return _explain_status(error)
        case _:
            if isinstance(error, TRANSPORT_ERROR):
                return f"{endpoint} could not be reached ({type(error).__name__}: {_first_line(error)})"
            return _first_line(error)


def _explain_not_found(error: RepositoryNotFoundError, repo_id: str) -> str:
    """A model the Hub doesn't show: a wrong id, a private one, or a token that it doesn't accept (any more)."""
    endpoint = huggingface_hub.constants.ENDPOINT
    refused = error.response.status_code == 401 and huggingface_hub.get_token() is not None
    if refused and ("expired" in (error.server_message or "") or _token_is_rejected()):
        return (
            "the token was rejected, it may have expired; "
            f"make one at {endpoint}/settings/tokens and set HF_TOKEN to it, or unset it"
        )
    near = _near_matches(repo_id)
    return (
        f"no such model on {endpoint}, or it is private; "
        + (f"did you mean {' or '.join(near)}? " if near else "")
        + ("Otherwise check" if near else "check")
        + " the spelling (org/name), and set HF_TOKEN if it is private"
    )


def _token_is_rejected() -> bool:
    """Whether the Hub knows the token no longer, or never did; False if it can't be asked."""
    try:
        HfApi().whoami()
    except HfHubHTTPError as error:
        return error.response.status_code == 401
    except (OSError, TRANSPORT_ERROR):
        return False
    return False


def _near_matches(repo_id: str) -> list[str]:
    """Models whose id is close to ``repo_id``: of the same owner, or with the same name; none if it can't be asked."""
    owner, _, name = repo_id.partition("/")
    found: set[str] = set()
    for words, author in ((name, None), (None, owner)):
        with suppress(Exception):  # a suggestion is not worth an error of its own
            found |= {model.id for model in HfApi().list_models(search=words, author=author, limit=_LOOKED_AT)}
    lowered = {model_id.lower(): model_id for model_id in sorted(found) if model_id != repo_id}
    near = difflib.get_close_matches(repo_id.lower(), list(lowered), n=_SHOWN, cutoff=0.75)
    return [lowered[match] for match in near]


def _explain_status(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if is_expired_link(error):
        return f"HTTP {status} from the storage server: the link that the Hub gave expired; run the same command again"
    wait = retry_after(error)
    said = f" (the Hub says: {' '.join(error.server_message.split())})" if error.server_message else ""
    tokens = f"{huggingface_hub.constants.ENDPOINT}/settings/tokens"
    advice = {
        401: f"the token was rejected, it may have expired; make one at {tokens} and set HF_TOKEN to it, or unset it",
        403: "the token does not allow this; use one with the needed permission",
        404: "not found",
        409: "conflicts with what is there",
        412: "the branch has moved meanwhile; look at what came in, then run the same command again",
        429: "too many requests; wait a few minutes and run the same command again",
        507: "the Hub has no room for this; free some storage of the account",
    }
    default = "the Hub failed; run the same command again later" if status >= 500 else "the Hub refused the request"
    after = f"; it asks to wait {wait:,.0f} s" if wait is not None else ""
    return f"HTTP {status}: {advice.get(status, default)}{after}{said}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 1 + _SHOWN]) if lines[0].endswith(":") else lines[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's own progress bars, which would be drawn over ours, and with its log cleaned."""
    bars = not are_progress_bars_disabled()
    handlers = [one for one in logging.getLogger("huggingface_hub").handlers if _clean not in one.filters]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="huggingface_hub")
        if bars:
            disable_progress_bars()
        for handler in handlers:
            handler.addFilter(_clean)
        try:
            yield
        finally:
            for handler in handlers:
                handler.removeFilter(_clean)
            if bars:
                enable_progress_bars()


def _clean(record: logging.LogRecord) -> bool:
    """What the client logs, without tokens and links that grant access."""
    text = record.getMessage()
    if text.startswith(_NOISE) or _FAILED in text:
        return False
    record.msg, record.args = without_secrets(text), ()
    return True
