"""Same seed, same machine kind: same bits, for every defence, interrupted or not, and for every attack."""

# ruff: noqa: F811 - fixtures that are imported are the arguments of tests
from __future__ import annotations

import pytest
import small
import torch
from test_attacks import attack, lm, text  # noqa: F401
from test_loop import Stop, same, train

from hardener import recipe_file, registry, sources
from hardener.console import quiet
from hardener.defenses.configs import CONFIGS

BEDS = {"sophon": "tiny-sophon-text", "sophon-wide": "tiny-sophon-text"}
"""Defence → the recipe that it is tried in, where that is not the one of language models."""


ELSEWHERE = ("ctrap", "sophon", "ctrap-rollout")
"""Defences of which `test_loop.py` asks the same in the default run."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ELSEWHERE else []) for name in CONFIGS]
)
def test_every_defence_gives_the_same_bits_again_although_it_was_interrupted(request, tmp_path, name):
    beds = ("bert", "text_paths") if name in BEDS else ("letters", "paths")
    folder, paths = (request.getfixturevalue(bed) for bed in beds)
    recipe = BEDS.get(name, "tiny-ctrap")
    words = [
        word for word in small.overrides(paths, name=recipe) if name == "sophon" or not word.startswith("defense.")
    ]
    settings = () if name in ("ctrap", "sophon") else (f"defense={{name: {name}}}",)
    chosen = sources.pin(recipe_file.load(recipe, [*words, *settings, "train.steps=3"]))
    whole = train(chosen, folder, tmp_path / "whole")
    with pytest.raises(Stop):
        train(chosen, folder, tmp_path / "broken", stop_after=2)
    torch.rand(7)  # the random state of the new process is another
    again = train(chosen, folder, tmp_path / "broken")
    assert same(whole[0], again[0])
    assert whole[1] == again[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        n
        for n in registry.BUILT_IN["attacks"]
        if registry.find("attacks", n).suits("language") or registry.find("attacks", n).suits("classifier")
    ],
)
def test_every_attack_gives_the_same_bits_again(lm, text, name):
    family = registry.find("attacks", name)
    if family.objective == "dpo":
        pytest.importorskip("trl", reason="the extra `dpo` is not installed")
    scene = lm if family.suits("language") else text
    rate = (family.doses or family.rates or (1e-3,))[0]
    with quiet():
        first = attack(scene, family, rate, seed=3, steps=2, batch_size=4)
        torch.rand(5)
        again = attack(scene, family, rate, seed=3, steps=2, batch_size=4)
    assert first[0] == again[0]
    assert same(first[1], again[1])
