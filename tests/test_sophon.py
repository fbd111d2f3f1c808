"""SOPHON's borders: no walk, no suppression, and a floor from which the weights go back exactly."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import small
import torch
from test_defenses import Recorded, close, gradient, widened
from test_loop import Stop, same, train

from hardener import recipe_file
from hardener.defenses import configs
from hardener.errors import RecipeError
from hardener.losses import SUPPRESSION, cross_entropy
from hardener.state import States

BEDS = {"image": ("resnet", "image_paths"), "text": ("bert", "text_paths"), "lm": ("letters", "paths")}


@pytest.fixture
def chosen(request):
    """A small SOPHON recipe for a bed: (recipe, folder of the model)."""

    def make(bed: str, *more: str):
        folder, files = (request.getfixturevalue(name) for name in BEDS[bed])
        if bed == "lm":
            files = {role: path for role, path in files.items() if role != "alignment"}
            scores = [f"data.{role}.score=likelihood" for role in files]
            return small.recipe(
                files, "task=causal-lm", "probe.rates={}", *scores, *more, name="tiny-sophon-text"
            ), folder
        return small.recipe(files, *more, name=f"tiny-sophon-{bed}"), folder

    return make


@pytest.fixture
def sophon(chosen):
    """SOPHON on float64 weights: (defense, outer)."""

    def make(bed: str, *more: str):
        defense, outer = small.defended(*chosen(bed, *more))
        outer.model.double()
        outer.optimizers = defense.optimizers(outer.params)
        targets = outer.task.targets
        outer.task.targets = lambda model, batch: targets(model, widened(batch))
        return defense, outer

    return make


def state(model) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


# --- what it reduces to -------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["kept", "fresh"])
@pytest.mark.parametrize("bed", ["image", "text"])
def test_without_a_walk_the_gradient_is_that_of_plain_suppression(sophon, bed, head):
    """K = 0: ∇ L_α at θ, through the model's own head or a newly drawn one."""
    defense, outer = sophon(bed, "defense.inner_steps=0", f"defense.head={head}", "defense.suppression=ice")
    start, seen = copy.deepcopy(outer.model), Recorded(outer)
    torch.manual_seed(3)
    defense.step(outer)
    query = seen.rows("restricted")
    assert len(query) == defense.config.query_batch
    body = [name for name, _ in start.named_parameters() if name not in outer.task.head(start)]
    torch.manual_seed(3)
    outer.model.load_state_dict(start.state_dict())
    with defense.head(outer):
        expected = dict(zip(dict(outer.model.named_parameters()), at(outer, "ice", query), strict=True))
    found = dict(zip(dict(start.named_parameters()), seen.gradients["suppress"], strict=True))
    close([found[name] for name in body], [expected[name] for name in body], 1e-9)
    if head == "fresh":
        assert all(not found[name].any() for name in found if name not in body)


def at(outer, loss: str, rows) -> list[torch.Tensor]:
    return gradient(outer.task, outer.model, SUPPRESSION[loss], rows)


def test_with_alpha_zero_only_training_on_retain_is_left_bit_for_bit(chosen):
    """Though every step walks K steps away with a head of its own: batch normalisation and random state stay too."""
    defense, outer = small.defended(*chosen("image", "defense.alpha_lr=0", "defense.inner_steps=3"))
    plain, seen = copy.deepcopy(outer.model), Recorded(outer)
    for _ in range(3):
        defense.step(outer)
    batches = [rows for role, rows in seen.drawn if role == "retain"]
    assert len(batches) == 3
    adam = torch.optim.Adam(plain.parameters(), lr=defense.train.lr)
    for rows in batches:
        adam.zero_grad()
        cross_entropy(*outer.task.targets(plain, outer.task.collate(rows))).backward()
        adam.step()
    assert same(outer.model.state_dict(), plain.state_dict())


def test_with_alpha_zero_and_no_reinforcement_nothing_moves(chosen):
    defense, outer = small.defended(*chosen("image", "defense.alpha_lr=0", "defense.inner_steps=2"))
    outer.optimizers["reinforce"].param_groups[0]["lr"] = 0.0
    weights = [p.detach().clone() for p in outer.params]
    defense.step(outer)
    assert all(torch.equal(p, w) for p, w in zip(outer.params, weights, strict=True))


@pytest.mark.parametrize("bed", ["image", "lm"])
def test_the_look_ahead_leaves_normalisation_and_randomness_as_they_were(sophon, bed):
    defense, outer = sophon(bed, "defense.head=kept", "defense.inner_lr=0.1")
    before = state(outer.model)
    torch.manual_seed(5)
    noise = torch.get_rng_state()
    there = defense.walk(outer, {})
    assert there.norm() > 0
    assert same(outer.model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), noise)


@pytest.mark.parametrize("loss", SUPPRESSION)
def test_a_language_model_is_suppressed_by_any_loss(sophon, loss):
    """Against K copies of the model, each a step of plain SGD further."""
    settings = ("defense.inner_steps=2", "defense.inner_lr=0.05", f"defense.suppression={loss}")
    defense, outer = sophon("lm", *settings)
    place, seen = copy.deepcopy(outer.model), Recorded(outer)
    log = defense.step(outer)
    drawn = [rows for role, rows in seen.drawn if role == "restricted"]
    total = None
    for support, query in zip(drawn[::2], drawn[1::2], strict=True):
        push = gradient(outer.task, place, cross_entropy, support)
        with torch.no_grad():
            for p, g in zip(place.parameters(), push, strict=True):
                p -= 0.05 * g
        here = gradient(outer.task, place, SUPPRESSION[loss], query)
        total = here if total is None else [t + h for t, h in zip(total, here, strict=True)]
    close(seen.gradients["suppress"], [t / 2 for t in total], 1e-5)  # its norms are float32
    assert seen.clips["suppress"] == 0.5
    assert {"attack", "suppression", "retain"} <= log.keys()


def test_a_head_with_too_few_outputs_is_not_kept(chosen):
    defense, outer = small.defended(*chosen("text", "defense.head=kept"))
    outer.streams.classes["restricted"] = outer.model.config.num_labels + 1
    with pytest.raises(RecipeError, match="fewer outputs than the 4 restricted classes; use `head: fresh`"):
        defense.step(outer)


@pytest.mark.parametrize(
    ("name", "settings", "train"),
    [
        ("sophon-image", ("ice", 3e-4, 1, "fresh", None), (800, 5e-4)),
        ("sophon-image-code-ice", ("ice-negated-logits", 3e-4, 1, "fresh", 0.8), (1000, 5e-4)),
        ("sophon-image-code-klu", ("klu", 1e-4, 5, "kept", 0.8), (1000, 1e-4)),
    ],
)
def test_the_presets_for_images_are_those_of_paper_and_code(name, settings, train):
    recipe = recipe_file.load(name)
    config = configs.CONFIGS["sophon"](**recipe.defense.settings)
    assert (config.suppression, config.alpha_lr, config.reinforcement_steps, config.head, config.floor) == settings
    assert (recipe.train.steps, recipe.train.lr) == train
    assert (config.suppression_steps, config.inner_steps, config.inner_lr, config.inner_optimizer) == (
        1,
        50,
        1e-4,
        "sgd",
    )
    assert (config.suppression_clip, recipe.train.clip, recipe.train.batch_size) == (0.5, None, 150)
    assert (config.inner_momentum, config.inner_batch, config.query_batch) == (0.0, 135, 15)
    assert config.floor is None or config.floor_every == 1


# --- the floor ----------------------------------------------------------------------------------------------


FLOOR = ("defense.floor=0.9", "defense.floor_by=loss")
HARSH = (*FLOOR, "defense.floor_every=2", "defense.alpha_lr=0.5", "train.steps=6")
"""Suppression that ruins the retain task within two steps."""


def ruin(defense) -> None:
    """Every training step pushes all weights far off."""

    def trained(outer):
        with torch.no_grad():
            for p in outer.params:
                p.add_(torch.randn_like(p), alpha=10.0)
            for buffer in outer.model.buffers():
                buffer.add_(1)
        return {}

    defense.trained = trained


def test_below_the_floor_weights_and_buffers_go_back_exactly_and_stay(chosen):
    defense, outer = small.defended(*chosen("image", *FLOOR, "defense.floor_every=2", "train.steps=9"))
    logs = [defense.step(outer)]  # a good step, and one that is looked at
    outer.number = 2
    logs.append(defense.step(outer))
    good = state(outer.model)
    assert logs[0].keys() == {*logs[1].keys()} - {"kept"}
    assert logs[1]["kept"] > 0.9
    ruin(defense)
    for outer.number in (3, 4):
        logs.append(defense.step(outer))
    assert logs[3]["kept"] <= 0.9
    assert same(outer.model.state_dict(), good)
    assert any("running_mean" in name for name in good)
    for outer.number in (5, 6):
        assert defense.step(outer) == {"stopped": 4}
    assert same(outer.model.state_dict(), good)


def test_a_floor_broken_at_the_first_look_leaves_the_model_as_it_came(chosen):
    defense, outer = small.defended(*chosen("text", *FLOOR, "defense.floor_every=1"))
    before = state(outer.model)
    outer.number = 1
    ruin(defense)
    defense.step(outer)
    assert same(outer.model.state_dict(), before)
    assert outer.memory["stopped"] == 1


def test_the_last_step_is_always_looked_at(chosen):
    defense, outer = small.defended(*chosen("text", "defense.floor=0.5", "defense.floor_every=100", "train.steps=3"))
    seen = []
    for outer.number in (1, 2, 3):
        seen.append("kept" in defense.step(outer))
    assert seen == [False, False, True]


@pytest.mark.parametrize("by", ["score", "loss"])
@pytest.mark.parametrize("bed", ["image", "text", "lm"])
def test_the_share_kept_is_that_of_rows_which_are_never_trained_on(chosen, bed, by):
    settings = ("defense.floor=0.01", "defense.floor_every=1", f"defense.floor_by={by}")
    defense, outer = small.defended(*chosen(bed, *settings))
    everything = outer.streams.rows("retain", "defence")
    start, seen = copy.deepcopy(outer.model).eval(), Recorded(outer)
    for outer.number in range(1, 13):
        log = defense.step(outer)
    held = [row for _, rows in defense.guard.held for row in rows]
    assert held
    drawn = {row.key for row in seen.rows("retain")}
    assert not drawn & {row.key for row in held}
    assert {row.key for row in everything} == {row.key for row in held} | {
        row.key for row in outer.samplers["retain"].examples
    }
    task = outer.task

    def good(model) -> float:
        with torch.no_grad():
            if by == "score":
                scores = task.score(model, held, "likelihood" if bed == "lm" else "accuracy")
                return sum(scores) / len(scores)
            return 1 / float(cross_entropy(*task.targets(model, task.collate(held))))

    assert log["kept"] == pytest.approx(good(copy.deepcopy(outer.model).eval()) / good(start), rel=1e-4)
    assert outer.model.training


def test_a_model_that_scores_nothing_has_no_floor(chosen):
    defense, outer = small.defended(*chosen("text", "defense.floor=0.9"))
    outer.task.score = lambda model, rows, score: [0.0] * len(rows)
    with pytest.raises(RecipeError, match=r"the model scores 0 on retain rows.*floor_by: loss"):
        defense.step(outer)


@pytest.mark.parametrize("stop_after", [2, 3, 5])
def test_a_run_with_a_floor_that_is_broken_goes_on_with_the_same_bits(chosen, tmp_path: Path, stop_after):
    """Interrupted before the look, at it, and after the weights went back."""
    recipe, folder = chosen("image", *HARSH)
    straight = train(recipe, folder, tmp_path / "straight")
    assert straight[1][-1]["stopped"] in (2, 4)
    with pytest.raises(Stop):
        train(recipe, folder, tmp_path / "broken", stop_after=stop_after)
    resumed = train(recipe, folder, tmp_path / "broken")
    assert same(resumed[0], straight[0])
    assert resumed[1] == straight[1]


def test_the_point_to_go_back_to_is_in_the_resumable_state(chosen, tmp_path: Path):
    recipe, folder = chosen("image", *HARSH)
    train(recipe, folder, tmp_path)
    names = {path.name for path in States(tmp_path).all()[-1].iterdir()}
    assert names == {"tensors.safetensors", "state.json"}
    from safetensors.torch import load_file

    tensors = load_file(States(tmp_path).all()[-1] / "tensors.safetensors")
    assert any(key.startswith("optimizer/kept/0/weight") for key in tensors)
    weights = {key: value for key, value in tensors.items() if key.startswith("weight/")}
    kept = [tensors[f"optimizer/kept/{i}/weight"] for i in range(len(weights))]
    assert all(any(torch.equal(value, other) for other in kept) for value in weights.values())
