"""A long run keeps no more memory and no more open files at its end than soon after its beginning."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import small
import torch

from hardener import loop, registry
from hardener.attacks.attack import Attack
from hardener.attacks.families import FULL
from hardener.attacks.finetune import attacked
from hardener.attacks.recorder import never, quietly
from hardener.attacks.scene import Scene
from hardener.console import quiet
from hardener.defenses import configs
from hardener.measurement import Checkpoint
from hardener.state import States

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> float:
    """Memory of this process in MiB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20


def handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def tensors() -> int:
    return sum(type(thing) in (torch.Tensor, torch.nn.Parameter) for thing in gc.get_objects())


@pytest.mark.parametrize(
    ("steps", "probes", "growth"), [(30, 3, 24.0), pytest.param(400, 20, 24.0, marks=pytest.mark.slow)]
)
def test_memory_and_handles_are_flat_over_a_long_run_with_probe_points(
    letters: Path, paths: dict[str, Path], tmp_path: Path, steps: int, probes: int, growth: float
) -> None:
    """CTRAP with a state every fifth step, and an attack on the parent every so often."""
    chosen = small.recipe(paths, f"train.steps={steps}", "train.save_every=5")
    task, streams = small.opened(chosen, letters)
    settings = configs.CONFIGS[chosen.defense.name](**chosen.defense.settings)
    defense = registry.find("defenses", chosen.defense.name)(settings, chosen.train, task)
    scene = Scene(letters, task, streams.rows("restricted", "attack"), streams.rows("retain", "attack"), "cpu")
    seen: list[tuple[float, int, int]] = []

    def judge(model: Any, step: int, last: bool) -> Checkpoint:
        return Checkpoint(step=step, scores=tuple(task.score(model, scene.harm[:4], "exact-match")))

    def probe(step: int, _: dict[str, float]) -> None:
        if step % (steps // probes) == 0:
            attacked(scene, Attack(FULL, 1e-3, 0, 4, 4), judge, never, quietly)
            seen.append((resident(), handles(), tensors()))

    with quiet():
        loop.run(defense, task.load(letters), task, streams, chosen.train, "cpu", States(tmp_path), probe)
    first, last = seen[0], seen[-1]
    print(f"{steps} steps, {len(seen)} probe points, (MiB, handles, tensors) from {first} to {last}")
    assert len(seen) == probes
    assert last[0] - first[0] < growth
    assert last[1] <= first[1] + 2
    assert last[2] <= first[2] + 8
    assert len(States(tmp_path).all()) == 2
