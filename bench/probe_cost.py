"""What the probe adds to an attack, and what it saves.

    python -m bench.probe_cost [--quick] [--json FILE] [--device cuda]

An attacker's step is timed against that of a bare transformers `Trainer` on the same model and the same rows, between
two of its steps, so that loading is in neither. Attackers with LoRA share one loaded base: eight of them are timed
against eight that load it each, weights and all. The measurement of an original is kept for the next hardening of the
same parent: reading it is timed against making it.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from bench import untrained
from bench.rows import Row, clock, main, row, seconds
from hardener import data, recipe_file, sources
from hardener.attacks import families
from hardener.attacks.attack import Attack
from hardener.attacks.families import Family
from hardener.attacks.finetune import attacked
from hardener.attacks.mixture import Mixture
from hardener.attacks.scene import Scene
from hardener.attacks.training import inputs
from hardener.attacks.victim import victim
from hardener.bench import Bench, able, cached
from hardener.console import quiet
from hardener.measurement import Checkpoint
from hardener.probing import Prober
from hardener.tasks.causal_lm import CausalLM

BEGIN = 4
"""The step from which on time is taken."""
ATTACKERS = 8


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    steps: int
    """Of an attack whose step is timed; a number at which it is judged, which costs nothing here."""
    short: int
    """Of each of the attackers who share a base."""
    repeats: int


QUICK, FULL = Size(steps=32, short=4, repeats=3), Size(steps=256, short=32, repeats=5)


class Bed:
    """A bench and a scene around an untrained model."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.model = untrained.letters(folder)
        recipe = sources.pin(recipe_file.load("tiny-ctrap", untrained.overrides(folder)))
        task = CausalLM(self.model, template=recipe.data.template, max_length=recipe.data.max_length)
        self.bench = Bench(task, data.open_streams(recipe, task, {}), recipe.probe, device)
        rows = {role: self.bench.streams.rows(role, "attack") for role in ("restricted", "retain")}
        self.scene = Scene(self.model, task, rows["restricted"], rows["retain"], device)

    def attack(self, family: Family, steps: int, seed: int = 0) -> Attack:
        """The same rate for all."""
        return Attack(family, 1e-3, seed, steps, self.bench.probe.batch_size)

    def collated(self, drawn: list[Any]) -> dict[str, Tensor]:
        """A batch as the model's own forward takes it."""
        return inputs(self.scene.task, [example for _, example in drawn])

    def probed(self, family: Family, steps: int) -> float:
        """Seconds of a step as the probe takes it."""
        seen: dict[int, float] = {}

        def judge(model: Any, step: int, last: bool) -> Checkpoint:
            seen[step] = clock(self.device)
            return Checkpoint(step=step, scores=(0.0,))

        attacked(self.scene, self.attack(family, steps), judge)
        return (seen[steps] - seen[BEGIN]) / (steps - BEGIN)

    def bare(self, family: Family, steps: int) -> float:
        """Seconds of a step of a `Trainer` with the same model, rows, optimizer and clipping, and nothing else."""
        attack, watch = self.attack(family, steps), Watch(self.device)
        batches = Mixture(self.scene.harm, self.scene.benign, attack)
        with victim(self.scene, attack) as model, tempfile.TemporaryDirectory() as nowhere:
            arguments = TrainingArguments(
                nowhere,
                max_steps=steps,
                per_device_train_batch_size=attack.batch_size,
                use_cpu=self.device == "cpu",
                learning_rate=attack.rate,
                dataloader_pin_memory=False,
                remove_unused_columns=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            trainer = Trainer(model, arguments, self.collated, batches, callbacks=[watch])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return (watch.seen[steps] - watch.seen[BEGIN]) / (steps - BEGIN)

    def eight(self, steps: int, shared: bool) -> None:
        """Attackers with LoRA, one after the other."""
        for seed in range(ATTACKERS):
            if not shared:
                self.scene.forget_base()
            attacked(self.scene, self.attack(families.LORA, steps, seed), unjudged)
        self.scene.forget_base()


class Watch(TrainerCallback):  # type: ignore[misc]
    """When each step ended."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seen: dict[int, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the clock."""
        self.seen[state.global_step] = clock(self.device)


def unjudged(model: Any, step: int, last: bool) -> Checkpoint:
    return Checkpoint(step=step, scores=(0.0,))


def turns(one: Callable[[], float], other: Callable[[], float], repeats: int) -> tuple[float, float]:
    """The median of `one`, and of its quotients by `other`, over turns."""
    one(), other()
    found = [(one(), other()) for _ in range(repeats)]
    return statistics.median(mine for mine, _ in found), statistics.median(mine / theirs for mine, theirs in found)


def steps(bed: Bed, size: Size) -> Iterator[Row]:
    for family in (families.FULL, families.LORA):
        took, share = turns(
            lambda family=family: bed.probed(family, size.steps),
            lambda family=family: bed.bare(family, size.steps),
            size.repeats,
        )
        yield row(f"attacker's step, {family.name}", 1e3 * took, "ms")
        yield row(f"attacker's step / bare Trainer step, {family.name}", share, "×")
    bed.scene.forget_base()


def sharing(bed: Bed, size: Size) -> Row:
    _, share = turns(
        lambda: seconds(lambda: bed.eight(size.short, shared=True), bed.device),
        lambda: seconds(lambda: bed.eight(size.short, shared=False), bed.device),
        size.repeats,
    )
    return row(f"{ATTACKERS} attackers of {size.short} steps, one base / a base each", share, "×", 0.7)


def caching(bed: Bed) -> Iterator[Row]:
    bench = bed.bench
    chosen = bench.families(able(bench, bed.model, 0, parent=False))
    kept = bed.folder / "kept" / "original.json"

    def measure() -> None:
        cached(kept, lambda: Prober(bench, "original", bed.model, bed.folder / "runs", lambda _: None).measure(chosen))

    made, read = seconds(measure, bed.device), seconds(measure, bed.device)
    yield row("measuring an original", made, "s")
    yield row("the same once more, from the cache / made", read / made, "×")


def measured(quick: bool, device: str, size: Size | None = None) -> Iterator[Row]:
    size = size or (QUICK if quick else FULL)
    with tempfile.TemporaryDirectory() as folder, quiet():
        torch.manual_seed(0)
        bed = Bed(device, Path(folder))
        yield from steps(bed, size)
        yield sharing(bed, size)
        yield from caching(bed)


if __name__ == "__main__":
    main(__doc__, measured)
