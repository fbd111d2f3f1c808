"""What text and image classification share: one target per row, accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from hardener.attacks.families import Kind
from hardener.tasks.base import Batch, Example, Task


class Classification(Task):
    """One label per row; labels are indices into the head."""

    kind: ClassVar[Kind] = "classifier"
    default_score = "accuracy"
    generative = False

    def targets(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits (B, C) and labels (B,)."""
        return model(**batch.inputs).logits, batch.labels

    @torch.no_grad()
    def score(self, model: nn.Module, examples: Sequence[Example], score: str) -> list[float]:
        """1 where the largest logit is the label, else 0. (rows,)"""
        device = next(model.parameters()).device
        scores: list[float] = []
        for _, batch in self.batches(examples, 256):
            logits, labels = self.targets(model, batch.to(device))
            scores += (logits.argmax(-1) == labels).float().tolist()
        return scores
