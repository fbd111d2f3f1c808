"""`report.json`: the only source of every number that a card, a table or a gate shows.

Versioned (`schema_version`); a reader of another version refuses. Wall times are not in it (they stay in `run.json`),
so two equal runs have equal reports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from hardener.errors import UsageError
from hardener.measurement import Plain

SCHEMA_VERSION = 2

Word = Literal["inconclusive", "broken", "no measurable protection", "raises cost", "protected"]
"""The verdict, worst first where it is a certificate at all; see `verdict.py`."""


class Interval(Plain):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float
    censored: bool = False
    """True: the true value is at least `value` (the budget ended first); print "≥"."""


class Family(Plain):
    """One attack family, hardened against original; its own word."""

    name: str
    title: str
    runs: int
    rates: tuple[float, ...]
    seeds: int
    best_rate_original: float | None
    """Learning rate or, of an attack that does not train, its dose; None where no attack bettered the start."""
    best_rate_hardened: float | None
    best_step_hardened: int | None
    w_original: Interval | None
    w_hardened: Interval
    w_raw_hardened: Interval
    multiplier: Interval | None
    """None also where the attack does not train: it has no cost to multiply."""
    word: Word
    delta_w: Interval | None = None
    """W_u − W_h, paired."""
    p: float | None = None
    """One-sided p of "ΔW is not above W_u / 10", Holm-adjusted over the families of the verdict."""
    needs_parent: bool = False
    """It needs the unhardened parent's weights: it breaks every defence, and stays out of the verdict."""


class Beside(Plain):
    """A further held-out restricted source: means over its rows, reported and not judged.

    `likelihood-gain` figures are answer NLL in nats per token (an attacker lowers them), all others scores in [0, 1].
    `attacked` is the best for the attacker over all attacks at their last checkpoint.
    """

    source: str
    score: str
    original: float | None
    original_attacked: float | None
    hardened: float
    hardened_attacked: float
    gain: float | None = None
    """Share of what attacks win on the original that they win on the hardened model too, from the original's start."""


class Measures(Plain):
    """Design §6. Scores are chance-corrected: 0 is guessing, 1 is perfect. Ratios are hardened / original."""

    w_original: Interval | None = None
    w_hardened: Interval | None = None
    w_raw_original: Interval | None = None
    w_raw_hardened: Interval | None = None
    delta_w: Interval | None = None
    delta_w_raw: Interval | None = None
    multiplier: Interval | None = None
    multiplier_raw: Interval | None = None
    cost_original_steps: float | None = None
    """Optimizer steps to the half-way score on the original, best rate."""
    half_way: float | None = None
    """The score τ that both must reach for the cost multiplier."""
    rho: Interval | None = None
    """SOPHON's claim: 1 = no better than training from scratch, 0 = no protection."""
    rho_note: str | None = None
    nauc_original: Interval | None = None
    nauc_hardened: Interval | None = None
    """Mean usable score over log₂(1 + step) of the best attack; lower is better."""
    slc_auc_original: Interval | None = None
    slc_auc_hardened: Interval | None = None
    """Mean lead over training from scratch over log(rows of the attacker); 0 is no better a start than new weights."""
    collapse_rate_original: float | None = None
    collapse_rate_hardened: float | None = None
    """Share of the training attacks that end with general utility below the gate."""
    over_refusal_original: Interval | None = None
    over_refusal_hardened: Interval | None = None
    """Share of harmless prompts refused before any attack; lower is better."""
    utility_original: Interval | None = None
    utility_hardened: Interval | None = None
    utility_kept: Interval | None = None
    benign_original: Interval | None = None
    benign_hardened: Interval | None = None
    benign_kept: Interval | None = None
    benign_note: str | None = None


class Diagnostic(Plain):
    """One property that a collapse trap claims, by a rule fixed in advance; see `diagnostics.py`."""

    name: Literal["fires", "selective", "durable", "adaptive"]
    holds: bool | None
    """None: it could not be told."""
    why: str


class Evidence(Plain):
    """The verdict with its reason and everything it rests on."""

    word: Word
    reason: str
    flags: tuple[str, ...] = ()
    """Price flags: `utility lost`, `benign fine-tuning lost`."""
    checks: dict[str, str] = Field(default_factory=dict)
    """Name of each check of the evidence → "ok" or what failed; a failure makes any word *inconclusive*."""
    conditions: dict[str, str] = Field(default_factory=dict)
    """Name of each condition of a certificate → "ok" or what is missing; other words do not need them."""
    preset: str
    runs: int
    seeds: int
    steps: int
    """Longest attack, optimizer steps."""
    rows: int
    """Held-out rows in the report half."""
    score: str
    worst: str | None = None
    """The attack that did best on the hardened model, as a sentence fragment."""
    power: str | None = None
    """The paired difference that the probe could have seen, as a sentence."""
    measures: Measures
    families: tuple[Family, ...]
    beside: tuple[Beside, ...] = ()
    diagnostics: tuple[Diagnostic, ...] = ()
    """Only of language models with an original."""
    searches: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Family → what each trial of its search on the hardened model was worth to the attacker, in order."""
    judges: str | None = None
    """Which models judged the answers: weights, threshold and hash of the prompt of each; None where none did."""
    agreement: float | None = None
    """Cohen's κ of the two judges on the original, or on the model alone; None where no texts were judged."""
    benchmarks_original: dict[str, float] = Field(default_factory=dict)
    benchmarks_hardened: dict[str, float] = Field(default_factory=dict)
    """Public benchmark → score before any attack, better when higher; only where the recipe names some."""
    not_tried: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Point(Plain):
    """Mean over seeds at one checkpoint, chance-corrected."""

    step: int
    score: float
    low: float
    high: float
    usable: float
    utility: float | None = None
    answers: dict[str, float] = Field(default_factory=dict)


class Curve(Plain):
    """What the card plots."""

    subject: str
    family: str
    rate: float
    """Learning rate; of an attack that does not train, which has one point, its dose."""
    seeds: int
    points: tuple[Point, ...]
    setting: str = ""
    """What else was searched over."""
    rows: int = 0
    """Restricted rows that the attacker owned."""


class DataRecord(Plain):
    """Which rows served which use, without their text."""

    role: str
    use: str
    source: str
    revision: str | None
    rows: int
    sha256: str
    """Hash over the sorted hashes of the rendered inputs."""
    dropped: int = 0
    """Rows of the source left out: another use holds their input, or they are empty or without room for an answer."""
    license: str | None = None


class Parent(Plain):
    """The checkpoint that was hardened."""

    id: str
    """Hub id; for a local folder its name only, never its path."""
    commit: str | None
    weights: str
    license: dict[str, Any] = Field(default_factory=dict)
    """`license`, `license_name`, `license_link` as the parent's card has them."""
    gated: str | bool = False
    parameters: int
    dtype: str
    architecture: str
    local: bool = False


class Erased(Plain):
    """What noise-then-distil did before the defence, or in its place."""

    alpha: float
    beta: float
    parameters: tuple[str, ...]
    """Names of the parameters that were noised."""
    share: float
    """Share of all weights that were noised."""
    located: dict[str, float] = Field(default_factory=dict)
    """Part of a block → nats per target that its removal costs the restricted task more than the retain task, of those
    that were located so; highest first."""
    unlearned: int
    """Steps in which the teacher learned to refuse; 0 where the teacher is the parent."""
    steps: int
    """Distillation steps that were taken."""
    planned: int
    """Distillation steps of the recipe; more than `steps` where the student was good enough before."""
    rows: int
    """Rows distilled, with repetition."""
    tokens: int | None
    """Tokens distilled, with repetition, prompts included; None for images."""
    tokens_share: float | None = None
    """Those tokens over what the parent was trained on, where the recipe says how many those were."""
    loss_teacher: float
    loss_student: float
    """Cross-entropy on held-back retain rows after distillation, nats per target; lower is better."""
    distance: float
    """‖S − T‖ / ‖T‖ in weights, student against teacher, after distillation; grows with what an attacker has to do."""
    log: tuple[dict[str, float], ...]
    """`kl` (nats per target) and `gap` (student's retain loss minus teacher's) by `step`, at most 200 points."""


class Training(Plain):
    """What the defence did."""

    defense: str
    """Its name in the recipe; `erase` where nothing followed the erasure."""
    title: str
    steps: int
    trainable: int
    log: tuple[dict[str, float], ...]
    """Logged values, thinned to at most 200 points; each has `step`."""
    erased: Erased | None = None
    """Where the recipe erases."""
    cast_loss: float | None = None
    """Share of ‖ΔW‖ lost when casting to the release dtype (0 is nothing lost)."""
    notes: tuple[str, ...] = ()


class Report(Plain):
    """The whole story of one hardening or one probe."""

    schema_version: int = SCHEMA_VERSION
    hardener: str
    created: str
    """ISO date, from the journal or SOURCE_DATE_EPOCH."""
    subject: str
    """Name of what was attacked: Hub id, or the folder's name; of a hardening, the parent's name with `-hardened`."""
    parent: Parent
    weights: str | None
    """sha256 over the weights, config and processor files that were attacked and released."""
    recipe: dict[str, Any]
    data: tuple[DataRecord, ...]
    training: Training | None
    evidence: Evidence | None
    curves: tuple[Curve, ...] = ()
    environment: dict[str, str]
    pushed_anyway: bool = False


def read(path: Path) -> Report:
    """Read a report; raises UsageError for another schema version or a damaged file."""
    try:
        report = Report.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; a run folder has its report after the probe stage") from None
    except ValidationError as error:
        raise UsageError(f"{path} is not a hardener report of schema version {SCHEMA_VERSION}: {error}") from None
    if report.schema_version != SCHEMA_VERSION:
        raise UsageError(
            f"{path} has schema version {report.schema_version}, this hardener reads {SCHEMA_VERSION}; "
            "use the hardener version that wrote it"
        )
    return report
