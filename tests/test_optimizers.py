"""The optimizer that the recipe names trains, is resumed, and is refused before any work where it cannot be had."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import small
import torch
from torch import nn

from bench.rows import Live
from hardener import optimizers, pipeline, recipe_file
from hardener.errors import RecipeError, UsageError
from hardener.recipe import Train
from hardener.state import States

HERE = ("adamw", "adafactor")
TRAPS: dict[str, dict[str, object]] = {
    "ctrap": {},
    "ctrap-rollout": {"inner_steps": [2, 2]},
    "ctrap-adaptive": {"inner_steps": [2, 2]},
}
absent = pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed here")


def defended(paths, letters, name: str, optimizer: str):
    defense = json.dumps({"name": name, **TRAPS[name]})
    return small.defended(small.recipe(paths, f"defense={defense}", f"train.optimizer={optimizer}"), letters)


@pytest.mark.parametrize("name", TRAPS)
def test_every_trap_is_trained_by_what_the_recipe_names(paths, letters, name):
    kinds = {which: type(defended(paths, letters, name, which)[1].optimizers["outer"]).__name__ for which in HERE}
    assert kinds == {"adamw": "AdamW", "adafactor": "Adafactor"}


@pytest.mark.parametrize("name", HERE)
def test_a_step_that_was_resumed_gives_the_same_bits(paths, letters, tmp_path, name):
    states = States(tmp_path)
    defense, outer = defended(paths, letters, "ctrap", name)
    defense.step(outer)
    states.save(outer, 1, [])
    defense.step(outer)
    again, resumed = defended(paths, letters, "ctrap", name)
    assert states.restore(resumed, []) == 1
    again.step(resumed)
    assert all(map(torch.equal, outer.params, resumed.params))


def test_adafactor_moves_by_the_recipes_rate_and_keeps_rows_and_columns_alone():
    train = Train(steps=1, batch_size=2, lr=1e-3, optimizer="adafactor")
    weights = [nn.Parameter(torch.ones(300, 200))]
    optimizer = optimizers.made(train, weights)
    weights[0].grad = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    with Live() as live:
        optimizer.step()
    assert float((weights[0].detach() - 1).square().mean().sqrt()) == pytest.approx(1e-3, rel=0.05)
    assert live.now - 2 * 300 * 200 * 4 < 0.02 * 300 * 200 * 4  # beside the weights and their gradient


@absent
@pytest.mark.parametrize("name", optimizers.PACKAGED)
@pytest.mark.parametrize("section", ["train", "erase"])
def test_a_package_that_is_missing_is_named_before_any_work(paths, letters, tmp_path, section, name):
    more = [f"{section}.optimizer={name}"]
    if section == "erase":
        more += ["erase={alpha: 0.5, steps: 1, batch_size: 8, lr: 1.0e-3}"]
        more.reverse()
    with pytest.raises(UsageError, match=rf'{section}\.optimizer: {name} needs .* "hardener\[optimizers\]"'):
        pipeline.harden(
            str(letters), recipe="tiny-ctrap", overrides=small.overrides(paths, *more), output=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_sophon_says_that_its_optimizers_are_its_own(image_paths):
    asked = small.overrides(image_paths, "train.optimizer=adafactor", name="tiny-sophon-image")
    with pytest.raises(RecipeError, match="sophon trains with two Adams"):
        recipe_file.load("tiny-sophon-image", asked)


class Shard(nn.Parameter):
    """A parameter that says of itself that it is a shard."""

    full_tensor = None


def test_sharded_weights_are_trained_by_adamw_alone():
    train = Train(steps=1, batch_size=2, lr=1e-3, optimizer="adafactor")
    with pytest.raises(UsageError, match="sharded weights are trained by adamw, not by adafactor"):
        optimizers.made(train, [Shard(torch.ones(2))])


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "share"), [("adamw-8bit", 0.3), ("adamw-paged", 1.05)])
def test_bitsandbytes_keeps_what_the_plan_says(name, share):
    """In shares of AdamW's two moments; a step moves as AdamW's does."""
    pytest.importorskip("bitsandbytes")
    weights = {which: [nn.Parameter(torch.ones(1024, 1024, device="cuda"))] for which in ("adamw", name)}
    kept = {}
    for which, params in weights.items():
        optimizer = optimizers.made(Train(steps=1, batch_size=2, lr=1e-3, optimizer=which), params)
        for _ in range(3):
            params[0].grad = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).cuda()
            optimizer.step()
        state = optimizer.state[params[0]].values()
        kept[which] = sum(v.numel() * v.itemsize for v in state if isinstance(v, torch.Tensor))
    assert kept[name] <= share * kept["adamw"]
    torch.testing.assert_close(weights[name][0], weights["adamw"][0], rtol=0, atol=1e-4)
