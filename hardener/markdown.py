"""What a report says, as Markdown: in short for pull requests and job summaries, and the tables of a model card."""

from __future__ import annotations

from collections.abc import Sequence

from hardener import summary, tables
from hardener.report import Report
from hardener.tables import NARROW, WIDE, escape, family_table, markdown_table

TOP = 8
"""Attacks shown at first sight."""


def in_short(report: Report) -> str:
    """The facts in short, for pull requests and job summaries; what is longer is folded."""
    parts = [
        f"### hardener: {escape(report.parent.id)}",
        *([f"**{summary.GATE_MISSED}**"] if report.pushed_anyway else []),
        f"**Verdict: {escape(summary.verdict(report))}.** {escape(summary.why(report))}",
        "\n".join(f"- **{escape(kind)}:** {escape(caveat)}" for kind, caveat in summary.caveats(report)),
        escape(summary.sentences(summary.headline(report), summary.power(report))),
        families(report, most=TOP),
        summary.LIMIT,
        _folded("Four answers, and what was not tried", _answers(report)),
        _folded("Every attack", _every_attack(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _answers(report: Report) -> str:
    answers = [f"**{escape(question)}** {escape(answer)}" for question, answer in summary.four_answers(report)]
    untried = "\n".join(f"- {escape(line)}" for line in summary.not_tried(report))
    return "\n\n".join([*answers, escape(summary.holds_for(report)), f"**Not tried**\n\n{untried}"])


def _every_attack(report: Report) -> str:
    """All that is known of each attack, of the trap, and beside the verdict."""
    remarks = "\n".join(f"- {escape(note)}" for note in summary.notes(report))
    parent = outside(report)
    parts = (
        families(report, WIDE),
        f"{summary.NEEDS_PARENT}\n\n{parent}" if parent else "",
        further(report),
        trap(report),
        remarks,
    )
    return "\n\n".join(part for part in parts if part)


def _folded(title: str, inside: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{inside}\n\n</details>" if inside else ""


def families(report: Report, columns: Sequence[str] = NARROW, most: int | None = None) -> str:
    """The families of the verdict, the worst first and in bold, `most` of them; empty if none was run.

    A column that says nothing of any family is left out.
    """
    found = tables.ranked(report.evidence)[:most] if report.evidence else []
    columns = summary.comparable(report, columns)
    return family_table(found, columns, bold=frozenset({0}), dosed=_dosed(report)) if found else ""


def _dosed(report: Report) -> frozenset[str]:
    """Attacks whose curves are single points: they take no steps, so what they were tried at are doses."""
    stepped = {curve.family for curve in report.curves if len(curve.points) > 1}
    return frozenset(curve.family for curve in report.curves) - stepped


def outside(report: Report) -> str:
    """The families that need the parent's weights; empty where none was run."""
    found = tables.outside(report.evidence) if report.evidence else []
    return family_table(found, ("Attack", "Original", "Hardened", "Hardened, raw")) if found else ""


def further(report: Report) -> str:
    """The measures beside the verdict; empty where there are none."""
    rows = summary.further(report)
    return markdown_table(("Beside the verdict", "Original", "Hardened"), rows) if rows else ""


def trap(report: Report) -> str:
    """The properties of a trap; empty where they were not asked for."""
    rows = summary.trap(report)
    return markdown_table(("What a collapse trap claims", "Shown", "Why"), rows) if rows else ""
