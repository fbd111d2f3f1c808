"""What the probe measured, as plain data: per run, per checkpoint, per row. Nothing is judged here.

Direction: `scores` are restricted-task scores, so **lower is better for the defender**; `utility` and benign scores are
better when higher. A row score is in [0, 1] (`likelihood-gain`: answer NLL in nats per token, better for the defender
when higher, turned into a score by `case.py` with the original as reference).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Subject = Literal["original", "hardened", "scratch"]


class Plain(BaseModel):
    """Frozen, exact data."""

    # Written as words, a figure that is no number is read again as what it was, and the file is JSON.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Checkpoint(Plain):
    """One point on an attack's curve."""

    step: int
    scores: tuple[float, ...]
    """Score of each evaluation row of the judged restricted source, always in the same row order. (rows,)"""
    utility: float | None = None
    """General utility in [0, 1] at this point; None where the attacker does not care (classifiers)."""
    beside: dict[str, float] = {}
    """Mean score of each further restricted source, by `name|score`; reported, not judged."""
    answers: dict[str, float] = {}
    """Share of greedy answers that are `usable`, `refused`, `other`; only where answers were generated. Where models
    judge, `collapsed` as well, and beside these four `unclear`, which no judge could read, and `ended`."""
    votes: tuple[tuple[bool | None, ...], ...] = ()
    """What each judge said of each answer, None where it could not tell; only where models judge. (rows, judges)"""


class Run(Plain):
    """One attack: a family at one rate with one seed."""

    family: str
    """Attack family, e.g. `full`, `lora`, `mixed`, `canonical`, `relative`; `none` is no attack."""
    rate: float
    """Learning rate; for the family `relative`, the step length per tensor as a share of its norm; for an attack that
    does not train, its dose: the share pruned, the bits left, the examples shown, the parent's weight in a merge."""
    seed: int
    curve: tuple[Checkpoint, ...]
    """Checkpoints in order of step; the first is step 0, after whatever the attack did to the weights before it
    trained. An attack that does not train has this one alone."""
    train_loss: tuple[float, ...] = ()
    """Attack loss at each logged step (nats)."""
    trainable: int = 0
    """Number of parameters the attacker trained."""
    rows: int = 0
    """Restricted rows that the attacker owned."""
    peak_rate: float = 0.0
    """The highest learning rate that was applied at any step."""
    warm_share: float = 1.0
    """Share of the steps at which the rate was above 1 % of its peak."""
    setting: str = ""
    """What else was searched over: `batch 8, cosine, half benign`; empty where the family decides it."""
    scheduled: bool = False
    """The rate warmed up, or decayed."""
    needs_parent: bool = False
    """It used the unhardened parent's weights, so it stays out of the verdict."""
    source: str = ""
    """Of a benign fine-tune, its task."""
    answered: bool = False
    """The attack succeeded in full at two checkpoints in a row and was stopped: more steps had told nothing."""
    failed: str | None = None
    """Why the run gave no evidence (NaN loss, exception), or None. A failed run never counts as `no harm`."""


class Measurement(Plain):
    """Everything measured on one subject."""

    subject: Subject
    weights: str
    """sha256 over weights, config and processor files of the folder that was attacked."""
    score: str
    """Kind of the row scores, as in a recipe: `exact-match`, `accuracy`, `likelihood`, `likelihood-gain`, `judged`."""
    chance: float
    """Score of guessing on the judged source."""
    report_half: tuple[bool, ...]
    """Per evaluation row: True if it is in the report half, False if in the selection half. (rows,)"""
    questions: tuple[str, ...] = ()
    """Per evaluation row: a hash of what the folder's own tokenizer or image processor makes of it. (rows,)"""
    utility_rows: tuple[float, ...] = ()
    """Per-row utility before any attack, paired between subjects by position. (utility rows,)"""
    utility_groups: tuple[int, ...] = ()
    """Index of the retain source of each utility row; utility is the mean of the sources' means."""
    utility_names: tuple[str, ...] = ()
    runs: tuple[Run, ...] = ()
    benign: tuple[Run, ...] = ()
    """Benign fine-tunes: here `scores` are the benign task's row scores, better when higher."""
    benign_chance: float = 0.0
    over_refusal: tuple[float, ...] = ()
    """Per harmless prompt, before any attack: 1 if the model refused it. Better when lower. (harmless rows,)"""
    searches: dict[str, tuple[float, ...]] = {}
    """Family → what each trial of its search was worth, in order. Only for the preset `thorough`."""
    benchmarks: dict[str, float] = {}
    """Public benchmark → score before any attack; only where the recipe names some."""
    agreement: float | None = None
    """Cohen's κ of the judges over all answers that they judged, mean over their pairs; None where none were."""
    foul: float | None = None
    """Share of the attacker's benign rows that the judges hold for harmful; None where no models judge."""
    norm_ratio: tuple[float, float] | None = None
    """Smallest and largest per-tensor norm ratio hardened/original; outside 0.5…2 is flagged."""
    notes: tuple[str, ...] = ()
    """Sentences for the reader, e.g. `not canonicalised: the table of re-scalings has no row for this architecture`."""
