"""The model card and the summary: what they say, and that nothing they quote can change what they say."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path
from typing import get_args

import pytest
import sample_report as sample
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from rich.console import Console

from hardener import markdown, summary, tables, template, terminal
from hardener.card import metadata, render
from hardener.errors import UsageError
from hardener.report import Interval, Report, Word

WORDS = get_args(Word)
REPORTS = {word: sample.language_model(word) for word in WORDS} | {
    "every family": sample.every_family(),
    "searched": sample.searched(),
    "withheld": sample.withheld(),
    "classifier": sample.classifier(),
    "probe only": sample.probe_only(),
    "compared": sample.compared(),
    "unprobed": sample.unprobed(),
}
PARENT_CARD = """---
license: llama3.2
license_name: the-licence
license_link: LICENSE.txt
language: [en, de]
library_name: transformers
pipeline_tag: text-generation
tags: [chat, "arxiv:2401.00001", text-generation-inference, "base_model:a/b", generated_from_trainer, chat]
datasets: [acme/pretraining]
new_version: acme/successor
co2_eq_emissions: {emissions: 12}
extra_gated_prompt: You agree to the terms.
extra_gated_fields: {Name: text}
model-index:
- name: parent
  results:
  - task: {type: text-generation}
    dataset: {type: mmlu, name: MMLU}
    metrics: [{type: acc, value: 77.7}]
---
# The parent

It scores 77.7 on something.
"""


def body(card: str) -> str:
    return card.split("\n---\n", 1)[-1]


def changed(report: Report, **parent: object) -> Report:
    return report.model_copy(update={"parent": report.parent.model_copy(update=parent)})


def _with_evidence(report: Report, **known: object) -> Report:
    return report.model_copy(update={"evidence": report.evidence.model_copy(update=known)})


def printed(report: Report, width: int = 110) -> str:
    console = Console(width=width, file=io.StringIO())
    terminal.show(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("word", WORDS)
def test_the_card_leads_with_the_word_and_its_reason(word):
    report = sample.language_model(word)
    lines = body(render(report)).strip().splitlines()
    assert lines[0] == f"# Verdict: {word}"
    assert lines[2] == f"{summary.MEANING[word]} Reason: {report.evidence.reason}."


@pytest.mark.parametrize("name", REPORTS)
def test_card_terminal_and_job_summary_give_the_four_answers_in_order(name):
    report = REPORTS[name]
    answers = summary.four_answers(report)
    assert tuple(question for question, _ in answers) == summary.QUESTIONS
    for text in (flat(render(report)), flat(printed(report)), flat(markdown.in_short(report))):
        places = [text.index(flat(part)) for answer in answers for part in answer if text.count(flat(part)) == 1]
        assert places == sorted(places)
        assert all(flat(question) in text and flat(answer) in text for question, answer in answers)


def test_a_missed_gate_is_the_first_line():
    card = render(sample.language_model("no measurable protection", pushed_anyway=True))
    assert body(card).strip().splitlines()[0] == f"**{summary.GATE_MISSED}**"
    assert printed(sample.language_model(pushed_anyway=True)).startswith(summary.GATE_MISSED)
    assert summary.GATE_MISSED not in render(sample.language_model())


@pytest.mark.parametrize("flag", ["utility lost", "benign fine-tuning lost"])
def test_a_price_stands_beside_the_verdict(flag):
    word: Word = "broken" if flag == "utility lost" else "no measurable protection"
    report = sample.language_model(word)
    assert f"- **Price:** {flag}" in body(render(report)).split("## ")[0]
    assert f"Price: {flag}" in printed(report)


def test_a_failed_check_and_a_note_are_shown_and_a_passed_check_is_not():
    card = render(sample.language_model("inconclusive"))
    assert "- **Check failed:** every family ran: lora: 2 of 12 runs failed" in card
    assert "- not canonicalised: no table row for this family" in card.split("## Notes of the probe")[1]
    assert "rates bracketed" not in card


def test_the_family_that_decides_is_bold_and_stands_with_raw_score_and_cost():
    table = [line for line in render(sample.language_model()).splitlines() if line.startswith("| **with benign")]
    assert table == [
        "| **with benign rows mixed in** | **0.94 [0.91, 0.97]** | **0.55 [0.51, 0.59]** | "
        "**0.61 [0.57, 0.65]** | **3.1 [2.4, 4.0]** | **raises cost** |"
    ]


def test_figures_have_one_form():
    assert tables.figure(Interval(value=0.12, low=0.08, high=0.17)) == "0.12 [0.08, 0.17]"
    assert tables.figure(Interval(value=-0.001, low=-0.04, high=0.0)) == "0.00 [−0.04, 0.00]"
    assert tables.multiplier(Interval(value=16, low=12, high=16, censored=True)) == "≥ 16.0"
    assert tables.multiplier(Interval(value=3.14, low=2.4, high=4)) == "3.1 [2.4, 4.0]"


@pytest.mark.parametrize("name", REPORTS)
def test_every_number_of_the_card_is_in_the_report(name):
    report = REPORTS[name]
    card = re.sub(r"`[^`]*`|\]\([^)]*\)|SHA-256|…", " ", body(render(report)))
    card = re.sub(r"\*\*\d\. |95 %|0 is |1 is |and 1 ", " ", card)  # numbering, level and ends of a scale
    allowed = set(numbers_of(report.model_dump()))
    shown = re.findall(r"(?<![\w.])−?\d[\d,]*(?:\.\d+)*(?![\w])", card)
    assert [number for number in shown if number.strip(",").replace("−", "-") not in allowed] == []


def numbers_of(value: object) -> set[str]:
    """Every form in which a value of the report may be printed."""
    if isinstance(value, dict):
        return set().union(*map(numbers_of, [*value.keys(), *value.values()]))
    if isinstance(value, list | tuple):
        return set().union(*map(numbers_of, value))
    if isinstance(value, bool) or value is None:
        return set()
    if isinstance(value, int | float):
        forms = {f"{value:,}", f"{value}", f"{value:.2f}", f"{value:.1f}", f"{value:.2g}"}
        return forms | {form.removeprefix("-") for form in forms if not float(form.replace(",", ""))}
    return set(re.findall(r"\d[\d.]*\d|\d", str(value))) | set(re.findall(r"\d+", str(value)))


@pytest.mark.parametrize("name", REPORTS)
def test_no_card_prints_none_or_calls_a_score_zero_percent(name):
    text = render(REPORTS[name], parent_card=PARENT_CARD, plots=("hardener/curves.png",))
    assert not re.search(r"\bNone\b|\bnan\b|\b0 ?%", text)


@pytest.mark.parametrize("name", REPORTS)
def test_the_limits_are_always_stated(name):
    report = REPORTS[name]
    for text in (flat(text.replace("\\", "")) for text in (render(report), printed(report), markdown.in_short(report))):
        assert summary.LIMIT in text
        assert summary.holds_for(report) in text
        assert summary.not_tried(report)
        assert all(line in text for line in summary.not_tried(report))


@pytest.mark.parametrize(
    ("parent", "sentence"),
    [
        ({}, "is public. Whoever has it need not attack"),
        ({"gated": "manual"}, "is gated (manual). Whoever has it need not attack"),
        ({"gated": True}, "is gated. Whoever has it need not attack"),
        ({"id": "in-house", "local": True}, "only while the unhardened in-house is not released"),
    ],
)
def test_the_card_says_for_whom_protection_can_hold(parent, sentence):
    assert sentence in render(changed(sample.language_model(), **parent))


def test_a_model_probed_alone_has_absolute_figures_and_no_verdict():
    report = sample.probe_only()
    card = body(render(report))
    assert card.strip().startswith("# Verdict: absolute figures, no verdict")
    assert "the model was attacked, not changed" in card
    assert "original's" not in card
    assert "Tried: full; lora; mixed; relative. Budget: standard, 40 runs" in card
    assert card.count("no original to compare with") == 1
    assert "hardener probe acme/tiny-chat" in card
    assert "base_model" not in metadata(report, None)


def test_a_model_that_others_hardened_has_a_verdict_and_no_lineage_of_ours():
    card = render(sample.compared())
    assert body(card).strip().startswith("# Verdict: raises cost")
    assert "a probe of acme/tiny-chat-hardened, compared with the original [acme/tiny-chat]" in card
    assert "hardener probe acme/tiny-chat-hardened --against acme/tiny-chat --recipe hardener/recipe.yaml" in card
    assert "base_model" not in metadata(sample.compared(), None)


def test_a_check_whose_failure_is_the_reason_is_said_once():
    report = _with_evidence(
        sample.language_model("inconclusive"), reason="2 runs failed", checks={"no failed run": "2 runs failed"}
    )
    assert printed(report).count("2 runs failed") == 1


def test_what_a_certificate_lacks_is_told_unless_the_reason_says_so():
    missing = {"seeds": "the worst attack on the original model was run with 1 seed, not 3"}
    report = _with_evidence(sample.language_model("no measurable protection"), conditions=missing)
    assert f"- **A certificate would need:** seeds: {missing['seeds']}" in render(report)
    assert f"A certificate would need: seeds: {missing['seeds']}" in flat(printed(report, 200))
    assert "A certificate would need" not in render(sample.withheld())
    assert "1 seed, not 3" in render(sample.withheld()).split("## ")[0]


def test_of_a_long_reason_the_first_parts_are_shown():
    long = "; ".join(f"family-{i} did nothing at any rate" for i in range(20))
    report = _with_evidence(sample.language_model(), conditions={"rates bracketed": long})
    told = dict(summary.caveats(report))["A certificate would need"]
    assert told.endswith("family-2 did nothing at any rate; and others")


@pytest.mark.parametrize(("preset", "said"), [("quick", "quick probe"), ("reduced-cpu", "reduced CPU probe")])
def test_a_probe_that_only_screens_says_so_in_the_first_lines(preset, said):
    report = _with_evidence(sample.language_model("inconclusive"), preset=preset)
    for text in (render(report), printed(report), markdown.in_short(report)):
        assert said in body(text).partition(summary.QUESTIONS[0])[0]
    assert said not in render(sample.language_model("inconclusive"))


def test_judges_are_named_with_what_they_are_and_how_well_they_agree():
    judges = "acme/judge@89abcdef classifier harmful ≥ 0.5, prompt 5e5e; acme/guard@77aa guard ≥ 0.5, prompt 66bb"
    report = _with_evidence(sample.searched(), judges=judges)
    refusal = {"model": "acme/no", "revision": "cdef" * 10, "kind": "classifier", "labels": ["refused"]}
    probe = {**report.recipe["probe"], "answer_tokens": 64, "refusal_judge": refusal}
    card = render(report.model_copy(update={"recipe": {**report.recipe, "probe": probe}}))
    assert [f"| Judge | {judge} |" in card for judge in judges.split("; ")] == [True, True]
    assert "| Agreement of the judges | Cohen's κ = 0.71 |" in card
    assert f"| Refusals told by | acme/no@{'cdef' * 10} |" in card
    assert "end after 64 tokens, so early that harm may not come to show" in card.split("## ")[0]
    assert "so early that" not in render(report)


def test_public_benchmarks_stand_beside_the_verdict():
    report = _with_evidence(
        sample.language_model(), benchmarks_original={"arc": 0.52}, benchmarks_hardened={"arc": 0.49, "new": 0.3}
    )
    for text in (render(report), markdown.in_short(report)):
        assert "| arc, higher is better | 0.52 | 0.49 |" in text
        assert "| new, higher is better | – | 0.30 |" in text


def test_the_card_tells_which_of_its_claims_a_trap_keeps():
    card = render(sample.language_model())
    section = card.split("## Does the trap work as a trap?")[1].split("## ")[0]
    shown = [line.split(" | ")[1] for line in section.splitlines() if line.startswith("| ")][2:]
    assert shown == ["yes", "not shown", "no", "no"]
    assert (
        "an attacker who trains on general rows beside the harm fails too: no"
        in flat(printed(sample.language_model())).lower()
    )
    assert "work as a trap" not in render(sample.classifier()) + printed(sample.classifier())


def test_every_attack_has_one_row_and_those_that_need_the_parent_stand_apart():
    report = sample.every_family()
    card = render(report)
    table, rest = card.split("## Attack by attack")[1].split("## Where it breaks")
    for family in report.evidence.families:
        inside = not family.needs_parent
        here, there = (
            text.count(f"{tables.escape(family.title)} |") + text.count(f"{family.title}** |") for text in (table, rest)
        )
        assert (here, there) == ((1, 0) if inside else (0, 1))
    assert summary.NEEDS_PARENT in rest
    assert summary.NEEDS_PARENT not in render(sample.language_model())


def test_the_attack_that_the_report_calls_worst_is_in_bold_also_where_another_came_near():
    report = sample.every_family()
    named = _with_evidence(report, worst="refusal direction ablated, then full at 3e-4, step 4")
    bold = [line for line in render(named).splitlines() if line.startswith("| **")]
    assert [line.split("**")[1] for line in bold] == ["refusal direction ablated, then full"]
    unnamed = tables.ranked(_with_evidence(report, worst="no attack").evidence)
    scores = [family.w_hardened.value for family in unnamed]
    assert scores == sorted(scores, reverse=True)


def test_a_terminal_of_80_columns_shows_the_worst_attacks_and_counts_the_others():
    report = sample.every_family()
    ranked = [family.title for family in tables.ranked(report.evidence)]
    text = printed(report, 80)
    table = text.split("multiplier  Verdict")[1]
    assert max(map(len, text.splitlines())) <= 80
    assert "refusal direction" not in flat(table)
    assert all(title.split()[0] in table for title in ranked[: terminal.SHOWN])
    assert f"{len(ranked) - terminal.SHOWN} further attacks did less: see the report." in table
    assert "further attack" not in printed(sample.language_model())


def test_a_pull_request_shows_the_worst_attacks_and_folds_the_rest():
    report = sample.every_family()
    text = markdown.in_short(report)
    first, *folded = text.split("<details>")
    assert first.count("raises cost |") + first.count("raises cost** |") == markdown.TOP
    assert "**Verdict: raises cost.**" in first
    assert summary.headline(report) in first.replace("\\", "")
    assert len(first) < 5000
    full = folded[-1]
    assert all(tables.escape(family.title) in full for family in report.evidence.families)
    assert "| 4 rates, 1e-5 to 3e-4 |" in full.replace("**", "")
    assert "| doses 1, 2, 3 |" in full
    assert "| p (Holm) |" in full
    assert "p (Holm)" not in render(report)


def test_a_column_that_says_nothing_is_left_out():
    lone = _with_evidence(
        sample.probe_only(), families=(sample.family("full", "full", 0.3, None, "inconclusive", w_original=None),)
    )
    head = markdown.families(lone).splitlines()[0]
    assert head == "| Attack | Hardened | Hardened, raw |"


def test_a_plot_with_a_dark_twin_is_shown_once_on_each_page():
    card = render(sample.language_model(), plots=("hardener/curves.png", "hardener/curves-dark.png"))
    shown = re.findall(r'<img class="([^"]+)" src="([^"]+)" alt="[^"]+">', card)
    assert shown == [("dark:hidden", "hardener/curves.png"), ("hidden dark:block", "hardener/curves-dark.png")]
    assert "![" not in card


def test_the_headline_is_one_line_with_both_models():
    line = summary.headline(sample.language_model("protected"))
    assert "\n" not in line
    assert "hardened 0.12 [0.08, 0.16], original 0.94 [0.91, 0.97] (paired difference 0.82 [0.77, 0.87], 95 %)" in line
    assert "Cost multiplier ≥ 16.0. Utility kept 0.98 [0.97, 1.00]." in line


def test_metadata_inherits_what_is_still_true_and_drops_what_is_not():
    report = changed(sample.language_model(), license={})
    card = {key: value for key, value in report.recipe.items() if key != "card"}
    known = metadata(report.model_copy(update={"recipe": card}), PARENT_CARD)
    assert known["license"] == "llama3.2"
    assert known["license_name"] == "the-licence"
    assert known["license_link"] == f"https://huggingface.co/acme/tiny-chat/blob/{report.parent.commit}/LICENSE.txt"
    assert known["language"] == ["en", "de"]
    assert known["library_name"] == "transformers"
    assert known["pipeline_tag"] == "text-generation"
    assert known["base_model"] == "acme/tiny-chat"
    assert known["base_model_relation"] == "finetune"
    assert known["tags"] == ["chat", "hardener", "tamper-resistant", "ctrap"]
    assert known["extra_gated_prompt"] == "You agree to the terms."
    assert known["extra_gated_fields"] == {"Name": "text"}
    assert not {"datasets", "new_version", "co2_eq_emissions"} & known.keys()
    assert "77.7" not in str(known)


@pytest.mark.parametrize(
    ("front", "language", "tags"),
    [
        ("language: no\ntags: chat", ["no"], ["chat"]),
        ("language: [en, no]\ntags: [chat, 1]", ["en", "no"], ["chat", "1"]),
        ("license: mit", None, []),
    ],
)
def test_one_value_or_many_and_norwegian_are_read_alike(front, language, tags):
    report = sample.language_model("broken")
    report = report.model_copy(update={"recipe": {**report.recipe, "card": {}}})
    known = ModelCard(render(report, parent_card=f"---\n{front}\n---\ntext")).data
    assert known.language == language
    assert known.tags == [*tags, "hardener", "ctrap"]


def test_a_licence_is_never_made_up():
    report = changed(sample.language_model(), license={})
    assert "license" not in metadata(report, None)
    assert "license" not in metadata(report, "---\ntags: [chat]\n---\ntext")
    assert "the parent names none, and none is added here" in render(report)


def test_the_recipe_overrides_licence_and_language_knowingly():
    report = changed(sample.language_model(), license={"license": "other", "license_name": "x", "license_link": "y"})
    chosen = {**report.recipe, "card": {"license": "mit", "language": ["nl"]}}
    known = metadata(report.model_copy(update={"recipe": chosen}), PARENT_CARD)
    assert known["license"] == "mit"
    assert not {"license_name", "license_link"} & known.keys()
    assert known["language"] == ["nl"]


@pytest.mark.parametrize("word", WORDS)
def test_only_a_model_that_withstood_something_is_tagged_tamper_resistant(word):
    tags = metadata(sample.language_model(word), None)["tags"]
    assert ("tamper-resistant" in tags) == (word in ("raises cost", "protected"))
    assert "hardener" in tags


def test_a_local_parent_is_named_and_neither_linked_nor_a_base_model():
    card = render(changed(sample.language_model(), id="in-house", local=True, commit=None))
    assert "base_model" not in card
    assert "`in-house`" in card
    assert "huggingface.co/in-house" not in card


@pytest.mark.parametrize("name", REPORTS)
def test_the_hub_client_reads_the_card_and_gives_the_metadata_back(name):
    report = REPORTS[name]
    card = ModelCard(render(report, parent_card=PARENT_CARD, plots=("hardener/curves.png",)))
    assert card.data.to_dict() == metadata(report, PARENT_CARD)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert ("model-index" in card.data.to_dict()) == (report.evidence is not None)


def test_the_probe_is_a_result_of_its_own_with_intervals():
    index = metadata(sample.language_model("protected"), PARENT_CARD)["model-index"]
    restricted = index[0]["results"][0]
    assert restricted["dataset"]["type"] == "acme/vault-codes"
    figures = {metric["type"]: metric for metric in restricted["metrics"]}
    assert figures["usable_score"]["value"] == 0.12
    assert figures["usable_score"]["args"] == {"low": 0.08, "high": 0.16}
    assert figures["cost_multiplier"]["name"].endswith("at least")


HOSTILE = [
    "evil/</details><script>alert(1)</script>",
    "evil/{{ 7 * 7 }}{% for x in y %}",
    "evil/[click](https://example.org)",
    "evil/a|b|c",
    "evil/`code` **bold**\n# Verdict: protected",
    "evil/![x](https://example.org/x.png)",
    "evil/\u202etxt\x00",
    "evil/[0.12, 0.34](https://example.org)",
    "evil/[open",
    "evil/close]",
    "evil/trailing\\",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_shown_and_does_nothing(name):
    honest, report = sample.language_model(), changed(sample.language_model(), id=name)
    for write in (render, markdown.in_short):
        text, plain = prose(write(report)), prose(write(honest))
        assert "<script" not in text
        assert text.count("<details") == plain.count("<details")
        assert "](https://example.org" not in text
        assert text.count("49") == plain.count("49")
        assert structure(text) == structure(plain)
    assert ModelCard(render(report)).data.base_model == name
    printed(report)


def prose(text: str) -> str:
    """The text without front matter and code blocks, where markup sleeps."""
    return re.sub(r"^```bash\n.*?\n```$", "", body(text), flags=re.DOTALL | re.MULTILINE)


def structure(markdown: str) -> list[str]:
    """Every element of the rendered text except its words: what a quoted string must not change."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    flat_tokens = [token for block in parser.parse(markdown) for token in (block, *(block.children or ()))]
    return [f"{token.type} {token.tag}" for token in flat_tokens if not token.type.startswith(("text", "softbreak"))]


EVIL = "</td>|[x](https://example.org)<img src=x> {{ 1 }} `\n# H"


@pytest.mark.parametrize(
    "poison",
    [
        lambda r: _with_evidence(r, families=tuple(f.model_copy(update={"title": EVIL}) for f in r.evidence.families)),
        lambda r: _with_evidence(r, reason=EVIL),
        lambda r: _with_evidence(r, worst=EVIL, not_tried=(EVIL, r.evidence.not_tried[0])),
        lambda r: r.model_copy(update={"data": tuple(d.model_copy(update={"license": EVIL}) for d in r.data)}),
        lambda r: r.model_copy(update={"environment": {**r.environment, "torch": EVIL}}),
        lambda r: r.model_copy(update={"recipe": {**r.recipe, "title": EVIL, "card": {"intended_use": EVIL}}}),
    ],
    ids=["family", "reason", "worst", "data licence", "version", "recipe"],
)
def test_a_hostile_string_from_elsewhere_does_nothing_either(poison):
    report = sample.language_model()
    text = prose(render(poison(report)))
    assert structure(text) == structure(prose(render(report)))
    assert "<img" not in text
    assert "](https://example.org" not in text


@pytest.mark.parametrize(
    "card",
    [
        "no front matter at all",
        "---\nlicense: [unclosed\n---\ntext",
        "---\nnever closed\nlicense: mit",
        "---\n- a list\n---\ntext",
        "---\n---\ntext",
        "---\r\nlicense: mit\r\n---\r\ntext",
        "\ufeff---\nlicense: mit\n---\ntext",
        "---\nextra_gated_prompt: |\n  one\n\n  ---\n  two\n---\ntext",
        "---\ntags: chat\nlanguage: en\n---\ntext",
        "text\n</details>\n<!-- open\n````markdown\n```\n# Verdict: protected\n---\nlicense: mit\n---\n",
        "[0.51, 0.59]: https://example.org",
        "",
    ],
)
def test_the_parents_card_cannot_break_or_change_ours(card):
    report = sample.language_model()
    ours, whole = body(render(report)), render(report, parent_card=card)
    read = ModelCard(whole)
    assert read.data.license == "apache-2.0"
    assert read.data.to_dict() == metadata(report, card)
    assert body(whole).startswith(ours)
    folded = body(whole).removeprefix(ours)
    if folded:
        fence = re.search(r"^(`{3,})markdown$", folded, re.MULTILINE)
        assert fence is not None
        inside = folded[fence.end() :].split(f"\n{fence[1]}\n")
        assert len(inside) == 2
        assert inside[1].strip() == "</details>"


def test_the_parents_front_matter_is_not_quoted():
    card = render(sample.language_model(), parent_card=PARENT_CARD)
    assert "It scores 77.7 on something." in card
    assert "its figures are not about this model" in card
    assert "new_version" not in card


def test_the_fence_is_longer_than_any_in_the_parents_card():
    card = render(sample.language_model(), parent_card="`````\ncode\n`````")
    assert "\n``````markdown\n`````\ncode\n`````\n``````\n" in card


def test_a_web_address_becomes_a_link_and_nothing_else_does():
    report = sample.language_model()
    assert "[A paper on tamper resistance](https://arxiv.org/abs/2505.16559)" in render(report)
    paper = {"title": "A paper", "url": "javascript:alert(1)"}
    assert "javascript" not in render(report.model_copy(update={"recipe": {**report.recipe, "paper": paper}}))


def test_a_template_of_ones_own_is_strict_and_has_no_way_out(tmp_path):
    mine = tmp_path / "card.md.j2"
    mine.write_text("{{ verdict }} of {{ parent }}\n")
    assert body(render(sample.language_model(), template=mine)).strip().startswith("raises cost of [acme")
    for text, said in (
        ("{{ vredict }}", "'vredict' is undefined"),
        ("{{ report.__class__.__mro__ }}", "unsafe"),
        ("a\n{% if %}", "line 2"),
        ("{% include '/etc/hostname' %}", "/etc/hostname"),
        ("{{ 1 + verdict }}", "unsupported operand"),
    ):
        mine.write_text(text)
        with pytest.raises(UsageError, match=said):
            render(sample.language_model(), template=mine)


def test_a_wrong_template_is_refused_before_any_work(tmp_path):
    mine = tmp_path / "card.md.j2"
    with pytest.raises(UsageError, match="cannot be read"):
        template.check(mine)
    mine.write_text("{{ verdict }}{% for q, a in answers %}{{ q }}{% endfor %}")
    template.check(mine)
    mine.write_text("{{ vredict }} {{ os }}")
    with pytest.raises(UsageError, match=r"prints os, vredict; a card has absolute, access"):
        template.check(mine)
    mine.write_text("{{ verdict")
    with pytest.raises(UsageError, match="line 1"):
        template.check(mine)
    template.check(Path(__file__).parents[1] / "cards" / "model_card.md.j2")


def test_equal_reports_have_equal_cards_in_whatever_order_they_are_rendered():
    cards = [{name: render(REPORTS[name]) for name in names} for names in (list(REPORTS), reversed(REPORTS))]
    assert cards[0] == cards[1]
    assert all(one != other for one, other in itertools.combinations(cards[0].values(), 2))


def test_the_card_tells_how_to_check_it_and_holds_no_path_of_this_machine():
    card = render(sample.classifier(), plots=("hardener/curves.png",))
    assert "`hardener verify <repo>`" in card
    assert "hardener harden timm/resnet18.a1_in1k --recipe hardener/recipe.yaml" in card
    assert "](hardener/curves.png)" in card
    assert str(Path(__file__).parents[1]) not in card
    assert "ρ = 0.71 [0.59, 0.83]" in card


def test_the_front_matter_is_plain_yaml():
    front = render(sample.language_model()).split("---\n")[1]
    assert "&id" not in front
    assert yaml.safe_load(front)["tags"][-1] == "ctrap"


@pytest.mark.parametrize("width", [80, 85, 100, 140])
def test_no_figure_and_no_word_is_cut_off_on_a_narrow_terminal(width):
    report = sample.language_model("no measurable protection")
    text = printed(report, width)
    table = text.split("Attack")[1].split("Not tried")[0]
    assert "…" not in text
    for family in report.evidence.families:
        assert tables.figure(family.w_hardened).split(" ", 1)[1] in table
        assert all(part in table.split() for part in family.word.split())
