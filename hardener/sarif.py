"""A report as SARIF 2.1.0 (OASIS), the form in which code scanning takes findings.

One run with a rule for the verdict, for each attack family that it rests on, and for each check of the evidence. A rule
has a result where its word is below the gate or its check failed; the attack that did best always has one.

    error     below the recipe's gate
    warning   below "raises cost", where the recipe sets no gate
    note      the attack that did best, where it is not below

Pure, and nothing but words, titles and figures of the evidence goes in: no prompt, answer, data source or path.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from hardener import summary, verdict
from hardener.errors import UsageError
from hardener.recipe import Gate
from hardener.report import Evidence, Family, Report, Word
from hardener.tables import figure, multiplier, ranked

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
UNGATED: Gate = "raises-cost"
"""What a word is held against where the recipe sets no gate."""
Level = Literal["error", "warning", "note"]


class Finding(NamedTuple):
    """One rule, and what came of it; level None: nothing to report."""

    rule: str
    title: str
    meaning: str
    level: Level | None
    said: str


def sarif(report: Report, place: str = "hardener/report.json") -> dict[str, Any]:
    """The report as a SARIF log, ready for `json.dumps`.

    `place` is the file that code scanning shows the results beside, relative to the repository's root: best the recipe.
    Raises UsageError for a report without evidence.
    """
    if report.evidence is None:
        raise UsageError(f"the report of {report.subject} has no evidence: probe the model first")
    findings = list(_findings(report.evidence, report.recipe.get("probe", {}).get("gate")))
    driver = {"name": "hardener", "version": report.hardener, "rules": [_rule(finding) for finding in findings]}
    results = [_result(finding, index, report, place) for index, finding in enumerate(findings) if finding.level]
    run = {
        "tool": {"driver": driver},
        # One model's results must not close another's.
        "automationDetails": {"id": f"hardener/{report.subject}/"},
        "results": results,
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _findings(evidence: Evidence, gate: Gate | None) -> Iterator[Finding]:
    below: Level = "error" if gate else "warning"

    def level(word: Word) -> Level | None:
        return None if verdict.meets(word, gate or UNGATED) else below

    flags = "".join(f"; {flag}" for flag in evidence.flags)
    said = f"Verdict: {evidence.word}{flags}. {evidence.reason}"
    yield Finding("verdict", "Verdict of the probe", summary.MEANING[evidence.word], level(evidence.word), said)
    for place, family in enumerate(ranked(evidence)):
        best: Level | None = "note" if place == 0 else None
        meaning = f"How far a stranger gets with {family.title}, hardened against original."
        yield Finding(f"attack/{family.name}", family.title, meaning, level(family.word) or best, _attack(family))
    for name, answer in evidence.checks.items():
        failed = None if answer == "ok" else below
        meaning = "A check that the evidence must pass before it may be judged."
        yield Finding(f"check/{_slug(name)}", name, meaning, failed, f"The check “{name}” failed: {answer}")


def _attack(family: Family) -> str:
    """What one attack reached, in a sentence."""
    against = f" against {figure(family.w_original)} on the original" if family.w_original else ""
    cost = f"; cost multiplier {multiplier(family.multiplier)}" if family.multiplier else ""
    return f"{family.title}: {family.word}. Usable score {figure(family.w_hardened)}{against}{cost}."


def _rule(finding: Finding) -> dict[str, Any]:
    return {
        "id": finding.rule,
        "shortDescription": {"text": _plain(finding.title)},
        "fullDescription": {"text": _plain(finding.meaning)},
        "help": {"text": _plain(f"{finding.meaning} {summary.LIMIT}")},
        "properties": {"tags": ["security", "machine-learning"]},
    }


def _result(finding: Finding, index: int, report: Report, place: str) -> dict[str, Any]:
    location = {"artifactLocation": {"uri": quote(place)}, "region": {"startLine": 1}}
    # The same finding of the same model is the same alert in every run, whatever its figures.
    same = hashlib.sha256(f"{report.subject}\n{finding.rule}".encode()).hexdigest()[:16]
    return {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": finding.level,
        "message": {"text": _plain(f"{report.subject}: {finding.said}")},
        "locations": [{"physicalLocation": location, "logicalLocations": [{"fullyQualifiedName": report.subject}]}],
        "partialFingerprints": {"primaryLocationLineHash": f"{same}:1"},
    }


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _plain(text: str) -> str:
    """One line in which nothing is a link or a placeholder (SARIF 2.1.0, 3.11.5 and 3.11.6)."""
    line = " ".join("".join(c for c in text if c.isprintable() or c.isspace()).split())
    return line.replace("](", "] (").replace("{", "{{").replace("}", "}}")
