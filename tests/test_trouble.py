"""When numbers go wrong: the run stops with the last good state, or steps back to it, and the report tells.

When memory runs out: the same batch in smaller parts, to the same bits as if the recipe had asked for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from test_loop import same

from hardener import loop, recipe_file, registry, stages, trouble
from hardener.attacks.families import FULL
from hardener.console import Narrator
from hardener.defenses import configs
from hardener.errors import DivergedError, RecipeError, ResourceError
from hardener.probing import Prober
from hardener.state import States

Outer = loop.Outer
BACK = ("train.on_trouble=step-back", "train.save_every=2", "train.steps=6")


def train(
    chosen: Any, folder: Path, state: Path, before: Callable[[Outer], None] | None = None, room: int | None = None
) -> tuple[dict[str, torch.Tensor], tuple[dict[str, float], ...], Outer]:
    """Run the loop. `before` may spoil what a step meets; `room`: rows that the memory of the machine holds."""
    task, streams = small.opened(chosen, folder)
    defense = registry.find("defenses", chosen.defense.name)(
        configs.CONFIGS[chosen.defense.name](**chosen.defense.settings), chosen.train, task
    )
    step, targets, met = defense.step, task.targets, []

    def watched(outer: Outer) -> dict[str, float]:
        met[:] = [outer]
        if before is not None:
            before(outer)
        return step(outer)

    def within(model: Any, batch: Any) -> Any:
        if room is not None and torch.is_grad_enabled() and len(batch.inputs["input_ids"]) > room:
            raise torch.OutOfMemoryError(f"no memory for {len(batch.inputs['input_ids'])} rows")
        return targets(model, batch)

    defense.step, task.targets = watched, within
    model = task.load(folder)
    log = loop.run(defense, model, task, streams, chosen.train, "cpu", States(state), lambda *_: None)
    return model.state_dict(), log, met[0]


def once(number: int, spoil: Callable[[Outer], None]) -> Callable[[Outer], None]:
    """Spoil the weights before one step, the first time that it is taken."""
    left = [number]

    def before(outer: Outer) -> None:
        if outer.number in left:
            left.clear()
            with torch.no_grad():
                spoil(outer)

    return before


def nan(outer: Outer) -> None:
    outer.params[0].fill_(float("nan"))


def far(outer: Outer) -> None:
    for p in outer.params:
        p.add_(torch.randn_like(p))


TROUBLE: dict[str, tuple[Callable[[Outer], None], tuple[str, ...], str]] = {
    "a loss that is no number": (nan, (), "loss is nan"),
    "a gradient that explodes": (far, ("train.norm_limit=30",), "the gradient norm is .*, train.norm_limit 30"),
    "utility that is lost": (far, ("train.utility_limit=1.0",), "the loss on retain rows rose by .* nats"),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_by_default_the_run_stops_and_the_last_good_state_is_kept(letters, paths, tmp_path, kind):
    spoil, settings, said = TROUBLE[kind]
    chosen = small.recipe(paths, *BACK, "train.on_trouble=stop", *settings)
    with pytest.raises(DivergedError, match=said) as caught:
        train(chosen, letters, tmp_path, once(4, spoil))
    assert caught.value.exit_code == 5
    assert [state.name for state in States(tmp_path).all()] == ["step-000002"]


@pytest.mark.parametrize("kind", TROUBLE)
def test_a_step_back_goes_on_from_the_last_good_state_with_half_the_rate_and_is_told(letters, paths, tmp_path, kind):
    spoil, settings, _ = TROUBLE[kind]
    chosen = small.recipe(paths, *BACK, *settings)
    weights, log, outer = train(chosen, letters, tmp_path / "a", once(4, spoil))
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert [point["step"] for point in log] == [1, 2, 4, 3, 4, 5, 6]
    (group,) = [group for optimizer in outer.optimizers.values() for group in optimizer.param_groups]
    assert group["lr"] == pytest.approx(chosen.train.lr / 2)
    (note,) = trouble.told(log)
    assert note.startswith("at step 4 the training went wrong and stepped back to step 2, 1 times in all")
    again, same_log, _ = train(chosen, letters, tmp_path / "b", once(4, spoil))
    assert same(weights, again)
    assert same_log == log


def test_a_run_that_goes_wrong_again_and_again_ends_after_three_steps_back(letters, paths, tmp_path):
    counted = itertools.count()

    def always(outer: Outer) -> None:
        if outer.number == 4:
            next(counted)
            with torch.no_grad():
                nan(outer)

    with pytest.raises(DivergedError, match="stepped back 3 times"):
        train(small.recipe(paths, *BACK), letters, tmp_path, always)
    assert next(counted) == trouble.MOST + 1


def test_limits_that_are_not_met_change_no_bit(letters, paths, tmp_path):
    plain, log, _ = train(small.recipe(paths), letters, tmp_path / "plain")
    limits = ("train.on_trouble=step-back", "train.norm_limit=1e9", "train.utility_limit=1e9")
    bounded, same_log, _ = train(small.recipe(paths, *limits), letters, tmp_path / "bounded")
    assert same(plain, bounded)
    assert same_log == log


@pytest.mark.parametrize("defense", ["ctrap", "ctrap-rollout"])
def test_where_memory_runs_out_the_same_batch_is_taken_in_parts(letters, paths, tmp_path, defense):
    chosen = small.recipe(paths, f"defense={{name: {defense}}}")
    weights, log, outer = train(chosen, letters, tmp_path / "a", room=2)
    assert outer.parts > 1
    asked = small.recipe(paths, f"defense={{name: {defense}}}", f"train.grad_accumulation={outer.parts}")
    again, _, _ = train(asked, letters, tmp_path / "b", room=2)
    assert same(weights, again)
    assert list(trouble.told(log))[-1].endswith(f"from there on {outer.parts} micro-batches")


def test_where_not_even_one_row_fits_the_settings_are_named(letters, paths, tmp_path):
    with pytest.raises(ResourceError, match=r"with 8 micro-batches per batch; lower train\.batch_size") as caught:
        train(small.recipe(paths), letters, tmp_path, room=0)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("room", [7, 8])
def test_an_attack_that_does_not_fit_is_named_with_the_settings_to_change(letters, paths, tmp_path, room):
    """The batch is one of eight rows."""
    bench = stages.open_bench(small.recipe(paths), letters, "cpu", Narrator(silent=True))
    load = bench.task.load

    def within(model: Any, _: Any, inputs: dict[str, torch.Tensor]) -> None:
        if model.training and len(inputs["input_ids"]) > room:
            raise torch.OutOfMemoryError(f"no memory for {len(inputs['input_ids'])} rows")

    def loaded(folder: Path) -> Any:
        model = load(folder)
        model.register_forward_pre_hook(within, with_kwargs=True)
        return model

    bench.task.load = loaded
    prober = Prober(bench, "hardened", letters, tmp_path, lambda _: None)
    family = replace(FULL, steps=2)
    if room == 8:
        assert prober.attack(family, 1e-3, 0).failed is None
        return
    with pytest.raises(
        ResourceError, match=r"no memory for 8 rows\) in the attack .*, rate 0\.001, seed 0; .*"
    ) as told:
        prober.attack(family, 1e-3, 0)
    assert "a lower probe.batch_size (now 8) or data.max_length" in str(told.value)
    assert told.value.exit_code == 5
    assert not list(tmp_path.rglob("*.json"))


def test_erasing_knows_no_step_back():
    with pytest.raises(RecipeError, match=r"erase\.on_trouble: distillation stops where numbers go wrong"):
        recipe_file.load("tiny-erase", ["erase.on_trouble=step-back"])
