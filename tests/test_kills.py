"""A run that is killed at any moment ends, once resumed, as if nothing had happened.

In the default run so many kills as take half a minute; `pytest -m slow tests/test_kills.py` tries two hundred.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import kills
import pytest
import small
import tiny
from kills import Chain

MICRO = (
    "erase={alpha: 0.3, steps: 2, batch_size: 4, lr: 1.0e-3, save_every: 1}",
    *("train.steps=3", "train.batch_size=4", "probe.families=[full]", "probe.batch_size=4", "probe.attack_rows=8"),
    *("probe.evaluation_rows=8", "probe.utility_rows=8"),
)
STAGES = {
    *("Preparing data", "Attacking the original", "Erasing the restricted capability"),
    *("Hardening with tiny-ctrap", "Attacking the release", "Writing report and card"),
}
INCONCLUSIVE = 4
"""How a run of so few steps ends."""


@pytest.fixture(scope="module")
def line(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """Erasure, defence, probe before and after, release: every stage that writes, in a few seconds."""
    paths = tiny.letter_data(tmp_path_factory.mktemp("few"), rows=80)
    words = [word for one in small.overrides(paths, *MICRO) for word in ("--set", one)]
    return ("harden", letters, "--recipe", "tiny-ctrap", "--device", "cpu", *words)


@pytest.fixture(scope="module")
def whole(line: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, kills.Ending]:
    """A run that nothing disturbed."""
    chain = Chain(tmp_path_factory.mktemp("whole"), line)
    ending = chain.live(None)
    assert ending.code == INCONCLUSIVE, ending.error
    return chain, ending


@pytest.mark.parametrize("number", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_after_any_number_of_kills_the_release_is_that_of_an_undisturbed_run(line, whole, tmp_path, number):
    chain, ending = whole
    planned = kills.spread(number, ending.seconds, ending.changes, random.Random(number))
    tally = kills.survived(planned, lambda i: Chain(tmp_path / str(i), line), chain.run, INCONCLUSIVE)
    print(f"{len(tally.hit)} kills, {tally.runs} runs:", Counter(stage for _, stage in tally.hit))
    assert tally.wrong == []
    assert Counter(kill.how for kill, _ in tally.hit) == Counter(kill.how for kill in planned)
    met = {stage for _, stage in tally.hit}
    assert number < 100 or met >= STAGES, met


@pytest.mark.parametrize("number", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_from_any_write_on_ends_the_run_with_5_and_loses_nothing(line, whole, tmp_path, number):
    chain, ending = whole
    for index in range(number):
        other = Chain(tmp_path / str(index), line)
        stopped = other.live(kills.Kill("disk full", 3 + index * int(0.8 * ending.changes) // (number - 1)))
        assert stopped.code == 5, stopped.error
        assert "No space left on device" in stopped.error
        assert "Traceback" not in stopped.error
        assert other.live(None).code == INCONCLUSIVE
        assert kills.lost(other.run, chain.run) == []


def test_an_undisturbed_run_takes_at_most_ten_seconds_of_a_processor_and_says_every_stage(whole):
    _, ending = whole
    assert 0 < ending.cpu < 10
    assert all(f"▸ {stage}" in ending.error for stage in STAGES)


def test_the_comparison_sees_one_changed_byte_and_one_file_too_many(whole, tmp_path):
    run = whole[0].run
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    assert kills.lost(copy, run) == []
    weights = bytearray((copy / "release" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "release" / "model.safetensors").write_bytes(weights)
    (copy / "probe" / "left").write_text("x")
    assert kills.lost(copy, run) == ["probe/left", "release/model.safetensors"]
