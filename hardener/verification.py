"""Check a release against itself: sums, report, recipe; and measure it again if asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hardener import files, hub, recipe_file, verdict
from hardener import report as reports
from hardener.console import Narrator
from hardener.errors import RecipeError, UsageError, VerifyError
from hardener.report import Evidence, Report

EVIDENCE = "hardener"
"""Folder of report, recipe and plots inside a release."""


def verify(
    release: str,
    *,
    revision: str | None = None,
    re_probe: bool = False,
    overrides: Sequence[str] = (),
    device: str = "auto",
    narrator: Narrator | None = None,
) -> dict[str, Any]:
    """Check a release folder or Hub repository; returns what was checked.

    `sums`: SHA256SUMS names every file with its hash. `report`: it is of a known schema and its hash of the
    attacked weights is that of the weights here; its verdict is the one that its figures and checks give. `recipe`:
    hardener/recipe.yaml is the one in the report. This finds damage and inconsistency; without a signature it cannot
    find a forgery. With `re_probe`, the release is attacked again, paired with its parent, by that recipe; local data
    comes by overrides "data.ROLE.dataset=PATH". Raises VerifyError naming everything that disagrees.
    """
    folder = Path(release).expanduser()
    local = folder.is_dir()
    if local and revision is not None:
        raise UsageError(f"{release} is a local folder and has no revision {revision}; leave --revision out")
    if not local:
        folder = hub.verify_remote(release, revision)
    if not (folder / EVIDENCE / "report.json").is_file():
        raise UsageError(f"{release} is not a hardener release: it has no {EVIDENCE}/report.json")
    problems = [*(_links(folder) if local else ()), *_sums(folder)]
    try:
        report = reports.read(folder / EVIDENCE / "report.json")
    except UsageError as error:
        raise _disagrees(release, [*problems, str(error)]) from None
    problems += [*_report(folder, report), *_verdict(report), *_recipe(folder, report)]
    if problems:
        raise _disagrees(release, problems)
    checks = {"sums": "ok", "report": "ok", "recipe": "ok"}
    if re_probe:
        checks["re-probe"] = _again(folder, report, overrides, device, narrator or Narrator(silent=True))
    word = None if report.evidence is None else report.evidence.word
    return {"release": release, "checks": checks, "verdict": word, "weights": report.weights}


def _disagrees(release: str, problems: list[str]) -> VerifyError:
    return VerifyError(f"{release} does not agree with its own evidence:\n  " + "\n  ".join(problems))


def _links(folder: Path) -> list[str]:
    """What a link leads to is not in the release. (The Hub's cache is made of links, and knows no others.)"""
    links = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_symlink()]
    return [f"{name} is a link; a release holds files" for name in links]


def _sums(folder: Path) -> list[str]:
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        return ["SHA256SUMS is missing"]
    lines = [line.partition("  ") for line in sums.read_text("utf-8", errors="replace").splitlines()]
    told = {name: digest for digest, _, name in lines}
    here = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("SHA256SUMS", ".gitattributes")
    }
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

    if report.training is None and not any(folder.glob("*.safetensors")):
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
        same = recipe_file.load(path).model_dump(mode="json") == report.recipe
    except RecipeError as error:
        return [str(error)]
    return [] if same else [f"{EVIDENCE}/recipe.yaml is not the recipe in the report"]


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
