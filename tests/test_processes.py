"""Several processes compute what one does, however weights lie; and where one is lost the run ends and can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.distributed as dist
from torch.optim import SGD

from hardener import loop, registry
from hardener.defenses import configs
from hardener.group import ALONE, Group, full
from hardener.losses import cross_entropy, probability
from hardener.recipe import Recipe
from hardener.state import States

WAYS = ("whole", "sharded")
"""How weights lie: a copy in each process, or spread over both."""


class Stop(Exception):
    """The machine goes away."""


def prepared(chosen: Recipe, folder: Path, dtype: torch.dtype = torch.float64):
    """Defence, model, task and streams."""
    task, streams = small.opened(chosen, folder)
    settings = configs.CONFIGS[chosen.defense.name](**chosen.defense.settings)
    defense = registry.find("defenses", chosen.defense.name)(settings, chosen.train, task)
    return defense, task.load(folder).to(dtype).train(), task, streams


def gradient(chosen: Recipe, folder: Path, group: Group) -> list[torch.Tensor]:
    """That of ten rows of uneven length, taken twice, with what is logged of it."""
    defense, model, task, streams = prepared(chosen, folder)
    outer = loop.Outer(model, task, streams, defense, chosen.train, loop.Accelerator(cpu=True), group)
    rows = sorted(outer.draw("restricted", 10), key=lambda e: e.targets)
    log: dict[str, float] = {}
    for _ in range(2):  # what is there already is not summed again
        outer.gradient(cross_entropy, rows, log, "loss", {"p(e)": probability(5)})()
    told = torch.tensor([log["loss"], log["p(e)"], outer.norm()], dtype=torch.float64)
    return [*(full(p.grad) for p in outer.params), told]


def trained(chosen: Recipe, folder: Path, group: Group, state: Path, optimizer: Any = None, stop: int | None = None):
    """Weights in the first process, and the log; with an optimizer of our own in place of the defence's, in float64."""
    defense, model, task, streams = prepared(chosen, folder, torch.float64 if optimizer else torch.float32)
    if optimizer is not None:
        names = list(defense.optimizers(list(model.parameters())))
        defense.optimizers = lambda params: {name: optimizer(params) for name in names}

    def tell(step: int, _: dict[str, float]) -> None:
        if step == stop:
            raise Stop

    log = loop.run(defense, model, task, streams, chosen.train, "cpu", States(state), tell, group)
    return (model.state_dict() if group.size == 1 else group.whole(model)), log


def plain(params: list[torch.nn.Parameter]) -> SGD:
    return SGD(params, lr=0.1)


def computed(recipes: dict[str, Recipe], folders: dict[str, Path], group: Group, out: Path) -> dict[str, Any]:
    """Everything that is compared."""
    chosen, letters = recipes["ctrap"], folders["letters"]
    found = {
        "gradient": gradient(chosen, letters, group),
        "sgd": trained(chosen, letters, group, out / "sgd", plain),
        "adamw": trained(chosen, letters, group, out / "adamw"),
    }
    if group.mesh is None:
        found["rollout"] = trained(recipes["rollout"], letters, group, out / "rollout", plain)
        found["sophon"] = trained(recipes["sophon"], folders["bert"], group, out / "sophon", plain)
    return found


def member(rank: int, recipes: dict[str, Recipe], folders: dict[str, Path], out: Path) -> None:
    """One of two processes."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    for way in WAYS:
        group = Group(rank, 2, init_device_mesh("cpu", (2,)) if way == "sharded" else None)
        found = computed(recipes, folders, group, out / way)
        try:
            trained(recipes["ctrap"], folders["letters"], group, out / way / "broken", stop=3)
        except Stop:
            torch.rand(rank)
            found["resumed"] = trained(recipes["ctrap"], folders["letters"], group, out / way / "broken")
        if rank == 0:
            torch.save(found, out / f"{way}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def recipes(paths, text_paths) -> dict[str, Recipe]:
    rows = "train.grad_accumulation=3"
    rollout = 'defense={"name": "ctrap-rollout", "inner_steps": [1, 3], "inner_adapter": {"r": 2, "alpha": 4}}'
    return {
        "ctrap": small.recipe(paths, rows),
        "rollout": small.recipe(paths, rows, rollout),
        "sophon": small.recipe(text_paths, rows, name="tiny-sophon-text"),
    }


@pytest.fixture(scope="module")
def folders(letters, bert) -> dict[str, Path]:
    return {"letters": letters, "bert": bert}


@pytest.fixture(scope="module")
def one(recipes, folders, tmp_path_factory) -> dict[str, Any]:
    """What one process computes."""
    return computed(recipes, folders, ALONE, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(recipes, folders, tmp_path_factory) -> dict[str, Any]:
    """What two processes compute, by how weights lie."""
    out = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(member, (recipes, folders, out), nprocs=2)
    return {way: torch.load(out / f"{way}.pt") for way in WAYS} | {"out": out}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_gradient_of_one(one, two, way):
    for mine, theirs in zip(one["gradient"], two[way]["gradient"], strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-9, atol=1e-12)


def near(theirs: Any, mine: Any, **how: float) -> None:
    """Weights and log."""
    torch.testing.assert_close(theirs[0], mine[0], **how)
    assert [set(point) for point in theirs[1]] == [set(point) for point in mine[1]]
    for one, other in zip(theirs[1], mine[1], strict=True):
        assert one == pytest.approx(other, rel=how["rtol"])


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_weights_of_one_after_a_walk_through_traps(one, two, way):
    near(two[way]["sgd"], one["sgd"], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["rollout", "sophon"])
def test_a_simulated_lora_and_a_fresh_head_are_the_same_in_all_processes(one, two, name):
    near(two["whole"][name], one[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_loss_curve_of_one(one, two, way):
    for theirs, mine in zip(two[way]["adamw"][1], one["adamw"][1], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_go_on_with_the_same_bits(two, way):
    weights, log = two[way]["resumed"]
    straight, its_log = two[way]["adamw"]
    assert all(torch.equal(weights[name], straight[name]) for name in straight)
    assert log == its_log


@pytest.mark.parametrize("way", WAYS)
def test_one_process_goes_on_from_the_state_of_two(recipes, letters, two, tmp_path, way):
    import shutil

    shutil.copytree(two["out"] / way / "adamw" / "step-000003", tmp_path / "step-000003")
    weights, log = trained(recipes["ctrap"], letters, ALONE, tmp_path)
    near((weights, log), two[way]["adamw"], rtol=1e-3, atol=1e-5)
