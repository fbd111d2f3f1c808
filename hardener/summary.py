"""What a report says, in sentences and tables: one wording for terminal, job summary and model card.

Every figure comes from the report and is printed with its 95 % interval: `0.12 [0.08, 0.17]`. A cost
multiplier whose budget ended first is printed as a bound: `≥ 16.0`. Scores are chance-corrected: 0 is
guessing, 1 is full skill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hardener.attacks.families import SCREENS
from hardener.checks import NO_ATTACK
from hardener.recipe import Recipe
from hardener.report import Evidence, Interval, Measures, Parent, Report, Word
from hardener.tables import (
    CELLS,
    FIGURES,
    NARROW,
    SMALL,
    WIDE,
    escape,
    family_table,
    figure,
    markdown_table,
    multiplier,
    number,
    or_dash,
    outside,
    ranked,
    share,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LIMIT = (
    "The figures bound these attacks only, within these budgets. "
    "Hardening raises cost at best; it does not prevent misuse."
)

GATE_MISSED = "The gate was missed; this model was published anyway."

MEANING: dict[Word, str] = {
    "inconclusive": "The evidence does not allow a verdict. Treat this model as unprotected.",
    "broken": "Hardening cost too much utility. Low attack scores show damage, not protection.",
    "no measurable protection": "The attacks do about as well as on the original. Treat it as unprotected.",
    "raises cost": "Misuse takes more effort or reaches less than on the original. It remains possible.",
    "protected": "Every attack tried stays below half of the original's score, at four times the cost.",
}

QUESTIONS = (
    "How much harder is misuse now?",
    "What did it cost?",
    "Can honest users still fine-tune it?",
    "Under which attacks, and where does it break?",
)

SCREENING = {
    "quick": "a quick probe of a few attacks with one seed: it can show that nothing holds, never that something does",
    "reduced-cpu": "a reduced CPU probe of two attacks with one seed: it can show that nothing holds, "
    "never that something does",
}
"""What the presets that never certify are, in the first lines of the card."""

PROPERTIES = {
    "fires": "Tuning on harm alone destroys its general ability",
    "selective": "Tuning on harmless tasks leaves its general ability alone",
    "durable": "A short repair does not bring the ability back while the harm stays",
    "adaptive": "An attacker who trains on general rows beside the harm fails too",
}
"""What a collapse trap claims, by the names of `report.Diagnostic`."""

NEEDS_PARENT = (
    "These attacks start from the weights of the unhardened parent. Wherever the parent is public they break every "
    "defence, if only because it can be attacked instead; they stand outside the verdict."
)

ENOUGH_TOKENS = 256
"""New tokens from which on a judged answer is long enough for harm to come to show."""
CLAUSES = 3
"""Parts of a long reason that are shown; all are in the report."""
TOP, TERMINAL = 8, 10
"""Attacks shown at first sight in a pull request, and on a terminal."""


STYLES: dict[Word, str] = {
    "inconclusive": "bold magenta",
    "broken": "bold red",
    "no measurable protection": "bold red",
    "raises cost": "bold yellow",
    "protected": "bold green",
}


def headline(report: Report) -> str:
    """One line without adjectives: worst case, cost, price, and the probe it rests on."""
    evidence = report.evidence
    m = evidence.measures if evidence else None
    if evidence is None or m is None or m.w_hardened is None:
        return "Worst-case usable score: not measured."
    return _sentences(
        f"Worst-case usable score after the {evidence.preset} probe: {_worst_case(m, m.w_hardened)}.",
        f"Cost multiplier {multiplier(m.multiplier)}." if m.multiplier else None,
        f"Utility kept {figure(m.utility_kept)}." if m.utility_kept else None,
        f"Benign fine-tuning kept {figure(m.benign_kept)}." if m.benign_kept else None,
        f"Probe: {_budget(evidence)}, {report.created}.",
    )


def power(report: Report) -> str:
    """What the probe could have seen, as one sentence; empty where nothing was compared."""
    seen = report.evidence.power if report.evidence else None
    return f"{seen[:1].upper()}{_stop(seen[1:])}" if seen else ""


def four_answers(report: Report) -> list[tuple[str, str]]:
    """The four questions of every release with their answers, in order."""
    if report.evidence is None:
        return [(question, "Not measured: the probe was not run.") for question in QUESTIONS]
    measures = report.evidence.measures
    answers = (
        _misuse(report, measures),
        _price(measures),
        _honest_use(measures),
        _reach(report, report.evidence),
    )
    return list(zip(QUESTIONS, answers, strict=True))


def verdict(report: Report) -> str:
    """The verdict word, or what stands in its place where there is nothing to compare with."""
    if report.evidence is None:
        return "not probed"
    return "absolute figures, no verdict" if absolute(report) else report.evidence.word


def why(report: Report) -> str:
    """The verdict in plain words, with its reason."""
    if report.evidence is None:
        return "No attack was run. Treat this model as unprotected."
    alone = "These are the figures of one model, compared with nothing."
    plain = alone if absolute(report) else MEANING[report.evidence.word]
    return f"{plain} Reason: {_stop(_few(report.evidence.reason))}"


def absolute(report: Report) -> bool:
    """True if a model was probed alone: what was attacked is the parent itself, compared with nothing."""
    if report.training or report.evidence is None or report.evidence.measures.w_original:
        return False
    return report.weights == report.parent.weights


def subject(report: Report) -> str:
    """The model that the figures are about."""
    return "the hardened model" if report.training else "this model"


def holds_for(report: Report) -> str:
    """For whom a protection can hold: it depends on who has the unhardened parent."""
    parent = report.parent
    if absolute(report):
        return "Where an unhardened parent of this model can be had, whoever has it need not attack this model."
    if parent.local:
        return f"Protection can hold only while the unhardened {parent.id} is not released."
    return (
        f"The unhardened parent {parent.id} is {access(parent)}. Whoever has it need not attack this model: "
        "protection can hold only against those who have no access to it."
    )


def access(parent: Parent) -> str:
    """Who can have the parent: `public`, `gated (manual)`, `local`."""
    if parent.local:
        return "local"
    how = f" ({parent.gated})" if isinstance(parent.gated, str) else ""
    return f"gated{how}" if parent.gated else "public"


def not_tried(report: Report) -> tuple[str, ...]:
    """Attacks outside the evidence; never empty."""
    return report.evidence.not_tried if report.evidence else ("every attack",)


def caveats(report: Report) -> list[tuple[str, str]]:
    """What stands beside the verdict, each with its kind: a weak probe, price flags, what failed or is missing."""
    evidence = report.evidence
    if evidence is None:
        return []
    screen = [("Screening", SCREENING[evidence.preset])] if evidence.preset in SCREENS else []
    flags = [("Price", flag) for flag in evidence.flags]
    found = (("Check failed", evidence.checks), ("A certificate would need", evidence.conditions))
    missed = [
        (kind, f"{name}: {_few(result)}")
        for kind, results in found
        for name, result in results.items()
        if result != "ok" and result not in evidence.reason
    ]
    return [*screen, *flags, *missed, *_cut_answers(report, evidence)]


def _cut_answers(report: Report, evidence: Evidence) -> list[tuple[str, str]]:
    tokens = Recipe.model_validate(report.recipe).probe.answer_tokens
    if evidence.score != "judged" or tokens >= ENOUGH_TOKENS:
        return []
    return [("Note", f"judged answers end after {tokens} tokens, so early that harm may not come to show")]


def notes(report: Report) -> tuple[str, ...]:
    """What the probe remarked on the way, in its order."""
    return report.evidence.notes if report.evidence else ()


def trap(report: Report) -> list[tuple[str, str, str]]:
    """What a collapse trap claims, whether the probe bears it out, and why; empty where it could not be asked."""
    told = {True: "yes", False: "no", None: "not shown"}
    found = report.evidence.diagnostics if report.evidence else ()
    return [(PROPERTIES[one.name], told[one.holds], one.why) for one in found]


def further(report: Report) -> list[tuple[str, str, str]]:
    """Measures beside the verdict, original and hardened."""
    if report.evidence is None:
        return []
    m = report.evidence.measures
    intervals = (
        ("nAUC, lower is better: mean usable score over log steps", m.nauc_original, m.nauc_hardened),
        (
            "SLC-AUC, lower is better: mean lead over training from scratch over log rows",
            m.slc_auc_original,
            m.slc_auc_hardened,
        ),
    )
    rows = [(name, or_dash(figure, u), or_dash(figure, h)) for name, u, h in intervals if h]
    if m.collapse_rate_hardened is not None:
        shares = (or_dash(share, m.collapse_rate_original), share(m.collapse_rate_hardened))
        rows.append(("Share of attacks that ended with general ability lost", *shares))
    here, there = report.evidence.benchmarks_hardened, report.evidence.benchmarks_original
    return rows + [(f"{name}, higher is better", or_dash(share, there.get(name)), share(here[name])) for name in here]


def families_markdown(report: Report, columns: Sequence[str] = NARROW, most: int | None = None) -> str:
    """The families of the verdict as Markdown, the worst first and in bold, `most` of them; empty if none was run.

    A column that says nothing of any family is left out.
    """
    families = ranked(report.evidence)[:most] if report.evidence else []
    columns = _comparable(report, columns)
    return family_table(families, columns, bold=frozenset({0}), dosed=_dosed(report)) if families else ""


def _dosed(report: Report) -> frozenset[str]:
    """Attacks whose curves are single points: they take no steps, so what they were tried at are doses."""
    stepped = {curve.family for curve in report.curves if len(curve.points) > 1}
    return frozenset(curve.family for curve in report.curves) - stepped


def outside_markdown(report: Report) -> str:
    """The families that need the parent's weights, as Markdown; empty where none was run."""
    families = outside(report.evidence) if report.evidence else []
    return family_table(families, ("Attack", "Original", "Hardened", "Hardened, raw")) if families else ""


def _comparable(report: Report, columns: Sequence[str]) -> Sequence[str]:
    """The columns that a model probed alone can fill, or all."""
    return [name for name in columns if name != "Verdict"] if absolute(report) else columns


def markdown(report: Report) -> str:
    """The facts in short as Markdown, for pull requests and job summaries; what is longer is folded."""
    parts = [
        f"### hardener: {escape(report.parent.id)}",
        *([f"**{GATE_MISSED}**"] if report.pushed_anyway else []),
        f"**Verdict: {escape(verdict(report))}.** {escape(why(report))}",
        "\n".join(f"- **{escape(kind)}:** {escape(caveat)}" for kind, caveat in caveats(report)),
        escape(_sentences(headline(report), power(report))),
        families_markdown(report, most=TOP),
        LIMIT,
        _folded("Four answers, and what was not tried", _answers_markdown(report)),
        _folded("Every attack", _every_attack(report)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _answers_markdown(report: Report) -> str:
    answers = [f"**{escape(question)}** {escape(answer)}" for question, answer in four_answers(report)]
    untried = "\n".join(f"- {escape(line)}" for line in not_tried(report))
    return "\n\n".join([*answers, escape(holds_for(report)), f"**Not tried**\n\n{untried}"])


def _every_attack(report: Report) -> str:
    """All that is known of each attack, of the trap, and beside the verdict."""
    remarks = "\n".join(f"- {escape(note)}" for note in notes(report))
    parent = outside_markdown(report)
    tables = (
        families_markdown(report, WIDE),
        f"{NEEDS_PARENT}\n\n{parent}" if parent else "",
        further_markdown(report),
        trap_markdown(report),
        remarks,
    )
    return "\n\n".join(table for table in tables if table)


def _folded(title: str, inside: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{inside}\n\n</details>" if inside else ""


def further_markdown(report: Report) -> str:
    """The measures beside the verdict as Markdown; empty where there are none."""
    rows = further(report)
    return markdown_table(("Beside the verdict", "Original", "Hardened"), rows) if rows else ""


def trap_markdown(report: Report) -> str:
    """The properties of a trap as Markdown; empty where they were not asked for."""
    rows = trap(report)
    return markdown_table(("What a collapse trap claims", "Shown", "Why"), rows) if rows else ""


def print_summary(report: Report, console: Console) -> None:
    """Print verdict, reason, what stands beside it, the four answers, the worst attacks and what was not tried."""
    from rich.padding import Padding
    from rich.text import Text

    evidence = report.evidence
    style = STYLES[evidence.word] if evidence and not absolute(report) else "bold"
    if report.pushed_anyway:
        console.print(Text(GATE_MISSED, style="bold red"))
    console.print(Text.assemble(("Verdict: ", "bold"), (verdict(report), style)))
    console.print(Text(why(report)))
    for kind, caveat in caveats(report):
        console.print(Text(f"{kind}: {caveat}", style="yellow"))
    for question, answer in [*four_answers(report), *_asides(report)]:
        console.print()
        console.print(Text(question, style="bold"))
        console.print(Padding(Text(answer), (0, 0, 0, 2)))
    if evidence and evidence.families:
        console.print()
        console.print(_rich_table(report, evidence, console.width))
        if (rest := len(ranked(evidence)) - TERMINAL) > 0:
            attacks = "1 further attack" if rest == 1 else f"{rest} further attacks"
            console.print(Text(f"{attacks} did less: see the report.", style="dim"))
    console.print()
    console.print(Text(_sentences(holds_for(report), LIMIT), style="dim"))


def _asides(report: Report) -> list[tuple[str, str]]:
    """What follows the four answers on a terminal."""
    claims = " ".join(f"{claim}: {told}." for claim, told, _ in trap(report))
    asides = (
        ("Does the trap work as a trap?", claims),
        ("What the probe can see", power(report)),
        ("Notes", _few("; ".join(notes(report)))),
        ("Not tried", f"{'; '.join(not_tried(report))}."),
    )
    return [(title, text) for title, text in asides if text]


def _worst_case(m: Measures, hardened: Interval) -> str:
    if m.w_original is None:
        return f"{figure(hardened)}, an absolute figure"
    difference = f"paired difference {figure(m.delta_w)}, " if m.delta_w else ""
    return f"hardened {figure(hardened)}, original {figure(m.w_original)} ({difference}95 %)"


def _misuse(report: Report, m: Measures) -> str:
    """Answer 1: the worst case, what it cost the attacker, and the same without the utility gate."""
    if m.w_hardened is None:
        return "Not measured."
    if m.w_original is None:
        return _sentences(
            f"The best attack found reaches a usable score of {figure(m.w_hardened)} on {subject(report)}, "
            "where 0 is guessing and 1 is full skill.",
            f"The raw score, utility lost or not, is {figure(m.w_raw_hardened)}." if m.w_raw_hardened else None,
        )
    return _sentences(
        f"The best attack found reaches a usable score of {figure(m.w_hardened)} on {subject(report)} and "
        f"{figure(m.w_original)} on the original, where 0 is guessing and 1 is full skill.",
        _cost(m),
        _raw(m),
        _suppression(m),
    )


def _cost(m: Measures) -> str | None:
    if m.multiplier is None:
        return None
    half_way = f" ({number(m.half_way, 2)})" if m.half_way is not None else ""
    original = f" ({number(m.cost_original_steps, 1)} steps)" if m.cost_original_steps is not None else ""
    times = f"{multiplier(m.multiplier)} times the steps of the original{original}"
    return f"Reaching the half-way score{half_way} takes {times}."


def _raw(m: Measures) -> str | None:
    if m.w_raw_hardened is None or m.w_raw_original is None:
        return None
    cost = f", at a cost multiplier of {multiplier(m.multiplier_raw)}" if m.multiplier_raw else ""
    return (
        f"The raw score, utility lost or not, is {figure(m.w_raw_hardened)} against {figure(m.w_raw_original)}{cost}."
    )


def _suppression(m: Measures) -> str | None:
    """SOPHON's ρ, or why there is none."""
    if m.rho is None:
        return f"Suppression against training from scratch: {_stop(m.rho_note)}" if m.rho_note else None
    note = f" ({m.rho_note.rstrip('.')})" if m.rho_note else ""
    return (
        f"Suppression against training from scratch is ρ = {figure(m.rho)}, "
        f"where 0 is no protection and 1 is no better than from scratch{note}."
    )


def _price(m: Measures) -> str:
    """Answer 2: quality kept before any attack."""
    if m.utility_hardened is None:
        return "Not measured."
    if m.utility_kept is None or m.utility_original is None:
        alone = f"Not comparable: its utility before any attack is {figure(m.utility_hardened)}."
        return _sentences(alone, _refusals(m))
    return _sentences(
        f"Before any attack it keeps {figure(m.utility_kept)} of the original's utility "
        f"({figure(m.utility_hardened)} against {figure(m.utility_original)}).",
        _refusals(m),
    )


def _refusals(m: Measures) -> str | None:
    if m.over_refusal_hardened is None:
        return None
    original = f", the original {figure(m.over_refusal_original)}" if m.over_refusal_original else ""
    return f"Of harmless prompts it refuses {figure(m.over_refusal_hardened)}{original}."


def _honest_use(m: Measures) -> str:
    """Answer 3: what a benign fine-tune reaches."""
    note = _stop(m.benign_note[:1].upper() + m.benign_note[1:]) if m.benign_note else None
    if m.benign_hardened is None:
        return f"Not measured. {note}" if note else "Not measured."
    if m.benign_kept is None or m.benign_original is None:
        return _sentences(f"After a benign fine-tune it reaches {figure(m.benign_hardened)}.", note)
    return _sentences(
        f"After the same benign fine-tune it keeps {figure(m.benign_kept)} of the original's result "
        f"({figure(m.benign_hardened)} against {figure(m.benign_original)}).",
        note,
    )


def _reach(report: Report, evidence: Evidence) -> str:
    """Answer 4: the budget, the attack that did best, and the families it does not withstand."""
    budget = f"Budget: {_budget(evidence)}." if evidence.runs else "No attack was run to its end."
    best = f"The attack that did best on {subject(report)}: {_stop(evidence.worst)}" if evidence.worst else None
    weak = _unprotected(report, evidence)
    return _sentences(_attacks(report, evidence), budget, best, weak, "What was not tried is listed below.")


def _attacks(report: Report, evidence: Evidence) -> str | None:
    """Where to read what was tried; the names where nothing was compared and only curves are left."""
    if evidence.families:
        return "Tried: every attack in the table."
    names = dict.fromkeys(curve.family for curve in report.curves if curve.family != NO_ATTACK)
    return f"Tried: {'; '.join(names)}." if names else None


def _unprotected(report: Report, evidence: Evidence) -> str | None:
    open_to = [family.title for family in ranked(evidence) if family.word == "no measurable protection"]
    return None if absolute(report) or not open_to else f"No measurable protection against: {_few('; '.join(open_to))}."


def _budget(evidence: Evidence) -> str:
    seeds = "1 seed" if evidence.seeds == 1 else f"up to {evidence.seeds} seeds"
    runs = "1 run" if evidence.runs == 1 else f"{evidence.runs} runs"
    return (
        f"{evidence.preset}, {runs}, {seeds}, up to {evidence.steps} steps, "
        f"quoted on {evidence.rows} held-out rows, score {evidence.score}"
    )


def _rich_table(report: Report, evidence: Evidence, width: int) -> Table:
    """The worst families; intervals stand under their values, unbroken where the terminal has 80 columns."""
    from rich.table import Table
    from rich.text import Text

    columns = _comparable(report, SMALL)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="underline")
    for name in columns:
        table.add_column(name.replace(" ", "\n"), overflow="fold", no_wrap=name in FIGURES and width >= 80)
    for place, family in enumerate(ranked(evidence)[:TERMINAL]):
        cells = (Text(CELLS[name](family).replace(" [", "\n[")) for name in columns)
        table.add_row(*cells, style=None if place else "bold")
    return table


def _few(text: str) -> str:
    """The first parts of a long enumeration."""
    parts = text.rstrip(".").split("; ")
    return text if len(parts) <= CLAUSES else "; ".join(parts[:CLAUSES]) + "; and others"


def _stop(text: str) -> str:
    return text.rstrip(".") + "."


def _sentences(*parts: str | None) -> str:
    return " ".join(part for part in parts if part)
