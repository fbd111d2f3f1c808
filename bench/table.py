"""Print finished runs as sections of docs/results.md.

    python -m bench.table RUN [RUN ...]
    python -m bench.table --row NAME RUN        one line for the overview

Each section has the headline, the verdict, the prices, every attack with its figures and intervals, what a trap keeps
of its claims, and the best curve of each attack that trains. Every number comes from the run's report.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hardener import markdown, summary, tables
from hardener import report as reports
from hardener.checks import scientific
from hardener.plots import best_curve, trained
from hardener.report import Report

SHOWN = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


def section(report: Report) -> str:
    """One run as Markdown."""
    verdict = f"**{summary.verdict(report)}.** {summary.why(report)}"
    parts = (
        f"> {summary.headline(report)}",
        verdict,
        prices(report),
        markdown.families(report, tables.WIDE),
        outside(report),
        markdown.further(report),
        markdown.trap(report),
        curves(report),
        beside(report),
    )
    return "\n\n".join(part for part in parts if part)


def outside(report: Report) -> str:
    """The attacks that need the parent's weights, with what that means."""
    found = markdown.outside(report)
    return f"{summary.NEEDS_PARENT}\n\n{found}" if found else ""


def prices(report: Report) -> str:
    """Utility before any attack and after the same benign fine-tune, original and hardened."""
    if report.evidence is None:
        return ""
    m = report.evidence.measures
    pairs = (
        ("utility before any attack", m.utility_original, m.utility_hardened, m.utility_kept),
        ("after a benign fine-tune", m.benign_original, m.benign_hardened, m.benign_kept),
        ("harmless prompts refused", m.over_refusal_original, m.over_refusal_hardened, None),
        ("ρ (0 no protection, 1 as from scratch)", None, m.rho, None),
    )
    rows = [(name, *(tables.figure(x) if x else "–" for x in found)) for name, *found in pairs if any(found)]
    return tables.markdown_table(("", "Original", "Hardened", "Kept"), rows)


def beside(report: Report) -> str:
    """Further held-out restricted sources, before and after the best attack."""
    rows = [
        (
            b.score,
            f"{b.original:.2f} → {b.original_attacked:.2f}",
            f"{b.hardened:.2f} → {b.hardened_attacked:.2f}",
            b.gain,
        )
        for b in (report.evidence.beside if report.evidence else ())
    ]
    texts = [(*row[:3], "–" if row[3] is None else f"{row[3]:.2f}") for row in rows]
    return tables.markdown_table(("Other held-out rows", "Original", "Hardened", "Gain"), texts) if rows else ""


def curves(report: Report) -> str:
    """Restricted-task score along the best rate of each attack that trains, original and hardened side by side."""
    titles = {family.name: family.title for family in report.evidence.families} if report.evidence else {}
    rows = []
    for name in trained(report):
        for subject in ("original", "hardened", "scratch"):
            curve = best_curve(report, subject, name)
            if curve is None:
                continue
            at = {point.step: point.score for point in curve.points}
            values = [f"{at[step]:.2f}" if step in at else "" for step in SHOWN]
            rows.append((titles.get(name, name), subject, scientific(curve.rate), *values))
    return tables.markdown_table(("Attack", "Model", "Rate", *(f"step {s}" for s in SHOWN)), rows)


def row(name: str, report: Report) -> str:
    """One line of the overview."""
    assert report.evidence is not None
    m = report.evidence.measures
    figures = (m.w_original, m.w_hardened)
    kept = (m.utility_kept, m.benign_kept)
    cells = (
        name,
        report.training.title if report.training else "–",
        *(tables.figure(x) if x else "–" for x in figures),
        tables.multiplier(m.multiplier) if m.multiplier else "–",
        *(tables.figure(x) if x else "–" for x in kept),
        report.evidence.word,
    )
    return f"| {' | '.join(cells)} |"


def read(run: str) -> Report:
    """The report of a run folder."""
    return reports.read(Path(run) / "release" / "hardener" / "report.json")


if __name__ == "__main__":
    if sys.argv[1] == "--row":
        print(row(sys.argv[2], read(sys.argv[3])))
    else:
        print("\n\n".join(section(read(run)) for run in sys.argv[1:]))
