"""SOPHON: what it reduces to, the floor from which weights go back exactly, and the population of attackers."""

from __future__ import annotations

import copy
import itertools
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file
from test_defenses import Recorded, close, gradient
from test_loop import Stop, same, train

from hardener import pipeline, recipe_file
from hardener.defenses import configs
from hardener.defenses.sophon_wide import OPTIMIZERS, Adapter
from hardener.errors import RecipeError
from hardener.losses import SUPPRESSION, cross_entropy, divergence
from hardener.recipe import Lora
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
    return lambda bed, *more: double(chosen(bed, *more))


def double(recipe):
    """A defence on float64 weights: (defense, outer)."""
    defense, outer = small.defended(*recipe)
    outer.model.double()
    if outer.origin is not None:
        outer.origin.double()
    outer.optimizers = defense.optimizers(outer.params)
    targets = outer.task.targets
    outer.task.targets = lambda model, batch: targets(model, widened(batch))
    return defense, outer


def widened(batch):
    return replace(batch, inputs={k: v.double() if v.is_floating_point() else v for k, v in batch.inputs.items()})


def state(model) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def streamed(task, place, seen, loss: str, rate: float) -> list[torch.Tensor]:
    """The mean suppression gradient over a walk of plain SGD on the rows that were seen, in `place`."""
    drawn = [rows for role, rows in seen.drawn if role == "restricted"]
    walks = list(zip(drawn[::2], drawn[1::2], strict=True))
    total = [torch.zeros_like(p) for p in place.parameters()]
    for support, query in walks:
        push = gradient(task, place, cross_entropy, support)
        with torch.no_grad():
            for p, g in zip(place.parameters(), push, strict=True):
                p -= rate * g
        total = [t + h for t, h in zip(total, gradient(task, place, SUPPRESSION[loss], query), strict=True)]
    return [t / len(walks) for t in total]


# --- what a step is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ice", "klu"])
@pytest.mark.parametrize("bed", ["image", "text", "lm"])
def test_sophons_streamed_gradient_is_the_mean_over_the_walk(sophon, bed, loss):
    """Against K copies of the model, each a step of plain SGD further, and one gradient at each."""
    steps, rate = 3, 0.05
    settings = [f"defense.inner_steps={steps}", f"defense.inner_lr={rate}", f"defense.suppression={loss}"]
    defense, outer = sophon(bed, "defense.head=kept", *settings)
    place, seen = copy.deepcopy(outer.model), Recorded(outer)
    defense.step(outer)
    assert sum(role == "restricted" for role, _ in seen.drawn) == 2 * steps
    close(seen.gradients["suppress"], streamed(outer.task, place, seen, loss, rate), 1e-5)


def test_k_simulated_steps_leave_batchnorm_and_randomness_untouched(sophon):
    defense, outer = sophon("image")
    before = copy.deepcopy(outer.model.state_dict())
    torch.manual_seed(5)
    with defense.head(outer):
        after_head = torch.get_rng_state()
        defense.walk(outer, {})
        assert torch.equal(torch.get_rng_state(), after_head)
    after = outer.model.state_dict()
    assert any("running_mean" in key for key in before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("bed", ["image", "text"])
def test_suppression_with_a_fresh_head_leaves_the_models_own_head_alone(sophon, bed):
    defense, outer = sophon(bed)
    outer.optimizers["reinforce"].param_groups[0]["lr"] = 0.0  # reinforcement alone may move it, and here does not
    names = list(outer.task.head(outer.model))
    own = {name: outer.model.get_parameter(name) for name in names}
    before = {name: p.detach().clone() for name, p in own.items()}
    body = {n: p.detach().clone() for n, p in outer.model.named_parameters() if n not in own}
    defense.step(outer)
    assert all(outer.model.get_parameter(name) is own[name] for name in names)
    assert all(torch.equal(own[name], before[name]) for name in names)
    assert any(not torch.equal(outer.model.get_parameter(n), p) for n, p in body.items())


def test_every_walk_draws_another_head(sophon):
    defense, outer = sophon("image")
    heads = []
    for _ in range(2):
        with defense.head(outer):
            heads.append([outer.model.get_parameter(name).detach().clone() for name in outer.task.head(outer.model)])
    assert not all(torch.equal(a, b) for a, b in zip(*heads, strict=True))


def test_reinforcement_is_adam_on_the_cross_entropy_of_the_original_task(sophon):
    defense, outer = sophon("text", "train.lr=1.0e-2")
    defense.walk = lambda *_: Nothing()
    plain, seen = copy.deepcopy(outer.model), Recorded(outer)
    defense.step(outer)
    rows = seen.rows("retain")
    adam = torch.optim.Adam(plain.parameters(), lr=1e-2)
    logits, labels = outer.task.targets(plain, outer.task.collate(rows))
    cross_entropy(logits, labels).backward()
    adam.step()
    close([p.detach() for p in outer.model.parameters()], [p.detach() for p in plain.parameters()], 1e-6)


class Nothing:
    """A walk from which no gradient came back."""

    def add_kept(self) -> None:
        pass


def test_the_two_optimizers_do_not_share_their_moments(sophon):
    defense, outer = sophon("text", "defense.suppression_steps=2", "defense.reinforcement_steps=3")
    defense.step(outer)
    counts = {name: {int(s["step"]) for s in o.state.values()} for name, o in outer.optimizers.items()}
    assert counts == {"suppress": {2}, "reinforce": {3}}


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


@pytest.mark.parametrize("loss", [name for name in SUPPRESSION if name != "dos"])
def test_a_language_model_is_suppressed_by_any_loss(sophon, loss):
    """Against K copies of the model, each a step of plain SGD further."""
    settings = ("defense.inner_steps=2", "defense.inner_lr=0.05", f"defense.suppression={loss}")
    defense, outer = sophon("lm", *settings)
    place, seen = copy.deepcopy(outer.model), Recorded(outer)
    log = defense.step(outer)
    assert sum(role == "restricted" for role, _ in seen.drawn) == 2 * 2
    close(seen.gradients["suppress"], streamed(outer.task, place, seen, loss, 0.05), 1e-5)  # its norms are float32
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
    held = [row for _, rows in defense.floor.held for row in rows]
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


# --- a population of attackers ------------------------------------------------------------------------------


@pytest.fixture
def wide(chosen):
    """A small recipe of SOPHON against a population: (recipe, folder of the model)."""

    def make(bed: str, *more: str, **settings: object):
        own = {
            "name": "sophon-wide",
            "inner_steps": [2, 4],
            "inner_batches": [4, 8],
            "query_batch": 4,
            "query_every": 2,
        }
        floor = {"floor_by": "loss", "floor": 0.01}
        return chosen(bed, "defense=" + json.dumps(own | floor | settings), *more)

    return make


def test_every_outer_step_draws_another_attacker_and_the_same_one_again(wide):
    """By the seed, the number of the step and the scores, and by nothing else."""

    def attackers(seed: int, memory: dict[str, float]):
        defense, outer = small.defended(*wide("image", f"train.seed={seed}"))
        outer.memory.update(memory)
        torch.rand(seed + 3)
        drawn = []
        for outer.number in range(1, 9):
            found = defense.draw(outer)
            drawn.append((*found.names.values(), found.rate, found.batch, found.steps, found.warm_up))
        return drawn

    first = attackers(0, {})
    assert first == attackers(0, {})
    assert len(set(first)) == len(first)
    assert first != attackers(1, {})
    beaten = {f"won/head {head}": score for head, score in (("kept", 0.0), ("fresh", 1.0))}
    assert first != attackers(0, beaten)


def test_rates_cover_at_least_three_decades_for_each_optimizer_in_pieces_that_meet(wide):
    defense, outer = small.defended(*wide("image"))
    for optimizer in ("sgd-momentum", "nesterov", "adamw", "adagrad", "adadelta"):
        bands = [(low, high) for name, low, high in defense.bands().values() if name == optimizer]
        assert bands[-1][1] / bands[0][0] >= 999
        assert all(high == pytest.approx(low) for (_, high), (low, _) in itertools.pairwise(bands))
    for outer.number in range(1, 40):
        found = defense.draw(outer)
        low, high = defense.config.rates[found.optimizer]
        assert low <= found.rate <= high
        assert 2 <= found.steps <= 4
        assert found.batch in (4, 8)


def test_who_wins_is_drawn_again_and_who_diverged_is_not(wide):
    """SGD at 1e4 ends nowhere; the other learns."""
    rates = {"sgd-momentum": [1e4, 1e4], "adamw": [1e-3, 1e-3]}
    settings = {"rates": rates, "heads": ["fresh"], "scopes": ["all"], "suppression": "ice", "inner_steps": [8, 8]}
    defense, outer = small.defended(*wide("text", **settings))
    for outer.number in range(1, 13):
        defense.step(outer)
    won = {name: outer.memory[f"won/rate {name}"] for name in defense.bands()}
    assert won["sgd-momentum 1.0e+04"] < won["adamw 1.0e-03"]
    drawn = [defense.draw(outer).optimizer for outer.number in range(100, 160)]
    assert drawn.count("adamw") > drawn.count("sgd-momentum") > 0


def test_an_attacker_that_diverges_suppresses_nothing(wide):
    settings = {"rates": {"sgd": [1e30, 1e30]}, "scopes": ["all"], "warm_up": [0, 0], "inner_steps": [4, 4]}
    defense, outer = small.defended(*wide("image", **settings))
    before = state(outer.model)
    outer.optimizers["reinforce"].param_groups[0]["lr"] = 0.0
    defense.reinforce = lambda *_: None
    log = defense.step(outer)
    assert log["won"] == 0.0
    assert same(outer.model.state_dict(), before)


@pytest.mark.parametrize("head", ["kept", "fresh"])
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw", "adadelta"])
def test_the_gradient_of_a_wide_walk_is_the_mean_over_its_looks(wide, optimizer, head):
    """Against a plain attack on a copy, after a warm-up on the original task with the model's own head."""
    settings = {"rates": {optimizer: [0.01, 0.01]}, "heads": [head], "scopes": ["all"], "inner_steps": [4, 4]}
    settings |= {"warm_up": [2, 2], "inner_batches": [8], "suppression": "ice", "suppression_clip": None}
    defense, outer = double(wide("text", **settings))
    start, seen = copy.deepcopy(outer.model), Recorded(outer)
    make = OPTIMIZERS[optimizer]
    torch.manual_seed(3)
    log = defense.step(outer)
    warm = [rows for role, rows in seen.drawn if role == "retain"][:2]
    drawn = [rows for role, rows in seen.drawn if role == "restricted"]
    batches, queries = [drawn[i] for i in (0, 1, 3, 4)], {1: drawn[2], 3: drawn[5]}
    walk(outer, start, make(start.parameters(), 0.01), warm)
    own = [p for name, p in start.named_parameters() if name not in outer.task.head(start)]
    torch.manual_seed(3)
    total = None
    with outer.task.fresh_head(start, 3) if head == "fresh" else nullcontext():
        phi = make(start.parameters(), 0.01)
        for k, rows in enumerate(batches):
            walk(outer, start, phi, [rows])
            if k in queries:
                here = gradients_of(outer, start, own, "ice", queries[k])
                total = here if total is None else [t + h for t, h in zip(total, here, strict=True)]
    names = [name for name, _ in outer.model.named_parameters() if name not in outer.task.head(outer.model)]
    found = dict(zip(dict(outer.model.named_parameters()), seen.gradients["suppress"], strict=True))
    close([found[name] for name in names], [t / 2 for t in total], 1e-5)
    assert 0 < log["won"] < 1


def walk(outer, model, optimizer, batches) -> None:
    """Plain training on `model`."""
    for rows in batches:
        for p, g in zip(model.parameters(), gradient(outer.task, model, cross_entropy, rows), strict=True):
            p.grad = g
        optimizer.step()


def gradients_of(outer, model, params, loss: str, rows) -> list[torch.Tensor]:
    found = torch.autograd.grad(SUPPRESSION[loss](*outer.task.targets(model, outer.task.collate(rows))), params)
    return list(found)


@pytest.mark.parametrize("scope", ["all", "head", "lora"])
@pytest.mark.parametrize("bed", ["image", "text", "lm"])
def test_an_attacker_trains_what_it_is_said_to(wide, bed, scope):
    if (bed, scope) == ("lm", "head"):
        return
    defense, outer = small.defended(*wide(bed, scopes=[scope], heads=["fresh"], rates={"adamw": [0.01, 0.01]}))
    before = {name: p.detach().clone() for name, p in outer.model.named_parameters()}
    moved: set[str] = set()
    forward = outer.model.forward

    def watching(*args, **kwargs):
        moved.update(n for n, p in outer.model.named_parameters() if n in before and not torch.equal(p, before[n]))
        return forward(*args, **kwargs)

    outer.model.forward = watching
    attacker = defense.draw(outer)
    defense.walk(outer, replace(attacker, warm_up=0), {})
    head = set(outer.task.head(outer.model))
    if scope == "head":
        assert moved == head
        return
    assert head <= moved
    body = moved - head
    plain = {n for n in body if before[n].dim() < 2}
    assert body
    assert bool(plain) == (scope == "all")
    assert not any(n.startswith("lm_head") for n in body) or scope == "all"


def test_a_simulated_lora_on_convolutions_is_pefts(wide):
    """Three steps of AdamW on the factors, started alike."""
    from peft import LoraConfig, get_peft_model

    conv = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.Flatten(), torch.nn.Linear(4 * 16, 5))
    twin = get_peft_model(copy.deepcopy(conv), LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]))
    weights = [conv[0].weight, conv[2].weight]
    make = OPTIMIZERS["adamw"]
    adapter = Adapter(weights, lambda ab: make(ab, 0.05), Lora(r=2, alpha=4), torch.Generator().manual_seed(0))
    layers = [twin.base_model.model[0], twin.base_model.model[2]]
    with torch.no_grad():
        for layer, (_, _, a) in zip(layers, adapter.factors, strict=True):
            layer.lora_A["default"].weight.copy_(a.view_as(layer.lora_A["default"].weight))
    theirs = make([p for p in twin.parameters() if p.requires_grad], 0.05)
    x, y = torch.randn(6, 3, 6, 6), torch.arange(6) % 5
    for _ in range(3):
        for model, optimizer in ((conv, adapter), (twin, theirs)):
            model.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    merged = twin.merge_and_unload()
    close([w.detach() for w in weights], [merged[0].weight.detach(), merged[2].weight.detach()], 1e-5)


def test_reinforcement_adds_the_divergence_from_the_parent(wide):
    """∇[L + κ·KL(f₀‖f)], f₀ in its own mode: on a model that was moved away, the second term pulls it back."""
    defense, outer = double(wide("image", distil=0.7, reinforcement_steps=1))
    came = copy.deepcopy(outer.model).eval()
    with torch.no_grad():
        for p in outer.params:
            p.add_(torch.randn_like(p), alpha=0.05)
    start, seen = copy.deepcopy(outer.model), Recorded(outer)
    defense.reinforce(outer, {})
    rows = outer.task.collate(seen.rows("retain"))
    logits, labels = outer.task.targets(start, rows)
    with torch.no_grad():
        told, _ = outer.task.targets(came, rows)
    loss = cross_entropy(logits, labels) + 0.7 * divergence(told, logits, 1.0)
    close(seen.gradients["reinforce"], list(torch.autograd.grad(loss, list(start.parameters()))), 1e-9)


def test_no_parent_is_kept_where_nothing_is_distilled(wide):
    defense, outer = small.defended(*wide("text", distil=0.0))
    assert outer.origin is None
    assert "retain alone" not in defense.step(outer)


def test_below_the_floor_alpha_is_halved_and_training_goes_on(wide):
    settings = {"floor": 0.9, "floor_every": 1, "alpha_lr": 0.04}
    defense, outer = small.defended(*wide("image", "train.steps=20", **settings))
    before = state(outer.model)
    outer.number = 1
    reinforce = defense.reinforce
    defense.reinforce = lambda outer, log: (reinforce(outer, log), shake(outer))
    log = defense.step(outer)
    outer.advance()
    assert log["alpha"] == 0.02
    assert same(outer.model.state_dict(), before)
    assert not outer.optimizers["suppress"].state
    assert outer.optimizers["suppress"].param_groups[0]["lr"] == 0.02
    assert outer.optimizers["reinforce"].param_groups[0]["lr"] == defense.train.lr
    defense.reinforce = reinforce
    outer.number = 2
    assert "stopped" not in defense.step(outer)


def shake(outer) -> None:
    with torch.no_grad():
        for p in outer.params:
            p.add_(torch.randn_like(p), alpha=10.0)


@pytest.mark.parametrize("settings", [{}, {"floor": 0.97, "floor_every": 1, "alpha_lr": 0.3}])
def test_a_wide_run_goes_on_with_the_same_bits(wide, tmp_path: Path, settings):
    """Attackers, their scores, the parent, the floor and the halved α are the same ones."""
    recipe, folder = wide("image", "train.steps=6", "train.schedule=cosine", **settings)
    straight = train(recipe, folder, tmp_path / "straight")
    assert any("alpha" in point for point in straight[1]) == bool(settings)
    with pytest.raises(Stop):
        train(recipe, folder, tmp_path / "broken", stop_after=3)
    torch.rand(5)
    resumed = train(recipe, folder, tmp_path / "broken")
    assert same(resumed[0], straight[0])
    assert resumed[1] == straight[1]


def test_a_language_model_has_no_head_to_draw(wide):
    defense, outer = small.defended(*wide("lm", suppression="negative-entropy"))
    members = {kind: set(population.members) for kind, population in defense.populations(outer).items()}
    assert members["head"] == {"head kept"}
    assert members["scope"] == {"scope all", "scope lora"}
    assert math.isfinite(defense.step(outer)["suppression"])
    defense, outer = small.defended(*wide("lm", scopes=["head"]))
    with pytest.raises(RecipeError, match="no attacker is left"):
        defense.step(outer)


@pytest.mark.parametrize("settings", [{"inner_steps": [4, 2]}, {"warm_up": [2, 1]}, {"rates": {"adamw": [1e-2, 1e-3]}}])
def test_ends_of_a_range_stand_in_order(wide, settings):
    with pytest.raises(RecipeError, match="the lower end comes first"):
        wide("text", **settings)


def test_passes_and_rows_of_a_wide_step_are_those_of_its_mean_walk():
    config = configs.SophonWideConfig(inner_steps=(10, 30), inner_batches=(8, 24), warm_up=(0, 4), query_every=5)
    assert config.passes == 22 + 4 + 2
    assert config.rows(10) == 22 * 16 + 4 * 32 + 20


@pytest.mark.parametrize("name", ["sophon-wide-image", "sophon-wide-text", "sophon-wide-lm"])
def test_a_shipped_population_is_wide_and_says_that_it_is_not_the_papers(name):
    recipe = recipe_file.load(name)
    config = configs.SophonWideConfig(**recipe.defense.settings)
    assert len(config.rates) >= 3
    assert all(high / low >= 999 for low, high in config.rates.values())
    assert config.floor == 0.98
    assert config.distil > 0
    assert "extension" in recipe.title
    assert config.passes == 42


def test_an_erased_classifier_is_defended_from_there_and_held_to_the_parent_it_had(resnet, image_paths, tmp_path, warm):
    """Noise, then the allowed task distilled, then a population of attackers."""
    start = "erase={alpha: 1.0, steps: 3, batch_size: 8, lr: 1.0e-3, seed: 5}"
    settings = {"name": "sophon-wide", "alpha_lr": 1e-12, "inner_steps": [1, 2], "inner_batches": [8], "query_batch": 4}
    more = (
        start,
        f"defense={json.dumps(settings)}",
        "train.lr=1.0e-12",
        "train.steps=2",
        "probe.families=[fresh-head]",
    )
    own = [one for one in small.overrides(image_paths, name="tiny-sophon-image") if "defense." not in one]
    made = pipeline.harden(
        str(resnet), recipe="tiny-sophon-image", overrides=[*own, *more], output=tmp_path / "run", device="cpu"
    )
    assert made.report.training.title.endswith("after noise-then-distil")
    assert made.report.training.erased.share > 0.5
    parent, released = (load_file(f / "model.safetensors") for f in (resnet, tmp_path / "run" / "release"))
    erased = load_file(tmp_path / "run" / "state" / "erased" / "model.safetensors")
    matrices = [name for name in made.report.training.erased.parameters if parent[name].dim() > 1]
    assert all((released[name] - erased[name]).abs().max() < 1e-6 for name in matrices)
    cosine = torch.nn.functional.cosine_similarity
    assert all(cosine(released[name].flatten(), parent[name].flatten(), dim=0) < 0.9 for name in matrices)
    log = made.report.training.log
    assert log[-1]["retain"] - log[-1]["retain alone"] > 1e-4  # κ·KL from the parent, which an erased model is not
