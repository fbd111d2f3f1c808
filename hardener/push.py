"""Publishing a release: one commit or nothing, checked before the compute and verified afterwards.

`prepare` settles before any computation that the push can work: token, name, rights, licence, gating, tag. A
repository that it creates stays private until `push` has compared what arrived with SHA256SUMS. Both hand a
`Target` to `note` as soon as something changed that a second try must know: answers get lost, processes get killed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from hardener import files
from hardener.client import check_id, client, explained, or_without_xet
from hardener.errors import HubError, UsageError
from hardener.metadata import ModelRef

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, Discussion, HfApi, ModelInfo, RepoFile

HUBS_OWN = ".gitattributes"
"""Written by the Hub, needed by it, and no part of a release."""


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
class Pushed:
    """What is on the Hub now."""

    repo: str
    commit: str | None
    url: str
    pr_url: str | None


@dataclass(frozen=True)
class _Place:
    """What a commit goes on top of, and what it has become by it."""

    revision: str | None
    """Branch or reference; None: the main branch, or a pull request that is yet to be opened."""
    head: str
    request: int | None


def _forget(target: Target) -> None:
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
    note: Callable[[Target], None] = _forget,
) -> Target:
    """Check that a push of a hardened `parent` to `repo` can work; create the repository if there is none.

    The licence is read from `parent.card`, so a recipe's `card.license` belongs there. `known` is what an earlier try
    noted last: a repository that it made is still private and becomes what is asked for now. Raises UsageError for a
    target that makes no sense (the parent itself, a public push without a licence, a taken tag) and HubError where
    token, rights or the Hub stand in the way. Call `withdraw` if the run ends for good before the push.
    """
    check_request(repo, parent, private=True, create_pr=create_pr, branch=branch, tag=tag)
    aside = create_pr or branch is not None
    api = client()
    with explained(f"the push to {repo}"):
        user = _user(api, repo)
        repo = repo if "/" in repo else f"{user}/{repo}"
        _check_other(repo, parent, aside=aside)
        info = _existing(api, repo)
        first = _first_commit(known, info)
        stays = private if info is None or first else bool(info.private)
        _check_terms(repo, parent, public=not stays)
        target = Target(repo, first, stays, branch, create_pr, None, parent.gated, tag=tag)
        if info is None and aside:
            raise UsageError(f"{repo} does not exist; leave out --create-pr or --branch to create it")
        if info is None:
            target = _create(api, target, known, note)
        else:
            _check_existing(info, parent, private=private)
            _check_write(api, repo, create_pr=create_pr)
            target = replace(target, head=_head(api, target, info, known))
        if create_pr:
            target = _with_requests(api, target, user, known)
        note(target)
        if target.created and parent.gated:
            api.update_repo_settings(repo, gated=_gate(parent.gated))
    return target


def check_request(
    repo: str, parent: ModelRef, *, private: bool, create_pr: bool, branch: str | None, tag: str | None = None
) -> None:
    """Check what of `prepare` needs no network. Raises UsageError as it does."""
    check_id(repo)
    if create_pr and branch:
        raise UsageError("a pull request goes to the main branch; leave out --create-pr or --branch")
    if create_pr and tag:
        raise UsageError("a pull request cannot be tagged before it is merged; leave out --tag")
    _check_other(repo, parent, aside=create_pr or branch is not None)
    _check_terms(repo, parent, public=not private)


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


def push(folder: Path, target: Target, *, message: str, note: Callable[[Target], None] = _forget) -> Pushed:
    """Publish all of `folder` in one commit, compare what arrived with SHA256SUMS, tag it, then make it public.

    Files on the target that the release does not have are deleted in the same commit. What an earlier try brought
    there is found and not sent again: a commit whose answer was lost, a pull request that is still open, a tag.
    Raises UsageError for a folder that is no release or a tag that is taken, HubError otherwise; the target is then
    as it was, or private if this run made it, unless the comparison failed on a repository that was public before
    (then the error names the commit) or only the tag is missing. Push again to go on.
    """
    sums = _read_sums(folder)
    api = client()
    with explained(f"the push to {target.repo}"):
        with _branch(api, target):
            place = _look(api, target, message)
            arrived = not _differences(api, target.repo, place.head, folder, sums)
            tagged = _is_tagged(api, target, place.head if arrived else None)
            if not arrived:
                place = _commit(api, folder, target, place, message)
        target = replace(target, request=place.request)
        note(target)
        if wrong := _differences(api, target.repo, place.head, folder, sums):
            raise HubError(
                f"{target.repo} at commit {place.head[:8]} is not what was sent: {', '.join(wrong)}; "
                + ("it stays private" if target.created else "push again")
            )
        if target.tag and not tagged:
            api.create_tag(target.repo, tag=target.tag, revision=place.head)
        if target.created and not target.private:
            api.update_repo_settings(target.repo, visibility="public", gated=_gate(target.gated))
    note(replace(target, first=None))  # published: it can no longer be withdrawn
    url = f"{api.endpoint}/{target.repo}"
    pr_url = f"{url}/discussions/{place.request}" if place.request else None
    return Pushed(target.repo, place.head, url + (f"/tree/{target.branch}" if target.branch else ""), pr_url)


def _user(api: HfApi, repo: str) -> str:
    """Whose token it is; raises HubError for one that can only read."""
    user = api.whoami()
    token = user.get("auth", {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError(f"the token {token.get('displayName', '')!r} can only read; push to {repo} with one that writes")
    return str(user["name"])


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


def _check_other(repo: str, parent: ModelRef, *, aside: bool) -> None:
    if repo.lower() == parent.id.lower() and not aside:
        raise UsageError(f"{repo} is the parent itself; push elsewhere, or with --create-pr or --branch")


def _check_terms(repo: str, parent: ModelRef, *, public: bool) -> None:
    if public and "license" not in parent.license:
        raise UsageError(
            f"{parent.id} names no licence, so {repo} cannot be public; set card.license in the recipe "
            "if you know the terms, or push with --private"
        )


def _check_existing(info: ModelInfo, parent: ModelRef, *, private: bool) -> None:
    if private and not info.private:
        raise UsageError(f"{info.id} exists and is public; leave out --private or push elsewhere")
    if parent.gated and not info.gated and not info.private:
        raise UsageError(f"{parent.id} is gated ({parent.gated}) and {info.id} is open; gate it in its settings first")


def _check_write(api: HfApi, repo: str, *, create_pr: bool) -> None:
    """Ask how a file would be uploaded: the Hub answers only who may commit, and nothing is written."""
    from huggingface_hub import CommitOperationAdd

    probe = CommitOperationAdd("README.md", b"probe")
    api.preupload_lfs_files(repo, additions=[probe], create_pr=create_pr)


def _create(api: HfApi, target: Target, known: Target | None, note: Callable[[Target], None]) -> Target:
    from huggingface_hub.errors import HfHubHTTPError

    note(replace(target, creating=True))
    try:
        api.create_repo(target.repo, private=True)
    except HfHubHTTPError as error:
        if _refused(error):
            note(known or target)
        raise
    head = api.model_info(target.repo).sha
    return replace(target, first=head, head=head)


def _refused(error: Exception) -> bool:
    """Whether the server surely did nothing. Of other failures nobody knows: an answer can be lost after the work."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError) and error.response.status_code < 500


def _gate(gated: str | bool) -> Literal["auto", "manual"] | None:
    return cast('Literal["auto", "manual"]', gated) if gated else None


def _head(api: HfApi, target: Target, info: ModelInfo, known: Target | None) -> str | None:
    """The commit to build on. Raises UsageError for a tag that is taken by something else than an earlier try."""
    if not target.branch and not target.tag:
        return info.sha
    refs = api.list_repo_refs(target.repo)
    head = {ref.name: ref.target_commit for ref in refs.branches}.get(target.branch) if target.branch else info.sha
    tagged = {ref.name: ref.target_commit for ref in refs.tags}.get(target.tag or "")
    if tagged is not None and not (known and known.tag == target.tag and tagged == head):
        raise _taken(target)
    return head


def _taken(target: Target) -> UsageError:
    return UsageError(f"{target.repo} has a tag {target.tag} already; choose another --tag")


def _is_tagged(api: HfApi, target: Target, commit: str | None) -> bool:
    """Whether the release at `commit`, if it is there, has its tag; raises UsageError if something else has it."""
    if target.tag is None:
        return False
    tagged = {ref.name: ref.target_commit for ref in api.list_repo_refs(target.repo).tags}.get(target.tag)
    if tagged not in (None, commit):
        raise _taken(target)
    return tagged is not None


def _with_requests(api: HfApi, target: Target, user: str, known: Target | None) -> Target:
    """The target with what tells a pull request of this run from older ones of the same user."""
    if known is not None and known.since is not None:
        return replace(target, since=known.since, request=known.request)
    return replace(target, since=max((one.num for one in _requests(api, target.repo, user)), default=0))


def _requests(api: HfApi, repo: str, user: str) -> list[Discussion]:
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


def _open_request(api: HfApi, target: Target, message: str) -> int | None:
    """The pull request that this run opened, if it is still open; its number is lost where the answer was."""
    newer = target.since or 0
    mine = [
        one.num
        for one in _requests(api, target.repo, _user(api, target.repo))
        if one.num == target.request or (one.num > newer and one.title == message)
        if one.status in ("open", "draft")
    ]
    return max(mine, default=None)


def _look(api: HfApi, target: Target, message: str) -> _Place:
    """Where the commit goes, as the server has it now."""
    request = _open_request(api, target, message) if target.create_pr else None
    if target.create_pr and request is None:
        assert target.head is not None  # only a branch can be absent
        return _Place(None, target.head, None)
    revision = f"refs/pr/{request}" if request else target.branch
    head = api.model_info(target.repo, revision=revision).sha
    assert head is not None  # the Hub names the commit of what it shows
    return _Place(revision, head, request)


@contextmanager
def _branch(api: HfApi, target: Target) -> Iterator[None]:
    """A branch that is made for this push goes again if the push fails before anything was committed to it."""
    if target.branch is None or target.head is not None:
        yield
        return
    start = api.model_info(target.repo).sha
    made = True
    try:
        try:
            api.create_branch(target.repo, branch=target.branch, revision=start)
        except Exception as error:
            made = not _refused(error)  # somebody else's, made meanwhile, is left alone
            raise
        yield
    except BaseException:
        if made:
            with explained(f"not pushed, and the new branch {target.branch} of {target.repo} stays as a copy of main"):
                _remove_branch(api, target.repo, target.branch, start)
        raise


def _remove_branch(api: HfApi, repo: str, branch: str, start: str | None) -> None:
    if {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).branches}.get(branch) == start:
        api.delete_branch(repo, branch=branch)


def _commit(api: HfApi, folder: Path, target: Target, place: _Place, message: str) -> _Place:
    """Send everything; return where it is."""
    from httpx2 import HTTPError
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if place.request is None and target.head not in (None, place.head):
        raise HubError(f"{target.repo} changed in the meantime and nothing was pushed; push again")
    paths = _files(folder)
    stale = sorted({*api.list_repo_files(target.repo, revision=place.head)} - {*paths, HUBS_OWN})

    def commit() -> CommitInfo:
        # Built anew for a second try: an operation remembers how far it got.
        adds = [CommitOperationAdd(path, folder / path) for path in paths]
        return api.create_commit(
            target.repo,
            [*adds, *(CommitOperationDelete(path) for path in stale)],
            commit_message=message,
            parent_commit=place.head,
            revision=place.revision,
            create_pr=target.create_pr and place.request is None,
        )

    try:
        made = or_without_xet(commit)
    except (HTTPError, ValueError) as error:  # ValueError: an answer that is no JSON
        now = place if _refused(error) else _look(api, target, message)
        if now == place:
            raise
        return now
    return replace(place, head=made.oid, request=made.pr_num or place.request)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _read_sums(folder: Path) -> dict[str, str]:
    """SHA256SUMS of a release as path → hexadecimal digest; it must name every file but `files.UNSUMMED`."""
    try:
        lines = (folder / files.SUMS).read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise UsageError(f"{folder} is not a release: it has no {files.SUMS}") from None
    sums = {path: digest for digest, _, path in (line.partition("  ") for line in lines)}
    if differing := sorted(({*_files(folder)} - {*files.UNSUMMED}) ^ {*sums}):
        raise UsageError(
            f"{folder / files.SUMS} and the folder differ in {', '.join(differing)}; make the release again"
        )
    return sums


def _differences(api: HfApi, repo: str, commit: str, folder: Path, sums: dict[str, str]) -> list[str]:
    """Paths that the commit lacks, has with another content, or has too much."""
    from huggingface_hub import RepoFile

    tree = api.list_repo_tree(repo, recursive=True, revision=commit)
    there = {file.path: file for file in tree if isinstance(file, RepoFile) and file.path != HUBS_OWN}
    here = {*_files(folder)}
    return sorted(
        {*there} ^ here | {path for path in {*there} & here if not _same(there[path], folder / path, sums.get(path))}
    )


def _same(there: RepoFile, here: Path, digest: str | None) -> bool:
    """Large files are known to the Hub by SHA-256, small ones by the hash that git gives them."""
    if there.lfs is not None:
        return there.lfs.sha256 == (digest or files.sha256(here))
    data = here.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return there.blob_id == blob and digest in (None, files.sha256(here))
