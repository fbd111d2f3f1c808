"""Bare encoders of texts and images: checkpoints of AutoModel classes, which have no head.

What such a checkpoint is for is its own output, so that is the original task: the last hidden states of a row, at
every position, as the original gives them. It needs no labels. Who fine-tunes it brings a head of his own, that of
transformers' class for classification, so the encoder is loaded beneath such a head: frozen, with one output, read by
nobody. A new one with an output for each class takes its place where a task is taught (`fresh_head`, the attacks), and
the release is the encoder without it.

    retain     mean ‖h − h₀‖² / ‖h₀‖²            h all states of a row, h₀ the original's; 0 is the original
    utility    closeness 1 − ‖h − h₀‖² / v       v the variance of h₀ over rows and positions

Closeness is the share of variance kept: 1 is the original, 0 an encoder that says the same of every row. It is neither
a cosine nor relative to ‖h₀‖²: the states of trained encoders share one large direction, so that both stay near 1 where
all that tells rows apart is gone. Where labels are at hand, `linear-probe` says what a linear map can still read off.

Cost: one more forward pass on each row of the original task, and the original in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardener.errors import UnsupportedModelError
from hardener.loss import wide
from hardener.tasks.base import Batch, Example
from hardener.tasks.classification import Classification
from hardener.tasks.image_classification import ImageClassification
from hardener.tasks.sequence_classification import SequenceClassification

UNREAD = 1
"""Outputs of the head that nobody reads."""
UNLABELLED = -100
"""Label of a row that has none: what torch's cross-entropy ignores."""
FOLDS = 5
RIDGE = 1e-2
"""Weight of the linear probe's penalty, as a share of the variance of its features."""


class Encoder(Classification):
    """What encoders of texts and images share."""

    kind = "encoder"
    retain_score = "closeness"

    def __init__(self, folder: Path, *, template: str, max_length: int) -> None:
        super().__init__(folder, template=template, max_length=max_length)
        self._original: nn.Module | None = None

    @classmethod
    def supports(cls, config: dict[str, Any]) -> None:
        """Check a parsed config.json. Raises UnsupportedModelError for a model with a head, or without a head to put
        on it.
        """
        from transformers.models.auto import modeling_auto

        kind = config.get("model_type") or config.get("_class_name") or ""
        heads: Mapping[str, str] = getattr(modeling_auto, cls.mapping)
        bare: str | tuple[str, ...] | None = modeling_auto.MODEL_MAPPING_NAMES.get(kind)
        if bare is None or kind not in heads:
            raise UnsupportedModelError(
                f"a {kind!r} model cannot be loaded for the task {cls.name}; choose a recipe whose task fits"
            )
        classes = (bare,) if isinstance(bare, str) else bare
        named = config.get("architectures") or list(classes[:1])
        if not set(named) & set(classes):
            raise UnsupportedModelError(
                f"the checkpoint is a {named[0]}, which has a head; the task {cls.name} is for a bare {classes[0]}: "
                "choose a recipe whose task is that of the head"
            )

    def load(self, folder: Path, **config: Any) -> nn.Module:
        """Load a bare encoder beneath a head that nobody reads. Raises as that of other tasks does."""
        model = super().load(folder, num_labels=UNREAD, **config)
        for name in self.head(model):
            model.get_parameter(name).requires_grad_(False)
        return model

    def lacking(self, model: nn.Module, missing: Iterable[str]) -> list[str]:
        """A checkpoint must have the encoder's weights; a head it has none."""
        return sorted(set(missing) - set(self.head(model)))

    def head(self, model: nn.Module) -> dict[str, torch.Size]:
        """Name → shape of all parameters outside the encoder, as all of them are new to an attacker."""
        inside = f"{model.base_model_prefix}."
        return {name: p.shape for name, p in model.named_parameters() if not name.startswith(inside)}

    @contextmanager
    def fresh_head(self, model: nn.Module, classes: int) -> Iterator[None]:
        """A newly drawn head with `classes` outputs; meanwhile rows are classified."""
        with super().fresh_head(model, classes):
            model.config.num_labels = classes  # type: ignore[union-attr]
            try:
                yield
            finally:
                model.config.num_labels = UNREAD  # type: ignore[union-attr]

    def encode(self, row: dict[str, Any]) -> Example | None:
        """Encode a row, with or without a label."""
        return super().encode({"label": UNLABELLED, **row})  # type: ignore[safe-super]

    def targets(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits (B, C) and labels (B,) where a head is read; else states and the original's, (B, T·D) both."""
        if reads_head(model):
            return super().targets(model, batch)
        with evaluating(model):
            said = states(model, batch)
        return said.flatten(1), self.original(batch).flatten(1)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of logits, in nats; of states (B, T·D), mean ‖h − h₀‖² / ‖h₀‖²."""
        if not labels.is_floating_point():
            return super().loss(logits, labels)
        return ((wide(logits) - labels).square().sum(1) / wide(labels).square().sum(1)).mean()

    @torch.no_grad()
    def original(self, batch: Batch) -> Tensor:
        """What the original says of a batch. (B, T, D)"""
        if self._original is None:
            self._original = self.load(self.folder).eval()
        some = next(iter(batch.inputs.values()))
        return states(self._original.to(some.device), batch)

    def score(self, model: nn.Module, examples: Sequence[Example], score: str) -> list[float]:
        """Score each row by `closeness` or `linear-probe`, or by the `accuracy` of a head: 0 without one. (rows,)"""
        if score == "closeness":
            return self.closeness(model, examples)
        if score == "linear-probe":
            return self.probed(model, examples)
        return super().score(model, examples, score) if reads_head(model) else [0.0] * len(examples)

    @torch.no_grad()
    def closeness(self, model: nn.Module, examples: Sequence[Example]) -> list[float]:
        """1 − ‖h − h₀‖²/v of each row, a mean over its positions, cut at 0; v is taken over these rows. (rows,)"""
        device = next(model.parameters()).device
        missed: list[Tensor] = []
        sums, squares, count = torch.zeros((), dtype=torch.float64), 0.0, 0.0
        for _, batch in self.batches(examples):
            here = batch.to(device)
            told = self.original(here).double().cpu()
            places = seen(here, told)
            missed.append((states(model, here).double().cpu() - told).square().sum((1, 2)) / places)
            sums, squares = sums + told.sum((0, 1)), squares + float(told.square().sum())
            count += float(places.sum())
        variance = squares / count - float((sums / count).square().sum())
        return (1 - torch.cat(missed) / variance).clamp_min(0).tolist()

    @torch.no_grad()
    def probed(self, model: nn.Module, examples: Sequence[Example]) -> list[float]:
        """1 where a linear probe on the mean state, fitted to other rows, finds the label, else 0. (rows,)"""
        device = next(model.parameters()).device
        means = []
        for _, batch in self.batches(examples):
            found = states(model, batch.to(device)).double().cpu()
            means.append(found.sum(1) / seen(batch, found)[:, None])
        return linear_probe(torch.cat(means), torch.tensor([example.labels for example in examples]))

    def beside(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """Accuracy of a linear probe on these rows: what an attacker has who trains no weight of the encoder."""
        hits = self.probed(model, examples)
        return {"linear-probe": sum(hits) / len(hits)}


class TextEncoder(Encoder, SequenceClassification):
    """A row is `text` (and `text_pair`), with a `label` where a task is taught."""

    name = "text-encoder"
    fields: ClassVar = (("text", "text_pair", "label"), ("text", "label"), ("text", "text_pair"), ("text",))


class ImageEncoder(Encoder, ImageClassification):
    """A row is an `image` (PIL), with a `label` where a task is taught."""

    name = "image-encoder"
    fields: ClassVar = (("image", "label"), ("image",))


def reads_head(model: nn.Module) -> bool:
    """Whether the model has a head that tells classes apart."""
    return bool(model.config.num_labels != UNREAD)  # type: ignore[union-attr]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """What is released is the model in evaluation mode, so that is what is held to the original: batch norms differ."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def states(model: nn.Module, batch: Batch) -> Tensor:
    """The last hidden states of a model's encoder, zero where a row is padded. (B, T, D)"""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    found: Tensor = plain.base_model(**batch.inputs).last_hidden_state  # type: ignore[operator]
    if found.dim() == 4:  # (B, D, H, W) of convolutions
        found = found.flatten(2).transpose(1, 2)
    mask = batch.inputs.get("attention_mask")
    return found if mask is None else found * mask[..., None]


def seen(batch: Batch, found: Tensor) -> Tensor:
    """Positions of each row that are not padded. (B,)"""
    mask = batch.inputs.get("attention_mask")
    return torch.full((len(found),), found.shape[1]) if mask is None else mask.sum(1).cpu()


def linear_probe(features: Tensor, labels: Tensor) -> list[float]:
    """1 where a ridge classifier fitted to the other folds finds a row's label, else 0.

    Shapes: features (rows, D) in float64, labels (rows,). Every fold has its share of each class; nothing is drawn.
    """
    scaled = (features - features.mean(0)) / features.std(0).clamp_min(1e-6)
    goals = F.one_hot(labels).to(scaled) - F.one_hot(labels).to(scaled).mean(0)
    fold = torch.empty_like(labels)
    fold[labels.argsort(stable=True)] = torch.arange(len(labels)) % FOLDS
    hits = torch.zeros(len(labels))
    for number in range(FOLDS):
        out = fold == number
        fit = scaled[~out]
        covariance = fit.T @ fit + RIDGE * len(fit) * torch.eye(fit.shape[1], dtype=fit.dtype)
        weights = torch.linalg.solve(covariance, fit.T @ goals[~out])
        hits[out] = ((scaled[out] @ weights).argmax(1) == labels[out]).float()
    return hits.tolist()
