"""What is released: evidence, card and sums beside the weights, and the way to the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hardener import files, hub, recipe_file, verdict
from hardener import target as targets
from hardener.errors import DivergedError, GateError, HardenerError, HubError, UsageError, VerifyError
from hardener.push import Pushed, push
from hardener.recipe import Recipe
from hardener.report import Parent, Report
from hardener.run import RunFolder
from hardener.target import Destination, Target, prepare, withdraw


def write(run: RunFolder, recipe: Recipe, report: Report, parent: Path) -> None:
    """Put report, recipe, plots, card, BOM and sums beside the weights, and sign it all by the key that was asked for.

    Benchmarks that the Hub knows go where it looks for them. Written again from the same, everything keeps its bytes,
    the signature too.
    """
    import yaml

    from hardener import bom, card, eval_results, plots, sources

    beside = run.release / "hardener"
    beside.mkdir(parents=True, exist_ok=True)
    files.write_text(beside / "report.json", report.model_dump_json(indent=1) + "\n")
    files.write_text(beside / "recipe.yaml", recipe_file.dump(sources.published(recipe)))
    drawn = [*plots.draw(report, beside), *([card.SAMPLES] if (beside / card.SAMPLES).is_file() else [])]
    names = tuple(f"hardener/{name}" for name in drawn)
    readme = parent / "README.md"
    parent_card = readme.read_text("utf-8", errors="replace") if readme.is_file() else None
    mine = run.request.get("card_template")
    text = card.render(report, parent_card=parent_card, plots=names, template=None if mine is None else Path(mine))
    files.write_text(run.release / "README.md", text)
    if public := eval_results.entries(report):
        (run.release / eval_results.NAME).parent.mkdir(exist_ok=True)
        files.write_text(run.release / eval_results.NAME, yaml.safe_dump(public, sort_keys=False))
    files.write_json(run.release / bom.NAME, bom.bom(report, run.release))
    write_sums(run.release)
    _settle_signature(run)


def _settle_signature(run: RunFolder) -> None:
    """Keep a signature that still stands; put a new one in the place of any other.

    A keyless one enters a public log, so it waits until the release is published.
    """
    from hardener import signing

    asked = run.request.get("sign")
    if asked is not None and signing.stands(run.release, asked):
        return
    (run.release / files.SIGNATURE).unlink(missing_ok=True)
    if asked not in (None, signing.KEYLESS):
        _sign(run)


def _sign(run: RunFolder) -> None:
    from hardener import signing

    signing.sign(run.release, signing.chosen(run.request["sign"]))


def write_sums(release: Path) -> None:
    """Write SHA256SUMS over every file of the release but `files.UNSUMMED`, in the format of `sha256sum`."""
    files.unfinished(release / files.SUMS).unlink(missing_ok=True)  # a process killed right here left it
    paths = (path for path in sorted(release.rglob("*")) if path.is_file())
    names = ((path, path.relative_to(release).as_posix()) for path in paths)
    lines = [f"{files.sha256(path)}  {name}\n" for path, name in names if name not in files.UNSUMMED]
    files.write_text(release / files.SUMS, "".join(lines))


def licensed(ref: hub.ModelRef, recipe: Recipe) -> hub.ModelRef:
    """The model with the recipe's licence where that names one."""
    own = recipe.card.license
    return ref if own is None else replace(ref, card={**ref.card, "license": own})


def parent_of(ref: hub.ModelRef, folder: Path) -> Parent:
    """The parent as the report names it."""
    from hardener import checkpoint

    return Parent(
        id=ref.id,
        commit=ref.commit,
        weights=checkpoint.fingerprint(folder),
        license=ref.license,
        gated=ref.gated,
        parameters=ref.parameters,
        dtype=ref.dtype,
        architecture=ref.architecture,
        local=ref.folder is not None,
    )


def check_attacked(run: RunFolder, report: Report) -> None:
    """Raise VerifyError if the weights of a hardening, or what loads them, were changed after the attack."""
    from hardener import checkpoint

    if report.training is not None and checkpoint.fingerprint(run.release) != report.weights:
        raise VerifyError(
            f"{run.release} is not what was attacked: weights, config or tokenizer were changed afterwards, "
            "so the evidence does not hold for them; start a new run"
        )


def dressing(sign: str | None = None, template: str | Path | None = None) -> dict[str, str]:
    """What a run's journal keeps of signature and card template. Raises UsageError for one that will not work."""
    from hardener import signing
    from hardener.template import check

    asked = {}
    if sign is not None:
        key = signing.chosen(sign)
        asked["sign"] = sign if key is None else str(key.resolve())
    if template is not None:
        check(Path(template))
        asked["card_template"] = str(Path(template).resolve())
    return asked


def destination(asked: dict[str, Any], ref: hub.ModelRef) -> Destination:
    """The repository asked for as a push would find it; nothing is changed."""
    return targets.destination(asked["push_to"], ref, **_how(asked))


def target(run: RunFolder, asked: dict[str, Any], ref: hub.ModelRef) -> Target:
    """Check and prepare the repository asked for, as it is now; one that an earlier try made is this run's own."""
    repo = asked["push_to"]
    return prepare(repo, ref, **_how(asked), known=_known(run, repo), note=_noted(run, repo))


def _how(asked: dict[str, Any]) -> dict[str, Any]:
    """How to push; a run of before there were tags has asked for none."""
    return {key: asked.get(key) for key in ("private", "create_pr", "branch", "tag")}


def prepared(run: RunFolder, repo: str) -> Target:
    """The target as it was noted last."""
    return Target(**run.result(_key(repo)))


def _known(run: RunFolder, repo: str) -> Target | None:
    return prepared(run, repo) if run.result(_key(repo)) else None


def _noted(run: RunFolder, repo: str) -> Callable[[Target], None]:
    """What keeps a target in the journal."""
    return lambda target: run.keep(_key(repo), asdict(target))


def _key(repo: str) -> str:
    return f"target {repo}"


def withdraw_target(run: RunFolder, repo: str) -> str | None:
    """Remove the repository that this run made if nothing was committed to it; return what became of it, if it did."""
    made = _known(run, repo)
    if made is None or not made.created:
        return None
    try:
        if not withdraw(made):
            return staying(run, repo)
    except HubError as error:
        return f"{staying(run, repo)} (it could not be removed: {error})"
    run.forget(_key(repo))
    return f"the empty repository {made.repo} was removed again"


def staying(run: RunFolder, repo: str) -> str | None:
    """Name the repository that this run made and has not published, and what can be done with it."""
    made = _known(run, repo)
    if made is None or not made.created:
        return None
    return f"{made.repo} stays private until the push is repeated; to delete it: hf repos delete {made.repo}"


@contextmanager
def accounted_for(run: RunFolder, repo: str) -> Iterator[None]:
    """Whatever ends the block early: an unused repository that was made for it goes again, or is named.

    It goes if the run ended for good, and waits for the next try otherwise. An error of hardener says so in its
    message, any other in its attribute `staying`.
    """
    try:
        yield
    except BaseException as error:
        said = withdraw_target(run, repo) if _over(run, error) else staying(run, repo)
        if said and isinstance(error, HardenerError):
            error.args = (f"{error}\n{said}",)
        elif said:
            vars(error)["staying"] = said
        raise


def _over(run: RunFolder, error: BaseException) -> bool:
    """Whether going on with the run would end the same way; `run.resumable` tells people."""
    if isinstance(error, (UsageError, VerifyError, DivergedError)):
        return True
    bug = isinstance(error, Exception) and not isinstance(error, HardenerError)
    return bug and not run.begun


def publish(run: RunFolder, repo: str, report: Report) -> Pushed:
    """Push the release to its prepared target, with its verdict as the message."""
    from hardener import signing

    assert report.evidence is not None  # a release is pushed after it was judged
    if run.request.get("sign") == signing.KEYLESS and not (run.release / files.SIGNATURE).exists():
        _sign(run)
    message = f"Hardened with {report.recipe['name']}: {report.evidence.word}"
    return push(run.release, prepared(run, repo), message=message, note=_noted(run, repo))


def push_run(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    branch: str | None = None,
    tag: str | None = None,
    push_anyway: bool = False,
    sign: str | None = None,
) -> Pushed:
    """Push the release of a finished run, signed as `signing.chosen` understands it.

    Raises GateError if its evidence does not allow it, unless `push_anyway`, and VerifyError where the release is no
    longer what was attacked.
    """
    from hardener import report as reports

    dressed = dressing(sign)
    run = RunFolder.reopen(Path(folder))
    report = reports.read(run.report)
    evidence = report.evidence
    recipe = recipe_file.load(run.recipe)
    if evidence is None or report.training is None:
        raise UsageError(f"{run.path} holds no hardened release to push")
    allowed = verdict.pushes(evidence.word, evidence.flags, recipe.probe.gate)
    if not allowed and not push_anyway:
        raise GateError(
            f"not pushed — {evidence.word}: {evidence.reason}; --push-anyway publishes it and says so in the card"
        )
    asked = {"push_to": repo, "private": private, "create_pr": create_pr, "branch": branch, "tag": tag}
    with run.locked(), accounted_for(run, repo):
        run.ask(**dressed)
        check_attacked(run, report)
        ref = licensed(hub.resolve(run.request["model"], run.request["revision"]), recipe)
        if not allowed:
            report = report.model_copy(update={"pushed_anyway": True})
        write(run, recipe, report, hub.pull(ref))
        target(run, asked, ref)
        return publish(run, repo, report)


def card_run(folder: str | Path, template: str | Path | None = None) -> str:
    """Render card and plots of a finished run again, from now on by `template`; returns the card.

    Raises VerifyError as `push_run` does, UsageError as `template.check`.
    """
    from hardener import report as reports

    dressed = dressing(template=template)
    run = RunFolder.reopen(Path(folder))
    report = reports.read(run.report)
    asked = run.request
    ref = (
        hub.resolve(asked["against"], asked["against_revision"])
        if asked.get("against")
        else hub.resolve(asked["model"], asked["revision"])
    )
    with run.locked():
        run.ask(**dressed)
        check_attacked(run, report)
        write(run, recipe_file.load(run.recipe), report, hub.pull(ref))
    return (run.release / "README.md").read_text("utf-8")
