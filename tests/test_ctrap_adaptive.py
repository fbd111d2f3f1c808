"""The trap against attackers who adapt: its gradient by a second road, its price, its population."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter

import pytest
import small
import torch
from test_defenses import Recorded, close, gradient, length, minus

from hardener.defenses.configs import CtrapAdaptiveConfig
from hardener.defenses.ctrap_adaptive import DEAREST, FALL, RISE, Drawn, half
from hardener.defenses.low_rank import LowRank, linear_weights
from hardener.defenses.population import OPTIMIZERS, Dice
from hardener.errors import RecipeError
from hardener.losses import collapse, cross_entropy, divergence, kl_from_uniform

ROLES = {
    "harm": [["restricted"]] * 3,
    "mixed": [["restricted", "retain"]] * 3,
    "benign-loss": [["restricted", "retain"]] * 3,
    "repair": [["restricted"], ["restricted"], ["retain"]],
    "warm-up": [["retain"], ["retain"], ["restricted"]],
}
"""Goal → roles whose rows a walk of three steps takes, in order."""


def adaptive(letters, paths, *more: str, **settings: object):
    """On float64 weights, a walk of three steps of one kind: (defense, outer)."""
    own = {
        **{"name": "ctrap-adaptive", "inner_steps": [3, 3], "cap": None, "goals": ["harm"], "subspaces": ["all"]},
        **{"rates": {"adamw": [1e-2, 1e-2]}, "lora": {"r": 2, "alpha": 4}},
    }
    chosen = small.recipe(paths, "defense=" + json.dumps(own | settings), *more)
    defense, outer = small.defended(chosen, letters)
    outer.model.double()
    outer.origin.double()
    outer.optimizers = defense.optimizers(outer.params)
    return defense, outer


def joined(goal: str) -> bool:
    """Whether a step takes one mean over the rows of all its roles."""
    return goal == "mixed"


@pytest.mark.parametrize("subspace", ["all", "lora", "half"])
@pytest.mark.parametrize("goal", ROLES)
def test_the_gradient_is_that_of_the_objective_at_the_end_of_a_plain_attack(letters, paths, goal, subspace):
    """∇KL(θ₀‖θ; G) + ∇L(θ; A) + (λ/ν)·(∇C(θ_K; G) + σ·∇U(θ_K; H)), from a model that has already moved."""
    settings = {"goals": [goal], "subspaces": [subspace], "lam": 0.7, "restricted_weight": 0.4}
    defense, outer = adaptive(letters, paths, **settings)
    with torch.no_grad():
        for p in outer.params:
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    start, seen = copy.deepcopy(outer.model), Recorded(outer)
    log = defense.step(outer)

    task, there = outer.task, copy.deepcopy(start)
    dice = defense.draw(outer).dice
    rate = 1e-1 if subspace == "lora" else 1e-2
    if subspace == "lora":
        attacker = LowRank(
            linear_weights(there, defense.config.lora),
            lambda factors: OPTIMIZERS["adamw"](factors, rate),
            defense.config.lora,
            dice.generator,
        )
    else:
        params = list(there.parameters())
        attacker = OPTIMIZERS["adamw"](params if subspace == "all" else half(params, dice), rate)
    (_, general), (_, refusals), *rest = seen.drawn
    for roles in ROLES[goal]:
        parts = [rest.pop(0) for _ in roles]
        assert [role for role, _ in parts] == roles
        if joined(goal):
            parts = [("both", [row for _, rows in parts for row in rows])]
        found = [gradient(task, there, cross_entropy, rows) for _, rows in parts]
        for p, *all_of_it in zip(there.parameters(), *found, strict=True):
            p.grad = sum(all_of_it)
        attacker.step()
    ((role, h),) = rest
    assert role == "restricted"
    with torch.no_grad():
        told, _ = task.targets(outer.origin, task.collate(general))
    expected = [
        keep + refuse + 0.7 / log["price"] * (trap + 0.4 * suppressed)
        for keep, refuse, trap, suppressed in zip(
            gradient(task, start, lambda logits, _: divergence(told, logits, 1.0), general),
            gradient(task, start, cross_entropy, refusals),
            gradient(task, there, collapse(defense.token), general),
            gradient(task, there, kl_from_uniform, h),
            strict=True,
        )
    ]
    close(seen.gradients["outer"], expected, 1e-6)
    with torch.no_grad():
        losses = [float(cross_entropy(*task.targets(there, task.collate(rows)))) for rows in (h, general)]
    assert log["won"] == pytest.approx(math.exp(-sum(losses)))
    assert {outer.memory[f"won/{name}"] for name in (goal, subspace, "adamw")} == {log["won"]}


def test_a_dearer_utility_makes_trap_and_counter_term_weigh_less(letters, paths):
    shares = {}
    for price in (1.0, 10.0):
        defense, outer = adaptive(letters, paths, lam=0.5, benign_weight=0.5, bound=1e9)
        outer.memory["price"] = price * math.exp(FALL)  # no drift: it falls by one pace
        start, seen = copy.deepcopy(outer.model), Recorded(outer)
        log = defense.step(outer)
        assert log["price"] == pytest.approx(price)
        keep = gradient(outer.task, start, cross_entropy, seen.drawn[1][1])  # nothing drifted: refusals alone
        shares[price] = length(minus(seen.gradients["outer"], keep))
    assert shares[1.0] == pytest.approx(10 * shares[10.0], rel=1e-6)


def test_the_price_rises_above_the_bound_and_falls_below_it_within_its_limits(letters, paths):
    defense, _ = adaptive(letters, paths, bound=0.1)
    memory: dict[str, float] = {}
    assert defense.price(memory, 0.0) == 1.0  # it cannot fall below
    assert defense.price(memory, 0.15) == pytest.approx(math.exp(0.5 * RISE))
    for _ in range(9):
        defense.price(memory, 100.0)
    assert defense.price(memory, 0.1) == pytest.approx(math.exp(9.5 * RISE))
    assert defense.price(memory, 0.05) == pytest.approx(math.exp(9.5 * RISE - 0.5 * FALL))
    for _ in range(200):
        defense.price(memory, 100.0)
    assert memory["price"] == DEAREST


def test_utility_is_a_bound_that_holds_where_a_weight_alone_breaks_it(letters, paths):
    """A strong trap for 60 steps, with a price and without one."""
    drifts = {}
    for bound in (1e9, 0.01):
        defense, outer = adaptive(letters, paths, "train.lr=3.0e-3", lam=5.0, bound=bound)
        drift = []
        for number in range(1, 61):
            outer.number = number
            drift.append(defense.step(outer)["drift"])
        drifts[bound] = sum(drift[-20:]) / 20
    assert drifts[1e9] > 0.1
    assert drifts[0.01] < 0.03


def test_a_step_moves_no_weight_but_by_its_optimizer(letters, paths):
    for goal in ROLES:
        for subspace in ("all", "lora", "half"):
            defense, outer = adaptive(letters, paths, goals=[goal], subspaces=[subspace], benign_weight=1.0)
            outer.optimizers["outer"].param_groups[0]["lr"] = 0.0
            before, origin, random = (
                copy.deepcopy(outer.model.state_dict()),
                copy.deepcopy(outer.origin.state_dict()),
                torch.get_rng_state(),
            )
            defense.step(outer)
            assert all(torch.equal(value, before[key]) for key, value in outer.model.state_dict().items())
            assert all(torch.equal(value, origin[key]) for key, value in outer.origin.state_dict().items())
            assert torch.equal(torch.get_rng_state(), random)


def test_every_kind_of_attacker_is_met_and_the_one_who_wins_more_often(letters, paths):
    defense, outer = adaptive(
        letters,
        paths,
        goals=list(ROLES),
        subspaces=["all", "lora", "half"],
        rates={"adamw": [1e-4, 1e-2], "sgd-momentum": [1e-3, 1e-1]},
    )
    for population, best in ((defense.goals, "mixed"), (defense.subspaces, "lora"), (defense.movers, "adamw")):
        for member in population.members:
            population.learn(member, 0.9 if member == best else 0.1, outer.memory)
    drawn: list[Drawn] = []
    for outer.number in range(1, 401):
        drawn.append(defense.draw(outer))
    for field, best in (("goal", "mixed"), ("subspace", "lora"), ("optimizer", "adamw")):
        counts = Counter(getattr(attacker, field) for attacker in drawn)
        assert counts.most_common(1)[0][0] == best
        assert min(counts.values()) > 5
    rates = [d.rate for d in drawn if (d.optimizer, d.subspace) == ("adamw", "lora")]
    assert 1e-3 <= min(rates) < 2e-3  # ten times those of all weights
    assert 5e-2 < max(rates) <= 1e-1


def test_half_of_the_tensors_is_another_half_each_time():
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(9)]
    chosen = [{id(p) for p in half(params, Dice.of(0, number))} for number in range(20)]
    assert {len(one) for one in chosen} == {5}
    assert len({frozenset(one) for one in chosen}) > 10


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"goals": ["harm"]}, 9 + 2 + 2),
        ({"goals": ["benign-loss"]}, 18 + 2 + 2),
        ({"goals": ["harm", "benign-loss"], "kept": "even", "benign_weight": 1.0}, 14 + 18 + 2 + 10),
    ],
)
def test_the_passes_are_counted_at_the_mean_length(settings, passes):
    assert CtrapAdaptiveConfig(**settings).passes == passes


def test_the_passes_counted_are_those_that_the_model_makes(letters, paths):
    for goal in ROLES:
        defense, outer = adaptive(letters, paths, goals=[goal], benign_weight=1.0)
        seen: list[int] = []
        outer.model.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        defense.step(outer)
        assert len(seen) == defense.config.passes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"goals": []}, "defense.goals"),
        ({"goals": ["theft"]}, "defense.goals"),
        ({"rates": {"adamw": [1e-2, 1e-3]}}, "defense.rates: the lower end comes first"),
        ({"rates": {"lion": [1e-3, 1e-2]}}, "defense.rates"),
        ({"order": "second"}, "second order is defined for one normalised step"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(paths, settings, message):
    with pytest.raises(RecipeError, match=message):
        small.recipe(paths, "defense=" + json.dumps({"name": "ctrap-adaptive", **settings}))


def test_a_simulated_lora_is_refused_beside_an_adapter(paths):
    defense = "defense=" + json.dumps({"name": "ctrap-adaptive"})
    with pytest.raises(RecipeError, match=r"defense\.subspaces: a LoRA is simulated on all weights"):
        small.recipe(paths, defense, "adapter={r: 4, alpha: 8}")
    small.recipe(
        paths, "defense=" + json.dumps({"name": "ctrap-adaptive", "subspaces": ["all"]}), "adapter={r: 4, alpha: 8}"
    )
