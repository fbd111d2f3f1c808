"""Figures and families as text: one form of every number, one row for every attack, inert in Markdown and HTML.

Every figure is printed with its 95 % interval: `0.12 [0.08, 0.17]`. A cost multiplier whose budget ended first is
printed as a bound: `≥ 16.0`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from hardener.checks import scientific
from hardener.report import Evidence, Family, Interval

SMALL = ("Attack", "Original", "Hardened", "Cost multiplier", "Verdict")
NARROW = ("Attack", "Original", "Hardened", "Hardened, raw", "Cost multiplier", "Verdict")
WIDE = (
    *("Attack", "Tried at", "Original", "Hardened", "Hardened, raw"),
    *("Difference", "Cost multiplier", "p (Holm)", "Verdict"),
)
"""Headings of a table of families: on a terminal, in the card, and where there is room."""
FIGURES = frozenset({"Original", "Hardened", "Cost multiplier"})

SPECIAL = re.compile(r"(?P<interval>\[−?\d+\.\d+, −?\d+\.\d+\](?![(\[:]))|[\\`*_|~$#\[\]]|:(?=//)")


def ranked(evidence: Evidence) -> list[Family]:
    """The families of the verdict: the attack that did best on the hardened model first, then by usable score."""
    worst = evidence.worst or ""
    inside = [family for family in evidence.families if not family.needs_parent]
    return sorted(inside, key=lambda f: (not worst.startswith(f"{f.title} at "), -f.w_hardened.value))


def outside(evidence: Evidence) -> list[Family]:
    """The families that need the parent's weights."""
    return [family for family in evidence.families if family.needs_parent]


def family_table(
    families: Sequence[Family],
    columns: Sequence[str],
    *,
    bold: frozenset[int] = frozenset(),
    dosed: frozenset[str] = frozenset(),
) -> str:
    """Families under these headings; a column that says nothing of any of them is left out.

    `bold` has the places of rows in bold, `dosed` the names of attacks that take no steps.
    """

    def tried_at(family: Family) -> str:
        return _doses(family) if family.name in dosed else _rates(family)

    cells = {**CELLS, "Tried at": tried_at}
    rows = [[cells[name](family) for name in columns] for family in families]
    filled = [i for i in range(len(columns)) if any(row[i] != "–" for row in rows)]
    return markdown_table(tuple(columns[i] for i in filled), [tuple(row[i] for i in filled) for row in rows], bold)


def markdown_table(
    columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], bold: frozenset[int] = frozenset()
) -> str:
    """A GitHub-flavoured table of plain text; rows whose index is in `bold` are set in bold."""
    lines = [columns, ("---",) * len(columns)]
    cells = [
        tuple(f"**{escape(cell)}**" if index in bold else escape(cell) for cell in row)
        for index, row in enumerate(rows)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [*lines, *cells])


def figure(interval: Interval) -> str:
    """A score or ratio with its interval: `0.12 [0.08, 0.17]`."""
    return f"{number(interval.value, 2)} [{number(interval.low, 2)}, {number(interval.high, 2)}]"


def multiplier(interval: Interval) -> str:
    """A cost multiplier: `3.1 [2.4, 4.0]`, or `≥ 16.0` where the budget ended first."""
    if interval.censored:
        return f"≥ {number(interval.value, 1)}"
    return f"{number(interval.value, 1)} [{number(interval.low, 1)}, {number(interval.high, 1)}]"


def share(value: float) -> str:
    """A share without an interval: `0.15`."""
    return number(value, 2)


def number(value: float, digits: int) -> str:
    """Fixed digits, a true minus sign, and never minus zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def escape(text: str) -> str:
    """Make any string inert in Markdown and HTML, on one line and inside a table cell.

    Intervals such as `[0.08, 0.17]` stay readable unless what follows would make them a link.
    """
    line = " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(SPECIAL, lambda match: match["interval"] or "\\" + match[0], line)


def _rates(family: Family) -> str:
    """The ladder of learning rates."""
    low, high = scientific(min(family.rates)), scientific(max(family.rates))
    return f"rate {low}" if low == high else f"{len(family.rates)} rates, {low} to {high}"


def _doses(family: Family) -> str:
    """What an attack that takes no steps was tried with."""
    return f"{'dose' if len(family.rates) == 1 else 'doses'} {', '.join(f'{dose:g}' for dose in family.rates)}"


def or_dash(form: Callable[[Any], str], value: Any) -> str:
    """A figure in its form, or a dash where there is none."""
    return "–" if value is None else form(value)


CELLS: dict[str, Callable[[Family], str]] = {
    "Attack": lambda family: family.title,
    "Original": lambda family: or_dash(figure, family.w_original),
    "Hardened": lambda family: figure(family.w_hardened),
    "Hardened, raw": lambda family: figure(family.w_raw_hardened),
    "Difference": lambda family: or_dash(figure, family.delta_w),
    "Cost multiplier": lambda family: or_dash(multiplier, family.multiplier),
    "p (Holm)": lambda family: or_dash("{:.2g}".format, family.p),
    "Verdict": lambda family: family.word,
}
"""What a family says of itself, by the heading it stands under."""
