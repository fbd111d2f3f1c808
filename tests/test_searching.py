"""The search finds what a ladder misses, says how many trials it took, and can be gone on with."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hardener.attacks.attack import Attack
from hardener.attacks.families import FULL, KICKED
from hardener.conditions import LEAST_TRIALS, rising
from hardener.measurement import Checkpoint, Run
from hardener.searching import MORE, search

FIRST = Attack(FULL, 1e-4, 0, 16, 16)


def made(attack: Attack, value: float, losses: tuple[float, ...] = (), steps: int = 16) -> Run:
    curve = (Checkpoint(step=0, scores=(0.0,)), Checkpoint(step=steps, scores=(value,)))
    return Run(family="full", rate=attack.rate, seed=0, curve=curve, train_loss=losses, setting=attack.setting)


def worth(run: Run) -> float:
    return run.curve[-1].scores[0]


def narrow(attack: Attack) -> float:
    """Only cosine at rates near 2e-3 works in full: no rate of the ladder, and not its schedule."""
    near = math.exp(-((math.log(attack.rate / 2e-3) / 0.7) ** 2))
    return 0.3 + 0.6 * near * (attack.family.schedule == "cosine")


def searched(value=narrow, losses=lambda attack: (1.0,) * 8, first=FIRST):
    """(runs, values, attacks in order)."""
    attacks = []

    def make(attack, watch):
        attacks.append(attack)
        shown = []
        for index, loss in enumerate(losses(attack)):
            shown.append(loss)
            if watch(index, loss):
                break
        return made(attack, value(attack), tuple(shown), steps=2 * len(shown))

    ladder = [made(replace(first, rate=rate), value(replace(first, rate=rate))) for rate in (1e-4, 3e-4, 1e-3)]
    runs, values = search(ladder, first, worth, make)
    return runs, values, attacks


def test_a_search_finds_what_no_rate_of_the_ladder_does():
    runs, values, attacks = searched()
    assert max(values[:3]) == pytest.approx(0.3, abs=1e-9)
    assert max(values) > 0.6
    assert values == tuple(map(worth, runs))
    assert len(runs) == 3 + len(attacks) >= LEAST_TRIALS
    assert max(run.rate for run in runs) <= 10 * 1e-3 * 1.001


def test_a_search_goes_on_while_its_best_still_rises_and_not_for_ever():
    count = [0]

    def later(attack):
        count[0] += 1
        return count[0] / 100

    runs, values, _ = searched(later)
    assert len(runs) == LEAST_TRIALS + 3 * MORE
    assert rising(values)
    level, _, _ = searched(lambda attack: 0.5)
    assert len(level) == LEAST_TRIALS


def test_a_hopeless_trial_is_given_up_by_its_loss():
    def losses(attack):
        return (9.0,) * 8 if attack.rate > 2e-3 else (1.0,) * 8

    runs, _, _ = searched(lambda attack: 0.5 if attack.rate < 2e-3 else 0.1, losses)
    hopeless = [run for run in runs if run.train_loss[:1] == (9.0,)]
    assert hopeless
    assert min(len(run.train_loss) for run in hopeless) < 8
    assert all(len(run.train_loss) == 8 for run in runs if run.train_loss[:1] == (1.0,))


def test_the_same_search_again_makes_the_same_attacks():
    """So that an interrupted one goes on: every finished run is found again under its attack."""
    assert searched()[2] == searched()[2]
    other = searched(first=replace(FIRST, seed=1))[2]
    assert other != searched()[2]


def test_every_trial_says_what_it_searched_over():
    _, _, attacks = searched()
    assert {attack.setting.split(", ")[0] for attack in attacks} == {"batch 8", "batch 16", "batch 32"}
    for attack in attacks:
        assert (
            attack.setting
            == f"batch {attack.batch_size}, {attack.family.schedule}, "
            + {
                1.0: "harm only",
                0.5: "half benign",
                0.1: "nine tenths benign",
            }[attack.family.phases[0].harm]
        )


def test_a_family_with_phases_of_its_own_keeps_them():
    _, _, attacks = searched(first=replace(FIRST, family=KICKED))
    assert {attack.family.phases for attack in attacks} == {KICKED.phases}
