"""Image classification with any backbone that has an image-classification head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hardener.tasks.base import Batch, Example, key_of, loadable
from hardener.tasks.classification import Classification

CACHE_BYTES = 2 * 1024**3
"""Preprocessed pixels kept in memory; a look-ahead sees the same images many times."""


class ImageClassification(Classification):
    """A row is `image` (PIL) + `label`."""

    name = "image-classification"
    mapping = "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"
    fields: ClassVar[tuple[tuple[str, ...], ...]] = (("image", "label"),)

    def __init__(self, folder: Path, *, template: str, max_length: int) -> None:
        super().__init__(folder, template=template, max_length=max_length)
        from transformers import AutoConfig, AutoImageProcessor

        with loadable(f"the image processor of {folder.name}"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            self.processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        self._mode = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
        self._pixels: dict[str, Tensor] = {}
        self._cached = 0

    @property
    def auto(self) -> Any:
        """AutoModelForImageClassification."""
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def encode(self, row: dict[str, Any]) -> Example | None:
        """Keep the decoded image; it is preprocessed when first needed."""
        image = row["image"].convert(self._mode)
        key = key_of(repr(image.size), image.tobytes())
        return Example(key, {"image": image}, int(row["label"]), 1)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Stack. pixel_values (B, 3, H, W), labels (B,)."""
        pixels = torch.stack([self.pixels(e) for e in examples])
        return Batch({"pixel_values": pixels}, torch.tensor([e.labels for e in examples]), len(examples))

    def pixels(self, example: Example) -> Tensor:
        """Preprocessed pixels of one example, (3, H, W)."""
        known = self._pixels.get(example.key)
        if known is not None:
            return known
        value: Tensor = self.processor(example.inputs["image"], return_tensors="pt")["pixel_values"][0]
        if self._cached < CACHE_BYTES:
            self._cached += value.nbytes
            self._pixels[example.key] = value
        return value
