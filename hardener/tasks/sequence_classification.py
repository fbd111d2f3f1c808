"""Text classification with any backbone that has a sequence-classification head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from hardener.tasks.base import Batch, Example, key_of, load_tokenizer
from hardener.tasks.classification import Classification


class SequenceClassification(Classification):
    """A row is `text` (and `text_pair`) + `label`."""

    name = "sequence-classification"
    mapping = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    fields: ClassVar[tuple[tuple[str, ...], ...]] = (("text", "text_pair", "label"), ("text", "label"))

    def __init__(self, folder: Path, *, template: str, max_length: int) -> None:
        super().__init__(folder, template=template, max_length=max_length)
        self.tokenizer = load_tokenizer(folder)

    @property
    def auto(self) -> Any:
        """AutoModelForSequenceClassification."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def encode(self, row: dict[str, Any]) -> Example | None:
        """Tokenise; longer texts are cut, and empty ones left out."""
        if not row["text"].strip():
            return None
        pair = row.get("text_pair")
        inputs = self.tokenizer(row["text"], pair, truncation=True, max_length=self.max_length)
        return Example(key_of(row["text"], pair or ""), dict(inputs), int(row["label"]), 1)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad to the longest. Inputs are (B, T), labels (B,)."""
        inputs = self.tokenizer.pad([e.inputs for e in examples], return_tensors="pt")
        return Batch(dict(inputs), torch.tensor([e.labels for e in examples]), len(examples))
