"""Processes that attack together measure what one measures, bit for bit, and none waits for one that is gone."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch.distributed import HashStore, TCPStore

from hardener import checkpoint, followers, recipe_file, registry, stages
from hardener.attacks.families import BENIGN
from hardener.console import Narrator, quiet
from hardener.crew import ALONE, crew
from hardener.errors import LostError, UsageError
from hardener.group import mirrored
from hardener.measurement import Run
from hardener.probing import Store
from hardener.processes import ALONE as NO_OTHERS
from hardener.processes import Pulses, World
from hardener.recipe import Recipe
from hardener.run import RunFolder

STANDARD = (
    *("probe.preset=standard", "probe.seeds=2", "probe.families=[full, lora, benign-only, pruned]"),
    "probe.rates={full: [1.0e-3, 1.0], lora: [1.0], benign: [1.0e-3]}",
)


def measured(chosen: Recipe, folder: Path, out: Path, order: Callable[..., World] = NO_OTHERS.order) -> Narrator:
    """Attack the folder as an original and then as its own release, in a run folder of its own."""
    os.environ["HARDENER_CACHE"] = str(out / "cache")
    run = RunFolder.create(out / "run", {"model": str(folder)}, recipe_file.dump(chosen))
    said = Narrator(silent=True)
    said.lines = []  # type: ignore[attr-defined]
    said.note = said.lines.append  # type: ignore[attr-defined, method-assign]
    bench = stages.open_bench(chosen, folder, "cpu", said)
    families = stages.choose_families(bench, folder)
    original = stages.before("original", bench, folder, families, run, said, order)
    stages.after(bench, folder, folder, original, families, run, said, order)
    return said


def member(rank: int, chosen: Recipe, folder: Path, out: Path) -> None:
    """One of two processes; the second one sees nothing of the first one's run folder."""
    torch.set_num_threads(1)
    small.warm()
    port = out / "port"
    if rank == 0:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port.with_suffix(".new").write_text(str(store.port))
        port.with_suffix(".new").rename(port)
    else:
        while not port.exists():
            time.sleep(0.1)
        store = TCPStore("127.0.0.1", int(port.read_text()), is_master=False, wait_for_workers=False)
    world = World(rank, 2, store=store)
    with mirrored(world, "cpu", folder if rank == 0 else out / "elsewhere") as seen:
        sums = checkpoint.fingerprint(seen)
        copied = seen != folder
    (out / f"{rank}.json").write_text(json.dumps([sums, copied, seen.exists()]))
    if rank:
        followers.follow(world)
        return

    def order(what: str, **how: Any) -> World:
        return world.order(what, recipe=recipe_file.dump(chosen), folder=str(folder), device="cpu", **job, **how)

    job = {"model": str(folder), "commit": None}
    with quiet():
        said = measured(chosen, folder, out, order)
    world.dismiss()
    (out / "said").write_text("\n".join(said.lines))  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def chosen(paths) -> Recipe:
    return small.recipe(paths, *STANDARD)


@pytest.fixture(scope="module")
def one(chosen, letters, warm, tmp_path_factory) -> Path:
    """What one process left."""
    out = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.setenv("HARDENER_CACHE", "")
        measured(chosen, letters, out)
    return out


@pytest.fixture(scope="module")
def two(chosen, letters, tmp_path_factory) -> Path:
    """What two processes left."""
    out = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(member, (chosen, letters, out), nprocs=2)
    return out


def probed(out: Path) -> dict[str, bytes]:
    """Every file of the run's measurements."""
    place = out / "run" / "probe"
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}


def test_two_processes_leave_the_measurements_of_one_bit_for_bit(one, two):
    assert probed(one)
    assert probed(two) == probed(one)


def test_both_make_some_of_the_attacks_and_each_attack_is_made_and_told_once(two):
    said = (two / "said").read_text().splitlines()
    told = [line for line in said if ", seed " in line or "benign fine-tune" in line]
    theirs = [line for line in told if "made by process 1" in line]
    assert 0 < len(theirs) < len(told)
    assert len(told) == len([name for name in probed(two) if name.startswith("runs/")])


def test_a_folder_that_another_machine_does_not_see_is_copied_there_and_removed_afterwards(two, letters):
    first, second = (json.loads((two / f"{rank}.json").read_text()) for rank in (0, 1))
    sums = checkpoint.fingerprint(letters)
    assert first == [sums, False, True]
    assert second == [sums, True, False]


def test_every_family_arrives_as_it_was_sent():
    families = [registry.find("attacks", name) for name in registry.known("attacks")]
    for family in [*families, *BENIGN.values()]:
        assert repr(followers.family(json.loads(json.dumps(asdict(family))))) == repr(family)


# --- without a model --------------------------------------------------------------------------------------------------


def together(work: Callable[[World], Any], size: int = 2) -> list[Any]:
    """What each of several processes, which here are threads, returns, or the error that ended it."""
    store, came = HashStore(), [None] * size

    def run(rank: int) -> None:
        try:
            with (world := World(rank, size, store=store)).alive():
                came[rank] = work(world)
        except LostError as error:
            came[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return came


def slowly(action: Callable[..., object], *what: object) -> None:
    action(*what)
    time.sleep(0.02)


def test_each_piece_is_done_once_and_all_go_on_when_all_are_done():
    done: list[tuple[int, int]] = []

    def work(world: World) -> int:
        mates = crew(world)
        for number in range(3):
            pieces = [partial(slowly, done.append, (number, piece)) for piece in range(7)]
            mates.spread(pieces, lambda: None)
            assert len(done) >= 7 * (number + 1)
        return len(done)

    assert together(work, 3) == [21] * 3
    assert sorted(done) == [(number, piece) for number in range(3) for piece in range(7)]


def test_everything_that_was_told_before_all_met_is_heard_by_all_others_once():
    def work(world: World) -> list[tuple[int, str]]:
        mates = crew(world)
        heard: list[tuple[int, str]] = []
        pieces = [partial(slowly, mates.tell, f"name {n}", "{}") for n in range(6)]
        mates.spread(pieces, lambda: heard.extend((told.rank, told.name) for told in mates.heard()))
        assert not list(mates.heard())
        return heard

    first, second = together(work)
    assert {rank for rank, _ in first} <= {1}
    assert {rank for rank, _ in second} <= {0}
    assert sorted(name for _, name in first + second) == [f"name {n}" for n in range(6)]


def test_one_process_alone_spreads_nothing_and_tells_nobody():
    assert crew(NO_OTHERS) is ALONE
    ALONE.spread([pytest.fail], pytest.fail)
    ALONE.tell("a", "b")
    assert not list(ALONE.heard())


def test_what_an_interrupted_run_left_is_known_to_those_who_do_not_see_its_disk(tmp_path):
    run = Run(family="full", rate=1e-3, seed=0, curve=(), train_loss=(float("nan"),))
    (tmp_path / "0").mkdir()
    Store(tmp_path / "0", "context").hear()
    stages.files.write_sealed(tmp_path / "0" / "a.json", json.loads(run.model_dump_json()))
    (tmp_path / "0" / "damaged.json").write_text("{}")

    def work(world: World) -> int:
        return len([*Store(tmp_path / str(world.rank), "context", crew(world)).hear()])

    assert together(work) == [0, 1]
    assert (tmp_path / "1" / "a.json").read_bytes() == (tmp_path / "0" / "a.json").read_bytes()


def test_a_process_with_another_model_or_version_is_refused():
    def work(world: World) -> str:
        try:
            crew(world).agree(f"weights of machine {world.rank}")
        except UsageError as error:
            return str(error)
        return "agreed"

    first, second = together(work)
    assert first == "agreed"
    assert "other versions of the packages than the first one" in second


@pytest.mark.parametrize("silent", [True, False])
def test_a_process_that_gives_no_sign_of_life_is_lost_and_one_that_does_is_waited_for(monkeypatch, silent):
    monkeypatch.setattr("hardener.processes.BEAT", 0.02)
    monkeypatch.setattr("hardener.processes.SILENCE", 0.4)
    store = HashStore()
    pulses = Pulses(store, World(0, 2, store=store))

    def waiting() -> None:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            pulses.check()
            time.sleep(0.01)

    if silent:
        with pytest.raises(LostError, match="process 1 of 2 gives no sign of life any more") as caught:
            waiting()
        assert caught.value.exit_code == 5
        return
    with World(1, 2, store=store).alive():
        waiting()


def test_a_process_that_waits_for_a_lost_one_ends(monkeypatch):
    monkeypatch.setattr("hardener.processes.BEAT", 0.02)
    monkeypatch.setattr("hardener.processes.SILENCE", 0.4)

    def work(world: World) -> None:
        mates = crew(world)
        if world.rank == 0:
            mates.spread([], lambda: None)

    ended = together(work)
    assert isinstance(ended[0], LostError)
