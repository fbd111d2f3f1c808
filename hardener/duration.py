"""How long a run takes, from metadata and the first lines of local files.

    seconds = 2 · N · rows forward · tokens per row / what this device reaches + passes · dispatch

N counts the weights that a token is multiplied with, a row that is trained on is three rows forward (its backward pass
costs two), and dispatch is what a pass costs however little it computes; attention is left out. Rows of local text
files are measured by their bytes, four to a token, all others are taken to be as long as the recipe allows. Every
attack is taken to be as long as its budget, though one that is answered early ends early; ladders that grow, and what
judging models and public benchmarks take, are not counted; the device is taken to do nothing else.

Measured on one CPU thread, in CPU time: a collapse trap with the standard probe on a Llama of 0.4 M weights took 300 s
(1.6 times the estimate), one with 32-step attacks on the smallest Llama of the tests 8 s (1.9 times). Layers so small
reach half of what the device reaches with a large product. How near it comes on larger models and other devices was
not measured. It tells minutes from hours from days.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from hardener import registry
from hardener.defenses.configs import CONFIGS
from hardener.defenses.settings import Settings
from hardener.defenses.sophon_configs import Guarded
from hardener.metadata import ModelRef
from hardener.recipe import ROLES, Data, Recipe, Source, Train

if TYPE_CHECKING:
    from hardener.attacks.families import Family, Kind
    from hardener.measurement import Subject

TRAINED = 3
"""Rows forward that a row costs where it is trained on."""
DISPATCH = 2e-4
"""Seconds that a pass costs for each weight tensor, however small: measured with tiny models on one CPU thread, where
it is most of the time."""
LONGER = 2
"""How much longer the attacks on the release are than those on the original, whose cost decides it."""
SCORED = 64
"""Rows that are judged in one pass."""
CONVOLVED = 168
"""How often a weight of a convolutional network is used on an image of 224 pixels a side: 162 times in ResNet-18 and
174 in ResNet-50, as torch counts."""
DENOISED = 1 / 6
"""Share of an image's pixels at which a weight of a denoiser is used: 0.17 in those of three or four resolutions, 0.03
in those of six, as torch counts."""
ROW_A_LINE = (".jsonl", ".csv", ".tsv")
"""Files whose rows can be measured without knowing their columns."""
BEGINNING = 1 << 16
"""Bytes of such a file that are read."""
TOKEN_BYTES = 4
"""Bytes of a token, by rule of thumb. Keys and quotes count too, in place of the template that the text will get."""


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
    if isinstance(settings, Guarded):
        return settings.rows(train.batch_size)
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
    from hardener.conditions import GATE_ROWS

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
    named = probe.rates.get("benign", _benign(task.kind))
    benign = [probe.benign_steps] * len(named) * len(recipe.data.benign or ())
    planned: dict[Subject, list[int]] = {
        "original": lengths(recipe, [f for f in chosen if not f.needs_parent]) + benign,
        "hardened": lengths(recipe, longer) + benign,
    }
    if not task.generative:
        planned["scratch"] = lengths(recipe, [f for f in chosen if f.can_begin_anew])
    return planned


def _benign(kind: Kind) -> tuple[float, ...]:
    from hardener.attacks.families import BENIGN

    return BENIGN[kind].rates


def lengths(recipe: Recipe, chosen: Sequence[Family]) -> list[int]:
    """The steps of each attack on one model: every family once, searches, and repeats with further seeds."""
    from hardener.attacks.attack import Attack
    from hardener.conditions import LEAST_TRIALS, WORST

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
    repeated = {"standard": trained[:WORST], "thorough": trained}.get(probe.preset, [])
    return runs + repeated * (probe.seeds - 1)


def tokens_per_row(recipe: Recipe, ref: ModelRef) -> float:
    """How often each weight is used on one row: tokens of a text, patches of an image, places of a convolution."""
    if recipe.task == "unconditional-diffusion":
        return float(DENOISED * ref.config["sample_size"] ** 2)
    if recipe.task != "image-classification":
        return text_length(recipe.data)
    side, patch = ref.config.get("image_size"), ref.config.get("patch_size")
    if isinstance(side, int) and isinstance(patch, int):
        return float((side // patch) ** 2)
    return CONVOLVED * ((side if isinstance(side, int) else 224) / 224) ** 2


def text_length(data: Data) -> float:
    """Tokens of a row: the mean over the roles, and within a role over its sources."""
    roles: list[tuple[Source, ...]] = [sources for role in ROLES if (sources := getattr(data, role))]
    return mean(mean(_tokens(source, data.max_length) for source in sources) for sources in roles)


def _tokens(source: Source, most: int) -> float:
    path = Path(os.path.expanduser(source.dataset))  # noqa: PTH111, which does not raise for a name that nobody has
    if path.suffix.lower() not in ROW_A_LINE or not path.is_file():
        return most
    with path.open("rb") as stream:
        begins = stream.read(BEGINNING)
    whole = begins[: begins.rfind(b"\n") + 1] or begins
    return mean(min(len(line) / TOKEN_BYTES, most) for line in whole.splitlines() or [b""])


def seconds(work: Work, ref: ModelRef, tokens: float, reached: float) -> float:
    """The estimate for rows of so many tokens, on a device that does so many floating-point operations per second."""
    return 2 * ref.multiplied * work.rows * tokens / reached + DISPATCH * len(ref.tensors) * work.passes


def speed(device: str, dtype: str) -> float:
    """Floating-point operations per second of the largest square matrix product that takes a few hundredths of one.

    A CPU is timed by what this process had of it, so other work on the machine does not count.
    """
    import torch

    clock = time.process_time if device == "cpu" else time.perf_counter
    threads = torch.get_num_threads() if device == "cpu" else 1
    side, took = 256, 0.0
    while took < 0.02 and side < 16384:
        side *= 2
        matrix = torch.ones(side, side, device=device, dtype=getattr(torch, dtype))
        for _ in range(2):  # the first one warms up
            began = clock()
            float((matrix @ matrix)[0, 0])  # waits for the device
            took = (clock() - began) / threads
    return float(2 * side**3 / took)
