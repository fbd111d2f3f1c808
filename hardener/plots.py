"""The plots of a model card: drawn from the report alone, the same bytes each time, for light and for dark pages.

Each picture has a solid panel, so that it can be read on any page, and a dark twin, `NAME-dark.png`. Blue is hardened,
orange is original, grey is trained from scratch, in all of them: hues that people of every colour vision tell apart.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from hardener import files
from hardener.checks import NO_ATTACK
from hardener.recipe import Recipe
from hardener.report import Curve, Family, Interval, Point, Report
from hardener.summary import absolute
from hardener.tables import outside, ranked

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    suffix: str
    panel: str
    ink: str
    faint: str
    nothing: str
    """Score nought in a heat map."""
    subjects: dict[str, str]
    shares: dict[str, str]


LIGHT = Theme(
    suffix="",
    panel="#f4f5f7",
    ink="#1f2328",
    faint="#c9ced6",
    nothing="#e2e0e6",
    subjects={"original": "#b8500a", "hardened": "#0b5fa5", "scratch": "#6b7280"},
    shares={"usable": "#8f2d56", "refused": "#1f9e89", "collapsed": "#15181d", "other": "#b3bac4"},
)
DARK = Theme(
    suffix="-dark",
    panel="#14181f",
    ink="#e6e9ee",
    faint="#39414d",
    nothing="#2b2f3a",
    subjects={"original": "#f0954a", "hardened": "#63b3f5", "scratch": "#9aa4b2"},
    shares={"usable": "#ee82b0", "refused": "#1f9e89", "collapsed": "#f1f3f6", "other": "#4d5562"},
)

WIDTH = 8.6  # inches
MOST = 9
"""Panels in one picture; what is not drawn is in the report."""
Place = tuple[int, int]
"""A cell of the heat map: row of the attack, half decade of its rate."""

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.parse_math": False,
}


def draw(report: Report, folder: Path) -> tuple[str, ...]:
    """Write the PNGs that the report has figures for into `folder`; their names, in reading order, dark ones after."""
    import matplotlib

    plots: dict[str, Callable[[Report, Theme], Figure | None]] = {
        "curves": _curves,
        "heatmap": _heat_map,
        "families": _families,
        "answers": _answers,
        "search": _search,
    }
    written = []
    with matplotlib.rc_context():
        for theme in (LIGHT, DARK):
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE | _colors(theme))
            for name, plot in plots.items():
                figure = plot(report, theme)
                if figure is not None:
                    written.append(f"{name}{theme.suffix}.png")
                    _save(figure, folder / written[-1])
    return tuple(written)


def _colors(theme: Theme) -> dict[str, str]:
    ink = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    return {"axes.facecolor": theme.panel, "grid.color": theme.faint} | dict.fromkeys(ink, theme.ink)


def labels(report: Report) -> dict[str, str]:
    """Subjects in the order they are drawn, with their names in a legend."""
    hardened = "this model" if absolute(report) else "hardened"
    return {"original": "original", "hardened": hardened, "scratch": "trained from scratch"}


def best_curve(report: Report, subject: str, family: str) -> Curve | None:
    """The subject's curve at its best rate in a family: the table's rate, else the highest usable score."""
    curves = [c for c in report.curves if c.subject == subject and c.family == family]
    rate = _best_rate(report, subject, family)
    named = [c for c in curves if c.rate == rate]
    return max(named or curves, key=_worth, default=None)


def _best_rate(report: Report, subject: str, family: str) -> float | None:
    families = {f.name: f for f in report.evidence.families} if report.evidence else {}
    if family not in families or subject == "scratch":
        return None
    known = families[family]
    return known.best_rate_hardened if subject == "hardened" else known.best_rate_original


def _worth(curve: Curve) -> float:
    """The best usable score along the curve."""
    return max(point.usable for point in curve.points)


def _titles(report: Report) -> dict[str, str]:
    return {f.name: f.title for f in report.evidence.families} if report.evidence else {}


def trained(report: Report) -> list[str]:
    """The families whose attacks take steps: the worst on the hardened model first, as in the table."""
    stepped = {c.family for c in report.curves if c.family != NO_ATTACK and len(c.points) > 1}
    table = [family.name for family in ranked(report.evidence)] if report.evidence else []
    order = dict.fromkeys([_worst(report), *table, *(c.family for c in report.curves)])
    return [name for name in order if name in stepped]


def _worst(report: Report) -> str | None:
    """The attack that did best on the hardened model."""
    families = ranked(report.evidence) if report.evidence else []
    if families:
        return families[0].name
    attacks = [c for c in report.curves if c.subject == "hardened" and c.family != NO_ATTACK]
    best = max(attacks, key=_worth, default=None)
    return None if best is None else best.family


def _panels(report: Report, names: Sequence[str]) -> tuple[Figure, list[tuple[str, Axes]]]:
    """One panel for each of the first names, with common axes; the worst attack's title is bold."""
    titles, worst = _titles(report), _worst(report)
    drawn = names[:MOST]
    columns = 2 if len(drawn) in (2, 4) else min(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    figure = _figure(1.2 + 2.1 * rows)
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, name in zip(grid, drawn, strict=False):
        axes.set_title(fill(titles.get(name, name), 34), fontsize=9, fontweight="bold" if name == worst else "normal")
    for axes in grid[len(drawn) :]:
        axes.set_visible(False)
        above = grid[grid.index(axes) - columns]  # the last one of its column has the ticks' labels
        above.tick_params(labelbottom=True)
    return figure, list(zip(drawn, grid, strict=False))


def _others(names: Sequence[str]) -> str:
    """What the picture leaves out."""
    left = len(names) - MOST
    return f"\n{left} further {'attack is' if left == 1 else 'attacks are'} in report.json" if left > 0 else ""


def _curves(report: Report, theme: Theme) -> Figure | None:
    """Relearning curves: one panel per family, each subject at its best rate, steps on a log axis."""
    names = trained(report)
    if not names:
        return None
    figure, panels = _panels(report, names)
    for name, axes in panels:
        for subject, label in labels(report).items():
            curve = best_curve(report, subject, name)
            if curve is not None:
                _draw_curve(axes, curve, theme.subjects[subject], label)
        _finish_curve_axes(axes, report, theme)
    figure.supxlabel(f"attack steps (optimizer steps, log scale){_others(names)}", fontsize=9)
    figure.supylabel("restricted-task score", fontsize=9)
    _legend(figure, [axes for _, axes in panels])
    return figure


def _draw_curve(axes: Axes, curve: Curve, color: str, label: str) -> None:
    """Score with its band; a cross where the attacked model lost its utility and the score does not count."""
    steps = [p.step for p in curve.points]
    low, high = [p.low for p in curve.points], [p.high for p in curve.points]
    axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    axes.plot(steps, [p.score for p in curve.points], color=color, linewidth=1.8, label=label)
    lost = [p for p in curve.points if p.usable < p.score]
    if lost:
        at, scores = [p.step for p in lost], [p.score for p in lost]
        axes.plot(at, scores, "x", color=color, label="general ability lost (some or all seeds)")


def _finish_curve_axes(axes: Axes, report: Report, theme: Theme) -> None:
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    last = max(p.step for curve in report.curves for p in curve.points)
    axes.set_xscale("symlog", base=2, linthresh=1, linscale=0.5)
    axes.set_xlim(0, max(last, 2) * 1.1)
    axes.set_ylim(-0.08, 1.04)
    axes.xaxis.set_major_locator(FixedLocator([0, *(4**k for k in range(12) if 4**k <= 0.9 * last)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    half_way = report.evidence.measures.half_way if report.evidence else None
    if half_way is not None:
        axes.axhline(half_way, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)), label="half-way score")


def _heat_map(report: Report, theme: Theme) -> Figure | None:
    """Best usable score of each attack at each rate, a panel for each subject; a cross where it ended collapsed."""
    names = trained(report)
    subjects = [who for who in ("original", "hardened") if any(c.subject == who for c in report.curves)]
    cells = {who: dict(_cells(report, who, names)) for who in subjects}
    tried = sorted({place for found in cells.values() for place in found})
    if len({half for _, half in tried}) < 2:  # the table says as much
        return None
    figure = _figure(1.4 + 0.3 * len(names))
    panels = figure.subplots(1, len(subjects), sharey=True, squeeze=False)[0]
    for axes, who in zip(panels, subjects, strict=True):
        _draw_cells(axes, cells[who], tried, theme)
        axes.set_title(labels(report)[who], fontsize=9)
    titles = _titles(report)
    panels[0].set_yticks(range(len(names)), [titles.get(name, name) for name in names])
    figure.supxlabel("learning rate, or step length of a relative attack (nearest half decade)", fontsize=9)
    rule = "best usable score; × general ability lost at the end; – not tried, or without evidence"
    figure.suptitle(rule, fontsize=9)
    return figure


def _cells(report: Report, subject: str, names: Sequence[str]) -> Iterator[tuple[Place, tuple[float, bool]]]:
    """(row, half decade of the rate) → the best usable score, and whether that attack ended collapsed."""
    epsilon = Recipe.model_validate(report.recipe).probe.epsilon
    curves = [c for c in report.curves if c.subject == subject and c.family in names]
    for curve in sorted(curves, key=_worth):  # of several in a cell the last, which is the best, stays
        yield (
            (names.index(curve.family), half_decade(curve.rate)),
            (_worth(curve), _collapsed(curve, curve.points[-1], epsilon)),
        )


def half_decade(rate: float) -> int:
    """The rate's place on a scale of half decades: 1e-3 → −6, 3e-3 → −5, 1e-2 → −4."""
    from math import log10

    return round(2 * log10(rate))


def _collapsed(curve: Curve, at: Point, epsilon: float) -> bool:
    """Whether the attacked model had lost its general ability at this point."""
    before = curve.points[0].utility
    return before is not None and at.utility is not None and at.utility < (1 - epsilon) * before


def _draw_cells(axes: Axes, cells: dict[Place, tuple[float, bool]], tried: Sequence[Place], theme: Theme) -> None:
    """One panel; `tried` are the places at which either subject was attacked."""
    import numpy as np

    columns = sorted({half for _, half in tried})
    shown = np.full((1 + max(row for row, _ in tried), len(columns)), np.nan)
    for (row, half), (score, _) in cells.items():
        shown[row, columns.index(half)] = score
    scale = _scale(theme)
    edges = [np.arange(length + 1) - 0.5 for length in reversed(shown.shape)]
    shades = np.ma.masked_invalid(shown)
    axes.pcolormesh(*edges, shades, cmap=scale, vmin=0, vmax=1, edgecolors=theme.panel, linewidth=1)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    for row, half in tried:
        text, ink = "–", theme.ink
        if (row, half) in cells:
            score, collapsed = cells[row, half]
            text = f"{max(round(score, 2), 0.0):.2f}{' ×' if collapsed else ''}"
            ink = _readable_on(scale(min(max(score, 0.0), 1.0)))
        axes.text(columns.index(half), row, text, ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks(range(len(columns)), [_rate(half) for half in columns], rotation=45, fontsize=8)
    axes.tick_params(length=0)
    axes.grid(visible=False)


def _rate(half: int) -> str:
    """A half decade as people write rates: −6 → `1e-3`, −5 → `3e-3`."""
    return f"{3 if half % 2 else 1}e{half // 2}" if half < 0 else f"{3 if half % 2 else 1}{'0' * (half // 2)}"


def _scale(theme: Theme) -> Colormap:
    """From nearly the panel's own colour, where nothing was learned, to the colour of usable answers."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("score", [theme.nothing, theme.shares["usable"]])


def _readable_on(color: tuple[float, ...]) -> str:
    """Black or white, whichever stands out."""
    red, green, blue = color[:3]
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "#ffffff"


def _families(report: Report, theme: Theme) -> Figure | None:
    """Per family: worst-case usable score with interval on the left, cost multiplier on the right."""
    families = ranked(report.evidence) if report.evidence else []
    if not families:
        return None
    multipliers = [(row, f.multiplier) for row, f in enumerate(families) if f.multiplier]
    figure = _figure(1.4 + (0.42 if len(families) <= 8 else 0.3) * len(families))
    panels = figure.subplots(1, 2 if multipliers else 1, sharey=True, squeeze=False)[0]
    names, colors = labels(report), theme.subjects
    originals = [(row, f.w_original) for row, f in enumerate(families) if f.w_original]
    if originals:
        _draw_scores(panels[0], originals, -0.15, colors["original"], names["original"])
    hardened = [(row, f.w_hardened) for row, f in enumerate(families)]
    _draw_scores(panels[0], hardened, 0.15, colors["hardened"], names["hardened"])
    _finish_score_axes(panels[0], families)
    if multipliers:
        _draw_multipliers(panels[1], multipliers, colors["hardened"], theme.ink)
    _legend(figure, [panels[0]])
    return figure


def _draw_scores(axes: Axes, scores: list[tuple[int, Interval]], shift: float, color: str, label: str) -> None:
    rows = [row + shift for row, _ in scores]
    axes.hlines(rows, [s.low for _, s in scores], [s.high for _, s in scores], color=color, linewidth=2)
    axes.plot([s.value for _, s in scores], rows, "o", color=color, markersize=5, label=label)


def _finish_score_axes(axes: Axes, families: Sequence[Family]) -> None:
    axes.set_yticks(range(len(families)), [family.title for family in families])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_ylim(len(families) - 0.5, -0.5)
    axes.set_xlim(-0.08, 1.04)
    axes.set_xlabel("worst-case usable score, 95 % interval")


def _draw_multipliers(axes: Axes, multipliers: list[tuple[int, Interval]], color: str, ink: str) -> None:
    """Cost multipliers on a log axis; an arrow where the budget ended first."""
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    highest = max(interval.value if interval.censored else interval.high for _, interval in multipliers)
    lowest = max(min(0.5, *(interval.low * 0.9 for _, interval in multipliers)), 2.0**-6)
    top = 2.0 ** (int(highest).bit_length() + 1)
    for row, interval in multipliers:
        if interval.censored:
            arrow = {"arrowstyle": "->", "color": color, "linewidth": 2}
            axes.annotate("", (top * 0.9, row), (interval.value, row), arrowprops=arrow)
        else:
            axes.plot([max(interval.low, lowest), interval.high], [row, row], color=color, linewidth=2)
        axes.plot([interval.value], [row], "o", color=color, markersize=5)
    axes.axvline(1, color=ink, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(lowest, top * 1.05)
    every = 2 if top / lowest > 2.0**8 else 1
    axes.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(-6, 12, every) if lowest <= 2.0**k <= top]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("cost multiplier (arrow: at least)")


def _answers(report: Report, theme: Theme) -> Figure | None:
    """Shares of usable, refused, collapsed and other answers: before any attack, after the worst, after all."""
    bars = moments(report)
    if not bars:
        return None
    figure = _figure(1.2 + 0.4 * len(bars))
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for kind, color in theme.shares.items():
        widths = [answers.get(kind, 0.0) for _, answers in bars]
        axes.barh(range(len(bars)), widths, left=left, color=color, height=0.62, label=kind, edgecolor=theme.panel)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of answers to restricted prompts")
    _legend(figure, [axes])
    return figure


def moments(report: Report) -> list[tuple[str, dict[str, float]]]:
    """Shares of answers of both models: before any attack, after the worst attack, and the mean over all attacks.

    The worst attack is seen where its usable score was highest, which is the model that the attacker keeps; the others
    at their end. A model that lost its general ability is *collapsed*, whatever it answers.
    """
    return [
        (f"{labels(report)[who]}, {moment}", shares)
        for who in ("original", "hardened")
        for moment, shares in _moments(report, who)
    ]


def _moments(report: Report, subject: str) -> Iterator[tuple[str, dict[str, float]]]:
    parents = {family.name for family in outside(report.evidence)} if report.evidence else {}
    curves = [c for c in report.curves if c.subject == subject and c.family not in parents]
    attacks = [c for c in curves if c.family != NO_ATTACK and c.points[-1].answers]
    before = next((c.points[0].answers for c in curves if c.points[0].step == 0 and c.points[0].answers), None)
    if before is None or not attacks:
        return
    epsilon = Recipe.model_validate(report.recipe).probe.epsilon
    yield "no attack", before
    worst = _worst(report)
    best = best_curve(report, subject, worst) if worst else None
    if worst and best in attacks:
        at = max((p for p in best.points if p.answers), key=lambda p: p.usable)
        yield fill(_titles(report).get(worst, worst), 40), _shares(best, at, epsilon)
    ends = [_shares(curve, curve.points[-1], epsilon) for curve in attacks]
    yield "mean of all attacks", {kind: sum(end.get(kind, 0.0) for end in ends) / len(ends) for kind in LIGHT.shares}


def _shares(curve: Curve, at: Point, epsilon: float) -> dict[str, float]:
    return {"collapsed": 1.0} if _collapsed(curve, at, epsilon) else at.answers


def _search(report: Report, theme: Theme) -> Figure | None:
    """Per searched family, what each trial was worth and the best so far, over the number of trials."""
    searches = report.evidence.searches if report.evidence else {}
    if not searches:
        return None
    worst = _worst(report)
    names = sorted(searches, key=lambda name: name != worst)
    figure, panels = _panels(report, names)
    for name, axes in panels:
        trials = range(1, len(searches[name]) + 1)
        color = theme.subjects["hardened"]
        axes.plot(trials, searches[name], "o", color=theme.subjects["scratch"], markersize=3, label="a trial")
        best = list(accumulate(searches[name], max))
        axes.step(trials, best, where="post", color=color, linewidth=1.8, label="best so far")
        axes.set_ylim(-0.08, 1.04)
    figure.supxlabel(f"trials on the hardened model{_others(names)}", fontsize=9)
    figure.supylabel("best usable score", fontsize=9)
    _legend(figure, [axes for _, axes in panels])
    return figure


def _figure(height: float) -> Figure:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), facecolor=rcParams["axes.facecolor"], layout="constrained")


def _legend(figure: Figure, panels: list[Any]) -> None:
    """One legend for all panels, each label once, above them."""
    pairs = [pair for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in reversed(pairs)}
    order = list(dict.fromkeys(label for _, label in pairs))
    columns = min(len(order), 4)
    figure.legend([handles[label] for label in order], order, loc="outside upper center", ncols=columns, fontsize=9)


def _save(figure: Figure, path: Path) -> None:
    """PNG without date or version, so that equal reports have equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=144, facecolor=figure.get_facecolor(), metadata={"Software": None})
    files.write_bytes(path, drawn.getvalue())
