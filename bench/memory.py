"""What the plan says of memory, beside what steps take.

    python -m bench.memory [--quick] [--json FILE]

Each row is a recipe: the peak that `--dry-run` tells for hardening, and the peak of live tensor bytes in an outer step
of the same defence, with weights, parent and optimizers' states. Rows are as long as `data.max_length` lets them be. Of
a population the most expensive attacker is drawn, as the plan has to be right for that one. Both count tensors, so what
is compared is a reckoning and not an allocator; on a GPU its context and rounding come on top.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from bench.rows import Row, main, row
from bench.step_cost import Bed, Size
from hardener import checkpoint, hub, memory, recipe_file, registry
from hardener.loop import Outer
from hardener.recipe import Recipe

QUICK = Size(hidden=64, layers=2, vocabulary=2048, rows=4, length=128, walks=(), repeats=2)
FULL = Size(hidden=128, layers=3, vocabulary=8192, rows=8, length=129, walks=(), repeats=2)
ADAPTER = "adapter={r: 8, alpha: 16}"
GOAL = 0.15

Settings = dict[str, object]
ROLLOUT: Settings = {"name": "ctrap-rollout", "inner_steps": [2, 2], "kept": "even"}
ADAPTIVE: Settings = {
    **{"name": "ctrap-adaptive", "inner_steps": [2, 2], "goals": ["benign-loss"], "subspaces": ["all"]},
    "rates": {"adamw": [1e-4, 1e-4]},
}
WIDE: Settings = {
    **{"name": "sophon-wide", "inner_steps": [3, 3], "query_every": 1, "scopes": ["all"], "warm_up": [1, 1]},
    **{"rates": {"adamw": [1e-4, 1e-4]}, "floor": None},
}
DEFENSES: dict[str, Settings] = {
    "ctrap": {"name": "ctrap"},
    "ctrap, second order": {"name": "ctrap", "order": "second"},
    "ctrap-rollout": ROLLOUT,
    "ctrap-rollout with a benign walk": {**ROLLOUT, "benign_weight": 0.1},
    "ctrap-adaptive": ADAPTIVE,
    "sophon, K = 4": {"name": "sophon", "inner_steps": 4},
    "sophon-wide": WIDE,
}
OTHERWISE: dict[str, tuple[str, ...]] = {
    "ctrap, all weights, adafactor": ("train.optimizer=adafactor",),
    "ctrap, all weights, checkpointing": ("train.checkpointing=true",),
    "ctrap, all weights, two micro-batches": ("train.grad_accumulation=2",),
}


def recipes(size: Size) -> Iterator[tuple[str, Recipe]]:
    """Every defence with all weights and through an adapter, and CTRAP with what saves memory."""
    for name, settings in DEFENSES.items():
        yield f"{name}, all weights", recipe(size, settings)
        yield f"{name}, LoRA", recipe(size, settings, ADAPTER)
    for name, more in OTHERWISE.items():
        yield name, recipe(size, DEFENSES["ctrap"], *more)


def recipe(size: Size, settings: Settings, *more: str) -> Recipe:
    """`tiny-ctrap` with another defence, of these rows."""
    batches = {"sophon": {"inner_batch": size.rows, "query_batch": size.rows}}
    batches["sophon-wide"] = {"inner_batches": [size.rows], "query_batch": size.rows}
    defense = settings | batches.get(str(settings["name"]), {})
    own = (f"train.batch_size={size.rows}", f"data.max_length={size.length}", "train.warmup_steps=0")
    return recipe_file.load("tiny-ctrap", ["defense=" + json.dumps(defense), *own, *more])


def taken(bed: Bed, chosen: Recipe) -> int:
    """Most bytes that live in the second outer step, whoever made them."""
    assert chosen.defense is not None
    assert chosen.train is not None
    found = registry.find("defenses", chosen.defense.name)
    defense = found(found.Config(**chosen.defense.settings), chosen.train, bed.task)
    with memory.Live() as live:
        model = counted(bed.task.load(bed.task.folder))
        if chosen.adapter != "none":
            model = checkpoint.attach(model, chosen.adapter, bed.task)
        if chosen.train.checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        outer = Outer(model.train(), bed.task, bed.streams, defense, chosen.train, Accelerator(cpu=True))
        if outer.origin is not None:
            counted(outer.origin)
        defense.step(outer)
        live.peak = live.now
        outer.number += 1
        defense.step(outer)
    return live.peak


def counted(model: nn.Module) -> nn.Module:
    """The model, its weights in memory that was asked for here and not by the reader of its file."""
    for p in model.parameters():
        p.data = p.data.clone()
    return model


def measured(quick: bool, device: str) -> Iterator[Row]:
    size = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        bed = Bed(size, device, Path(folder))
        bed.model(lora=False).save_pretrained(folder)  # type: ignore[operator]
        ref = hub.resolve(folder)
        for name, chosen in recipes(size):
            told, found = memory.needed(chosen, ref, device).hardening, taken(bed, chosen)
            yield row(f"{name}: measured", found / 1e6, "MB")
            yield row(f"{name}: predicted", told / 1e6, "MB")
            yield row(f"{name}: off by", abs(told / found - 1), "", GOAL)


if __name__ == "__main__":
    main(__doc__, measured)
