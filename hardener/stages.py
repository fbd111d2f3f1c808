"""The stages that need torch: data, attacks before and after, hardening, judgement, report."""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hardener
from hardener import card, checkpoint, data, erase, evidence, files, loop, metadata, registry, sources, trouble
from hardener.attacks.families import SCREENS, Family
from hardener.bench import Bench, able, cache_path, cached, with_norm_ratio
from hardener.checks import BUDGET_FACTOR, NO_ATTACK
from hardener.console import Narrator, values
from hardener.crew import crew
from hardener.errors import RecipeError, RunError, UsageError
from hardener.group import joined, mirrored
from hardener.judges import Classifier, Panel
from hardener.measurement import Measurement, Subject
from hardener.probing import Prober
from hardener.processes import ALONE, World
from hardener.progress import Tell
from hardener.recipe import Probe, Recipe, Train
from hardener.report import Erased, Evidence, Parent, Report, Training
from hardener.run import RunFolder
from hardener.state import States
from hardener.tasks.base import Task

ERASED, HASH = "model.safetensors", "sha256"
NOT_TRIED = (
    "reinforcement learning, distillation into another model, and attacks on embeddings or latent states",
    "prompts that are searched for (jailbreaks), and prompts of more than eight examples",
    "more steps, rows or compute than the budget above",
)
"""What no preset does; printed in every card, after the families of the table that this run left out."""


def open_bench(recipe: Recipe, folder: Path, device: str, say: Narrator) -> Bench:
    """Load task and data, checked for leaks and missing columns; refuse a model that could not be loaded later."""
    say.stage("Preparing data")
    if any(isinstance(part, Train) and part.deterministic for part in (recipe.train, recipe.erase)):
        # cuBLAS reads it once, when the first attack puts a model on the GPU, long before the hardening asks for it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    task_class = registry.find("tasks", recipe.task)
    task = task_class(folder, template=recipe.data.template, max_length=recipe.data.max_length)
    check_model(recipe, task, folder)
    streams = data.open_streams(recipe, task, label2id(folder))
    for record in streams.records:
        say.note(f"{record.role:<11} {record.use:<11} {record.rows:>7,} rows  {record.source}")
    device = pick_device(device)
    return Bench(task, streams, recipe.probe, device, *judging_models(recipe.probe, device))


def judging_models(probe: Probe, device: str) -> tuple[Panel | None, Classifier | None]:
    """The models that the recipe names to judge answers; raises UsageError for labels that they do not have."""
    panel = Panel(probe.judges, torch.device(device)) if probe.judges else None
    refusal = Classifier(probe.refusal_judge, torch.device(device)) if probe.refusal_judge else None
    return panel, refusal


def check_model(recipe: Recipe, task: Task, folder: Path) -> None:
    """Load the model without its weights, and see that they fit, that the adapter does, and what is released.

    Raises UsageError or UnsupportedModelError.
    """
    checkpoint.released(folder)
    model = task.load(folder, device_map="meta")
    if recipe.erase != "none":
        erase.noised(model, task, () if recipe.erase.modules == "located" else recipe.erase.modules)
    if recipe.defense is not None and recipe.adapter != "none":
        checkpoint.attach(model, recipe.adapter, task)


def label2id(folder: Path) -> dict[str, int]:
    """The classes of the checkpoint's head; none of a pipeline."""
    if (folder / metadata.PIPELINE).is_file():
        return {}
    from transformers import AutoConfig

    return dict(AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True).label2id)


def pick_device(asked: str) -> str:
    """The device to run on. Raises UsageError if the one asked for is not there."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if have[name])
    if not have.get(asked, False):
        raise UsageError(
            f"--device {asked}: no such device here; have {', '.join(n for n, there in have.items() if there)}"
        )
    return asked


def fingerprint(recipe: Recipe, folder: Path, bench: Bench) -> dict[str, str]:
    """Everything that a resumed run must share with the one that was interrupted."""
    return {
        **{f"recipe.{key}": str(value) for key, value in flat(recipe.model_dump(mode="json"))},
        "parent": checkpoint.fingerprint(folder),
        "data": bench.streams.fingerprint(),
        "device": bench.device,
        **versions(),
    }


def flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value with its dotted key."""
    if not isinstance(value, dict | list):
        yield place, value
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield from flat(item, f"{place}.{key}".lstrip("."))


def versions() -> dict[str, str]:
    """Versions that numbers depend on."""
    import peft
    import transformers

    return {
        "hardener": hardener.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        **{name: version(name) for name in ("diffusers", "lm-eval", "trl") if find_spec(name.replace("-", "_"))},
    }


def choose_families(bench: Bench, folder: Path, parent: bool = True) -> tuple[Family, ...]:
    """The attack families of the preset that apply to this architecture, with or without a parent to compare with.

    Raises RecipeError for one that the recipe names and that does not apply, UsageError as `able` does.
    """
    here = able(bench, folder, len(label2id(folder)), parent)
    for name in bench.probe.families or ():
        if lacks := here.lacks(registry.find("attacks", name)):
            raise RecipeError(f"probe.families: {name} cannot be made here: {lacks}")
    return bench.families(here)


def wanted(chosen: tuple[Family, ...], bench: Bench) -> tuple[Family, ...]:
    """The families that are run: all of the preset, or those the recipe names."""
    names = bench.probe.families
    return chosen if names is None else tuple(f for f in chosen if f.name in names)


def before(
    subject: Subject,
    bench: Bench,
    folder: Path,
    chosen: tuple[Family, ...],
    run: RunFolder,
    say: Narrator,
    order: Callable[..., World] = ALONE.order,
) -> Measurement:
    """Measure the original (or training from scratch), or take it from the cache of earlier runs.

    `order` has the other processes do something; here, attack as well.
    """
    weights = checkpoint.fingerprint(folder)
    families = wanted(chosen, bench)
    if subject == "scratch":
        families = tuple(f for f in families if f.can_begin_anew)
    path = cache_path(weights, bench, families, subject)
    if path.is_file():
        say.note(f"{subject}: measured earlier, taken from the cache")

    def make() -> Measurement:
        world = order("probe", subject=subject, families=[asdict(family) for family in families])
        with world.alive():
            return probed(subject, bench, folder, families, run.probe / "runs" / subject, say.note, None, world)

    measurement = cached(path, make)
    files.write_text(run.probe / f"{subject}.json", measurement.model_dump_json())
    return measurement


def probed(
    subject: Subject,
    bench: Bench,
    folder: Path,
    families: tuple[Family, ...],
    runs: Path,
    tell: Tell,
    parent: Path | None,
    world: World,
    notes: tuple[str, ...] = (),
) -> Measurement:
    """Attack a folder and measure it; what all processes do, each of them some of the attacks."""
    prober = Prober(bench, subject, folder, runs, tell, parent, crew(world))
    measured = prober.measure(families, notes)
    return prober.prolong(measured, budgeted(bench, measured, families)) if subject == "original" else measured


def erased(recipe: Recipe, bench: Bench, folder: Path, run: RunFolder, say: Narrator, world: World = ALONE) -> Erased:
    """Take the restricted capability out of the weights, and keep them in the run folder for `harden`."""
    student, done = distilled(recipe, bench, folder, run.state / "erase", say, world)
    keep(student, run.state / "erased")
    nats = f"{done.loss_student:.3f} nats on held-back retain rows, the teacher {done.loss_teacher:.3f}"
    say.note(f"{done.share:.0%} of the weights noised, {done.steps} of {done.planned} steps distilled: {nats}")
    return done


def keep(student: nn.Module, folder: Path) -> None:
    """Write the erased weights, with their hash beside them."""
    from safetensors.torch import save_model

    with files.new_folder(folder) as new:
        save_model(student.cpu(), str(new / ERASED))
        files.write_text(new / HASH, files.sha256(new / ERASED))


def take(model: nn.Module, folder: Path) -> None:
    """Load what `keep` wrote. Raises RunError if it has changed since."""
    from safetensors.torch import load_model

    if files.sha256(folder / ERASED) != (folder / HASH).read_text("utf-8"):
        raise RunError(f"{folder / ERASED} is damaged (it does not agree with its own hash); start a new run")
    load_model(model, folder / ERASED)


def distilled(
    recipe: Recipe, bench: Bench, folder: Path, states: Path, say: Narrator, world: World
) -> tuple[nn.Module, Erased]:
    """The erased model and what was done; what all processes do."""
    assert recipe.erase != "none"  # the only reason to be here
    with joined(world, bench.device, shard=False) as group, say.steps("erasing", recipe.erase.steps) as steps:
        return erase.run(
            recipe.erase,
            bench.task.load(folder),
            bench.task,
            bench.streams,
            bench.device,
            states,
            lambda step, logged: steps.update(step, values(logged)),
            group,
        )


def harden(
    recipe: Recipe,
    bench: Bench,
    folder: Path,
    run: RunFolder,
    say: Narrator,
    erased: Erased | None = None,
    world: World = ALONE,
) -> Training:
    """Run the defence, on the erased weights if there are some, and save the drop-in release."""
    model = bench.task.load(folder)
    if erased is not None:
        take(model, run.state / "erased")
        shutil.rmtree(run.state / "erase", ignore_errors=True)  # the states of a stage that has ended
    model, training = defended(recipe, bench, folder, model, run.state, say, erased, world)
    saved = checkpoint.save(checkpoint.merged(model).cpu(), folder, run.release)
    notes = list(training.notes)
    if saved.cast_loss > 0.1:
        notes.append(f"{saved.cast_loss:.0%} of the hardening was lost when casting to the parent's dtype")
        say.warn(notes[-1])
    return training.model_copy(update={"erased": erased, "cast_loss": saved.cast_loss, "notes": tuple(notes)})


def defended(
    recipe: Recipe,
    bench: Bench,
    folder: Path,
    model: nn.Module,
    states: Path,
    say: Narrator,
    erased: Erased | None,
    world: World,
) -> tuple[nn.Module, Training]:
    """The model after the loop, and what was done; where the recipe has no defence, that is the erasure.

    What all processes do; `model` is that of the first one, erased or as it is in `folder`.
    """
    if recipe.defense is None or recipe.train is None:
        assert erased is not None  # checked before anything started
        whole = sum(p.numel() for p in model.parameters())
        return model, Training(defense="erase", title=erase.TITLE, steps=erased.steps, trainable=whole, log=())
    train, task = recipe.train, bench.task
    defense_class = registry.find("defenses", recipe.defense.name)
    defense = defense_class(defense_class.Config(**recipe.defense.settings), train, task)
    torch.manual_seed(train.seed)
    if recipe.adapter != "none":
        model = checkpoint.attach(model, recipe.adapter, task)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with joined(world, bench.device) as group, say.steps("hardening", train.steps) as steps:
        if erased is not None:
            group.give([*model.parameters(), *model.buffers()])
        log = loop.run(
            defense,
            model,
            task,
            bench.streams,
            train,
            bench.device,
            States(states),
            lambda step, logged: steps.update(step, values(logged)),
            group,
        )
        weights = group.whole(model) if group.mesh is not None else None
    if weights is not None:  # a sharded model stays one
        model = task.load(folder)
        if recipe.adapter != "none":
            model = checkpoint.attach(model, recipe.adapter, task)
        model.load_state_dict(weights)
    title = defense_class.Config.title + (f" after {erase.TITLE}" if erased else "")
    made = {"steps": train.steps, "trainable": trainable, "log": log, "notes": (*defense.notes, *trouble.told(log))}
    return model, Training(defense=recipe.defense.name, title=title, **made)


def after(
    bench: Bench,
    folder: Path,
    original_folder: Path,
    original: Measurement | None,
    chosen: tuple[Family, ...],
    run: RunFolder,
    say: Narrator,
    order: Callable[..., World] = ALONE.order,
) -> Measurement:
    """Attack the saved folder, long enough for the original's own cost; `order` is that of `before`."""
    families = wanted(chosen, bench)
    parent = original_folder if original is not None else None
    if original is not None:
        families = budgeted(bench, original, families)
    notes: tuple[str, ...] = ()
    if not any(f.edit == "canonical" for f in chosen) and bench.probe.preset not in SCREENS:
        notes = ("not canonicalised: the table of re-scalings has no row for this architecture",)
    world = order("probe", subject="hardened", families=[asdict(f) for f in families], attacked=str(folder))
    runs = run.probe / "runs" / "hardened"
    with world.alive(), mirrored(world, bench.device, folder):
        measurement = probed("hardened", bench, folder, families, runs, say.note, parent, world, notes)
    if original is not None:
        measurement = with_norm_ratio(measurement, folder, original_folder)
    files.write_text(run.probe / "hardened.json", measurement.model_dump_json())
    return measurement


def picture(bench: Bench, original: Path, folder: Path, run: RunFolder) -> None:
    """Put beside the evidence what both models make of held-out retain rows, where the task draws.

    No restricted row, and nothing that an attacked model makes, is ever shown.
    """
    drawn = bench.task.picture((original, folder), bench.streams.rows("retain", "evaluation"), bench.device)
    if drawn is not None:
        (run.release / "hardener").mkdir(parents=True, exist_ok=True)
        drawn.save(run.release / "hardener" / card.SAMPLES)


def budgeted(bench: Bench, original: Measurement, families: tuple[Family, ...]) -> tuple[Family, ...]:
    """The families with the ladders that they climbed on the original, and their budgets.

    A budget is 16 × what the original cost, overall and by that family alone; at least `probe.steps` and at most
    `probe.max_steps`. The cost is that of the original judged against itself.
    """

    def cost(chosen: tuple[Family, ...]) -> float:
        names = {f.name for f in chosen} | {NO_ATTACK}
        there = original.model_copy(update={"runs": tuple(run for run in original.runs if run.family in names)})
        itself = there.model_copy(update={"subject": "hardened"})
        return judge(bench, there, itself, None, chosen).measures.cost_original_steps or 0.0

    def budget(family: Family) -> int:
        needed = math.ceil(BUDGET_FACTOR * max(overall, cost((family,))))
        return min(bench.probe.max_steps, max(bench.probe.steps, needed))

    def ladder(family: Family) -> tuple[float, ...]:
        # A rate that a search chose belongs to its setting; the other subject is searched by itself.
        climbed = (run for run in original.runs if run.family == family.name and not run.setting)
        return tuple(sorted({run.rate for run in climbed}))

    overall = cost(families)
    return tuple(replace(f, rates=() if f.doses else ladder(f), steps=budget(f)) for f in families)


def judge(
    bench: Bench,
    original: Measurement | None,
    hardened: Measurement,
    scratch: Measurement | None,
    chosen: tuple[Family, ...],
) -> Evidence:
    """Turn measurements into evidence."""
    return evidence.evidence(
        original,
        hardened,
        scratch,
        preset=bench.probe.preset,
        epsilon=bench.probe.epsilon,
        expected_families=tuple(f.name for f in chosen),
        titles={f.name: f.title for f in chosen},
        planned_steps=bench.probe.steps,
        not_tried=(*left_out(bench, chosen), *NOT_TRIED),
        judges=bench.panel.identity() if bench.panel else None,
        remarks=(*in_distribution(bench), *(bench.panel.notes() if bench.panel else ())),
    )


def left_out(bench: Bench, chosen: tuple[Family, ...]) -> Iterator[str]:
    """The families for this kind of model that the preset, the rows or what is installed left out, by their titles."""
    names = {family.name for family in wanted(chosen, bench)}
    for name in registry.BUILT_IN["attacks"]:
        family: Family = registry.find("attacks", name)
        if family.suits(bench.task.kind) and name not in names:
            yield family.title


def in_distribution(bench: Bench) -> Iterator[str]:
    """A note where attack or defence have rows of the judged source: another source may not be protected alike."""
    taught = {
        part.name
        for part in bench.streams.slices
        if part.role in ("restricted", "alignment") and part.use != "evaluation" and part.examples
    }
    if bench.judged.name not in taught:
        return
    apart = ", ".join(part.name for part in bench.beside if part.name not in taught)
    both = f"the verdict is in distribution; held-out sources stand beside it: {apart}"
    only = "in distribution only: no held-out source"
    yield f"{both if apart else only} (rows of {bench.judged.name} serve attack or defence as well as the judgement)"


def report(
    run: RunFolder,
    recipe: Recipe,
    subject: str,
    parent: Parent,
    bench: Bench,
    training: Training | None,
    judged: Evidence,
    measured: tuple[Measurement | None, ...],
    *,
    pushed_anyway: bool = False,
    processes: int = 1,
) -> Report:
    """Put the report together."""
    subjects = [m for m in measured if m is not None]
    hardened = next(m for m in subjects if m.subject == "hardened")
    published: dict[str, Any] = sources.published(recipe).model_dump(mode="json")
    return Report(
        hardener=hardener.__version__,
        created=run.created,
        subject=subject,
        parent=parent,
        weights=hardened.weights,
        recipe=published,
        data=bench.streams.records,
        training=training,
        evidence=judged,
        curves=evidence.curves(subjects, recipe.probe.epsilon),
        environment={**versions(), "device": bench.device, **({"processes": str(processes)} if processes > 1 else {})},
        pushed_anyway=pushed_anyway,
    )
