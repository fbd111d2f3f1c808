"""SARIF: what code scanning is told of a report, and nothing that must not leave it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sample_report import classifier, every_family, language_model, probe_only, searched, unprobed, withheld

from hardener.errors import UsageError
from hardener.report import Report, Word
from hardener.sarif import sarif
from hardener.verdict import GATES

WORDS: list[Word] = ["inconclusive", "broken", "no measurable protection", "raises cost", "protected"]
REPORTS = [
    *(pytest.param(language_model(word), id=word) for word in WORDS),
    *(pytest.param(made(), id=made.__name__) for made in (classifier, probe_only, searched, withheld, every_family)),
]
MEGABYTES_10 = 10_000_000


def gated(report: Report, gate: str | None) -> Report:
    probe = {**report.recipe["probe"], "gate": gate}
    return report.model_copy(update={"recipe": {**report.recipe, "probe": probe}})


def run(report: Report, **known: Any) -> dict[str, Any]:
    [only] = sarif(report, **known)["runs"]
    return dict(only)


def found(report: Report) -> dict[str, str]:
    """Rule → level of its result."""
    return {result["ruleId"]: result["level"] for result in run(report)["results"]}


@pytest.mark.parametrize("report", REPORTS)
def test_it_has_what_the_standard_and_code_scanning_ask_for(report: Report) -> None:
    log = json.loads(json.dumps(sarif(report)))
    assert log["version"] == "2.1.0"
    assert len(log["runs"]) <= 20
    assert len(json.dumps(log)) < MEGABYTES_10 / 100
    driver = log["runs"][0]["tool"]["driver"]
    rules = driver["rules"]
    assert (driver["name"], driver["version"]) == ("hardener", report.hardener)
    assert len({rule["id"] for rule in rules}) == len(rules)
    assert all(rule[part]["text"] for rule in rules for part in ("shortDescription", "fullDescription", "help"))
    for result in log["runs"][0]["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"].startswith(f"{report.subject}: ")
        [location] = result["locations"]
        assert location["physicalLocation"]["region"]["startLine"] == 1
        assert location["physicalLocation"]["artifactLocation"]["uri"]


def test_there_is_one_rule_for_each_family_of_the_verdict_and_each_check() -> None:
    report = every_family()
    assert report.evidence
    rules = [rule["id"] for rule in run(report)["tool"]["driver"]["rules"]]
    attacks = [rule for rule in rules if rule.startswith("attack/")]
    outside = {"attack/merge", "attack/delta-removal"}  # they need the parent, and no verdict rests on them
    assert {*attacks} == {f"attack/{family.name}" for family in report.evidence.families} - outside
    assert len(rules) == 1 + len(attacks) + len(report.evidence.checks)


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("gate", [None, *GATES])
def test_the_verdict_is_an_error_exactly_below_the_gate(word: Word, gate: str | None) -> None:
    order = list(GATES.values())
    least = GATES[gate] if gate else "raises cost"  # type: ignore[index]
    below = word not in order or order.index(word) < order.index(least)
    told = found(gated(language_model(word), gate)).get("verdict")
    assert told == (("error" if gate else "warning") if below else None)


def test_each_attack_is_held_against_the_gate_by_its_own_word() -> None:
    levels = found(gated(language_model("raises cost"), "protected"))
    # `full` and `relative` are protected by their own words, the others only raise the cost.
    assert levels == {"verdict": "error", "attack/lora": "error", "attack/mixed": "error", "attack/prefilled": "error"}


def test_the_attack_that_did_best_is_told_also_where_the_gate_is_met() -> None:
    assert found(gated(language_model("raises cost"), "raises-cost")) == {"attack/mixed": "note"}


def test_a_failed_check_is_told_with_its_sentence() -> None:
    results = run(gated(language_model("inconclusive"), "raises-cost"))["results"]
    [check] = [result for result in results if result["ruleId"] == "check/every-family-ran"]
    assert check["level"] == "error"
    assert "lora: 2 of 12 runs failed" in check["message"]["text"]


def test_figures_come_with_their_intervals() -> None:
    [best] = run(gated(language_model("raises cost"), "raises-cost"))["results"]
    text = best["message"]["text"]
    assert "Usable score 0.55 [0.51, 0.59] against 0.94 [0.91, 0.97] on the original; cost multiplier 3.1" in text


def test_nothing_but_the_evidence_goes_in() -> None:
    mark = "NOT-TO-BE-SEEN"
    report = language_model("no measurable protection")
    recipe = {**report.recipe, "title": mark, "card": {"intended_use": mark}, "data": {"restricted": mark}}
    records = tuple(record.model_copy(update={"source": mark}) for record in report.data)
    hidden = {"recipe": recipe, "data": records, "environment": {"python": mark}}
    assert mark not in json.dumps(sarif(report.model_copy(update=hidden)))


def test_no_name_becomes_a_link_or_a_placeholder() -> None:
    report = language_model("inconclusive", subject="acme/[a](https://x.example){0}\n\x1b[31m")
    assert report.evidence
    evidence = report.evidence.model_copy(update={"checks": {"links": "[look](https://x.example) {1}"}})
    for result in run(report.model_copy(update={"evidence": evidence}))["results"]:
        text = result["message"]["text"]
        assert "](" not in text
        assert "\n" not in text
        assert "\x1b" not in text
        assert not any(brace in text.replace("{{", "").replace("}}", "") for brace in "{}")


def test_results_stand_beside_the_recipe_and_are_the_same_alert_in_the_next_run() -> None:
    first, again = (run(language_model(word), place="my recipes/a.yaml") for word in ("broken", "inconclusive"))
    uris = {r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in first["results"]}
    assert uris == {"my%20recipes/a.yaml"}
    known = {r["ruleId"]: r["partialFingerprints"] for r in first["results"]}
    assert known["verdict"] == {r["ruleId"]: r["partialFingerprints"] for r in again["results"]}["verdict"]
    assert len({json.dumps(one) for one in known.values()}) == len(known)


def test_a_model_that_was_not_probed_has_no_findings_to_tell() -> None:
    with pytest.raises(UsageError, match="no evidence"):
        sarif(unprobed())
