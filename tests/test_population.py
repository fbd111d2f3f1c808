"""A population: the winner comes more often, nobody is forgotten, and a resumed run meets the same."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import nn

from hardener.defenses.population import EVEN, OPTIMIZERS, Dice, Population

THREE = Population(("harm", "mixed", "repair"))


def drawn(memory: dict[str, float], n: int = 3000) -> Counter[str]:
    return Counter(THREE.draw(Dice.of(0, number), memory) for number in range(n))


def test_before_anything_is_known_all_come_alike():
    assert THREE.chances({}) == pytest.approx([1 / 3] * 3)


def test_the_one_who_wins_comes_more_often_and_the_beaten_are_not_forgotten():
    memory: dict[str, float] = {}
    for name, score in zip(THREE.members, (0.0, 0.9, 0.1), strict=True):
        THREE.learn(name, score, memory)
    chances = THREE.chances(memory)
    assert chances == pytest.approx([EVEN / 3, EVEN / 3 + 0.75 * 0.9, EVEN / 3 + 0.75 * 0.1])
    counts = drawn(memory)
    assert [counts[name] / 3000 for name in THREE.members] == pytest.approx(chances, abs=0.03)


def test_a_member_not_met_yet_counts_as_one_that_wins():
    memory: dict[str, float] = {}
    THREE.learn("harm", 0.2, memory)
    harm, mixed, repair = THREE.chances(memory)
    assert harm < mixed == repair


def test_where_all_were_beaten_they_come_alike():
    memory: dict[str, float] = {}
    for name in THREE.members:
        THREE.learn(name, 0.0, memory)
    assert THREE.chances(memory) == pytest.approx([1 / 3] * 3)


def test_a_score_is_forgotten_step_by_step():
    memory: dict[str, float] = {}
    for score in (1.0, 0.0, 0.0):
        THREE.learn("harm", score, memory)
    assert next(iter(memory.values())) == pytest.approx(0.49)


def test_the_dice_of_a_step_fall_the_same_way_again_and_those_of_others_do_not():
    def throw(seed: int, number: int) -> tuple[int, float, int]:
        dice = Dice.of(seed, number)
        return dice.integer(1, 1000), dice.rate(1e-5, 1e-1), dice.choice([1.0] * 1000)

    assert throw(0, 7) == throw(0, 7)
    assert len({throw(0, 7), throw(0, 8), throw(1, 7)}) == 3


def test_both_ends_of_a_range_are_drawn_and_rates_fall_evenly_over_decades():
    assert {Dice.of(0, n).integer(2, 4) for n in range(100)} == {2, 3, 4}
    rates = [Dice.of(0, n).rate(1e-4, 1e-1) for n in range(3000)]
    assert min(rates) >= 1e-4
    assert max(rates) <= 1e-1
    decades = Counter(math.floor(math.log10(rate)) for rate in rates)
    assert [decades[d] / 3000 for d in (-4, -3, -2)] == pytest.approx([1 / 3] * 3, abs=0.04)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_an_attacker_goes_downhill(name):
    point = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = OPTIMIZERS[name]([point], 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        point.square().sum().backward()
        optimizer.step()
    assert float(point.square().sum().detach()) < 13.0
