"""The grid: its attackers are what they say, a killed run goes on, and its tables say what its cells say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import small
import tiny
import torch
from torch import nn

from bench import grid, grid_report
from bench.grid import FULL, QUICK, Cell, Place, Plan, Room
from bench.grid_attackers import AUTHORS, METHODS, OPTIMIZERS, PREPARATIONS, Attacker, rates
from bench.grid_sides import ORIGINAL, SCRATCH, Setting, Side, best_attackers, judged_step, reached, suppression
from hardener import files, recipe_file
from hardener.attacks.attack import Attack
from hardener.attacks.families import Family
from hardener.attacks.training import optimizer
from hardener.attacks.victim import loaded
from hardener.measurement import Checkpoint, Run

PLAN = Plan(steps=4, rates=slice(2, 3), batches=(8,), samples=(2,), seeds=(0, 1))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, resnet: Path, image_paths: dict[str, Path]) -> Place:
    """An original, another ResNet as its hardened version, and a recipe."""
    folder = tmp_path_factory.mktemp("grid")
    recipe = small.recipe(image_paths, name="tiny-sophon-image")
    (folder / "recipe.yaml").write_text(recipe_file.dump(recipe), "utf-8")
    hardened = tiny.resnet(folder / "hardened", seed=1)
    folders = ((ORIGINAL, resnet), ("ours", hardened), (SCRATCH, resnet))
    return Place(folders, folder / "recipe.yaml", folder / "out", PLAN.steps)


@pytest.fixture(scope="module")
def room(place: Place) -> Room:
    return grid.room(place)


@pytest.fixture(scope="module")
def found(place: Place, warm: None) -> Iterator[tuple[dict[str, Side], Setting]]:
    """A grid of two methods and two optimizers, made in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("adamw", "adagrad", "adadelta"):
            patch.delitem(OPTIMIZERS, name)
        for name in ("fresh-only", "fresh-lora"):
            patch.delitem(METHODS, name)
        yield grid.made(place, PLAN, jobs=1)


def cells(place: Place, side: str) -> list[Run]:
    """What lies in the files."""
    folder = place.out / "cells" / side
    return [Run.model_validate(files.read_sealed(path)) for path in sorted(folder.glob("*.json"))]


# ── the attackers ─────────────────────────────────────────────────────────────────────────────


def test_every_optimizer_has_four_rates_over_three_decades() -> None:
    for method in METHODS:
        for name in OPTIMIZERS:
            ladder = rates(method, name)
            assert len(ladder) == 4
            assert ladder[-1] / ladder[0] == pytest.approx(1000)


def test_adam_has_no_decay_and_adamw_has() -> None:
    made = {}
    for name in OPTIMIZERS:
        made[name], _ = optimizer(nn.Linear(2, 2), Attacker("fresh-all", name, 1e-3).attack(4, 0))
    decay = {name: one.param_groups[0]["weight_decay"] for name, one in made.items()}
    assert decay == {"sgd": 0, "adam": 0, "adamw": 0.01, "adagrad": 0, "adadelta": 0}
    kinds = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Adadelta)
    assert all(isinstance(one, kind) for one, kind in zip(made.values(), kinds, strict=True))
    assert made["sgd"].param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("plan", [FULL, QUICK])
def test_the_cross_product_is_whole_and_has_the_authors_attack(plan: Plan) -> None:
    made = grid.crossed((ORIGINAL, SCRATCH), list(METHODS), plan)
    each = len(OPTIMIZERS) * len(OPTIMIZERS["sgd"].rates[plan.rates]) * len(plan.seeds)
    assert Counter(cell.side for cell in made) == {ORIGINAL: 4 * each, SCRATCH: 3 * each}
    assert len(set(made)) == len(made)
    assert Cell(ORIGINAL, AUTHORS, 0) in made


def test_the_full_grid_has_what_the_claim_needs() -> None:
    assert (len(METHODS), len(OPTIMIZERS), len(FULL.batches) + 1, len(FULL.samples) + 1) == (4, 5, 3, 3)
    assert len(FULL.seeds) >= 3


def test_new_weights_are_neither_healed_nor_rescaled() -> None:
    best = [Attacker("fresh-all", "adam", 1e-3), Attacker("kept-all", "adam", 1e-3)]
    made = [*grid.varied(best, (ORIGINAL, SCRATCH), FULL)]
    prepared = {side: {c.attacker.preparation for c in made if c.side == side} for side in (ORIGINAL, SCRATCH)}
    assert prepared == {ORIGINAL: set(PREPARATIONS), SCRATCH: {"plain", "cosine"}}
    assert {c.attacker.method for c in made if c.side == SCRATCH} == {"fresh-all"}


def test_a_smaller_sample_is_part_of_a_larger_one_and_has_equally_many_of_each_class(room: Room) -> None:
    rows = room.bench.streams.rows("restricted", "attack")
    few, more = grid.sample(rows, 2, seed=3), grid.sample(rows, 5, seed=3)
    assert Counter(row.labels for row in few) == dict.fromkeys(range(3), 2)
    assert {row.key for row in few} < {row.key for row in more}
    assert [row.key for row in few] != [row.key for row in grid.sample(rows, 2, seed=4)]


def fresh_network(room: Room, side: str, seed: int) -> nn.Module:
    cell = Cell(side, Attacker("fresh-all", "sgd", 1e-2), seed)
    torch.manual_seed(seed)
    return loaded(room.scene(cell), cell.attacker.attack(4, seed))


def test_from_scratch_is_the_architecture_with_random_weights_and_nothing_of_the_parent(room: Room) -> None:
    parent = fresh_network(room, ORIGINAL, 7).state_dict()
    scratch = fresh_network(room, SCRATCH, 7).state_dict()
    again = fresh_network(room, SCRATCH, 7).state_dict()
    torch.manual_seed(7)
    drawn = room.bench.task.scratch(room.place.parent, num_labels=3).state_dict()
    assert {name: value.shape for name, value in parent.items()} == {k: v.shape for k, v in scratch.items()}
    for name, value in scratch.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, drawn[name])
    matrices = [name for name, value in scratch.items() if value.dim() > 1]
    assert not any(torch.equal(scratch[name], parent[name]) for name in matrices)
    assert not any(torch.equal(fresh_network(room, SCRATCH, 8).state_dict()[name], scratch[name]) for name in matrices)


# ── a run ─────────────────────────────────────────────────────────────────────────────────────


def test_all_sides_meet_the_same_attackers_with_the_same_rows(found: tuple[dict[str, Side], Setting]) -> None:
    sides, _ = found
    original, ours, scratch = (set(sides[name].attackers) for name in (ORIGINAL, "ours", SCRATCH))
    assert original == ours
    assert {w for w in original if "kept" not in w.family and not w.family.endswith(("healed", "rescaled"))} == scratch


def test_a_killed_run_makes_only_what_is_missing(
    place: Place, found: tuple[dict[str, Side], Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides, _ = found
    before = {path: path.stat().st_mtime_ns for path in (place.out / "cells").rglob("*.json")}
    whole = {path: path.read_bytes() for path in before}
    lost, broken = sorted(before)[0], sorted(before)[-1]
    lost.unlink()
    broken.write_bytes(whole[broken][:40])
    again, _ = grid.made(place, PLAN, jobs=1)
    after = {path: path.stat().st_mtime_ns for path in (place.out / "cells").rglob("*.json")}
    assert {path for path, when in after.items() if before[path] != when} == {lost, broken}
    assert all(path.read_bytes() == text for path, text in whole.items())
    assert again["ours"].measurement == sides["ours"].measurement


def table(text: str, title: str) -> list[dict[str, str]]:
    """The rows of the table under a heading, by column."""
    part = next(part for part in text.split("\n## ") if part.startswith(title))
    head, _, *rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")
    ]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_tables_say_what_the_cells_say(place: Place, found: tuple[dict[str, Side], Setting]) -> None:
    sides, setting = found
    report = np.array(setting.report_half)
    rows = table(grid_report.report(sides, setting), "Accuracy after 4 steps")

    def said(row: dict[str, str], side: str) -> str:
        return row[side].partition(" [")[0]

    def right(runs: list[Run], half: np.ndarray) -> float:
        return float(np.mean([np.array(run.curve[-1].scores)[half].mean() for run in runs]))

    for side in sides:
        ways: dict[tuple[str, float, str], list[Run]] = {}
        for run in cells(place, side):
            if run.setting.startswith("restricted") and run.setting.endswith("20 per class"):
                ways.setdefault((run.family, run.rate, run.setting), []).append(run)
        assert {len(runs) for runs in ways.values()} == {len(PLAN.seeds)}
        for row in rows[:4]:
            method = next(key for key, one in METHODS.items() if one.title == row["Method"])
            name = next(key for key, one in OPTIMIZERS.items() if one.title == row["Optimizer"])
            if side == SCRATCH:
                method = "fresh-all"
            plain = (f"{method}-{name}-plain", rates(method, name)[2], "restricted, batch 16, 20 per class")
            assert said(row, side) == f"{right(ways[plain], report):.2f}"
        best = max(right(runs, ~report) for runs in ways.values())
        options = {f"{right(runs, report):.2f}" for runs in ways.values() if right(runs, ~report) == best}
        assert said(rows[-1], side) in options


def test_everything_is_written(place: Place, found: tuple[dict[str, Side], Setting]) -> None:
    text = grid_report.write(*found, place.out)
    assert (place.out / "grid.md").read_text("utf-8") == text
    assert (place.out / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert [row["Rows a batch"] for row in table(text, "Batch sizes")] == ["8", "16"]
    assert [row["Labels per class"] for row in table(text, "Labels per class")] == ["2", "20"]
    assert len(table(text, "Adaptive attacks, after 4 steps")) == len(PREPARATIONS)
    assert table(text, "SLC-AUC")[0]["Hardened, SLC-AUC"] != "–"
    assert table(text, "A benign task")[0]["Its own"] != "–"


def test_a_reader_of_texts_is_attacked_in_every_way(
    tmp_path: Path, bert: Path, text_paths: dict[str, Path], warm: None
) -> None:
    chosen = small.recipe(text_paths, name="tiny-sophon-text")
    (tmp_path / "recipe.yaml").write_text(recipe_file.dump(chosen), "utf-8")
    there = Place(((ORIGINAL, bert),), tmp_path / "recipe.yaml", tmp_path, 2)
    room = Room(there)
    ways = [Attacker(method, "adam", 1e-4, 8, 4) for method in room.methods]
    ways += [ways[0]._replace(preparation=how) for how in PREPARATIONS]
    runs = [room.make(Cell(ORIGINAL, way, 0)) for way in dict.fromkeys(ways)]
    assert [run.failed for run in runs] == [None] * (len(METHODS) + len(PREPARATIONS) - 1)
    assert {run.rows for run in runs} == {4 * room.bench.streams.classes["restricted"]}
    assert len({run.curve[-1].scores for run in runs}) > 1


@pytest.mark.parametrize("text", ["release", "ours=no/such/folder", "=.", f"{ORIGINAL}=."])
def test_a_hardened_side_needs_a_name_and_a_folder(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        grid.main(["--parent", ".", "--recipe", "r", "--out", "o", "--hardened", text])
    assert text.partition("=")[0] in capsys.readouterr().err


def test_two_releases_of_one_name_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        grid.main(["--parent", ".", "--recipe", "r", "--out", "o", "--hardened", "a=.", "--hardened", "a=.."])
    assert "one name" in capsys.readouterr().err


# ── ρ ─────────────────────────────────────────────────────────────────────────────────────────

HALF = (False, False, False, False, True, True, True, True, True, True, True, True, True, True)


def side(name: str, *reached: tuple[Attacker, dict[int, tuple[int, int]]]) -> Side:
    """A side whose attacks get so many of the 4 selecting and 10 reported rows right at each step, with one seed."""
    setting = Setting(8, (0,), 0.2, 0.0, HALF)
    runs = {}
    for attacker, curve in reached:
        attack = attacker.attack(8, 0)
        points = [
            Checkpoint(step=step, scores=[1.0] * picked + [0.0] * (4 - picked) + [1.0] * told + [0.0] * (10 - told))
            for step, (picked, told) in {0: (0, 2), **curve}.items()
        ]
        run = Run(family=attack.family.name, rate=attack.rate, seed=0, curve=tuple(points), setting=attack.setting)
        runs[attacker, 0] = run
    return Side.of(name, name, runs, (), [], setting)


SLOW, QUICKLY = Attacker("fresh-all", "sgd", 1e-3), Attacker("fresh-all", "adam", 1e-2)


def sides(hardened: int = 6, scratch: int = 4) -> dict[str, Side]:
    """At step 4 the better attack of each side gets 9, `hardened` and `scratch` of ten rows right."""
    return {
        ORIGINAL: side(ORIGINAL, (SLOW, {4: (1, 10), 8: (4, 9)}), (QUICKLY, {4: (4, 9), 8: (4, 9)})),
        "ours": side("ours", (SLOW, {4: (3, hardened), 8: (4, 9)}), (QUICKLY, {4: (2, 10), 8: (3, 9)})),
        SCRATCH: side(SCRATCH, (SLOW, {4: (0, 2), 8: (4, 9)}), (QUICKLY, {4: (2, scratch), 8: (3, 9)})),
    }


SETTING = Setting(8, (0,), 0.2, 0.0, HALF)


def test_rho_is_that_of_the_best_attackers_chosen_on_the_other_half() -> None:
    found = sides()
    assert judged_step(found, SETTING) == 4
    best = {name: reached(one, one.tracks, 4, SETTING) for name, one in found.items()}
    assert {name: one.accuracy.value for name, one in best.items() if one} == {ORIGINAL: 0.9, "ours": 0.6, SCRATCH: 0.4}
    rho, note = suppression(found, "ours", 20, 4)
    assert rho is not None
    assert rho.value == pytest.approx((0.9 - 0.6) / (0.9 - 0.4))
    assert grid_report.word(rho, note) == "floor met"


@pytest.mark.parametrize(
    ("hardened", "scratch", "said"),
    [(4, 4, "as hard as from scratch"), (2, 4, "as hard as from scratch"), (8, 4, "missed"), (4, 9, "saturated")],
)
def test_a_budget_is_called_by_its_rho(hardened: int, scratch: int, said: str) -> None:
    assert grid_report.word(*suppression(sides(hardened, scratch), "ours", 20, 4)) == said


def test_a_row_that_missed_names_the_attack_that_broke_it() -> None:
    text = grid_report.report(sides(hardened=9), SETTING)
    (row,) = table(text, "In short")
    assert row["Result"] == "missed"
    assert row["Broken by"] == "fresh head, all weights, SGD, momentum 0.9, rate 0.001"


def test_the_best_of_every_side_is_tried_on_all() -> None:
    assert best_attackers(sides(), SETTING) == [QUICKLY, SLOW]


def test_an_attack_without_a_preparation_is_the_probes_own() -> None:
    made = Attacker("fresh-all", "adam", 1e-3).attack(64, 1)
    own = Family("own", "own", False, head="fresh")
    same = ("optimizer", "schedule", "scope", "head", "phases", "objective", "edit", "row_share")
    assert all(getattr(made.family, name) == getattr(own, name) for name in same)
    assert made.points == Attack(own, 1e-3, 1, 64, 16).points
