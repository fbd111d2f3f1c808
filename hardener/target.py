"""Where a release will go, settled before the compute: token, name, rights, licence, gating, privacy, tag.

`look` asks the Hub and changes nothing. A dry run tells what it found (`destination`); a real run goes on from there
(`prepare`), so that both fail alike. A repository that `prepare` creates stays private until the push has compared
what arrived. It hands a `Target` to `note` as soon as something changed that a second try must know: answers get lost,
processes get killed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, cast

from hardener.client import check_id, client, explained, no_right
from hardener.errors import HubError, UsageError
from hardener.metadata import ModelRef

if TYPE_CHECKING:
    from huggingface_hub import Discussion, HfApi, ModelInfo

log = logging.getLogger("hardener")
HUBS_OWN = ".gitattributes"
"""Written by the Hub, needed by it, and no part of a release."""
CREATORS = ("admin", "write", "contributor")
"""Roles in an organisation that may create repositories."""
NOT_YET = "unknown until it exists"
"""How weights will travel to a repository that is yet to be made."""


@dataclass(frozen=True)
class Target:
    """Where a release will go, as it was before the compute, and what was done there since."""

    repo: str
    first: str | None
    """The first commit of a repository that this run made and has not published yet; None: it is not this run's."""
    private: bool
    """Whether it is to stay private."""
    branch: str | None
    create_pr: bool
    head: str | None
    """Commit that the push builds on; None for a branch that does not exist yet."""
    gated: str | bool = False
    creating: bool = False
    """The repository did not exist and was asked for; whether that worked is not known."""
    tag: str | None = None
    since: int | None = None
    """Number of the newest pull request that this user had there before this run; 0 for none, None if nobody asked."""
    request: int | None = None
    """Number of the pull request that this run opened."""

    @property
    def created(self) -> bool:
        """Whether this run made the repository, or may have."""
        return self.creating or self.first is not None


@dataclass(frozen=True)
class Destination:
    """A repository as a push would find it, and leave it; None is what is not known."""

    repo: str | None
    exists: bool | None = None
    private: bool | None = None
    gated: str | bool | None = None
    writable: bool | None = None
    transfer: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class How:
    """What is asked of a push besides where it goes."""

    private: bool = False
    create_pr: bool = False
    branch: str | None = None
    tag: str | None = None

    @property
    def aside(self) -> bool:
        """Whether the main branch stays as it is."""
        return self.create_pr or self.branch is not None


@dataclass(frozen=True)
class Found:
    """What a look at the Hub found."""

    user: dict[str, Any]
    """Whose token it is, and what it may do."""
    info: ModelInfo | None
    """The repository; None where there is none."""
    target: Target
    """What a push would go on from; `head` is that of an existing repository."""


def forget(target: Target) -> None:
    """For a push without a journal."""


def prepare(
    repo: str,
    parent: ModelRef,
    *,
    private: bool = False,
    create_pr: bool = False,
    branch: str | None = None,
    tag: str | None = None,
    known: Target | None = None,
    note: Callable[[Target], None] = forget,
) -> Target:
    """Check that a push of a hardened `parent` to `repo` can work; create the repository if there is none.

    The licence is read from `parent.card`, so a recipe's `card.license` belongs there. What is made for a private
    parent stays private. `known` is what an earlier try noted last: a repository that it made is still private and
    becomes what is asked for now. Raises UsageError for a target that makes no sense (the parent itself, a public push
    of what is private or has no licence, a taken tag) and HubError where token, rights or the Hub stand in the way.
    Call `withdraw` if the run ends for good before the push.
    """
    how = How(private, create_pr, branch, tag)
    # An existing target that is private takes what has no licence, so that waits until the Hub was asked.
    check_request(repo, parent, replace(how, private=True))
    api = client()
    with explained(f"the push to {repo}"):
        found = look(api, repo, parent, how, known)
        target = found.target if found.info else _create(api, found.target, known, note)
        if not found.info and (said := _kept_closed(target, parent, how)):
            log.warning("%s", said)
        note(target)
        if target.created and parent.gated:
            api.update_repo_settings(target.repo, gated=gate(parent.gated))
    return target


def destination(
    repo: str,
    parent: ModelRef,
    *,
    private: bool = False,
    create_pr: bool = False,
    branch: str | None = None,
    tag: str | None = None,
) -> Destination:
    """Ask what `prepare` asks, and change nothing. Offline or without a token the note says so.

    Raises UsageError and HubError as `prepare` does, for a target that cannot work.
    """
    from huggingface_hub import get_token, is_offline_mode

    how = How(private, create_pr, branch, tag)
    with explained(f"the push to {repo}"):
        missing = "HF_HUB_OFFLINE is set" if is_offline_mode() else "" if get_token() else "no token is set"
    check_request(repo, parent, replace(how, private=private or not missing))
    if missing:
        return Destination(repo, note=f"the Hub was not asked for it: {missing}")
    api = client()
    with explained(f"the push to {repo}"):
        found = look(api, repo, parent, how)
        target, info = found.target, found.info
        if info is None:
            _check_creatable(found.user, target.repo)
            said = _kept_closed(target, parent, how)
            return Destination(target.repo, False, target.private, parent.gated, True, NOT_YET, said)
        transfer = _transfer(api, target.repo, create_pr=create_pr)
        return Destination(target.repo, True, target.private, info.gated or False, True, transfer)


def look(api: HfApi, repo: str, parent: ModelRef, how: How, known: Target | None = None) -> Found:
    """What a push would find, all questions asked and nothing changed. Raises as `prepare`."""
    user = _writer(api, repo)
    repo = repo if "/" in repo else f"{user['name']}/{repo}"
    _check_other(repo, parent, how)
    info = _existing(api, repo)
    first = _first_commit(known, info)
    stays = how.private or parent.private if info is None or first else bool(info.private)
    _check_terms(repo, parent, public=not stays)
    target = Target(repo, first, stays, how.branch, how.create_pr, None, parent.gated, tag=how.tag)
    if info is None:
        if how.aside:
            raise UsageError(f"{repo} does not exist; leave out --create-pr or --branch to create it")
        return Found(user, None, target)
    _check_existing(info, parent, how)
    _check_write(api, repo, create_pr=how.create_pr)
    target = replace(target, head=_head(api, target, info, known))
    return Found(user, info, _with_requests(api, target, user["name"], known) if how.create_pr else target)


def check_request(repo: str, parent: ModelRef, how: How) -> None:
    """Check what of `look` needs no network. Raises UsageError as it does."""
    check_id(repo)
    if how.create_pr and how.branch:
        raise UsageError("a pull request goes to the main branch; leave out --create-pr or --branch")
    if how.create_pr and how.tag:
        raise UsageError("a pull request cannot be tagged before it is merged; leave out --tag")
    _check_other(repo, parent, how)
    _check_terms(repo, parent, public=not (how.private or parent.private))


def withdraw(target: Target) -> bool:
    """Delete the repository if this run made it and nothing was committed since; return whether it is gone."""
    if not target.created:
        return False
    api = client()
    with explained(f"withdrawing {target.repo}"):
        info = _existing(api, target.repo)
        if info is None:
            return True
        if info.sha != _first_commit(target, info):
            return False
        api.delete_repo(target.repo)
    return True


# --- what push asks again ------------------------------------------------------------------------------


def user_of(api: HfApi, repo: str) -> str:
    """The name of the user whose token it is; raises HubError for one that can only read."""
    return str(_writer(api, repo)["name"])


def requests(api: HfApi, repo: str, user: str) -> list[Discussion]:
    """All pull requests that `user` ever opened there."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        return list(api.get_repo_discussions(repo, author=user, discussion_type="pull_request"))
    except RepositoryNotFoundError:
        raise
    except HfHubHTTPError as error:
        if error.response.status_code in (404, 501):
            raise HubError(f"{repo}: this server has no pull requests; push to a branch instead") from error
        raise


def refused(error: Exception) -> bool:
    """Whether the server surely did nothing. Of other failures nobody knows: an answer can be lost after the work."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError) and error.response.status_code < 500


def gate(gated: str | bool) -> Literal["auto", "manual"] | None:
    """The gate as the client takes it."""
    return cast('Literal["auto", "manual"]', gated) if gated else None


def taken(target: Target) -> UsageError:
    """The error of a tag that something else has."""
    return UsageError(f"{target.repo} has a tag {target.tag} already; choose another --tag")


# --- questions ------------------------------------------------------------------------------


def _writer(api: HfApi, repo: str) -> dict[str, Any]:
    """Whose token it is; raises HubError for one that can only read."""
    user = api.whoami()
    token = user.get("auth", {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError(f"the token {token.get('displayName', '')!r} can only read; push to {repo} with one that writes")
    return user


def _existing(api: HfApi, repo: str) -> ModelInfo | None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return api.model_info(repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:  # the client takes any 401 for one, also that of a token that ended
            raise
        return None


def _first_commit(known: Target | None, info: ModelInfo | None) -> str | None:
    """First commit of a repository that this run made, also where the answer to its creation was lost."""
    if known is None or info is None:
        return None
    if not known.creating:
        return known.first
    empty = {file.rfilename for file in info.siblings or ()} <= {HUBS_OWN}
    return info.sha if info.private and empty else None


def _head(api: HfApi, target: Target, info: ModelInfo, known: Target | None) -> str | None:
    """The commit to build on. Raises UsageError for a tag that is taken by something else than an earlier try."""
    if not target.branch and not target.tag:
        return info.sha
    refs = api.list_repo_refs(target.repo)
    head = {ref.name: ref.target_commit for ref in refs.branches}.get(target.branch) if target.branch else info.sha
    tagged = {ref.name: ref.target_commit for ref in refs.tags}.get(target.tag or "")
    if tagged is not None and not (known and known.tag == target.tag and tagged == head):
        raise taken(target)
    return head


def _with_requests(api: HfApi, target: Target, user: str, known: Target | None) -> Target:
    """The target with what tells a pull request of this run from older ones of the same user."""
    if known is not None and known.since is not None:
        return replace(target, since=known.since, request=known.request)
    return replace(target, since=max((one.num for one in requests(api, target.repo, user)), default=0))


def _transfer(api: HfApi, repo: str, *, create_pr: bool) -> str:
    """How weights will travel: the Hub grants a token for Xet, or has no such route."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
        return "lfs"
    address = f"{api.endpoint}/api/models/{repo}/xet-write-token/main" + ("?create_pr=1" if create_pr else "")
    try:
        hf_raise_for_status(get_session().get(address, headers=build_hf_headers()))
    except HfHubHTTPError:
        return "lfs"
    return "xet"


# --- checks ------------------------------------------------------------------------------


def _check_other(repo: str, parent: ModelRef, how: How) -> None:
    if repo.lower() == parent.id.lower() and not how.aside:
        raise UsageError(f"{repo} is the parent itself; push elsewhere, or with --create-pr or --branch")


def _check_terms(repo: str, parent: ModelRef, *, public: bool) -> None:
    if public and "license" not in parent.license:
        raise UsageError(
            f"{parent.id} names no licence, so {repo} cannot be public; set card.license in the recipe "
            "if you know the terms, or push with --private"
        )


def _check_existing(info: ModelInfo, parent: ModelRef, how: How) -> None:
    if info.private:
        return
    if how.private:
        raise UsageError(f"{info.id} exists and is public; leave out --private or push elsewhere")
    if parent.private:
        raise UsageError(f"{parent.id} is private and {info.id} is public; push elsewhere")
    if parent.gated and not info.gated:
        raise UsageError(f"{parent.id} is gated ({parent.gated}) and {info.id} is open; gate it in its settings first")


def _check_write(api: HfApi, repo: str, *, create_pr: bool) -> None:
    """Ask how a file would be uploaded: the Hub answers only who may commit, and nothing is written."""
    from huggingface_hub import CommitOperationAdd

    probe = CommitOperationAdd("README.md", b"probe")
    api.preupload_lfs_files(repo, additions=[probe], create_pr=create_pr)


def _check_creatable(user: dict[str, Any], repo: str) -> None:
    """Raise HubError if this token may not create the repository, as the Hub would."""
    token = user.get("auth", {}).get("accessToken") or {}
    member = [org["name"] for org in user.get("orgs", ()) if org.get("roleInOrg") in CREATORS]
    may = {user["name"], *member}
    if "fineGrained" in token:
        scopes = token["fineGrained"].get("scoped", ())
        may &= {scope["entity"].get("name") for scope in scopes if "repo.write" in scope["permissions"]}
    if repo.split("/")[0] not in may:
        raise no_right(f"the push to {repo}")


def _kept_closed(target: Target, parent: ModelRef, how: How) -> str | None:
    """Why a new repository stays private that was not asked to, and how to open it."""
    if how.private or not parent.private:
        return None
    return f"it stays private as {parent.id} is; to open it after the push: hf repos settings {target.repo} --public"


# --- the one change ------------------------------------------------------------------------------


def _create(api: HfApi, target: Target, known: Target | None, note: Callable[[Target], None]) -> Target:
    from huggingface_hub.errors import HfHubHTTPError

    note(replace(target, creating=True))
    try:
        api.create_repo(target.repo, private=True)
    except HfHubHTTPError as error:
        if refused(error):
            note(known or target)
        raise
    head = api.model_info(target.repo).sha
    return replace(target, first=head, head=head)
