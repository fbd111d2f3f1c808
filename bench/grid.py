"""SOPHON's evidence in the paper's own form: original, hardened and from scratch over a grid of attackers.

    python -m bench.grid --parent beds/mnist/resnet --hardened hot=RUN/release --recipe beds/mnist/resnet.yaml --out DIR
    python -m bench.grid ... --quick        # fewer rates and rows, one seed: to see that it runs

For classifiers of images or texts. The full cross product of methods, optimizers, rates, batches, samples and seeds is
too large, so it is made in two parts:

1. every method × optimizer × rate with 16 rows a batch and 20 labels per class;
2. of each method, the attacks that were best on any side: with other batches, with other numbers of labels, healed,
   re-scaled and scheduled first (adaptive attacks); and a benign task.

All sides meet the same attackers with the same rows, order and seeds; a seed draws the rows as well. In part 2 each
side meets also what was best on the others, so that none is attacked with less. Every cell is one file in `DIR/cells`,
so a run that was killed goes on by the same line. Written are `DIR/grid.md` and `DIR/grid.png`; see `grid_report.py`.

For the 22 k weights of the ResNet bed a cell takes one to two seconds of a core; see README.md for the whole.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch

from bench import grid_report
from bench.grid_attackers import METHODS, OPTIMIZERS, PLAIN, PREPARATIONS, Attacker, rates
from bench.grid_sides import ORIGINAL, SCRATCH, Setting, Side, best_attackers
from hardener import checkpoint, recipe_file, sources, stages
from hardener.attacks.finetune import attacked
from hardener.attacks.scene import Scene
from hardener.bench import Bench
from hardener.console import Narrator, quiet
from hardener.judging import Judge
from hardener.measurement import Run
from hardener.probing import Store
from hardener.recipe import Role
from hardener.tasks.base import Example


@dataclass(frozen=True)
class Plan:
    """How much of the grid is made."""

    steps: int
    rates: slice
    """Of each ladder."""
    batches: tuple[int, ...]
    """Beside the one of the cross product."""
    samples: tuple[int, ...]
    """Labels per class, beside those of the cross product."""
    seeds: tuple[int, ...]


FULL = Plan(128, slice(None), (4, 64), (5, 80), (0, 1, 2))
QUICK = Plan(32, slice(0, None, 2), (64,), (5,), (0,))
BENIGN = [Attacker("fresh-all", name, rate) for name in ("sgd", "adam") for rate in rates("fresh-all", name)]


@dataclass(frozen=True)
class Place:
    """What is attacked, and where the cells go."""

    folders: tuple[tuple[str, Path], ...]
    """Side → checkpoint folder: the original, the hardened ones, and again the original's for new weights."""
    recipe: Path
    out: Path
    steps: int

    @property
    def parent(self) -> Path:
        """The original's folder."""
        return dict(self.folders)[ORIGINAL]


@dataclass(frozen=True)
class Cell:
    """One attack on one side."""

    side: str
    attacker: Attacker
    seed: int
    role: Role = "restricted"


Found = dict[Cell, Run]


# --- one cell ------------------------------------------------------------------------------------------------------


class Room:
    """Where one process makes its cells: the data is read once."""

    def __init__(self, place: Place) -> None:
        torch.set_num_threads(1)
        self.place = place
        recipe = sources.pin(recipe_file.load(place.recipe, probe=True))
        with quiet():
            self.bench: Bench = stages.open_bench(recipe, place.parent, "cpu", Narrator(silent=True))
        self.judge = Judge(self.bench)
        gc.freeze()  # the trainer collects garbage after every attack: not among the libraries, a third of the time

    @cached_property
    def stores(self) -> dict[str, Store]:
        """Finished cells by side, each known by the weights that were attacked and all that a score depends on."""
        context = self.bench.fingerprint()
        return {
            side: Store(self.place.out / "cells" / side, f"{checkpoint.fingerprint(folder)} {context}")
            for side, folder in self.place.folders
        }

    def make(self, cell: Cell) -> Run:
        """The finished cell, or a new one."""
        attack = cell.attacker.attack(self.place.steps, cell.seed)
        attack = replace(attack, setting=f"{cell.role}, {attack.setting}")
        benign = cell.role == "benign"
        judge = partial(self.judge.benign, self.bench.benign[0]) if benign else self.judge.of(attack)
        with quiet():
            return self.stores[cell.side].run(attack, lambda: attacked(self.scene(cell), attack, judge))

    def scene(self, cell: Cell) -> Scene:
        """What the attacker of a cell holds."""
        streams = self.bench.streams
        return Scene(
            folder=dict(self.place.folders)[cell.side],
            task=self.bench.task,
            harm=sample(streams.rows(cell.role, "attack"), cell.attacker.per_class, cell.seed),
            benign=streams.rows("retain", "attack"),
            device=self.bench.device,
            classes=streams.classes[cell.role],
            scratch=cell.side == SCRATCH,
        )

    @property
    def methods(self) -> list[str]:
        """The methods that apply: a kept head needs an output for every restricted class."""
        short = len(stages.label2id(self.place.parent)) < self.bench.streams.classes["restricted"]
        return [name for name, method in METHODS.items() if not (short and method.head == "kept")]

    def retained(self, side: str) -> list[list[float]]:
        """Row scores of a checkpoint on its own task before any attack, by source."""
        with quiet():
            return self.judge.utility(self.bench.task.load(dict(self.place.folders)[side]).eval())


def sample(rows: Sequence[Example], per_class: int, seed: int) -> list[Example]:
    """So many rows of each class, or all there are; a smaller sample of the same seed is part of a larger one."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    taken: Counter[int] = Counter()
    chosen = []
    for row in (rows[i] for i in order):
        if taken[row.labels] < per_class:
            taken[row.labels] += 1
            chosen.append(row)
    return chosen


@lru_cache(maxsize=1)
def room(place: Place) -> Room:
    """The room of this process."""
    return Room(place)


def work(place: Place, cell: Cell) -> Run:
    """One cell, in whatever process."""
    return room(place).make(cell)


# --- which cells ---------------------------------------------------------------------------------------------------


def crossed(sides: Iterable[str], methods: Sequence[str], plan: Plan) -> list[Cell]:
    """Part 1. New weights have no head worth keeping: to them the first two methods are one."""
    return [
        Cell(side, Attacker(method, optimizer, rate), seed)
        for side in sides
        for method in methods
        if not (side == SCRATCH and METHODS[method].head == "kept")
        for optimizer in OPTIMIZERS
        for rate in rates(method, optimizer)[plan.rates]
        for seed in plan.seeds
    ]


def varied(best: Sequence[Attacker], sides: Iterable[str], plan: Plan) -> Iterator[Cell]:
    """Part 2: the best of each method with other batches, other samples, and prepared."""
    for side in sides:
        scratch = side == SCRATCH
        for one in best:
            if scratch and METHODS[one.method].head == "kept":
                continue
            others = [one._replace(batch=batch) for batch in plan.batches]
            others += [one._replace(per_class=rows) for rows in plan.samples]
            if METHODS[one.method].scope == "all":
                fit = [name for name, how in PREPARATIONS.items() if name != PLAIN and not (scratch and how.edit)]
                others += [one._replace(preparation=name) for name in fit]
            yield from (Cell(side, other, seed) for other in others for seed in plan.seeds)


def benign(sides: Iterable[str], plan: Plan) -> Iterator[Cell]:
    """The benign task: what an honest user may still teach."""
    chosen = BENIGN[plan.rates]
    return (Cell(side, one, seed, "benign") for side in sides for one in chosen for seed in plan.seeds)


# --- the whole -----------------------------------------------------------------------------------------------------


@contextmanager
def maker(place: Place, jobs: int) -> Iterator[Callable[[Sequence[Cell], str], Found]]:
    """Makes cells side by side, a core each; one job makes them here."""
    say = Narrator()

    def gathered(cells: Sequence[Cell], runs: Iterable[Run], title: str) -> Found:
        found: Found = {}
        with say.steps(title, len(cells)) as steps:
            for cell, run in zip(cells, runs, strict=True):
                found[cell] = run
                steps.update(len(found), cell.side)
        return found

    if jobs == 1:
        yield lambda cells, title: gathered(cells, (work(place, cell) for cell in cells), title)
        return
    # Not forked: threads of the libraries would be gone in the child, and their locks held.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield lambda cells, title: gathered(cells, pool.map(partial(work, place), cells), title)


def made(place: Place, plan: Plan, jobs: int) -> tuple[dict[str, Side], Setting]:
    """Make all cells; the sides, and what they share."""
    here = room(place)
    names = [name for name, _ in place.folders]
    setting = Setting.of(here.bench, plan.steps, plan.seeds)
    with maker(place, jobs) as make:
        found = make(crossed(names, here.methods, plan), "methods × optimizers × rates")
        best = best_attackers(sides(place, found, setting), setting)
        rest = [*varied(best, names, plan)]
        if here.bench.benign:
            rest += benign([name for name in names if name != SCRATCH], plan)
        found |= make(rest, "batches, samples, adaptive attacks, benign")
    return sides(place, found, setting), setting


def sides(place: Place, found: Found, setting: Setting) -> dict[str, Side]:
    """What was found on each side."""
    here, made = room(place), {}
    for name, folder in place.folders:
        own = {cell: run for cell, run in found.items() if cell.side == name}
        made[name] = Side.of(
            name,
            checkpoint.fingerprint(folder),
            {(cell.attacker, cell.seed): run for cell, run in own.items() if cell.role == "restricted"},
            tuple(run for cell, run in own.items() if cell.role == "benign"),
            [] if name == SCRATCH else here.retained(name),
            setting,
        )
    return made


def named(text: str) -> tuple[str, Path]:
    """Reads `NAME=DIR`."""
    name, equals, folder = text.partition("=")
    if not (equals and name and Path(folder).is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with a folder that exists")
    if name in (ORIGINAL, SCRATCH):
        raise argparse.ArgumentTypeError(f"{name!r} is a side of every grid; choose another name")
    return name, Path(folder).resolve()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Original, hardened and from scratch over a grid of attackers.")
    parser.add_argument("--parent", type=Path, required=True, help="checkpoint folder before hardening")
    parser.add_argument("--hardened", type=named, action="append", required=True, help="NAME=DIR; may be repeated")
    parser.add_argument("--recipe", type=Path, required=True, help="recipe that names the data")
    parser.add_argument("--out", type=Path, required=True, help="folder for cells, grid.md and grid.png")
    parser.add_argument("--quick", action="store_true", help="fewer rates and rows, one seed: to see that it runs")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, a core each; default: 2")
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), help="default: 0,1,2")
    chosen = parser.parse_args(arguments)
    if len({name for name, _ in chosen.hardened}) < len(chosen.hardened):
        parser.error("two hardened releases have one name; give each its own")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that are started
    plan = QUICK if chosen.quick else FULL
    plan = replace(plan, seeds=chosen.seeds or plan.seeds)
    parent = chosen.parent.resolve()
    folders = ((ORIGINAL, parent), *chosen.hardened, (SCRATCH, parent))
    place = Place(folders, chosen.recipe.resolve(), chosen.out.resolve(), plan.steps)
    found, setting = made(place, plan, chosen.jobs)
    print(grid_report.write(found, setting, place.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
