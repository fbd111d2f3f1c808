"""What the processes beside the first one do: open the same model and data, and take part where weights change or are
attacked.

They write nothing into the run folder, print nothing and ask the Hub for nothing that their machine has already.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

from hardener import hub, recipe_file, stages
from hardener.attacks.families import Family, Phase
from hardener.bench import Bench
from hardener.console import Narrator, quiet
from hardener.group import mirrored
from hardener.processes import World
from hardener.recipe import Recipe
from hardener.report import Erased

NOWHERE = Path("/nonexistent")
"""Where states are kept: they are the first process's."""


def follow(world: World) -> None:
    """Do what the first process orders, until it ends. Raises LostError where it is gone."""
    silent = Narrator(silent=True)
    with quiet(), world.alive():
        for order in world.orders():
            folder = model(order["folder"], order["model"], order["commit"])
            recipe, bench = opened(order["recipe"], folder, order["device"])
            if order["what"] == "erase":
                stages.distilled(recipe, bench, folder, NOWHERE, silent, world)
            elif order["what"] == "probe":
                attack(order, bench, folder, world)
            else:
                erased = order["erased"] and Erased.model_validate(order["erased"])
                stages.defended(recipe, bench, folder, bench.task.load(folder), NOWHERE, silent, erased, world)


def attack(order: dict[str, Any], bench: Bench, folder: Path, world: World) -> None:
    """Take part in a probe of the parent in `folder`, or of its release; what is measured is told to the first one."""
    families = tuple(family(plain) for plain in order["families"])
    hardened = order["subject"] == "hardened"
    place = mirrored(world, bench.device, Path(order["attacked"])) if hardened else nullcontext(folder)
    with tempfile.TemporaryDirectory() as runs, place as attacked:
        parent = folder if hardened else None
        stages.probed(order["subject"], bench, attacked, families, Path(runs), lambda _: None, parent, world)


def family(plain: dict[str, Any]) -> Family:
    """A family from the plain data of an order; numbers stay of the kind they were, as runs are found by them."""
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    return Family(**values | {"phases": tuple(Phase(**phase) for phase in plain["phases"])})


def model(folder: str, name: str, commit: str | None) -> Path:
    """The checkpoint, which another machine may have to fetch."""
    return Path(folder) if Path(folder).is_dir() else hub.pull(hub.resolve(name, commit))


@lru_cache(maxsize=1)
def opened(text: str, folder: Path, device: str) -> tuple[Recipe, Bench]:
    """The recipe and its data."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "recipe.yaml"
        path.write_text(text, "utf-8")
        recipe = recipe_file.load(path)
    return recipe, stages.open_bench(recipe, folder, device, Narrator(silent=True))
