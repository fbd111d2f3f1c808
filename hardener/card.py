"""`report.json` → `README.md`: the model card, whose every number is found in the report. Pure.

The wording comes from `summary.py`, the layout from `cards/model_card.md.j2`. Whatever the template prints is
made inert for Markdown and HTML unless it is marked as Markdown; the parent's card is quoted as text.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import yaml

from hardener import markdown, summary, tables
from hardener import template as templates
from hardener.recipe import Recipe
from hardener.report import DataRecord, Measures, Report
from hardener.resources import shipped
from hardener.template import Facts, Markdown, code, short

FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)

INHERITED = ("library_name", "pipeline_tag")
LICENSE_KEYS = ("license", "license_name", "license_link")

# Tags that the Hub or a trainer derives, or that name a file format the release does not have.
DERIVED_TAGS = re.compile(
    r"(arxiv|base_model|dataset|deploy|doi|license|region|template|trl|unsloth)(:.*)?"
    r"|generated_from_.*|autotrain.*|.*_compatible|has_space|model-index|text-generation-inference"
    r"|safetensors|pytorch|tf|jax|gguf|onnx|gptq|awq"
)

# (role of the evaluated data, field of Measures, metric type, what it is and which direction is good)
METRICS = (
    ("restricted", "w_hardened", "usable_score", "worst-case usable score (lower is better)"),
    ("restricted", "w_raw_hardened", "raw_score", "worst-case raw score (lower is better)"),
    ("restricted", "w_original", "usable_score_original", "worst-case usable score of the original"),
    ("restricted", "multiplier", "cost_multiplier", "cost multiplier (higher is better)"),
    ("restricted", "rho", "suppression", "suppression against training from scratch (higher is better)"),
    ("retain", "utility_kept", "utility_kept", "utility kept before any attack"),
    ("benign", "benign_kept", "benign_kept", "benign fine-tuning kept"),
)

TASK_TYPES = {
    "causal-lm": "text-generation",
    "sequence-classification": "text-classification",
    "image-classification": "image-classification",
    "text-encoder": "feature-extraction",
    "image-encoder": "image-feature-extraction",
    "unconditional-diffusion": "unconditional-image-generation",
}

MEASURES = {
    "likelihood-gain": "NLL, nats per token",
    "closeness": "closeness of the hidden states to the original's (share of their variance)",
    "linear-probe": "accuracy of a linear probe on the mean hidden state",
    "likeness": "likeness of samples to the rows (sliced Wasserstein; grey squares: 0)",
}
"""Scores whose names say too little."""

SAMPLES = "samples.png"
"""What a diffusion model draws; no report can bring it back, so it is made while the models are there."""
ALT = {
    SAMPLES: "Held-out images of the original domain, as they are (top), and brought back from noise by the original "
    "(middle) and by this model (bottom)",
    "curves.png": "Restricted-task score against attack steps, one panel per attack",
    "heatmap.png": "Best usable score of each attack at each learning rate",
    "families.png": "Worst-case score and cost multiplier of each attack",
    "answers.png": "Share of usable, refused, other and collapsed answers before and after attacks",
    "search.png": "Best usable score found against the trials of a search",
}


def render(
    report: Report,
    *,
    parent_card: str | None = None,
    plots: tuple[str, ...] = (),
    template: Path | None = None,
) -> str:
    """The complete README.md; `plots` are file names relative to the repository.

    `template` replaces the shipped Jinja template; see `template.py`, and raises as it does.
    """
    body = templates.fill(template or shipped("cards") / "model_card.md.j2", _facts(report, parent_card, plots))
    front = yaml.safe_dump(metadata(report, parent_card), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n{body}"


def metadata(report: Report, parent_card: str | None) -> dict[str, Any]:
    """The front matter: what is inherited from the parent, our lineage and tags, and the probe's results.

    A licence is the recipe's or the parent's, never made up. The parent's scores, successor and derived tags
    are dropped: they are not true of this model.
    """
    parent = _split(parent_card or "")[0]
    recipe = Recipe.model_validate(report.recipe)
    known = {key: parent[key] for key in INHERITED if parent.get(key)}
    gate = {key: value for key, value in parent.items() if str(key).startswith("extra_gated_")}
    language = list(recipe.card.language) or _list(parent.get("language"))
    index = _model_index(report, recipe, known.get("pipeline_tag"))
    return {
        **_license(report, parent, recipe),
        **known,
        **({"language": language} if language else {}),
        **_lineage(report),
        "tags": _tags(report, parent),
        **gate,
        **({"model-index": index} if index else {}),
    }


def _list(value: Any) -> list[str]:
    """A metadata value that may be one or many; Norwegian (`no`), which YAML reads as false, is put right."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return ["no" if item is False else str(item) for item in values]


def _lineage(report: Report) -> dict[str, Any]:
    """The parent as the Hub's model tree wants it: only a hardened model has one, only a Hub id is one."""
    if report.training is None or report.parent.local:
        return {}
    return {"base_model": report.parent.id, "base_model_relation": "finetune"}


def _license(report: Report, parent: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The recipe's licence, or all licence keys of the parent, or nothing."""
    if recipe.card.license:
        return {"license": recipe.card.license}
    source = report.parent.license or parent
    kept = {key: source[key] for key in LICENSE_KEYS if source.get(key)}
    link = str(kept.get("license_link", ""))
    if link and "://" not in link and not report.parent.local:
        # A file of the parent's repository, which this one need not have.
        kept["license_link"] = f"{_page(report)}/blob/{report.parent.commit or 'main'}/{quote(link)}"
    return kept


def _tags(report: Report, parent: dict[str, Any]) -> list[str]:
    """The parent's own tags, then ours; `tamper-resistant` only where the evidence says so."""
    kept = [tag for tag in _list(parent.get("tags")) if not DERIVED_TAGS.fullmatch(tag)]
    resists = report.evidence is not None and report.evidence.word in ("raises cost", "protected")
    ours = ["hardener"] + ["tamper-resistant"] * resists
    defense = [report.training.defense] if report.training else []
    return list(dict.fromkeys(kept + ours + defense))


def _model_index(report: Report, recipe: Recipe, pipeline_tag: str | None) -> list[dict[str, Any]]:
    """One result per evaluated role, each figure with its interval; empty without evidence."""
    if report.evidence is None:
        return []
    task = {"type": pipeline_tag or TASK_TYPES.get(recipe.task, recipe.task), "name": "hardener probe"}
    results = []
    for role in dict.fromkeys(row[0] for row in METRICS):
        metrics = _metrics(report.evidence.measures, role)
        record = _evaluated(report, role)
        if metrics and record:
            results.append({"task": dict(task), "dataset": _dataset(record), "metrics": metrics})
    return [{"name": _title(report), "results": results}] if results else []


def _metrics(measures: Measures, role: str) -> list[dict[str, Any]]:
    rows = [(getattr(measures, field), kind, name) for owner, field, kind, name in METRICS if owner == role]
    return [
        {
            "type": kind,
            "name": f"{name}, at least" if interval.censored else name,
            "value": interval.value,
            "args": {"low": interval.low, "high": interval.high},
        }
        for interval, kind, name in rows
        if interval is not None
    ]


def _evaluated(report: Report, role: str) -> DataRecord | None:
    """The judged source of a role: the first that served evaluation."""
    return next((r for r in report.data if r.role == role and r.use == "evaluation"), None)


def _dataset(record: DataRecord) -> dict[str, Any]:
    revision = {"revision": record.revision} if record.revision else {}
    return {"type": record.source, "name": f"{record.source} (held-out rows)", **revision}


def _facts(report: Report, parent_card: str | None, plots: tuple[str, ...]) -> Facts:
    """Everything that the template may print."""
    front = metadata(report, parent_card)
    return {
        "report": report,
        "recipe": Recipe.model_validate(report.recipe),
        "title": _title(report),
        "parent": _parent(report),
        "license": front.get("license_name") or front.get("license"),
        "gate_missed": summary.GATE_MISSED if report.pushed_anyway else None,
        "absolute": summary.absolute(report),
        "verdict": summary.verdict(report),
        "why": summary.why(report),
        "caveats": summary.caveats(report),
        "answers": summary.four_answers(report),
        "headline": summary.headline(report),
        "power": summary.power(report),
        "families": Markdown(markdown.families(report)),
        "further": Markdown(markdown.further(report)),
        "trap": Markdown(markdown.trap(report)),
        "plots": _pictures(plots),
        "access": summary.access(report.parent),
        "holds_for": summary.holds_for(report),
        "outside": Markdown(markdown.outside(report)),
        "needs_parent": summary.NEEDS_PARENT,
        "not_tried": summary.not_tried(report),
        "notes": summary.notes(report),
        "limit": summary.LIMIT,
        "scoring": _scoring(report),
        "beside": _beside_table(report),
        "data": _data_table(report),
        "erased": report.training.erased if report.training else None,
        "command": Markdown(_command(report)),
        "versions": {"hardener": report.hardener, **report.environment},
        "parent_text": _quoted(_split(parent_card or "")[1]),
    }


def _title(report: Report) -> str:
    """The parent's name without its owner, and what was done to it."""
    name = report.parent.id.rsplit("/", 1)[-1]
    return name if summary.absolute(report) else f"{name}, hardened"


def _parent(report: Report) -> Markdown:
    """The parent as a link to its page; a local one by its name alone."""
    if report.parent.local:
        return code(report.parent.id)
    return Markdown(f"[{tables.escape(report.parent.id)}]({_page(report)})")


def _page(report: Report) -> str:
    """Address of a parent that is on the Hub."""
    return f"https://huggingface.co/{quote(report.parent.id)}"


def _pictures(plots: tuple[str, ...]) -> list[Markdown]:
    """Each plot; one that has a dark twin is shown on a light page, and its twin on a dark one.

    The classes are those that the Hub documents for pictures of two themes. Where a viewer drops them, both are shown.
    """
    paths = [PurePosixPath(name) for name in plots]
    return [_picture(path, _dark(path) in paths) for path in paths if not path.stem.endswith("-dark")]


def _dark(path: PurePosixPath) -> PurePosixPath:
    return path.with_stem(f"{path.stem}-dark")


def _picture(path: PurePosixPath, twin: bool) -> Markdown:
    text = ALT.get(path.name, "Plot")
    if not twin:
        return Markdown(f"![{text}]({quote(str(path))})")
    shown = (("dark:hidden", path), ("hidden dark:block", _dark(path)))
    return Markdown("\n".join(f'<img class="{c}" src="{quote(str(p))}" alt="{text}">' for c, p in shown))


def _scoring(report: Report) -> list[tuple[str, str]]:
    """How answers were scored: by which models, to their prompts, and how well they agree."""
    evidence = report.evidence
    if evidence is None:
        return []
    probe, kappa = Recipe.model_validate(report.recipe).probe, evidence.agreement
    judges = [("Judge", judge) for judge in (evidence.judges or "").split("; ") if judge]
    agreed = [("Agreement of the judges", f"Cohen's κ = {kappa:.2f}")] if kappa is not None else []
    tokens = [("New tokens per judged answer", str(probe.answer_tokens))] if judges else []
    told = probe.refusal_judge
    refused = [("Refusals told by", f"{told.model}@{told.revision or told.sha256}")] if told else []
    return [("Score", evidence.score), *judges, *agreed, *tokens, *refused]


def _data_table(report: Report) -> Markdown:
    columns = ("Role", "Use", "Source", "Revision", "Rows", "Left out", "SHA-256 of inputs", "Licence")
    rows = [
        (
            record.role,
            record.use,
            short(record.source) if record.source.startswith("local:") else record.source,
            short(record.revision or "–"),
            str(record.rows),
            str(record.dropped),
            short(record.sha256),
            record.license or "not stated",
        )
        for record in report.data
    ]
    return Markdown(tables.markdown_table(columns, rows))


def _beside_table(report: Report) -> Markdown:
    """Further held-out sources; empty if there are none."""
    columns = ("Source", "Measure", "Original", "Hardened", "Share of the original's gain")
    rows = [
        (
            short(b.source) if b.source.startswith("local:") else b.source,
            MEASURES.get(b.score, b.score),
            "–" if b.original is None else f"{b.original:.2f} → {b.original_attacked:.2f}",
            f"{b.hardened:.2f} → {b.hardened_attacked:.2f}",
            "–" if b.gain is None else f"{b.gain:.2f}",
        )
        for b in (report.evidence.beside if report.evidence else ())
    ]
    return Markdown(tables.markdown_table(columns, rows) if rows else "")


def _command(report: Report) -> str:
    """The command line of this run, as a fenced block."""
    if report.training:
        words = ["hardener", "harden", report.parent.id]
    elif summary.absolute(report):
        words = ["hardener", "probe", report.parent.id]
    else:
        words = ["hardener", "probe", report.subject, "--against", report.parent.id]
    words += ["--recipe", "hardener/recipe.yaml"]
    return _fenced(" ".join(shlex.quote(" ".join(word.split())) for word in words), "bash")


def _split(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card; front matter that is no YAML mapping counts as none."""
    text = card.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    found = FRONT_MATTER.match(text)
    if found is None:
        return {}, text
    try:
        known = yaml.safe_load(found[1])
    except yaml.YAMLError:
        known = None
    return known if isinstance(known, dict) else {}, text[found.end() :]


def _quoted(text: str) -> Markdown:
    """The text as a fenced block: shown as written, links and HTML asleep; empty if there is none."""
    return Markdown(_fenced(text.strip(), "markdown") if text.strip() else "")


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks within."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
