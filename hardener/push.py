"""Publishing a release: one commit or nothing, verified afterwards.

What `target.prepare` settled before the compute is taken up here. A repository that this run made becomes public once
`push` has compared what arrived with SHA256SUMS. `push` hands a `Target` to `note` as soon as something changed that a
second try must know: answers get lost, processes get killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hardener import files
from hardener.client import client, explained, or_without_xet
from hardener.errors import HubError, UsageError
from hardener.target import HUBS_OWN, Target, forget, gate, refused, requests, taken, user_of

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi, RepoFile


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


def push(folder: Path, target: Target, *, message: str, note: Callable[[Target], None] = forget) -> Pushed:
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
            api.update_repo_settings(target.repo, visibility="public", gated=gate(target.gated))
    note(replace(target, first=None))  # published: it can no longer be withdrawn
    url = f"{api.endpoint}/{target.repo}"
    pr_url = f"{url}/discussions/{place.request}" if place.request else None
    return Pushed(target.repo, place.head, url + (f"/tree/{target.branch}" if target.branch else ""), pr_url)


def _is_tagged(api: HfApi, target: Target, commit: str | None) -> bool:
    """Whether the release at `commit`, if it is there, has its tag; raises UsageError if something else has it."""
    if target.tag is None:
        return False
    tagged = {ref.name: ref.target_commit for ref in api.list_repo_refs(target.repo).tags}.get(target.tag)
    if tagged not in (None, commit):
        raise taken(target)
    return tagged is not None


def _open_request(api: HfApi, target: Target, message: str) -> int | None:
    """The pull request that this run opened, if it is still open; its number is lost where the answer was."""
    newer = target.since or 0
    mine = [
        one.num
        for one in requests(api, target.repo, user_of(api, target.repo))
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
            made = not refused(error)  # somebody else's, made meanwhile, is left alone
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
        now = place if refused(error) else _look(api, target, message)
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
    return there.blob_id == files.git_blob(here) and digest in (None, files.sha256(here))
