"""Check a release: against itself, its parent on the Hub and its signature; and measure it again if asked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from hardener import __version__, files, hub, metadata, recipe_file, signing, verdict
from hardener import report as reports
from hardener.client import check_id, client, explained
from hardener.console import Narrator
from hardener.errors import HubError, RecipeError, UnsupportedModelError, UsageError, VerifyError
from hardener.report import Evidence, Parent, Report, Word
from hardener.target import HUBS_OWN

EVIDENCE = "hardener"
"""Folder of report, recipe and plots inside a release."""


class Verified(TypedDict):
    """What was checked, and what is claimed by what was checked."""

    release: str
    checks: dict[str, str]
    """Name of each check → "ok", with what was found, or why it was not made."""
    verdict: Word | None
    """None: the release was not probed."""
    weights: str | None


def verify(
    release: str,
    *,
    revision: str | None = None,
    re_probe: bool = False,
    overrides: Sequence[str] = (),
    device: str = "auto",
    public_key: str | Path | None = None,
    identity: str | None = None,
    issuer: str | None = None,
    narrator: Narrator | None = None,
) -> Verified:
    """Check a release folder or Hub repository; returns what was checked.

    `sums`: SHA256SUMS names every file with its hash. `report`: it is of a known schema and its hash of the
    attacked weights is that of the weights here; its verdict is the one that its figures and checks give. `recipe`:
    hardener/recipe.yaml is the one in the report. `parent`: the commit that the report names is on the Hub, with the
    files that the report names, by their hashes there; no weights are fetched, and offline nothing is checked. `bom`:
    hardener/bom.cdx.json is what report and weights give. `signature`: model.sig is over exactly these files, by
    `public_key` (PEM) or, keyless, by `identity` as `issuer` knows it. All but the last find damage and inconsistency;
    only a signature, checked with a key from elsewhere, finds a forgery.

    With `re_probe`, the release is attacked again, paired with its parent, by that recipe; local data comes by
    overrides "data.ROLE.dataset=PATH". Raises VerifyError naming everything that disagrees.
    """
    folder = Path(release).expanduser()
    local = folder.is_dir()
    if local and revision is not None:
        raise UsageError(f"{release} is a local folder and has no revision {revision}; leave --revision out")
    if not local:
        folder = hub.verify_remote(release, revision)
    if not (folder / EVIDENCE / "report.json").is_file():
        raise UsageError(f"{release} is not a hardener release: it has no {EVIDENCE}/report.json")
    key = None if public_key is None else Path(public_key).expanduser()
    signature, forged = _found(lambda: signing.check(folder, key, identity, issuer))
    problems = [*forged, *(_links(folder) if local else ()), *_sums(folder)]
    try:
        report = reports.read(folder / EVIDENCE / "report.json")
    except UsageError as error:
        raise _disagrees(release, [*problems, str(error)]) from None
    parent, foreign = _found(lambda: _parent(report.parent))
    problems += [*_report(folder, report), *_verdict(report), *_recipe(folder, report), *foreign, *_bom(folder, report)]
    if problems:
        raise _disagrees(release, problems)
    checks = {"sums": "ok", "report": "ok", "recipe": "ok", "parent": parent, "bom": "ok", "signature": signature}
    if re_probe:
        checks["re-probe"] = _again(folder, report, overrides, device, narrator or Narrator(silent=True))
    word = None if report.evidence is None else report.evidence.word
    return {"release": release, "checks": checks, "verdict": word, "weights": report.weights}


def _disagrees(release: str, problems: list[str]) -> VerifyError:
    return VerifyError(f"{release} does not agree with its own evidence:\n  " + "\n  ".join(problems))


def _found(check: Callable[[], str]) -> tuple[str, list[str]]:
    """What a check found that can end well in several ways, or the problem that it raised."""
    try:
        return check(), []
    except VerifyError as error:
        return "failed", [str(error)]


def _links(folder: Path) -> list[str]:
    """What a link leads to is not in the release. (The Hub's cache is made of links, and knows no others.)"""
    links = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_symlink()]
    return [f"{name} is a link; a release holds files" for name in links]


def _sums(folder: Path) -> list[str]:
    sums = folder / files.SUMS
    if not sums.is_file():
        return ["SHA256SUMS is missing"]
    lines = [line.partition("  ") for line in sums.read_text("utf-8", errors="replace").splitlines()]
    told = {name: digest for digest, _, name in lines}
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    here = {name: path for name, path in found.items() if name not in (*files.UNSUMMED, HUBS_OWN)}
    wrong = [
        f"{name} has another hash than SHA256SUMS says"
        for name in told
        if name in here and files.sha256(here[name]) != told[name]
    ]
    missing = [f"{name} is in SHA256SUMS but not here" for name in told if name not in here]
    extra = [f"{name} is not in SHA256SUMS" for name in here if name not in told]
    return wrong + missing + extra


def _report(folder: Path, report: Report) -> list[str]:
    from hardener import checkpoint

    if report.training is None and not any(folder.rglob("*.safetensors")):
        return []  # the folder of a probe holds evidence only
    found = checkpoint.fingerprint(folder)
    if found != report.weights:
        return [f"the weights here ({found[:12]}) are not those that were attacked ({str(report.weights)[:12]})"]
    return []


def _verdict(report: Report) -> list[str]:
    told = report.evidence
    if told is None:
        return []
    word, reason, flags = verdict.decide(told.measures, told.checks, told.conditions)
    word, _ = verdict.cap(word, reason, told.preset)
    if (word, flags) == (told.word, told.flags):
        return []
    found, said = (", ".join((one, *more)) for one, more in ((word, flags), (told.word, told.flags)))
    return [f"the report says “{said}”, but its figures and checks give “{found}”"]


def _recipe(folder: Path, report: Report) -> list[str]:
    path = folder / EVIDENCE / "recipe.yaml"
    if not path.is_file():
        return [f"{EVIDENCE}/recipe.yaml is missing"]
    try:
        same = _holds(recipe_file.load(path).model_dump(mode="json"), report.recipe)
    except RecipeError as error:
        return [str(error)]
    return [] if same else [f"{EVIDENCE}/recipe.yaml is not the recipe in the report"]


def _holds(found: Any, told: Any) -> bool:
    """Whether everything that was told is found; what is found besides has been added to recipes since."""
    if isinstance(told, dict):
        return isinstance(found, dict) and all(key in found and _holds(found[key], told[key]) for key in told)
    if isinstance(told, list):
        return isinstance(found, list) and len(found) == len(told) and all(map(_holds, found, told))
    return bool(found == told)


def _parent(parent: Parent) -> str:
    """Whether the Hub has the parent that the report names."""
    from huggingface_hub import is_offline_mode

    if parent.local:
        return "not checked (a local folder)"
    try:
        check_id(parent.id)
    except UsageError as error:
        raise VerifyError(f"the parent in the report: {error}") from None
    if not re.fullmatch("[0-9a-f]{40}", parent.commit or ""):
        raise VerifyError(f"the report names no commit of the parent {parent.id}, but {parent.commit!r}")
    if is_offline_mode():
        return "not checked (offline)"
    try:
        found = remote_fingerprint(parent.id, str(parent.commit))
    except HubError as error:
        return f"not checked ({error})"
    if found != parent.weights:
        raise VerifyError(
            f"the parent {parent.id} at its commit on the Hub ({found[:12]}) "
            f"is not the one in the report ({parent.weights[:12]})"
        )
    return "ok"


def remote_fingerprint(repo: str, commit: str) -> str:
    """`checkpoint.fingerprint` of a Hub model: large files by the hash that the Hub lists, only small ones fetched.

    Raises VerifyError where there is no such commit or it holds no model, HubError where the Hub cannot be asked.
    """
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import RevisionNotFoundError

    api = client()
    try:
        with explained(repo):
            api.model_info(repo, revision=commit)  # fails at once where the listing would try again and again
            tree = api.list_repo_tree(repo, recursive=True, revision=commit)
            found = {file.path: file for file in tree if isinstance(file, RepoFile)}
    except HubError as error:
        if isinstance(error.__cause__, RevisionNotFoundError):
            raise VerifyError(f"the parent {repo} has no commit {commit}") from None
        raise
    sizes = {name: file.size for name, file in found.items()}
    hashes = {name: metadata.hash_of(file) for name, file in found.items()}
    source = metadata.Remote(repo, api, commit, sizes, hashes)
    try:
        names = metadata.release_files(source)
    except UnsupportedModelError as error:
        raise VerifyError(f"the parent at commit {commit[:8]}: {error}") from None
    digest = hashlib.sha256()
    for name in names:
        if name != "README.md":
            lfs = found[name].lfs
            digest.update(f"{files.sha256(source.path(name)) if lfs is None else lfs.sha256}  {name}\n".encode())
    return digest.hexdigest()


def _bom(folder: Path, report: Report) -> list[str]:
    from hardener import bom

    path = folder / bom.NAME
    if not path.is_file():
        return [f"{bom.NAME} is missing"]
    try:
        same = json.loads(path.read_bytes()) == bom.bom(report, folder)
    except (ValueError, UnsupportedModelError) as error:
        return [f"{bom.NAME}: {error}"]
    other = f"; hardener {report.hardener} wrote it, this is {__version__}" if report.hardener != __version__ else ""
    return [] if same else [f"{bom.NAME} is not what report and weights give{other}"]


def _again(folder: Path, report: Report, overrides: Sequence[str], device: str, say: Narrator) -> str:
    """Attack the release again, with fresh runs, and compare its worst case with the report's interval."""
    import tempfile

    from hardener import pipeline

    if report.parent.local:
        raise UsageError(
            f"the parent {report.parent.id} was a local folder; probe it by hand: "
            f"hardener probe {folder} --against PARENT --recipe {folder / EVIDENCE / 'recipe.yaml'}"
        )
    with tempfile.TemporaryDirectory() as fresh:
        again = pipeline.probe(
            str(folder),
            recipe=folder / EVIDENCE / "recipe.yaml",
            against=report.parent.id,
            against_revision=report.parent.commit,
            overrides=overrides,
            output=Path(fresh) / "run",
            device=device,
            narrator=say,
        )
    assert again.report is not None  # a probe always reports
    return compare(report.evidence, again.report.evidence)


def compare(told: Evidence | None, found: Evidence | None) -> str:
    """Say whether two measurements of one release agree. Raises VerifyError if they do not."""
    if told is None or found is None or told.measures.w_hardened is None or found.measures.w_hardened is None:
        raise VerifyError("there is no worst case to compare")
    before, now = told.measures.w_hardened, found.measures.w_hardened
    figures = f"worst case {now.value:.2f} [{now.low:.2f}, {now.high:.2f}], the report says {before.value:.2f}"
    if now.low > before.high or now.high < before.low or told.word != found.word:
        raise VerifyError(f"measured again: {found.word}, {figures} and {told.word}")
    return f"ok: {found.word}, {figures}"
