"""What a run will do and need, from metadata alone: `--dry-run` prints it and ends.

The Hub is only asked questions, and no weight moves. The time is that of the arithmetic

    seconds = 2 · N · rows forward · tokens per row / what this device reaches + passes · dispatch

where N counts the weights that a token is multiplied with, a row that is trained on is three rows forward (its
backward pass costs two), and dispatch is what a pass costs however little it computes. Rows are taken to be as long as
the recipe allows, and attention is left out. Tiny Llamas and ResNets on one thread of a CPU took 0.7 to 2.2 times the
estimate, up to 3.7 times where others used the machine too; how near it comes on larger models and other devices was
not measured. It tells minutes from hours from days.
"""

from __future__ import annotations

import math
import shutil
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hardener import registry
from hardener.defenses.configs import CONFIGS, Settings, SophonConfig
from hardener.errors import ResourceError
from hardener.metadata import ModelRef
from hardener.recipe import Recipe, Train
from hardener.target import Destination

if TYPE_CHECKING:
    from hardener.attacks.families import Family
    from hardener.measurement import Subject

BYTES = 4
"""Bytes per weight: hardening and attacks run in float32."""
TRAINED = 3
"""Rows forward that a row costs where it is trained on."""
DISPATCH = 2e-4
"""Seconds that a pass costs for each weight tensor, however small: measured with tiny models on one CPU thread, where
it is most of the time."""
RANGE = math.sqrt(3.0)
"""The time is told as from the estimate / RANGE to the estimate · RANGE: three times as long at most as at least."""
LONGER = 2
"""How much longer the attacks on the release are than those on the original, whose cost decides it."""
SCORED = 64
"""Rows that are judged in one pass."""
REPEATED, GATE_ROWS = 2, 128
"""`ladder.WORST` and `judging.GATE_ROWS`, whose modules import the trainer: seconds that a plan need not take."""
CONVOLVED = 168
"""How often a weight of a convolutional network is used on an image of 224 pixels a side: 162 times in ResNet-18 and
174 in ResNet-50, as torch counts."""
WIDTH = 66
"""Columns of a value in the human form, beside its name in a terminal of 80."""


@dataclass(frozen=True)
class Plan:
    """The plan of one run. Sizes are bytes, times are seconds; None is what is not known."""

    model: str
    """Hub id, or the name of a local folder."""
    commit: str | None
    """Of the model; None for a local folder."""
    license: str | None
    """As the card says; `other` has a name and a link."""
    license_name: str | None
    license_link: str | None
    gated: str | bool
    private: bool
    parameters: int
    """Elements of all tensors, from the headers of the safetensors files."""
    dtype: str
    """In which most of them are stored."""
    files: int
    """Files that the release needs of the model."""
    download: int
    """Their size; 0 for a local folder."""
    recipe: str
    defense: str | None
    outer_steps: int
    passes_per_step: int
    """Forward and backward passes of one outer step; 0 where it is not known."""
    attacks: str
    """Preset and budget, in words."""
    attack_runs: int
    """On all models together; ladders that grow, and families that do not apply to the architecture, not counted."""
    memory: int
    """Estimated peak of weights, gradients, optimizer state and look-ahead copies; activations come on top."""
    disk: int
    """What run folder and cache will take, at most."""
    disk_free: int
    """On the disk of the run folder."""
    device: str
    """Where the time below was estimated."""
    hardening_seconds: float
    """Estimated, erasure included; the middle of a range three times as wide as it begins."""
    probe_seconds: float
    """The same for all attacks. A measurement of the original that is cached already, and the models that judge answers
    or run public benchmarks, are not considered."""
    push_to: str | None
    """The target by its full name, where the Hub could be asked."""
    push_exists: bool | None
    """False: it will be created. This and the next four are None where the Hub could not be asked."""
    push_private: bool | None
    """Whether it will be private after the push."""
    push_gated: str | bool | None
    """How it will be gated after the push."""
    push_writable: bool | None
    """Whether this token may push as asked."""
    push_transfer: str | None
    """`xet` or `lfs`; in words where it is not known."""
    push_note: str | None
    """Why the target could not be asked for."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def plan(
    recipe: Recipe,
    ref: ModelRef,
    push_to: str | Destination | None,
    *,
    place: Path = Path(),
    device: str = "auto",
) -> Plan:
    """Put together what is known before anything is fetched.

    `place` is the run folder, which need not exist. The device is measured by a fraction of a second of arithmetic.
    """
    target = push_to if isinstance(push_to, Destination) else Destination(push_to)
    lora = recipe.adapter != "none"
    # weights; and per trainable weight a gradient, two Adam moments, the look-ahead's copy and its kept gradient.
    # With an adapter those five are adapter-sized; the probe's full fine-tune (4 per weight) is then the peak.
    # Erasing is a full fine-tune beside its teacher.
    copies = 6 if recipe.defense and not lora else 4 if recipe.erase == "none" else 5
    runs = [steps for planned in attacks(recipe).values() for steps in planned]
    chosen = _device(device)
    trained = recipe.train or (recipe.erase if recipe.erase != "none" else None)
    dtype = trained.dtype if trained else "float32"
    return Plan(
        model=ref.id,
        commit=ref.commit,
        license=ref.license.get("license"),
        license_name=ref.license.get("license_name"),
        license_link=ref.license.get("license_link"),
        gated=ref.gated,
        private=ref.private,
        parameters=ref.parameters,
        dtype=ref.dtype,
        files=len(ref.files),
        download=0 if ref.folder else ref.bytes,
        recipe=recipe.name,
        defense=recipe.defense.name if recipe.defense else None,
        outer_steps=recipe.train.steps if recipe.train else 0,
        passes_per_step=passes(recipe),
        attacks=f"{recipe.probe.preset}: {recipe.probe.steps} steps of {recipe.probe.batch_size} rows per attack",
        attack_runs=len(runs),
        memory=copies * BYTES * ref.parameters,
        disk=2 * ref.bytes + (0 if ref.folder else ref.bytes) + 3 * BYTES * ref.parameters * (0 if lora else 2),
        disk_free=_free(place),
        device=chosen,
        hardening_seconds=seconds(hardening(recipe), recipe, ref, speed(chosen, dtype)),
        probe_seconds=seconds(probing(recipe, runs), recipe, ref, speed(chosen, "float32")),
        push_to=target.repo,
        push_exists=target.exists,
        push_private=target.private,
        push_gated=target.gated,
        push_writable=target.writable,
        push_transfer=target.transfer,
        push_note=target.note,
    )


def check_disk(needed: Plan, folder: Path) -> None:
    """Raise ResourceError if the run folder's disk is too small for the plan."""
    if (free := _free(folder)) < needed.disk:
        raise ResourceError(
            f"{_place(folder)} has {_bytes(free)} free, the run needs about {_bytes(needed.disk)}; "
            "free some space or choose another disk with --output"
        )


def _place(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())


def _free(folder: Path) -> int:
    return shutil.disk_usage(_place(folder)).free


# --- how long it takes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What is computed."""

    rows: float
    """Rows forward; a row that is trained on is `TRAINED` of them."""
    passes: float
    """Times that the model is called."""


def passes(recipe: Recipe) -> int:
    """Forward and backward passes of one outer step of the shipped defences; 0 where it is not known."""
    settings = _settings(recipe)
    return settings.passes if settings else 0


def rows_per_step(recipe: Recipe) -> int:
    """Rows on which gradients are taken in one outer step; 0 where it is not known."""
    settings, train = _settings(recipe), recipe.train
    if settings is None or train is None:
        return 0
    if isinstance(settings, SophonConfig):
        walk = settings.inner_steps * (settings.inner_batch + settings.query_batch)
        return settings.suppression_steps * walk + settings.reinforcement_steps * train.batch_size
    return settings.passes * train.batch_size


def _settings(recipe: Recipe) -> Settings | None:
    known = CONFIGS.get(recipe.defense.name) if recipe.defense else None
    return known(**recipe.defense.settings) if known and recipe.defense else None


def hardening(recipe: Recipe) -> Work:
    """The erasure, where there is one, and the outer loop."""
    train, erased = recipe.train, erasing(recipe)
    if train is None:
        return erased
    return Work(
        rows=erased.rows + _trained(train) * train.steps * rows_per_step(recipe),
        passes=erased.passes + train.steps * passes(recipe) * train.grad_accumulation,
    )


def erasing(recipe: Recipe) -> Work:
    """Unlearning, then distillation, whose every step asks the teacher too."""
    erase = recipe.erase
    if erase == "none":
        return Work(0, 0)
    unlearned = 0 if erase.unlearn == "none" else erase.unlearn.steps
    return Work(
        rows=erase.batch_size * (_trained(erase) * (unlearned + erase.steps) + erase.steps),
        passes=erase.grad_accumulation * (unlearned + 2 * erase.steps),
    )


def _trained(train: Train) -> int:
    """Rows forward that a row costs which is trained on."""
    return TRAINED + train.checkpointing


def probing(recipe: Recipe, runs: Iterable[int]) -> Work:
    """All attacks, each of so many steps, and the judging at their checkpoints."""
    from hardener.attacks.attack import checkpoints

    probe = recipe.probe
    held_out = _held_out(recipe)
    asked = probe.answer_tokens if recipe.data.restricted[0].score == "judged" else 1
    rows = calls = 0.0
    for steps in runs:
        points = 1 + (len(checkpoints(steps)) if steps else 0)
        rows += TRAINED * steps * probe.batch_size + points * held_out
        calls += steps + points * math.ceil(held_out / SCORED) * asked
    return Work(rows, calls)


def _held_out(recipe: Recipe) -> int:
    """Rows that are scored at a checkpoint: the judged ones and, of a language model, general utility."""
    probe = recipe.probe
    generative = registry.find("tasks", recipe.task).generative
    return probe.evaluation_rows + (min(GATE_ROWS, probe.utility_rows) * len(recipe.data.retain) if generative else 0)


def attacks(recipe: Recipe) -> dict[Subject, list[int]]:
    """The optimizer steps of every attack on every model; 0 for one that does not train."""
    from hardener.bench import Able, Bench
    from hardener.data import Streams

    probe, task = recipe.probe, registry.find("tasks", recipe.task)
    bench = Bench(task, Streams((), {}, (), ()), probe, "cpu")  # rows and weights decide nothing of what is asked
    chosen = bench.families(Able(*[True] * len(fields(Able))))
    chosen = tuple(f for f in chosen if probe.families is None or f.name in probe.families)
    longer = tuple(replace(f, steps=max(probe.steps, min(LONGER * probe.steps, probe.max_steps))) for f in chosen)
    named = probe.rates.get("benign", _benign(task.generative))
    benign = [probe.benign_steps] * len(named) * len(recipe.data.benign or ())
    planned: dict[Subject, list[int]] = {
        "original": lengths(recipe, [f for f in chosen if not f.needs_parent]) + benign,
        "hardened": lengths(recipe, longer) + benign,
    }
    if not task.generative:
        fresh = [f for f in chosen if f.head == "fresh" and f.scope == "all" and f.edit is None]
        planned["scratch"] = lengths(recipe, fresh)
    return planned


def _benign(generative: bool) -> tuple[float, ...]:
    from hardener.attacks.families import BENIGN

    return BENIGN[generative].rates


def lengths(recipe: Recipe, chosen: Sequence[Family]) -> list[int]:
    """The steps of each attack on one model: every family once, searches, and repeats with further seeds."""
    from hardener.attacks.attack import Attack
    from hardener.conditions import LEAST_TRIALS

    probe = recipe.probe
    runs = [
        Attack(family, rate, 0, family.steps, probe.batch_size).length
        for family in chosen
        for rate in family.rates or family.doses or (0.0,)
    ]
    if probe.preset == "thorough":
        searched = [f for f in chosen if f.rates and not f.follows]
        runs += [f.steps for f in searched for _ in range(LEAST_TRIALS - len(f.rates))]
    trained = sorted(filter(None, runs))
    repeated = {"standard": trained[:REPEATED], "thorough": trained}.get(probe.preset, [])
    return runs + repeated * (probe.seeds - 1)


def tokens_per_row(recipe: Recipe, ref: ModelRef) -> float:
    """How often each weight is used on one row: tokens at most, patches of an image, places of a convolution."""
    if recipe.task != "image-classification":
        return recipe.data.max_length
    side, patch = ref.config.get("image_size"), ref.config.get("patch_size")
    if isinstance(side, int) and isinstance(patch, int):
        return float((side // patch) ** 2)
    return CONVOLVED * ((side if isinstance(side, int) else 224) / 224) ** 2


def seconds(work: Work, recipe: Recipe, ref: ModelRef, reached: float) -> float:
    """The estimate for a device that does so many floating-point operations per second."""
    operations = 2 * ref.multiplied * work.rows * tokens_per_row(recipe, ref)
    return operations / reached + DISPATCH * len(ref.tensors) * work.passes


def speed(device: str, dtype: str) -> float:
    """Floating-point operations per second of the largest square matrix product that takes a few hundredths of one."""
    import torch

    side, took = 256, 0.0
    while took < 0.02 and side < 16384:
        side *= 2
        matrix = torch.ones(side, side, device=device, dtype=getattr(torch, dtype))
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            float((matrix @ matrix)[0, 0])  # waits for the device
            took = time.perf_counter() - began
    return float(2 * side**3 / took)


def _device(asked: str) -> str:
    import torch

    here = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
    return asked if asked != "auto" else here.type if here else "cpu"


# --- as a person reads it ---------------------------------------------------------------------------------------------


def lines(made: Plan) -> list[tuple[str, str]]:
    """The plan as (name, value) rows for 80 columns; a value that is too long goes on in a row without a name."""
    told = [(name, row) for name, value in _told(made) for row in textwrap.wrap(value, WIDTH)]
    return [(name if i == 0 or told[i - 1][0] != name else "", row) for i, (name, row) in enumerate(told)]


def _told(made: Plan) -> Iterator[tuple[str, str]]:
    yield "model", made.model + (f" at commit {made.commit[:12]}" if made.commit else ", a local folder")
    fetched = f"{_bytes(made.download)} to fetch" if made.download else "nothing to fetch"
    yield "size", f"{made.parameters:,} parameters, {made.dtype}; {made.files} files, {fetched}"
    named = ", ".join(filter(None, (made.license, made.license_name, made.license_link)))
    yield "licence", named or "none named"
    yield "access", _access(made.private, made.gated)
    steps = f", {made.outer_steps:,} outer steps" if made.outer_steps else ""
    each = f" of {made.passes_per_step} passes" if made.passes_per_step else ""
    yield "recipe", made.recipe + steps + each
    yield "attacks", f"{made.attacks}; about {made.attack_runs} attacks"
    yield "memory", f"about {_bytes(made.memory)}, activations not counted"
    yield "disk", f"about {_bytes(made.disk)} needed, {_bytes(made.disk_free)} free"
    yield "time", _time(made)
    if made.push_to is not None:
        yield "push to", f"{made.push_to}: {_target(made)}"


def _access(private: bool | None, gated: str | bool | None) -> str:
    return ("private" if private else "public") + (f", gated ({gated})" if gated else "")


def _time(made: Plan) -> str:
    total = made.hardening_seconds + made.probe_seconds
    share = f"{made.hardening_seconds / total:.0%}" if total else "none"
    return f"about {_duration(total / RANGE)} to {_duration(total * RANGE)} on {made.device}, {share} of it to harden"


def _target(made: Plan) -> str:
    if made.push_exists is None:
        return made.push_note or "not asked"
    begins = "exists" if made.push_exists else "will be created"
    access = _access(made.push_private, made.push_gated)
    right = "this token may write" if made.push_writable else "this token may not write"
    return f"{begins}; {access}; {right}; transfer: {made.push_transfer}"


def _duration(seconds: float) -> str:
    units = ((86400, "days"), (3600, "h"), (60, "min"))
    size, unit = next((one for one in units if seconds >= 1.5 * one[0]), (1, "s"))
    return f"{max(1, round(seconds / size))} {unit}"


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
