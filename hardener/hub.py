"""Models from the Hub or from a folder: first what one is, then its files.

`resolve` pins the commit and reads metadata only; `pull` fetches exactly the files that a release needs and
compares them with what was resolved. `push.py` is the way back.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hardener.client import check_id, client, explained, or_without_xet
from hardener.errors import HubError, UnsupportedModelError, UsageError
from hardener.metadata import (
    INDEX,
    PIPELINE,
    Folder,
    ModelRef,
    Remote,
    check_bytes,
    describe,
    hash_of,
    headers,
    listing,
    release_files,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["ModelRef", "dataset_commit", "explained", "pull", "resolve", "verify_remote"]


def resolve(model: str, revision: str | None = None) -> ModelRef:
    """Pin a local folder or a Hub id (`name` or `org/name`) and read its metadata; no weights are fetched.

    With HF_HUB_OFFLINE=1 a Hub id is taken from the cache; whether it is gated or private is unknown then.
    Raises UsageError for what is neither, UnsupportedModelError for what is refused, HubError otherwise.
    """
    from huggingface_hub import is_offline_mode

    if not model:
        raise UsageError("MODEL is empty; name a Hub id or a local folder")
    folder = Path(model).expanduser()
    if folder.is_dir() and revision is not None:
        raise UsageError(f"{model} is a local folder and has no revision {revision}; leave --revision out")
    if folder.is_dir():
        return _local(folder)
    _check_remote(model)
    return _cached(model, revision) if is_offline_mode() else _online(model, revision)


def pull(ref: ModelRef, progress: Callable[[str], None] | None = None) -> Path:
    """Return the folder with the files of `ref`; a Hub model is fetched at its commit.

    Raises HubError naming the files that are missing or not what was resolved.
    """
    from huggingface_hub.errors import IncompleteSnapshotError

    if ref.folder is not None:
        return ref.folder
    if progress is not None:
        progress(f"fetching {ref.id}: {len(ref.files)} files, {ref.bytes / 1e9:.2f} GB")
    assert ref.commit is not None  # it is no folder
    with explained(ref.id):
        try:
            folder = _snapshot(client(), ref.id, ref.commit, allow=[glob.escape(name) for name in ref.files])
        except IncompleteSnapshotError as error:  # it names three files at most
            folder = Path(error.snapshot_path)
    _compare(folder, ref)
    _check_bytes(folder, ref)
    return folder


def _snapshot(
    api: HfApi, repo: str, commit: str, *, allow: list[str] | None = None, ignore: list[str] | None = None
) -> Path:
    """Fetch files of a commit; with HF_HUB_OFFLINE=1 find them, or raise IncompleteSnapshotError."""
    from huggingface_hub import get_cached_repo_tree, is_offline_mode
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    offline = is_offline_mode()

    def fetch() -> str:
        return api.snapshot_download(
            repo, revision=commit, allow_patterns=allow, ignore_patterns=ignore, local_files_only=offline
        )

    folder = Path(or_without_xet(fetch))
    if not offline:
        try:
            get_cached_repo_tree(repo, revision=commit)
        except CachedRepoTreeNotFoundError:  # refused or not answered: it returned what it has in silence
            api.model_info(repo, revision=commit)  # raises the reason
    return folder


def verify_remote(repo: str, revision: str | None = None) -> Path:
    """Fetch every file of a release and return its folder (`.gitattributes` is the Hub's and is left out)."""
    _check_remote(repo)
    api = client()
    with explained(repo):
        commit = _pinned(api, repo, revision)
        return _snapshot(api, repo, commit, ignore=[".gitattributes"])


def evidence(repo: str) -> Path:
    """Fetch report and recipe of a release, without its weights, and return their folder. Raises HubError."""
    _check_remote(repo)
    api = client()
    with explained(repo):
        commit = _pinned(api, repo, None)
        return _snapshot(api, repo, commit, allow=["hardener/*"])


def dataset_commit(dataset: str, revision: str | None = None) -> str:
    """The commit of a Hub dataset at a revision, from the cache if offline. Raises HubError."""
    check_id(dataset)
    with explained(f"the dataset {dataset}"):
        return _pinned(client(), dataset, revision, "dataset")


def _pinned(api: HfApi, repo: str, revision: str | None, kind: Literal["model", "dataset"] = "model") -> str:
    """The commit of a revision, which the client notes for an offline run later.

    Where the Hub fails to answer, the client takes its last note in silence; here that is an error unless
    HF_HUB_OFFLINE=1 asked for it.
    """
    from huggingface_hub import is_offline_mode

    commit = api.resolve_revision(repo, repo_type=kind, revision=revision).resolved
    if is_offline_mode() or commit == revision:
        return commit
    now = api.repo_info(repo, repo_type=kind, revision=revision).sha
    if now != commit:
        raise HubError(f"{repo} is at commit {now}, and was at {commit} a moment ago; run the same line again")
    return commit


def _check_remote(name: str) -> None:
    """Raise UsageError for what is no folder here, and can only be meant as one, before the Hub is asked for it."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise UsageError(f"the folder {name} does not exist")
    check_id(name)


def _local(folder: Path) -> ModelRef:
    return describe(Folder(folder.resolve().name, folder, listing(folder)), folder=folder)


def _online(model: str, revision: str | None) -> ModelRef:
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import RevisionNotFoundError

    api = client()
    with explained(model):
        try:
            info = api.model_info(model, revision=revision)
        except RevisionNotFoundError:
            raise HubError(f"{model} has no revision {revision}; {_near(api, model, str(revision))}") from None
        commit = _pinned(api, info.id, revision)
        tree = api.list_repo_tree(info.id, recursive=True, revision=commit)
        listed = [file for file in tree if isinstance(file, RepoFile)]
    sizes = {file.path: file.size for file in listed}
    source = Remote(info.id, api, commit, sizes, {file.path: hash_of(file) for file in listed})
    return describe(source, commit=commit, gated=info.gated or False, private=bool(info.private))


def _near(api: HfApi, model: str, revision: str) -> str:
    refs = api.list_repo_refs(model)
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return "it has " + ", ".join(difflib.get_close_matches(revision, names, cutoff=0.3) or names[:5])


def _cached(model: str, revision: str | None) -> ModelRef:
    """The same from the cache, which may know of files that it lacks, or hold some without a list."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, IncompleteSnapshotError

    api = client()
    with explained(model):
        commit = api.resolve_revision(model, revision=revision, local_files_only=True).resolved
        try:
            folder = Path(api.snapshot_download(model, revision=commit, local_files_only=True))
        except IncompleteSnapshotError as error:
            folder = Path(error.snapshot_path)
    try:
        sizes = {file.path: file.size for file in get_cached_repo_tree(model, revision=commit)}
    except CachedRepoTreeNotFoundError:
        sizes = listing(folder)
    source = Folder(model, folder, sizes)
    try:
        _require(
            folder, {name: sizes[name] for name in ("config.json", INDEX, PIPELINE) if name in sizes}, model, commit
        )
        _require(folder, release_files(source), model, commit)
        return describe(source, commit=commit)
    except UnsupportedModelError as error:
        raise HubError(f"{error}\nHF_HUB_OFFLINE is set: if the cache is incomplete, {_fetch(model, commit)}") from None


def _compare(folder: Path, ref: ModelRef) -> None:
    """Raise HubError unless the fetched files are those that were resolved, header by header."""
    _require(folder, ref.files, ref.id, ref.commit)
    header = headers(Folder(ref.id, folder, ref.files))
    if {name: dtype for name, (dtype, _) in header.items()} != ref.tensors:
        raise HubError(
            f"{ref.id}: the weights in the cache are not those on the Hub; {_fetch(ref.id, ref.commit, force=True)}"
        )


def _check_bytes(folder: Path, ref: ModelRef) -> None:
    """Raise HubError as `check_bytes`, where the client noted by which hashes the Hub knows the files."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        listed = get_cached_repo_tree(ref.id, revision=ref.commit)
    except CachedRepoTreeNotFoundError:  # offline, and fetched one by one
        return
    check_bytes(ref.id, folder, {file.path: hash_of(file) for file in listed if file.path in ref.files})


def _require(folder: Path, wanted: dict[str, int], repo: str, commit: str | None) -> None:
    """Raise HubError listing the files that are absent or of another size."""
    absent = [name for name in wanted if not (folder / name).is_file()]
    wrong = [name for name in wanted if name not in absent and (folder / name).stat().st_size != wanted[name]]
    if absent or wrong:
        problems = [f"missing {name}" for name in absent] + [f"wrong size of {name}" for name in wrong]
        command = _fetch(repo, commit, [*absent, *wrong], force=bool(wrong))
        raise HubError(f"{repo}: the cache is incomplete: {', '.join(problems)}; {command}")


def _fetch(repo: str, commit: str | None, names: Sequence[str] = (), *, force: bool = False) -> str:
    """The one command that mends a cache: of the whole repository where it is not known what is missing."""
    words = ["hf download", repo, *names, f"--revision {commit}", *(["--force-download"] if force else [])]
    return f"fetch it once online with `{' '.join(words)}`"
