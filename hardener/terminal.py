"""What a report says, on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hardener import summary
from hardener.report import Evidence, Report, Word
from hardener.tables import CELLS, FIGURES, SMALL, ranked

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN = 10
"""Attacks in the table."""
STYLES: dict[Word, str] = {
    "inconclusive": "bold magenta",
    "broken": "bold red",
    "no measurable protection": "bold red",
    "raises cost": "bold yellow",
    "protected": "bold green",
}


def show(report: Report, console: Console) -> None:
    """Print verdict, reason, what stands beside it, the four answers, the worst attacks and what was not tried."""
    from rich.padding import Padding
    from rich.text import Text

    evidence = report.evidence
    style = STYLES[evidence.word] if evidence and not summary.absolute(report) else "bold"
    if report.pushed_anyway:
        console.print(Text(summary.GATE_MISSED, style="bold red"))
    console.print(Text.assemble(("Verdict: ", "bold"), (summary.verdict(report), style)))
    console.print(Text(summary.why(report)))
    for kind, caveat in summary.caveats(report):
        console.print(Text(f"{kind}: {caveat}", style="yellow"))
    for question, answer in [*summary.four_answers(report), *_asides(report)]:
        console.print()
        console.print(Text(question, style="bold"))
        console.print(Padding(Text(answer), (0, 0, 0, 2)))
    if evidence and evidence.families:
        console.print()
        console.print(_rich_table(report, evidence, console.width))
        if (rest := len(ranked(evidence)) - SHOWN) > 0:
            attacks = "1 further attack" if rest == 1 else f"{rest} further attacks"
            console.print(Text(f"{attacks} did less: see the report.", style="dim"))
    console.print()
    console.print(Text(summary.sentences(summary.holds_for(report), summary.LIMIT), style="dim"))


def _asides(report: Report) -> list[tuple[str, str]]:
    """What follows the four answers on a terminal."""
    claims = " ".join(f"{claim}: {told}." for claim, told, _ in summary.trap(report))
    asides = (
        ("Does the trap work as a trap?", claims),
        ("What the probe can see", summary.power(report)),
        ("Notes", summary.few("; ".join(summary.notes(report)))),
        ("Not tried", f"{'; '.join(summary.not_tried(report))}."),
    )
    return [(title, text) for title, text in asides if text]


def _rich_table(report: Report, evidence: Evidence, width: int) -> Table:
    """The worst families; intervals stand under their values, unbroken where the terminal has 80 columns."""
    from rich.table import Table
    from rich.text import Text

    columns = summary.comparable(report, SMALL)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="underline")
    for name in columns:
        table.add_column(name.replace(" ", "\n"), overflow="fold", no_wrap=name in FIGURES and width >= 80)
    for place, family in enumerate(ranked(evidence)[:SHOWN]):
        cells = (Text(CELLS[name](family).replace(" [", "\n[")) for name in columns)
        table.add_row(*cells, style=None if place else "bold")
    return table
