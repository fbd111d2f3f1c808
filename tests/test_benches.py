"""The benchmarks of cost: their smallest form runs, and their rows say what they mean."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import probe_cost, rows, scaling, startup
from bench.rows import Row


def whole(found: list[Row]) -> dict[str, Row]:
    """The rows by name, each of which is complete."""
    for row in found:
        assert set(row) == {"what", "value", "unit", "goal", "better"}
        assert row["value"] > 0
        assert row["better"] in ("lower", "higher")
    assert len({row["what"] for row in found}) == len(found)
    return {row["what"]: row for row in found}


def test_a_quotient_is_the_median_over_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first turn warms up and is not counted; then 1/2, 6/2 and 3/2."""
    now, long = 0.0, iter([9.0, 1.0, 6.0, 3.0])

    def one() -> None:
        nonlocal now
        now += next(long)

    def other() -> None:
        nonlocal now
        now += 2.0

    monkeypatch.setattr(rows, "clock", lambda device: now)
    assert rows.quotient(one, other, repeats=3) == 1.5


def test_a_peak_counts_what_lives_at_the_same_time() -> None:
    def action() -> tuple[Tensor, Tensor]:
        first = torch.zeros(1000)
        del first
        return torch.zeros(500), torch.zeros(700)

    assert rows.peak(action) == 4 * 1200


def test_rows_are_shown_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def measured(quick: bool, device: str):
        asked.append((quick, device))
        yield rows.row("one / other", 0.5, "×", 0.7)
        yield rows.row("speed", 3.0, "M", better="higher")

    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--json", str(tmp_path / "rows.json")])
    rows.main("A benchmark.", measured)
    assert asked == [(True, "cpu")]
    assert list(whole(json.loads((tmp_path / "rows.json").read_text()))) == ["one / other", "speed"]
    assert capsys.readouterr().out.splitlines()[0].split() == ["one", "/", "other", "0.500", "×", "0.7"]


def test_starting_is_measured_for_three_commands() -> None:
    found = whole(list(startup.measured(quick=True, device="cpu", repeats=1)))
    assert [row["goal"] for row in found.values()] == [0.3, 0.3, None]
    help_, _, dry = (row["value"] for row in found.values())
    assert dry > help_  # torch is imported to plan, and not to help


def test_an_attackers_step_is_measured_and_so_is_what_is_shared() -> None:
    size = probe_cost.Size(steps=6, short=1, repeats=1)
    found = whole(list(probe_cost.measured(quick=True, device="cpu", size=size)))
    names = list(found)
    assert [name.split(",")[0] for name in names[:4]] == ["attacker's step", "attacker's step / bare Trainer step"] * 2
    assert found["the same once more, from the cache / made"]["value"] < 0.2
    assert found["8 attackers of 1 steps, one base / a base each"]["goal"] == 0.7


def test_scaling_has_four_sizes_and_what_many_steps_change() -> None:
    effort = scaling.Effort(smaller=32, rows=2, length=16, repeats=1, steps=6)
    found = whole(list(scaling.measured(quick=True, device="cpu", effort=effort)))
    weights = [row["value"] for name, row in found.items() if name.endswith("weights")]
    assert len(weights) == 4
    assert len(set(weights)) == 4
    first = next(iter(scaling.SHAPES))
    assert found[f"{first}, seconds per weight and token / the smallest's"]["value"] == 1
    for name, bytes_ in zip(scaling.SHAPES, weights, strict=True):
        each = found[f"{name}, peak bytes per weight"]["value"]
        assert each == pytest.approx(found[f"{name}, peak"]["value"] / bytes_)
        assert each >= 20  # weights, gradient, two moments, and a copy or a kept gradient
    assert found["after step 6 / after the first, bytes held"]["value"] == 1
