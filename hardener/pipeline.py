"""The straight line: from a model's name to a verified, published release. Nothing but calls in order.

    recipe → model → plan → data → before → harden → after → report → card → push

Every stage leaves its result in the run folder, so that `resume` is the same line, started later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hardener import hub, optimizers, recipe_file, registry, release, verdict
from hardener.console import Narrator, quiet
from hardener.errors import RecipeError, UsageError
from hardener.plan import Plan, check_disk, expected, plan
from hardener.processes import ALONE, World
from hardener.push import Pushed
from hardener.recipe import Recipe
from hardener.report import Erased, Report, Training
from hardener.run import RunFolder, check_free, resumable
from hardener.target import Target


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    plan: Plan
    run: Path | None = None
    """The run folder; None for a dry run."""
    report: Report | None = None
    pushed: Pushed | None = None
    withheld: str | None = None
    """Why a release that was to be pushed was not."""
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON for `--format json`."""
        return {
            "plan": self.plan.to_dict(),
            "run": None if self.run is None else str(self.run),
            "report": None if self.report is None else self.report.model_dump(mode="json"),
            "pushed": None if self.pushed is None else asdict(self.pushed),
            "withheld": self.withheld,
            "exit_code": self.exit_code,
        }


def harden(
    model: str | None = None,
    *,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    revision: str | None = None,
    output: str | Path | None = None,
    push_to: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    branch: str | None = None,
    tag: str | None = None,
    sign: str | None = None,
    card_template: str | Path | None = None,
    device: str = "auto",
    dry_run: bool = False,
    resume: str | Path | None = None,
    from_report: str | Path | None = None,
    push_anyway: bool = False,
    narrator: Narrator | None = None,
    world: World = ALONE,
) -> Outcome:
    """Harden `model` by `recipe`, attack the result, write report and card, and push it if the evidence allows.

    `model` is a Hub id or a local folder, `recipe` a shipped name or a file, `overrides` are "key.path=value".
    The result is in `output` (a new folder; `runs/NAME-RECIPE` if left out). With `resume`, the folder of an
    earlier run, everything else comes from there. With `from_report`, a release (folder or Hub id) or its
    report.json, model, commit and recipe come from there; a parent that was a local folder is named by `model`.
    The other processes of `world` take part where weights change or are attacked; the run folder is the first one's.
    Raises children of HardenerError; their `exit_code` is what the command line ends with.
    """
    say = narrator or Narrator(silent=True)
    if resume is not None:
        ignored: dict[str, object] = {
            **{"MODEL": model, "--recipe": recipe, **dict.fromkeys(overrides, True), "--revision": revision},
            **{"--output": output, "--push-to": push_to, "--private": private, "--create-pr": create_pr},
            **{"--branch": branch, "--tag": tag, "--sign": sign, "--card-template": card_template},
            **{"--device": device, "--from-report": from_report},
        }
        _leave_out(ignored, "--resume takes everything from the run")
        run = RunFolder.reopen(Path(resume))
        asked = run.request | ({"push_anyway": True} if push_anyway else {})
        chosen = recipe_file.load(run.recipe)
    else:
        how: dict[str, Any] = {"private": private, "create_pr": create_pr, "branch": branch, "tag": tag}
        request = {"model": model, "revision": revision, "push_to": push_to, **how, "device": device}
        request |= {"push_anyway": push_anyway, **release.dressing(sign, card_template)}
        asked, source = _asked(request, recipe, from_report)
        chosen = recipe_file.load(source, overrides)
    if not chosen.hardens:
        raise RecipeError(f"the recipe {chosen.name} has no defense and train sections; use it with `hardener probe`")

    say.stage("Resolving")
    ref = release.licensed(hub.resolve(asked["model"], asked["revision"]), chosen)
    task_class = registry.find("tasks", chosen.task)
    task_class.supports(ref.config)
    _check_device(asked["device"])
    optimizers.check(chosen)
    place = Path(resume or output or Path("runs") / f"{ref.id.replace('/', '--')}-{chosen.name}")
    target = release.destination(asked, ref) if dry_run and asked["push_to"] else asked["push_to"]
    planned = plan(chosen, ref, target, place=place, device=asked["device"])
    check_disk(planned, place)
    if resume is None:
        check_free(place)
    from hardener import sources

    chosen = sources.pin(chosen)
    if dry_run:
        return Outcome(planned)
    say.note(f"time: {expected(planned)}")
    if resume is None:
        run = RunFolder.create(place, asked, recipe_file.dump(chosen))
    go_on = resumable(run, f"hardener harden --resume {run.path}")
    with run.locked(), quiet(), go_on, _taken_back(run, asked["push_to"], fresh=resume is None):
        return _line(run, chosen, ref, planned, asked, say, world)


def _asked(
    request: dict[str, Any], recipe: str | Path | None, from_report: str | Path | None
) -> tuple[dict[str, Any], str | Path]:
    """The request as the journal keeps it, and where its recipe is. Raises UsageError for what does not go together."""
    if request["push_to"] is None:
        aside = {f"--{key.replace('_', '-')}": request[key] for key in ("private", "create_pr", "branch", "tag")}
        _leave_out(aside, "nothing is pushed without --push-to")
    if from_report is not None:
        _leave_out({"--revision": request["revision"]}, "--from-report brings the commit")
        model, commit, recipe = _again(from_report, request["model"], recipe)
        request = {**request, "model": model, "revision": commit}
    if not request["model"] or not recipe:
        raise UsageError("name a model and a recipe: hardener harden org/model --recipe ctrap")
    return {**request, "model": _absolute(request["model"])}, recipe


def _leave_out(options: Mapping[str, object], why: str) -> None:
    """Raise UsageError naming the options that were given although they would be ignored."""
    given = [name for name, value in options.items() if value not in (None, False, "auto")]
    if given:
        raise UsageError(f"{why}; leave out {', '.join(given)}")


def _check_device(asked: str) -> None:
    """Raise UsageError for a device that is not here; torch is imported only where one is named that may not be."""
    if asked not in ("auto", "cpu"):
        from hardener import stages

        stages.pick_device(asked)


@contextmanager
def _taken_back(run: RunFolder, repo: str | None, *, fresh: bool) -> Iterator[None]:
    """Take back what a wrong request has begun, an unused repository and an empty run, so that it can be corrected."""
    try:
        with nullcontext() if repo is None else release.accounted_for(run, repo):
            yield
    except UsageError:
        if fresh and not run.begun:
            run.remove()
        raise


def _again(source: str | Path, model: str | None, recipe: str | Path | None) -> tuple[str, str | None, Path]:
    """Model, commit and recipe of an earlier hardening. Raises UsageError where they do not come from there."""
    from hardener import checkpoint
    from hardener import report as reports

    place = Path(source).expanduser()
    folder = place if place.exists() else hub.evidence(str(source))
    path = folder if folder.is_file() else folder / "hardener" / "report.json"
    parent = reports.read(path).parent
    if recipe is not None or (model is not None and not parent.local):
        raise UsageError("--from-report brings model and recipe; leave them out, and change the recipe by --set")
    if not parent.local:
        return parent.id, parent.commit, path.with_name("recipe.yaml")
    if model is None:
        raise UsageError(f"the parent {parent.id} was a local folder: hardener harden PATH --from-report {source}")
    if not Path(model).is_dir() or checkpoint.fingerprint(Path(model)) != parent.weights:
        raise UsageError(f"{model} is not the parent {parent.id} of that report: weights, config or tokenizer differ")
    return model, None, path.with_name("recipe.yaml")


def _line(
    run: RunFolder, recipe: Recipe, ref: hub.ModelRef, planned: Plan, asked: dict[str, Any], say: Narrator, world: World
) -> Outcome:
    """The stages of a run whose request is settled."""
    target: Target | None = None
    repo = asked["push_to"]
    if repo and run.result("push"):
        target = release.prepared(run, repo)
    elif repo:
        say.stage(f"Checking that {repo} can be pushed to")
        target = release.target(run, asked, ref)

    say.stage("Fetching the parent")
    folder = hub.pull(ref, say.note)

    from hardener import stages  # everything below needs torch

    bench = stages.open_bench(recipe, folder, asked["device"], say)
    run.guard(stages.fingerprint(recipe, folder, bench))
    chosen = stages.choose_families(bench, folder)

    job = {"recipe": recipe_file.dump(recipe), "folder": str(folder), "device": asked["device"]}
    job |= {"model": asked["model"], "commit": ref.commit}

    def order(what: str, **how: Any) -> World:
        return world.order(what, **job, **how)

    attack = ALONE.order if world.shard else order  # weights that were spread over all may not fit into each

    say.stage("Attacking the original")
    original = stages.before("original", bench, folder, chosen, run, say, attack)
    scratch = None if bench.task.generative else stages.before("scratch", bench, folder, chosen, run, say, attack)

    erased = None
    if recipe.erase != "none":
        say.stage("Erasing the restricted capability")
        erased = run.stage(
            "erase",
            lambda: stages.erased(recipe, bench, folder, run, say, order("erase")),
            Erased.model_validate,
            lambda e: e.model_dump(mode="json"),
        )

    say.stage(f"Hardening with {recipe.name}")
    training = run.stage(
        "harden",
        lambda: stages.harden(recipe, bench, folder, run, say, erased, order("harden", erased=_plain(erased))),
        Training.model_validate,
        lambda t: t.model_dump(mode="json"),
    )

    say.stage("Attacking the release")
    hardened = stages.after(bench, run.release, folder, original, chosen, run, say, attack)
    stages.picture(bench, folder, run.release, run)

    say.stage("Writing report and card")
    evidence = stages.judge(bench, original, hardened, scratch, chosen)
    gate = recipe.probe.gate
    meets = verdict.pushes(evidence.word, evidence.flags, gate)
    report = stages.report(
        run,
        recipe,
        f"{ref.id}-hardened" if target is None else target.repo,
        release.parent_of(ref, folder),
        bench,
        training,
        evidence,
        (original, hardened, scratch),
        pushed_anyway=bool(target and asked["push_anyway"] and not meets),
        processes=world.size,
    )
    release.write(run, recipe, report, folder)

    pushed = withheld = None
    if target is not None:
        if meets or asked["push_anyway"]:
            say.stage(f"Pushing to {target.repo}")
            pushed = run.stage("push", lambda: release.publish(run, repo, report), lambda d: Pushed(**d), asdict)
        else:
            withheld = f"{evidence.word}: {evidence.reason}"
            if said := release.withdraw_target(run, repo):
                withheld += f"; {said}"
    return Outcome(planned, run.path, report, pushed, withheld, verdict.exit_code(evidence.word, evidence.flags, gate))


def probe(
    model: str,
    *,
    recipe: str | Path,
    against: str | None = None,
    against_revision: str | None = None,
    overrides: Sequence[str] = (),
    revision: str | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    narrator: Narrator | None = None,
) -> Outcome:
    """Attack any checkpoint, also one that others hardened, paired with the original `against`.

    Without an original there are absolute figures and no verdict. The result is in `output` (if left out, in
    `runs/NAME-RECIPE-probe`): report, card and plots; nothing is pushed, no weights are copied.
    Raises as `harden` does.
    """
    from hardener import sources

    say = narrator or Narrator(silent=True)
    chosen = recipe_file.load(recipe, overrides, probe=True)
    if chosen.probe.gate is not None and against is None:
        raise UsageError("a gate needs --against ORIGINAL; without it there is no verdict")
    _check_device(device)
    say.stage("Resolving")
    ref = hub.resolve(model, revision)
    parent = ref if against is None else hub.resolve(against, against_revision)
    task_class = registry.find("tasks", chosen.task)
    for one in (ref, parent):
        task_class.supports(one.config)
    place = Path(output or Path("runs") / f"{ref.id.replace('/', '--')}-{chosen.name}-probe")
    planned = plan(chosen, ref, None, place=place, device=device)
    chosen = sources.pin(chosen)
    asked = {
        "model": _absolute(model),
        "revision": revision,
        "against": against and _absolute(against),
        "against_revision": against_revision,
        "device": device,
    }
    fresh = not _resumable(place, asked)
    run = RunFolder.create(place, asked, recipe_file.dump(chosen)) if fresh else RunFolder.reopen(place)
    with run.locked(), quiet(), resumable(run, "the same line again"), _taken_back(run, None, fresh=fresh):
        say.stage("Fetching")
        folder, original_folder = hub.pull(ref, say.note), hub.pull(parent, say.note)

        from hardener import stages

        bench = stages.open_bench(chosen, folder, device, say)
        bench.task.folder = original_folder  # an encoder is as good as it is near to the original
        run.guard(stages.fingerprint(chosen, folder, bench))
        families = stages.choose_families(bench, original_folder, parent=against is not None)
        original = scratch = None
        if against is not None:
            say.stage("Attacking the original")
            original = stages.before("original", bench, original_folder, families, run, say)
            if not bench.task.generative:
                scratch = stages.before("scratch", bench, original_folder, families, run, say)
        say.stage(f"Attacking {ref.id}")
        hardened = stages.after(bench, folder, original_folder, original, families, run, say)
        if against is not None:
            stages.picture(bench, original_folder, folder, run)
        evidence = stages.judge(bench, original, hardened, scratch, families)
        report = stages.report(
            run,
            chosen,
            ref.id,
            release.parent_of(parent, original_folder),
            bench,
            None,
            evidence,
            (original, hardened, scratch),
        )
        release.write(run, chosen, report, original_folder)
    code = 0 if against is None else verdict.exit_code(evidence.word, evidence.flags, chosen.probe.gate)
    return Outcome(planned, run.path, report, exit_code=code)


def _plain(erased: Erased | None) -> dict[str, Any] | None:
    return None if erased is None else erased.model_dump(mode="json")


def _resumable(place: Path, asked: dict[str, Any]) -> bool:
    return (place / "run.json").is_file() and RunFolder.reopen(place).request == asked


def _absolute(model: str) -> str:
    """A local folder by its full path, so that a run can be resumed from another place."""
    folder = Path(model).expanduser()
    return str(folder.resolve()) if folder.is_dir() else model


def as_json(outcome: Outcome) -> str:
    """An outcome as JSON text."""
    return json.dumps(outcome.to_dict(), indent=1, ensure_ascii=False)
