"""What the grid found: tables and curves, each side at its own best attacker, every figure with its 95 % interval."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.grid_attackers import AUTHORS, BATCH, METHODS, OPTIMIZERS, PER_CLASS, PREPARATIONS, Attacker
from bench.grid_sides import (
    ORIGINAL,
    SCRATCH,
    Reached,
    Setting,
    Side,
    Sides,
    case_of,
    judged_step,
    reached,
    sample_curve,
    suppression,
    tried,
)
from hardener import files, measures, tables
from hardener.metrics import Track, best, lines
from hardener.plots import LIGHT
from hardener.report import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

USUAL = Attacker._field_defaults
"""What all attacks of the cross product have in common."""
GOAL, FLOOR = 1.0, 0.5
"""ρ from which on a model is as hard to teach as new weights, and below which a row has missed."""


def write(sides: Sides, setting: Setting, out: Path) -> str:
    """Write `grid.md` and `grid.png`; returns the text."""
    text = report(sides, setting)
    files.write_text(out / "grid.md", text)
    draw(sides, setting, out / "grid.png")
    return text


def report(sides: Sides, setting: Setting) -> str:
    """All tables."""
    step = judged_step(sides, setting)
    rows = f"{PER_CLASS} labels per class, {BATCH} rows a batch"
    parts = [
        f"# Original, hardened, from scratch\n\n{preface(sides, setting, step)}",
        f"## In short\n\n{short(sides, setting, step)}",
        f"## ρ at every budget\n\n{budgets(sides, setting)}",
        *(
            f"## Accuracy after {at} steps ({rows})\n\n{by_method(sides, setting, at)}"
            for at in sorted({step, setting.steps})
        ),
        f"## Batch sizes, after {step} steps\n\n{variation(sides, setting, 'batch', step)}",
        f"## Labels per class, after {step} steps\n\n{variation(sides, setting, 'per_class', step)}",
        f"## SLC-AUC\n\n{SLC}\n\n{curves_table(sides)}",
        *(
            f"## Adaptive attacks, after {at} steps\n\n{variation(sides, setting, 'preparation', at)}"
            for at in sorted({step, setting.steps})
        ),
        f"## A benign task\n\n{benign(sides)}",
    ]
    return "\n\n".join(parts) + "\n"


SLC = (
    "Mean over log(rows) of S(side) − S(scratch), each at its best attack and step, by trapezoids; S is 0 at guessing "
    "and 1 if all is right (the sample-wise learning curve of NTP, arXiv 2410.08015). 0 is no better a start than new "
    "weights, below 0 is a worse one; lower is better for the defender."
)


def preface(sides: Sides, setting: Setting, step: int) -> str:
    """How it was measured."""
    runs = sum(len(side.measurement.runs) + len(side.measurement.benign) for side in sides.values())
    seeds = f"{len(setting.seeds)} seed{'s' if len(setting.seeds) > 1 else ''}"
    return (
        f"{runs:,} attacks of {setting.steps} steps, {seeds}, quoted on {sum(setting.report_half)} held-out rows; "
        f"guessing gives {tables.share(setting.chance)}. Accuracies are shares, in brackets are 95 % intervals over "
        "rows and seeds. Every side is shown at its own best rate. Original and new weights differ most at step "
        f"{step}, where the grid is judged."
    )


def short(sides: Sides, setting: Setting, step: int) -> str:
    """One line for each hardened side."""
    head = (
        "Hardened",
        "Own task kept",
        "Authors' attack",
        "the same from scratch",
        "ρ",
        "Result",
        "Broken by",
        "Lowest ρ",
    )
    return tables.markdown_table(head, [short_row(sides, name, setting, step) for name in hardened(sides)])


def short_row(sides: Sides, name: str, setting: Setting, step: int) -> tuple[str, ...]:
    """What became of a hardened side."""
    kept = measures.utility(case_of(sides, name, {one: [] for one in sides})).get("utility_kept")
    published = (reached(sides[who], authors(sides[who]), setting.steps, setting) for who in (name, SCRATCH))
    found = rhos(sides, name, setting)
    rho, note = found[PER_CLASS, step]
    worst = reached(sides[name], sides[name].where(per_class=PER_CLASS), step, setting)
    judged = [(one.value, tables.figure(one), place) for place, (one, _) in found.items() if one]
    lowest = min(judged, default=None)
    return (
        name,
        tables.or_dash(tables.figure, kept),
        *map(figure, published),
        tables.or_dash(tables.figure, rho),
        word(rho, note),
        worst.attacker.title if worst and rho and rho.value < GOAL else "–",
        f"{lowest[1]}, {lowest[2][0]} labels, step {lowest[2][1]}" if lowest else "–",
    )


def rhos(sides: Sides, name: str, setting: Setting) -> dict[tuple[int, int], tuple[Interval | None, str]]:
    """(labels per class, step) → ρ there with its note, in that order."""
    labels = sorted({one.per_class for one in sides[ORIGINAL].attackers.values()})
    return {(n, step): suppression(sides, name, n, step) for n in labels for step in setting.budgets}


def authors(side: Side) -> list[Track]:
    """The attack that the method was published with."""
    return side.where(**AUTHORS._asdict())


def word(rho: Interval | None, note: str) -> str:
    """What a ρ is called."""
    if rho is None:
        return note.partition(":")[0]
    return "as hard as from scratch" if rho.value >= GOAL else "floor met" if rho.value >= FLOOR else "missed"


def budgets(sides: Sides, setting: Setting) -> str:
    """A line for each number of labels and steps: each side at its best attacker, and ρ."""
    found = {name: rhos(sides, name, setting) for name in hardened(sides)}
    columns = [f"{title}, {name}" for name in found for title in ("ρ", "result", "best attack")]
    rows = []
    for per_class, step in next(iter(found.values())):
        at = {name: reached(one, one.where(per_class=per_class), step, setting) for name, one in sides.items()}
        judged: list[str] = []
        for name, every in found.items():
            rho, note = every[per_class, step]
            attack = at[name]
            judged += [tables.or_dash(tables.figure, rho), word(rho, note), attack.attacker.title if attack else "–"]
        rows.append((str(per_class), str(step), *map(figure, at.values()), *judged))
    return tables.markdown_table(("Labels per class", "Step", *sides, *columns), rows)


def by_method(sides: Sides, setting: Setting, step: int) -> str:
    """Method × optimizer, each side at its best rate; the authors' attack; and the best of all."""

    def cells(**wanted: Any) -> list[str]:
        return [with_rate(reached(side, side.where(**wanted), step, setting)) for side in sides.values()]

    rows = [
        (METHODS[method].title, OPTIMIZERS[optimizer].title, *cells(method=method, optimizer=optimizer, **USUAL))
        for method in tried(sides[ORIGINAL])
        for optimizer in OPTIMIZERS
    ]
    rows.append(("the authors' attack", OPTIMIZERS[AUTHORS.optimizer].title, *cells(**AUTHORS._asdict())))
    every = [figure(reached(side, side.where(per_class=PER_CLASS), step, setting)) for side in sides.values()]
    rows.append(("best of all, other batches and adaptive too", "–", *every))
    return tables.markdown_table(("Method", "Optimizer", *sides), rows, frozenset({len(rows) - 1}))


def variation(sides: Sides, setting: Setting, field: str, step: int) -> str:
    """A line for each value of a field: the best of the attacks that were tried at all of them."""
    found = {name: side.along(field) for name, side in sides.items()}
    order = list(PREPARATIONS).index if field == "preparation" else int
    values = sorted({value for some in found.values() for value in some}, key=order)
    rows = [
        (
            PREPARATIONS[value].title if field == "preparation" else str(value),
            *(figure(reached(sides[name], some.get(value, []), step, setting)) for name, some in found.items()),
        )
        for value in values
    ]
    return tables.markdown_table((TITLES[field], *sides), rows)


TITLES = {"batch": "Rows a batch", "per_class": "Labels per class", "preparation": "Beside fine-tuning"}


def curves_table(sides: Sides) -> str:
    """SLC-AUC of each hardened side beside the original's."""
    rows = []
    for name in hardened(sides):
        found = sample_curve(sides, name)
        rows.append(
            (name, *(tables.or_dash(tables.figure, found.get(f"slc_auc_{who}")) for who in ("original", "hardened")))
        )
    return tables.markdown_table(("Hardened", "Original", "Hardened, SLC-AUC"), rows)


def benign(sides: Sides) -> str:
    """What an honest user reaches from each start (0 is guessing, 1 is perfect; higher is better)."""
    rows = []
    for name in hardened(sides):
        found = measures.benign(case_of(sides, name, {one: [] for one in sides}))
        figures = (
            tables.or_dash(tables.figure, found.get(f"benign_{what}")) for what in ("original", "hardened", "kept")
        )
        rows.append((name, *figures, found.get("benign_note", "–")))
    return tables.markdown_table(("Hardened", "Original's skill", "Its own", "Kept", "Note"), rows)


def hardened(sides: Iterable[str]) -> list[str]:
    """The sides that are neither the original nor new weights."""
    return [name for name in sides if name not in (ORIGINAL, SCRATCH)]


def figure(found: Reached | None) -> str:
    """An accuracy with its interval."""
    return tables.figure(found.accuracy) if found else "–"


def with_rate(found: Reached | None) -> str:
    """An accuracy with its interval and the rate at which it was reached."""
    return f"{tables.figure(found.accuracy)} at {found.attacker.rate:g}" if found else "–"


# --- curves --------------------------------------------------------------------------------------------------------


def draw(sides: Sides, setting: Setting, path: Path) -> None:
    """A row for each hardened side: accuracy over steps by method, and over labels; a line for each seed."""
    from matplotlib.figure import Figure as Canvas

    methods = tried(sides[ORIGINAL])
    names = hardened(sides)
    canvas = Canvas(figsize=(3.0 * (len(methods) + 1), 2.8 * len(names)), layout="constrained")
    panels = canvas.subplots(len(names), len(methods) + 1, squeeze=False, sharey=True)
    step, along = judged_step(sides, setting), sorted(sides[ORIGINAL].along("per_class"))
    for name, row in zip(names, panels, strict=True):
        colours = {ORIGINAL: "original", name: "hardened", SCRATCH: "scratch"}
        for who, subject in colours.items():
            for method, axes in zip(methods, row, strict=False):
                by_steps(axes, sides[who], method, step, setting, LIGHT.subjects[subject])
            by_labels(row[-1], sides[who], step, setting, LIGHT.subjects[subject])
        for axes, title in zip(row, (*(METHODS[method].title for method in methods), f"step {step}"), strict=True):
            ticks = [*along] if axes is row[-1] else [1, *setting.budgets]
            axes.set(title=title, xscale="log", xlabel="labels per class" if axes is row[-1] else "step")
            axes.set_xticks(ticks, labels=map(str, ticks))
            axes.minorticks_off()
        row[0].set_ylabel("accuracy")
        row[-1].legend(fontsize="small")
    canvas.savefig(path, dpi=120)


def by_steps(axes: Axes, side: Side, method: str, step: int, setting: Setting, colour: str) -> None:
    """The seeds of a method's best attack with the usual rows."""
    tracks = side.where(method=method, **USUAL)
    pick = best(tracks, usable=False, at=step)
    for track in lines(tracks)[pick.way] if pick else ():
        later = track.steps > 0
        axes.plot(track.steps[later], setting.right(track.report[0])[later], color=colour, linewidth=1)


def by_labels(axes: Axes, side: Side, step: int, setting: Setting, colour: str) -> None:
    """The best attack with each number of labels, with its interval."""
    found = {labels: reached(side, tracks, step, setting) for labels, tracks in side.along("per_class").items()}
    there = {labels: one.accuracy for labels, one in sorted(found.items()) if one}
    axes.plot(list(there), [one.value for one in there.values()], color=colour, marker="o", label=side.name)
    axes.fill_between(
        list(there), [one.low for one in there.values()], [one.high for one in there.values()], color=colour, alpha=0.15
    )
