"""How a CTRAP step scales: time and memory against parameters, and against the number of steps.

    python -m bench.scaling [--quick] [--json FILE] [--device cuda]

Random weights in the shapes of real models, all of them trained. A step makes three passes of two floating-point
operations per weight and token forward and four backward; time is told per weight and token, beside the smallest model,
and memory as peak bytes per weight: weights, gradient, two moments, and first the copy of a look-ahead, then the
gradient that it kept, are 20, and activations come on top. `--quick` has an eighth of the widths, two layers, and an
eighth of the vocabularies.

Against steps: the last third of a run beside its first, in time and in what is held after it.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rows import Row, main, row, seconds
from bench.step_cost import Bed, Size, ctrap, held, whole_peak

SHAPES = {
    "SmolLM2-135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
    "SmolLM2-360M": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "vocab_size": 49152},
    "Qwen2.5-0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936},
    "Llama-3.2-1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
}
HEADS = {"SmolLM2-135M": (9, 3), "SmolLM2-360M": (15, 5), "Qwen2.5-0.5B": (14, 2), "Llama-3.2-1B": (32, 8)}
"""Attention heads, and those of keys and values."""


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    smaller: int
    """Widths and vocabularies are divided by this; above 1 there are two layers."""
    rows: int
    length: int
    repeats: int
    steps: int
    """Of the run whose last third is looked at."""


QUICK = Effort(smaller=8, rows=4, length=64, repeats=3, steps=30)
FULL = Effort(smaller=1, rows=8, length=512, repeats=3, steps=300)


class Shape(Bed):
    """A Llama of a real model's shape."""

    def __init__(self, name: str, effort: Effort, device: str, folder: Path) -> None:
        self.name, self.smaller = name, effort.smaller
        size = Size(0, 0, SHAPES[name]["vocab_size"], effort.rows, effort.length, (), effort.repeats)
        super().__init__(size, device, folder)

    def config(self) -> Any:
        """Of the model."""
        from transformers import LlamaConfig

        shape, (heads, shared) = dict(SHAPES[self.name]), HEADS[self.name]
        if self.smaller > 1:
            shape = {key: value // self.smaller for key, value in shape.items()} | {"num_hidden_layers": 2}
        return LlamaConfig(
            **shape,
            num_attention_heads=heads,
            num_key_value_heads=shared,
            head_dim=max(8, shape["hidden_size"] // heads // 2 * 2),
            max_position_embeddings=self.size.length,
            tie_word_embeddings=True,
        )


def sizes(effort: Effort, device: str, folder: Path) -> Iterator[Row]:
    """Each shape by itself."""
    smallest = None
    for name in SHAPES:
        bed = Shape(name, effort, device, folder / name)
        step, outer = bed.step(ctrap(bed), bed.train(), lora=False)
        weights = sum(p.numel() for p in outer.params)
        bytes_ = whole_peak(step, outer, device)
        took = statistics.median(seconds(step, device) for _ in range(effort.repeats))
        each = took / weights / (3 * effort.rows * effort.length)
        smallest = smallest or each
        yield row(f"{name}, weights", weights / 1e6, "M", better="higher")
        yield row(f"{name}, CTRAP step", took, "s")
        yield row(f"{name}, seconds per weight and token / the smallest's", each / smallest, "×")
        yield row(f"{name}, peak", bytes_ / 1e6, "MB")
        yield row(f"{name}, peak bytes per weight", bytes_ / weights, "B")


def duration(effort: Effort, device: str, folder: Path) -> Iterator[Row]:
    """The smallest shape for many steps."""
    bed = Shape(next(iter(SHAPES)), effort, device, folder / "long")
    step, outer = bed.step(ctrap(bed), bed.train(), lora=False)
    step()
    before, third = held(outer), effort.steps // 3
    times = [seconds(step, device) for _ in range(effort.steps)]
    late = statistics.median(times[-third:]) / statistics.median(times[:third])
    yield row(f"step {effort.steps - third}–{effort.steps} / step 1–{third}, time", late, "×", 1.05)
    yield row(f"after step {effort.steps} / after the first, bytes held", held(outer) / before, "×", 1.05)


def measured(quick: bool, device: str, effort: Effort | None = None) -> Iterator[Row]:
    effort = effort or (QUICK if quick else FULL)
    with tempfile.TemporaryDirectory() as folder:
        yield from sizes(effort, device, Path(folder))
        yield from duration(effort, device, Path(folder))


if __name__ == "__main__":
    main(__doc__, measured)
