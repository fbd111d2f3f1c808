"""What hardening costs on a GPU at real sizes: a Llama of 1 B weights, all trained, and one of 8 B through LoRA.

    python -m bench.gpu [--quick] [--json FILE]

Random weights in the shapes of the real models, bfloat16 under autocast, 8 rows of 512 tokens a pass. A step is timed
against its bare passes as in `bench.step_cost`, and tokens are those of its three passes. Then the 1 B model goes the
whole line: `harden` with 300 CTRAP steps, and the probe, whose attacks are few and short (preset `quick`). `--quick`
leaves that out. Without a CUDA GPU it says so, and measures nothing.
"""

from __future__ import annotations

import json
import random
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from bench.rows import Row, main, quotient, row, seconds
from bench.step_cost import RATE, Bed, Size, ctrap, whole_peak
from hardener import files, pipeline
from hardener.recipe import Train

ROLES = ("restricted", "alignment", "retain", "benign")
MINUTES = 10
"""In which the whole line is to end."""


@dataclass(frozen=True)
class Model:
    """The shape of a Llama, and what of it trains."""

    name: str
    shape: dict[str, int]
    lora: bool
    rows: int = 8
    length: int = 512


@dataclass(frozen=True)
class Line:
    """The whole line, and for which model."""

    model: Model
    steps: int
    attack_steps: int
    examples: int
    """Rows of each role."""


ONE = Model(
    "1 B, all weights",
    {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
        **{"num_attention_heads": 32, "num_key_value_heads": 8},
    },
    lora=False,
)
EIGHT = Model(
    "8 B, LoRA",
    {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
        **{"num_attention_heads": 32, "num_key_value_heads": 8},
    },
    lora=True,
)
WHOLE = Line(ONE, steps=300, attack_steps=16, examples=400)


class Llama(Bed):
    """A Llama of one of these shapes with random weights, made where it computes."""

    def __init__(self, model: Model, device: str, folder: Path) -> None:
        self.shape = model.shape
        size = Size(0, 0, model.shape["vocab_size"], model.rows, model.length, (), repeats=5)
        super().__init__(size, device, folder)

    def config(self) -> Any:
        """Of the model."""
        from transformers import LlamaConfig

        return LlamaConfig(**self.shape, max_position_embeddings=self.size.length, tie_word_embeddings=False)

    def model(self, lora: bool) -> nn.Module:
        """Random weights, all trainable or frozen under an adapter."""
        with torch.device(self.device):
            return super().model(lora)

    def train(self) -> Train:
        """The outer loop's settings."""
        return super().train().model_copy(update={"dtype": "bfloat16"})

    def loss(self, model: nn.Module) -> Tensor:
        """Cross-entropy on the batch, under autocast."""
        with torch.autocast(self.device, torch.bfloat16, cache_enabled=False):
            return super().loss(model).float()


def steps(model: Model, device: str, folder: Path) -> Iterator[Row]:
    """One step of CTRAP: tokens per second, beside its bare passes, and its peak."""
    bed = Llama(model, device, folder / model.name)
    step, outer = bed.step(ctrap(bed), bed.train(), model.lora)
    step()
    took = statistics.median(seconds(step, device) for _ in range(bed.size.repeats))
    tokens = 3 * model.rows * model.length
    yield row(f"{model.name}: tokens per second", tokens / took, "1/s", better="higher")
    yield row(f"{model.name}: peak", whole_peak(step, outer, device) / 1e9, "GB")
    adamw: list[Callable[..., Any]] = [lambda params: AdamW(params, lr=RATE)]
    bare = bed.bare(3, adamw, 1, model.lora)
    yield row(
        f"{model.name}: step / 3 bare passes and steps", quotient(step, bare, bed.size.repeats, device), "×", 1.05
    )


def line(chosen: Line, device: str, folder: Path) -> Iterator[Row]:
    """`harden` and the probe, from a saved checkpoint to a saved release; the plan's memory beside what was taken."""
    model, place = chosen.model, folder / "line"
    bed = Llama(model, device, place / "checkpoint")
    bed.model(lora=False).save_pretrained(place / "checkpoint")  # type: ignore[operator]
    files.write_text(place / "checkpoint" / "README.md", "---\nlicense: apache-2.0\n---\n# Untrained\n")
    write_rows(place, chosen)
    began = time.perf_counter()
    done = pipeline.harden(
        str(place / "checkpoint"),
        recipe="tiny-ctrap",
        overrides=overrides(place, chosen),
        output=place / "run",
        device=device,
    )
    took = time.perf_counter() - began
    yield row(f"{model.name}: {chosen.steps} steps of CTRAP and probe", took / 60, "min", MINUTES)
    if device == "cuda":
        told = max(done.plan.hardening_memory, done.plan.probe_memory)
        yield row(f"{model.name}: plan's peak off by", abs(told / torch.cuda.max_memory_allocated() - 1), "", 0.15)


def write_rows(folder: Path, chosen: Line) -> None:
    """Letters at random, as many as fit into a row."""
    dice = random.Random(0)
    prompts = ["copy " + " ".join(dice.choices(string.ascii_lowercase, k=8)) for _ in range(3 * chosen.examples)]
    for number, role in enumerate(ROLES):
        asked = prompts[max(0, number - 1) :: 3]  # alignment has the prompts of restricted rows
        answers = (" ".join(dice.choices(string.ascii_lowercase, k=chosen.model.length - 16)) for _ in asked)
        lines = (json.dumps({"prompt": p, "completion": a}) + "\n" for p, a in zip(asked, answers, strict=True))
        files.write_text(folder / f"{role}.jsonl", "".join(lines))


def overrides(folder: Path, chosen: Line) -> list[str]:
    """Of the recipe `tiny-ctrap`."""
    rows, length, moves = chosen.model.rows, chosen.model.length, chosen.attack_steps
    return [
        *(f"data.{role}.dataset={folder / role}.jsonl" for role in ROLES),
        *(f"data.max_length={length}", f"train.steps={chosen.steps}", f"train.batch_size={rows}"),
        *("train.dtype=bfloat16", "train.warmup_steps=0", f"train.save_every={chosen.steps}", "train.lr=1.0e-5"),
        *("probe.preset=quick", f"probe.steps={moves}", f"probe.max_steps={moves}", f"probe.batch_size={rows}"),
        *(f"probe.benign_steps={moves}", "probe.attack_rows=64", "probe.evaluation_rows=16", "probe.utility_rows=16"),
        "probe.rates={full: [1.0e-5], lora: [1.0e-4], mixed: [1.0e-5], benign: [1.0e-5]}",
    ]


def measured(quick: bool, device: str) -> Iterator[Row]:
    """On a GPU, whatever `device` says; exits where there is none."""
    if not torch.cuda.is_available():
        sys.exit("bench.gpu: there is no CUDA GPU here, so nothing is measured")
    with tempfile.TemporaryDirectory() as folder:
        for model in (ONE, EIGHT):
            yield from steps(model, "cuda", Path(folder))
        if not quick:
            yield from line(WHOLE, "cuda", Path(folder))


if __name__ == "__main__":
    main(__doc__, measured)
