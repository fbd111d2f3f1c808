"""Arms and seeds: which ways of hardening are worth a second look?

    python -m bench.beds.letters --out beds/letters
    python -m bench.laboratory --bed beds/letters --out DIR --smoke
    python -m bench.laboratory --bed beds/letters --out DIR --probe standard --jobs 2

Each cell, an arm with a hardening seed, is one `hardener harden` into its own run folder, beside its log: `DIR/PROBE/`.
A cell with a report is not run again, a broken one goes on where it was. The original is attacked once, together with
`never`, the twin that was never taught what is restricted: what it costs to teach it anew is the limit of any defence.
Written are `DIR/PROBE.md`, a table of arms and one of cells, and `DIR/PROBE.png`, utility kept and tokens
against the cost multiplier.

The probe `standard` is here cut to the attacks that the four properties of a trap ask for, so no cell is certified:
an arm that looks well is to be hardened once more, by hand, with all of them. On the letters bed a cell takes one to
two minutes of a core with `quick`, and about five with `standard`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hardener import recipe_file, tables
from hardener import report as reports
from hardener.defenses.configs import CONFIGS
from hardener.recipe import Recipe
from hardener.report import Interval, Report

Kind = TypeVar("Kind")
UNDEFENDED = ("defense=none", "train=null")
ROLLOUT = "defense={name: ctrap-rollout, inner_lr: [1.0e-4, 1.0e-3]}"
ADAPTIVE = "defense={name: ctrap-adaptive}"
LOCATED = "alpha: 1.0, modules: located, share: 0.2, relearn: {steps: 48, lr: 3.0e-4}"


@dataclass(frozen=True)
class Erasing:
    """Noise-then-distil before the defence."""

    how: str
    share: float = 0.095
    """Tokens distilled, over those that the parent was trained on; under a tenth, as locating takes rows too."""
    batch: int = 16
    lr: float = 2.0e-3

    def override(self, facts: dict[str, float]) -> str:
        """The section of the recipe, on a bed of which these are the facts."""
        steps = int(self.share * facts["parent_tokens"] / (self.batch * facts["row_tokens"]))
        plan = f"steps: {steps}, batch_size: {self.batch}, lr: {self.lr}, schedule: linear, alignment_share: 0.1"
        return f"erase={{{self.how}, {plan}, save_every: 100, parent_tokens: {facts['parent_tokens']}}}"


EVERYWHERE = Erasing("alpha: 0.95")
LONGER = Erasing("alpha: 0.95", share=0.356, batch=64)
THERE = Erasing(LOCATED)
ANEW = Erasing("alpha: 1.0, modules: ['*'], optimizer: muon", batch=12, lr=3.0e-3)
ARMS: dict[str, tuple[str | Erasing, ...]] = {
    "sft": ("defense.lam=0.0",),
    "random": ("defense.direction=random",),
    "ctrap": (),
    "ctrap-rollout": (ROLLOUT,),
    "ctrap-adaptive": (ADAPTIVE,),
    "erase-0.5": (Erasing("alpha: 0.5"), *UNDEFENDED),
    "erase-0.85": (Erasing("alpha: 0.85"), *UNDEFENDED),
    "erase-0.95": (EVERYWHERE, *UNDEFENDED),
    "erase-0.95-third": (LONGER, *UNDEFENDED),
    "erase-located": (THERE, *UNDEFENDED),
    "erase-anew": (ANEW, *UNDEFENDED),
    "erase-0.95+ctrap-rollout": (EVERYWHERE, ROLLOUT),
    "erase-0.95+ctrap-adaptive": (EVERYWHERE, ADAPTIVE),
    "erase-0.95-third+ctrap-adaptive": (LONGER, ADAPTIVE),
    "erase-located+ctrap-adaptive": (THERE, ADAPTIVE),
    "erase-anew+ctrap-adaptive": (ANEW, ADAPTIVE),
}
"""Arm → what it overrides in the bed's recipe. Two controls have the same rows, steps and rate: `sft` without a trap,
`random` with a trap along a random direction of the same length."""
NEVER = "never"
ASKED_FOR = "full, lora, relative, mixed, mixed-90, mixed-muon, benign-loss, kl, harm-then-repair"
PROBES: dict[str, tuple[str, ...]] = {
    "quick": ("probe.preset=quick",),
    "standard": ("probe.preset=standard", f"probe.families=[{ASKED_FOR}]"),
    "smoke": (
        *("probe.preset=quick", "probe.steps=128", "probe.max_steps=128"),
        *("probe.evaluation_rows=100", "probe.utility_rows=100", "probe.rates.benign=[3.0e-4]"),
    ),
}
"""How hard a cell is attacked → what it overrides in the bed's recipe."""
SMOKE = ("sft", "ctrap-rollout", "erase-0.85")
PROPERTIES = ("fires", "selective", "durable", "adaptive")
SHOWN = {True: "pass", False: "fail", None: "inconclusive"}


# --- the cells -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where the bed lies, where the cells go, and how hard they are attacked."""

    bed: Path
    out: Path
    probe: str

    @property
    def recipe(self) -> Path:
        """The bed's recipe; where there is no bed, a file that is missed by name."""
        return next(self.bed.glob("*.yaml"), self.bed / "recipe.yaml")

    @property
    def facts(self) -> dict[str, float]:
        """What the bed knows of its parent: `parent_tokens` and `row_tokens`."""
        read: dict[str, float] = json.loads((self.bed / "results.json").read_text("utf-8"))
        return read


@dataclass(frozen=True)
class Cell:
    """An arm with a hardening seed."""

    arm: str
    seed: int

    def folder(self, place: Place) -> Path:
        """Its run folder."""
        return place.out / place.probe / f"{self.arm}-{self.seed}"

    def log(self, place: Place) -> Path:
        """What it printed, beside its folder; an arm's name may have a dot."""
        return place.out / place.probe / f"{self.arm}-{self.seed}.log"

    def report(self, place: Place) -> Path:
        """Its report, once it is finished."""
        return self.folder(place) / "release" / "hardener" / "report.json"


def overrides(cell: Cell, place: Place) -> list[str]:
    """What the cell changes in the bed's recipe."""
    arm = ARMS.get(cell.arm, ())
    given = [change.override(place.facts) if isinstance(change, Erasing) else change for change in arm]
    if cell.arm != NEVER and not set(UNDEFENDED) <= set(arm):
        given.append(f"train.seed={cell.seed}")
    if any(isinstance(change, Erasing) for change in arm):
        given.append(f"erase.seed={cell.seed}")
    return [*given, *PROBES[place.probe]]


def command(cell: Cell, place: Place) -> list[str]:
    """The line that makes a cell, or goes on with it."""
    run = cell.folder(place)
    line = [sys.executable, "-m", "hardener"]
    if cell.arm != NEVER and (run / "run.json").is_file():
        return [*line, "harden", "--resume", str(run)]
    if cell.arm == NEVER:  # a probe goes on by the same line
        line += ["probe", str(place.bed / NEVER), "--against", str(place.bed / "aligned")]
    else:
        line += ["harden", str(place.bed / "aligned")]
    line += ["--recipe", str(place.recipe), "--output", str(run), "--device", "cpu"]
    return line + [part for override in overrides(cell, place) for part in ("--set", override)]


def make(cell: Cell, place: Place) -> None:
    """Run a cell unless it has a report. Its exit code tells a verdict as well, so what counts is the report."""
    if cell.report(place).is_file():
        return
    log = cell.log(place)
    log.parent.mkdir(parents=True, exist_ok=True)
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "HARDENER_CACHE": str(place.out / "cache")}
    with log.open("a", encoding="utf-8") as told:
        subprocess.run(command(cell, place), check=False, env=surroundings, stdout=told, stderr=subprocess.STDOUT)
    print(f"{log.stem}: {'done' if cell.report(place).is_file() else f'no report, see {log}'}", flush=True)


def make_all(cells: Sequence[Cell], place: Place, jobs: int) -> None:
    """Run `never`, which leaves the attacks on the original in the cache, and then all others side by side."""
    make(Cell(NEVER, 0), place)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda cell: make(cell, place), cells))


# --- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A finished cell."""

    cell: Cell
    report: Report
    tokens: float | None
    """What the hardening was trained on, as a share of what the parent was; None where nothing was hardened."""


@dataclass(frozen=True, order=True)
class Figure:
    """A number or, with a sign, a bound on it."""

    value: float
    sign: str = ""

    def __str__(self) -> str:
        shown = tables.number(self.value, 2 if self.value < 10 else 1)
        return f"{self.sign} {shown}".strip()


def read(cell: Cell, place: Place) -> Found:
    """What a finished cell left."""
    report = reports.read(cell.report(place))
    return Found(cell, report, tokens(report, recipe_file.load(cell.folder(place) / "recipe.yaml"), place.facts))


def tokens(report: Report, recipe: Recipe, facts: dict[str, float]) -> float | None:
    """Tokens erased and trained on, prompts and repetitions included, over those of the parent's training."""
    if report.training is None:
        return None
    trained = (report.training.erased.tokens or 0) if report.training.erased else 0
    if recipe.defense and recipe.train:
        passes = CONFIGS[recipe.defense.name](**recipe.defense.settings).passes
        trained += round(recipe.train.steps * passes * recipe.train.batch_size * facts["row_tokens"])
    return trained / facts["parent_tokens"]


def table(found: Sequence[Found], never: Report | None) -> str:
    """Arms, each the median over its seeds with their range, and below them every cell with its 95 % intervals."""
    arms = dict.fromkeys(one.cell.arm for one in found)
    rows = [arm_row([one for one in found if one.cell.arm == arm], never) for arm in arms]
    head = ("Arm", "Seeds", *PROPERTIES, "M", "M / M never", "W", "W raw", "Utility kept", "Benign kept", "Tokens")
    cells = ("Cell", "M", "W", "W raw", "Utility kept", "Benign kept", "Worst attack")
    by_cell = tables.markdown_table(cells, [cell_row(one) for one in found])
    return f"{tables.markdown_table(head, rows)}\n\n{by_cell}\n"


def arm_row(found: Sequence[Found], never: Report | None) -> tuple[str, ...]:
    """An arm's line."""
    limit = multiplier(never) if never else None
    measured = {name: [figure(one.report, name) for one in found] for name in FIGURES}
    costs = [multiplier(one.report) for one in found]
    return (
        found[0].cell.arm,
        str(len(found)),
        *(verdicts([one.report for one in found], name) for name in PROPERTIES),
        spread(costs),
        spread(relative(cost, limit) for cost in costs),
        *map(spread, measured.values()),
        spread(None if one.tokens is None else Figure(one.tokens) for one in found),
    )


def cell_row(one: Found) -> tuple[str, ...]:
    """A cell's line."""
    evidence = one.report.evidence
    assert evidence is not None  # a cell is always probed
    m = evidence.measures
    return (
        f"{one.cell.arm}, {one.cell.seed}",
        tables.or_dash(tables.multiplier, m.multiplier),
        *(tables.or_dash(tables.figure, getattr(m, name)) for name in FIGURES),
        evidence.worst or "–",
    )


FIGURES = ("w_hardened", "w_raw_hardened", "utility_kept", "benign_kept")


def figure(report: Report, name: str) -> Figure | None:
    """One of the measures."""
    assert report.evidence is not None
    measured: Interval | None = getattr(report.evidence.measures, name)
    return None if measured is None else Figure(measured.value)


def multiplier(report: Report) -> Figure | None:
    """Worst-case cost multiplier, a lower bound where the budget ended first; better when higher."""
    assert report.evidence is not None
    m = report.evidence.measures.multiplier
    return None if m is None else Figure(m.value, "≥" if m.censored else "")


def relative(cost: Figure | None, limit: Figure | None) -> Figure | None:
    """M / M never, 1 is as if never taught; None where both are bounds, which do not compare."""
    if cost is None or limit is None or (cost.sign and limit.sign):
        return None
    return Figure(cost.value / limit.value, cost.sign or ("≤" if limit.sign else ""))


def spread(figures: Iterable[Figure | None]) -> str:
    """Median and range: `3.1 (2.0 to ≥ 16.0)`; the lower of two in the middle, as bounds have no mean."""
    known = sorted(one for one in figures if one is not None)
    if not known:
        return "–"
    middle = str(statistics.median_low(known))
    return middle if len(known) == 1 else f"{middle} ({known[0]} to {known[-1]})"


def verdicts(found: Sequence[Report], name: str) -> str:
    """How often a property was shown: `2 pass, 1 inconclusive`; the word alone where all agree."""
    held = [d.holds for one in found if one.evidence for d in one.evidence.diagnostics if d.name == name]
    counts = {word: held.count(holds) for holds, word in SHOWN.items() if holds in held}
    return " ".join(counts) if len(counts) == 1 else ", ".join(f"{n} {word}" for word, n in counts.items()) or "–"


def draw(found: Sequence[Found], never: Report | None, path: Path) -> None:
    """M against utility kept and against the cost of hardening, a point per cell; a triangle is a lower bound."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(12.0, 5.0), layout="constrained")
    left, right = canvas.subplots(1, 2, sharey=True)
    for index, arm in enumerate(dict.fromkeys(one.cell.arm for one in found)):
        label: str | None = arm
        for one in found:
            cost, kept = multiplier(one.report), figure(one.report, "utility_kept")
            if one.cell.arm != arm or not cost or not kept:
                continue
            look = {"color": f"C{index % 10}", "marker": ("^v" if cost.sign else "oD")[index // 10]}
            left.scatter(kept.value, cost.value, label=label, **look)
            if one.tokens is not None:
                right.scatter(one.tokens, cost.value, **look)
            label = None
    limit = multiplier(never) if never else None
    for axes in (left, right) if limit else ():
        axes.axhline(limit.value, color="grey", linestyle="--", label=f"never taught: {limit}")
    left.set(xlabel="utility kept", ylabel="cost multiplier M (worst case)", yscale="log")
    right.set(xlabel="tokens, as a share of those that the parent was trained on", xscale="log")
    if left.get_legend_handles_labels()[0]:
        canvas.legend(*left.get_legend_handles_labels(), fontsize="small", loc="outside right upper")
    canvas.savefig(path, dpi=120)


def show(cells: Sequence[Cell], place: Place) -> int:
    """Write table and plot of the cells that have a report; returns how many have none."""
    limit = Cell(NEVER, 0)
    there = [cell for cell in (limit, *cells) if cell.report(place).is_file()]
    found = [read(cell, place) for cell in there]
    never = next((one.report for one in found if one.cell == limit), None)
    text = table(found, never)
    (place.out / f"{place.probe}.md").write_text(text, encoding="utf-8")
    draw([one for one in found if one.cell != limit], never, place.out / f"{place.probe}.png")
    print(text)
    return 1 + len(cells) - len(there)


def listed(kind: Callable[[str], Kind]) -> Callable[[str], list[Kind]]:
    """Reads `a,b` as a list of a kind."""
    return lambda text: [kind(part) for part in text.split(",")]


def known(arm: str) -> str:
    """The arm, if there is one of that name."""
    if arm not in ARMS:
        raise argparse.ArgumentTypeError(f"no arm is called {arm!r}; known: {', '.join(ARMS)}")
    return arm


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Harden a bed in many ways, and lay the results side by side.")
    parser.add_argument("--bed", type=Path, required=True, help="folder that bench.beds.letters or .vault wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, logs, tables and plots")
    parser.add_argument("--arms", type=listed(known), default=list(ARMS), help="arms, comma-separated; default: all")
    parser.add_argument("--seeds", type=listed(int), default=[0, 1, 2], help="hardening seeds; default: 0,1,2")
    parser.add_argument("--probe", choices=("quick", "standard"), default="quick", help="how hard to attack")
    parser.add_argument("--smoke", action="store_true", help="three arms, one seed, a short probe: to see that it runs")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, a core each; default: 2")
    chosen = parser.parse_args(arguments)
    arms, seeds = (SMOKE, (0,)) if chosen.smoke else (chosen.arms, chosen.seeds)
    place = Place(chosen.bed.resolve(), chosen.out.resolve(), "smoke" if chosen.smoke else chosen.probe)
    cells = [Cell(arm, seed) for arm in arms for seed in seeds]
    make_all(cells, place, chosen.jobs)
    return 1 if show(cells, place) else 0


if __name__ == "__main__":
    sys.exit(main())
