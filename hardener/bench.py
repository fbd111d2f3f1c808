"""The bench: what is equal for all subjects of a probe, and what is known of a checkpoint before it is attacked.

Rows, budget, families and tools are chosen once, so that the attacks on every subject are pairs. `fingerprint` says
what a measurement depends on; the measurement of an original is kept under it for the next hardening.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from hardener import files, registry
from hardener.attacks.asked import plain
from hardener.attacks.canonical import canonicalise, norm_ratio
from hardener.attacks.families import SCREENS, Family
from hardener.data import Slice, Streams, fraction
from hardener.errors import DataError, ResourceError, UnsupportedModelError, UsageError, disk_full
from hardener.judges import Classifier, Panel
from hardener.measurement import Measurement, Run, Subject
from hardener.recipe import Probe, Role
from hardener.tasks.base import Example, Task
from hardener.tasks.causal_lm import CausalLM

Kind = TypeVar("Kind", Run, Measurement)
log = logging.getLogger("hardener")

HARMLESS_ROWS = 200
"""Harmless prompts on which refusals are counted."""


@dataclass(frozen=True)
class Able:
    """What can be done to a checkpoint with these rows and tools."""

    canonical: bool
    """Re-scalings can be folded out."""
    kept_head: bool
    """The head has as many outputs as the restricted task has classes."""
    turns: bool
    """The judged rows have questions, which can be asked in other ways."""
    preferences: bool
    """Refusals are known, and the library for preference training is installed."""
    parent: bool
    """The unhardened parent is at hand."""

    def lacks(self, family: Family) -> str:
        """Why the family does not apply; empty where it does."""
        if family.edit == "canonical" and not self.canonical:
            return "no re-scaling that hardener knows leaves the outputs of this model as they are"
        if family.head == "kept" and not family.generative and not self.kept_head:
            return "the model's head has fewer outputs than data.restricted has classes"
        if family.asked and not self.turns:
            return "no judged row has a question that could be asked in another way"
        if family.needs_parent and not self.parent:
            return "it needs the unhardened parent's weights, and no original is named: --against ORIGINAL"
        if family.objective == "dpo" and not self.preferences:
            return "it needs questions, 1 to 20 refusals (data.alignment), and trl: pip install 'hardener[dpo]'"
        return ""


@dataclass(frozen=True)
class Bench:
    """Everything that is equal for all subjects: rows, budget, tools."""

    task: Task
    streams: Streams
    probe: Probe
    device: str
    panel: Panel | None = None
    """The models that judge generated answers, where the judged source is scored so."""
    refusal_judge: Classifier | None = None
    """Tells refusals, where the recipe names one."""

    @cached_property
    def judged(self) -> Slice:
        """Held-out rows of the judged restricted source."""
        first = self.streams.of("restricted", "evaluation")[0]
        return replace(first, examples=first.examples[: self.probe.evaluation_rows])

    @cached_property
    def beside(self) -> tuple[Slice, ...]:
        """Held-out rows of further restricted sources: reported, not judged."""
        return self._tasks(self.streams.of("restricted", "evaluation")[1:])

    @cached_property
    def utility(self) -> tuple[Slice, ...]:
        """Held-out rows of each retain source."""
        limit = self.probe.utility_rows
        return tuple(
            replace(s, examples=s.examples[:limit]) for s in self.streams.of("retain", "evaluation") if s.examples
        )

    @cached_property
    def benign(self) -> tuple[Slice, ...]:
        """Held-out rows of each benign task."""
        return self._tasks(self.streams.of("benign", "evaluation"))

    @cached_property
    def harmless(self) -> tuple[Example, ...]:
        """Held-out harmless prompts, on which a refusal is one too many."""
        named = self.streams.rows("harmless", "evaluation") or self.streams.rows("retain", "evaluation")
        return tuple(filter(plain, named))[:HARMLESS_ROWS]

    @cached_property
    def report_half(self) -> tuple[bool, ...]:
        """Whether each judged row is one to report on; the others select the attack. (rows,)"""
        return tuple(fraction(self.probe.seed + 1, example.key) < 0.5 for example in self.judged.examples)

    def _tasks(self, slices: Sequence[Slice]) -> tuple[Slice, ...]:
        """Rows by source: parts of one dataset that are scored alike are one task, as they have one name."""
        found: dict[tuple[str, str], Slice] = {}
        for part in slices:
            known = found.get((part.name, part.score))
            rows = (*known.examples, *part.examples) if known else part.examples
            found[part.name, part.score] = replace(part, examples=rows)
        limit = self.probe.evaluation_rows
        return tuple(replace(task, examples=task.examples[:limit]) for task in found.values() if task.examples)

    def chance(self, role: Role) -> float:
        """Score of guessing on a role's rows: 0 where there are no classes to guess from."""
        classes = self.streams.classes.get(role, 0)
        return 1 / classes if classes else 0.0

    def families(self, able: Able) -> tuple[Family, ...]:
        """The families that the preset runs on a subject of which so much can be done, with the recipe's ladders.

        Raises RecipeError for an unknown family.
        """
        kind, preset = self.task.kind, self.probe.preset
        every = [registry.find("attacks", name) for name in registry.known("attacks")]
        chosen = [family for family in every if family.suits(kind) and not able.lacks(family)]
        if short := SCREENS.get(preset):
            chosen = [family for family in chosen if family.name in short[kind]]
        chosen = [self._laddered(family) for family in chosen]
        if preset == "quick":  # the first family at two rates, the others at one
            last = [f.rates[-2:] if i == 0 else f.rates[-2:-1] or f.rates for i, f in enumerate(chosen)]
            chosen = [replace(f, rates=rates, doses=f.doses[:1]) for f, rates in zip(chosen, last, strict=True)]
        if preset == "reduced-cpu":  # two configurations
            chosen = [replace(f, rates=f.rates[-2:-1] or f.rates) for f in chosen]
        return tuple(sorted(chosen, key=lambda family: bool(family.follows)))  # who follows comes after

    def _laddered(self, family: Family) -> Family:
        """The family with its budget and, where the recipe has one, the recipe's own ladder."""
        if family.name in self.probe.rates:
            family = replace(family, rates=self.probe.rates[family.name], follows="")
        return replace(family, steps=self.probe.steps, planned=self.probe.steps)

    def fingerprint(self) -> str:
        """Hash over everything that a measurement of a given checkpoint depends on."""
        import peft
        import transformers

        import hardener

        versions = [hardener.__version__, torch.__version__, transformers.__version__, peft.__version__]
        probe = self.probe.model_dump_json(exclude={"gate"})
        form = json.dumps(Measurement.model_json_schema())  # what is measured, as much as by what
        digest = hashlib.sha256("\n".join([probe, self.device, form, *versions]).encode())
        identities = [judge.identity() for judge in (self.panel, self.refusal_judge) if judge is not None]
        digest.update(repr(identities).encode())
        digest.update(repr((self.streams.classes, self.streams.refusals)).encode())
        for part in self.streams.slices:
            if part.use != "defence":
                rows = [(example.key, example.labels) for example in part.examples]
                digest.update(repr((part.role, part.use, part.score, rows)).encode())
        return digest.hexdigest()


def able(bench: Bench, folder: Path, classes: int, parent: bool) -> Able:
    """What can be done to the original; its head has so many outputs.

    Raises UsageError where all attacks would be in vain.
    """
    import importlib.util

    model = bench.task.load(folder)
    check_original(bench, model, folder)
    trl = importlib.util.find_spec("trl") is not None
    return Able(
        canonical=canonicalise(model, bench.task, bench.task.collate(bench.judged.examples[:8])),
        kept_head=bench.streams.classes["restricted"] <= classes,
        turns=any(map(plain, bench.judged.examples)),
        preferences=trl and bool(bench.streams.refusals) and any(map(plain, bench.judged.examples)),
        parent=parent,
    )


def check_original(bench: Bench, model: nn.Module, folder: Path) -> None:
    """Raise DataError for too few rows, UsageError for rows of another tokenizer, UnsupportedModelError for NaN."""
    if len(set(bench.report_half)) < 2:
        raise DataError(
            f"all {len(bench.report_half)} judged rows fall into one half, to select the attack or to report it; "
            "give data.restricted more rows, raise probe.evaluation_rows or change probe.seed"
        )
    rows = [e.inputs["input_ids"] for part in bench.streams.slices for e in part.examples if "input_ids" in e.inputs]
    highest = max(map(max, rows), default=0)
    if rows and highest >= (known := model.get_input_embeddings().num_embeddings):  # type: ignore[operator]
        raise UsageError(
            f"{folder.name} has embeddings for {known} tokens, and the rows hold token {highest}: the tokenizer beside "
            "the model that is attacked is not for it; give --against its parent"
        )
    longest = max(map(len, rows), default=0)
    if isinstance(bench.task, CausalLM) and longest > bench.task.positions:
        raise UsageError(
            f"{folder.name} takes {bench.task.positions} tokens, and a row has {longest}; lower data.max_length"
        )
    with torch.no_grad():
        logits, _ = bench.task.targets(model.eval(), bench.task.collate(bench.judged.examples[:8]))
    if not logits.isfinite().all():
        raise UnsupportedModelError(f"the logits of {folder.name} are not finite; its weights are damaged")


def with_norm_ratio(measurement: Measurement, hardened: Path, original: Path) -> Measurement:
    """Add the smallest and largest per-tensor norm ratio, by which a scale placebo shows."""
    return measurement.model_copy(update={"norm_ratio": norm_ratio(hardened, original)})


def cache_path(weights: str, bench: Bench, chosen: Sequence[Family], subject: Subject) -> Path:
    """Where the measurement of an original is kept for the next hardening of the same parent."""
    root = Path(os.environ.get("HARDENER_CACHE", Path.home() / ".cache" / "hardener"))
    key = hashlib.sha256("\n".join([weights, bench.fingerprint(), subject, *map(repr, chosen)]).encode()).hexdigest()
    return root / "before" / f"{key[:40]}.json"


def cached(path: Path, make: Callable[[], Measurement]) -> Measurement:
    """Return the cached measurement, or make it and keep it.

    Raises UsageError where it could not be kept, ResourceError where the disk is full.
    """
    root = path.parent
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        kind = ResourceError if disk_full(error) else UsageError
        raise kind(f"the cache {root} cannot be made: {error.strerror}; set HARDENER_CACHE") from error
    if not path.is_file() and not os.access(root, os.W_OK):
        raise UsageError(f"the cache {root} cannot be written to; mend its rights, or set HARDENER_CACHE")
    return kept(path, Measurement, make)


def kept(path: Path, kind: type[Kind], make: Callable[[], Kind]) -> Kind:
    """Return what was kept under this name, or make it and keep it; a damaged or changed file is told and made anew."""
    if path.is_file():
        try:
            return kind.model_validate(files.read_sealed(path))
        except ValueError as error:
            why = str(error).splitlines()[0]
            log.warning("%s is damaged or was changed, and is measured again (%s)", path, why)
    made = make()
    files.write_sealed(path, json.loads(made.model_dump_json()))
    return made
