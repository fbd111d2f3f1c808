"""The Hub client: one way to build it, one fallback, and every failure in words.

Nothing here prints or keeps a token; texts that come from elsewhere are scrubbed before they are shown.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from hardener import __version__
from hardener.errors import HubError, ResourceError, UsageError, disk_full

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")
log = logging.getLogger("hardener")
TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}")
"""What the Hub's tokens look like. One that stands in a command or a recipe is there by mistake."""
MISPLACED = "tokens come from `hf auth login` or HF_TOKEN and from nowhere else; make this one invalid and take another"

_STATUS = {
    401: "the Hub does not accept {token}; run `hf auth login`, or set HF_TOKEN to a valid token",
    403: "{token} lacks the right to do this; it needs write access to the namespace, and if fine-grained "
    "to this repository or organisation",
    409: "it exists already",
    412: "the target changed in the meantime and nothing was pushed; push again, or as a pull request",
    413: "the server refuses uploads of this size",
    429: "the Hub asks to slow down; wait a few minutes and run the same line again",
    501: "this server has no pull requests; push to a branch instead",
}


def client() -> HfApi:
    """A client that says who it is; HF_ENDPOINT is read at each call and not only at import.

    Raises UsageError where that holds a user or password, which would stand in every address that is shown.
    """
    from huggingface_hub import HfApi

    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_scrubbed)  # it logs what servers answer; a second time changes nothing
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    if endpoint is not None and "@" in endpoint:
        raise UsageError("HF_ENDPOINT holds a user or password; leave out what stands before the @")
    return HfApi(endpoint=endpoint, library_name="hardener", library_version=__version__)


def check_id(repo: str) -> None:
    """Raise UsageError unless `repo` can be the id of a Hub repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} is not a Hub repository id: {error}") from None


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn every failure of the Hub client inside into `HubError("WHAT: what happened; what to do")`.

    A full disk is a ResourceError. The cause is kept for `--debug`, unless its text holds the token.
    """
    from httpx2 import HTTPError, InvalidURL
    from huggingface_hub import errors

    try:
        yield
    except (
        HTTPError,
        InvalidURL,
        AttributeError,
        OSError,
        ValueError,
        RuntimeError,
        errors.EntryNotFoundError,
        errors.OIDCError,
        errors.RevisionResolutionError,
        errors.CorruptedCacheException,
    ) as error:
        if isinstance(error, AttributeError) and not _lost_its_session(error):
            raise
        message = scrub(f"{what}: {_why(error)}")
        kind = ResourceError if disk_full(error) else HubError
        raise kind(message) from (error if scrub(str(error)) == str(error) else None)


def no_right(what: str) -> HubError:
    """The error of a token that may not write there, before the Hub is asked to."""
    return HubError(f"{what}: {_STATUS[403].format(token=_token_source())}")


def scrub(text: str) -> str:
    """Take tokens out: the one in use, and whatever looks like one."""
    if token := _token():
        text = text.replace(token, "hf_***")
    return re.sub(r"(hf_|Bearer )[^\s'\"*]{8,}", r"\1***", text)


def _scrubbed(record: logging.LogRecord) -> bool:
    """Take tokens out of one line of a log."""
    record.msg, record.args = scrub(record.getMessage()), ()
    return True


def or_without_xet(transfer: Callable[[], T]) -> T:
    """Run a transfer; if the Xet route fails, say so and run it once more by plain HTTP.

    `transfer` must be repeatable. The switch holds for the process: a server without Xet stays so.
    """
    from huggingface_hub import constants

    try:
        return transfer()
    except (OSError, RuntimeError) as error:
        if constants.HF_HUB_DISABLE_XET or not _is_xet_failure(error):
            raise
        log.warning("Xet transfer failed (%s); going on by plain HTTP", scrub(_said(error)))
        constants.HF_HUB_DISABLE_XET = True
        return transfer()


def _is_xet_failure(error: OSError | RuntimeError) -> bool:
    """hf_xet raises plain built-in errors or its own; the client's errors know their request."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return "/xet-" in error.response.url.path
    return type(error) in (ConnectionError, TimeoutError, RuntimeError) or type(error).__module__ == "hf_xet"


def _lost_its_session(error: BaseException) -> bool:
    """Of two threads whose connections are refused, the client lets one take away the session that the other uses."""
    return isinstance(error, AttributeError) and error.obj is None and error.name in ("request", "stream")


def _why(error: BaseException) -> str:
    """What happened and what to do."""
    from httpx2 import InvalidURL, TransportError
    from huggingface_hub import constants, errors, is_offline_mode

    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return _why(error.__cause__)
    if isinstance(error, errors.HfHubHTTPError):
        return _answer(error)
    if disk_full(error):
        return f"no space left in {constants.HF_HUB_CACHE}; free some, or set HF_HOME to another disk"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return "no token is set; run `hf auth login`, or set HF_TOKEN"
    said = _said(error)
    if isinstance(error, errors.OIDCError):
        return f"{said}; in CI, check `id-token: write` and the repository's trusted publisher entry"
    absent = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError, errors.OfflineModeIsEnabled)
    if isinstance(error, (TransportError, InvalidURL, *absent)) or _lost_its_session(error):
        if is_offline_mode():
            return f"HF_HUB_OFFLINE is set and the cache does not hold it; fetch it online with `hf download` ({said})"
        return f"no answer from {client().endpoint}; check the network and HF_ENDPOINT ({said})"
    if isinstance(error, ConnectionError):
        return f"the connection broke; run the same line again, at need with HF_HUB_DISABLE_XET=1 ({said})"
    if said.startswith("Invalid metadata in README.md"):
        return f"{said}; nothing was sent: correct the `card` section of the recipe"
    return said


def _answer(error: HfHubHTTPError) -> str:
    """What an HTTP answer means. Order matters: to the client, gated is a kind of not found."""
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return (
            f"access is gated; ask for it at {client().endpoint}/{error.repo_id} with the account of "
            f"{_token_source()}; a fine-grained token also needs the right to read gated repositories"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository, or it is private and {_token_source()} cannot see it"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision"
    if isinstance(error, errors.EntryNotFoundError):
        return f"the repository has no file {error.response.url.path.rsplit('/', 1)[-1]}"
    if status >= 500 and status != 501:
        return f"the Hub failed with status {status}; nothing is lost, run the same line again later"
    said = f" (the Hub says: {error.server_message.splitlines()[0]})" if error.server_message else ""
    return _STATUS.get(status, f"the Hub answered with status {status}").format(token=_token_source()) + said


def _token() -> str | None:
    """The token in use; a trusted publisher whose exchange fails has none."""
    from huggingface_hub import errors, get_token

    try:
        return get_token()
    except errors.OIDCError:
        return None


def _token_source() -> str:
    """Name the token by where it comes from, never by what it is."""
    if os.environ.get("HF_OIDC_RESOURCE"):
        return "the trusted publisher token"
    if os.environ.get("HF_TOKEN"):
        return "the token in HF_TOKEN"
    return "the stored token" if _token() else "an anonymous user (no token is set)"


def _said(error: BaseException) -> str:
    """The text of an error on one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:400] + " ..."
