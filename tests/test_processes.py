"""Several processes compute what one does, however weights lie; and where one is lost the run ends and can go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.optim import SGD

from hardener import loop, registry
from hardener import report as reports
from hardener.defenses import configs
from hardener.errors import DivergedError, LostError, RecipeError
from hardener.group import ALONE, Group, buckets, full
from hardener.losses import cross_entropy, probability
from hardener.processes import ALONE as NO_OTHERS
from hardener.processes import _code, world
from hardener.recipe import Recipe
from hardener.state import States, _read

WAYS = ("whole", "sharded")
"""How weights lie: a copy in each process, or spread over both."""


class Stop(Exception):
    """The machine goes away."""


def prepared(chosen: Recipe, folder: Path, dtype: torch.dtype = torch.float64):
    """Defence, model, task and streams."""
    task, streams = small.opened(chosen, folder)
    settings = configs.CONFIGS[chosen.defense.name](**chosen.defense.settings)
    defense = registry.find("defenses", chosen.defense.name)(settings, chosen.train, task)
    return defense, task.load(folder).to(dtype).train(), task, streams


def gradient(chosen: Recipe, folder: Path, group: Group) -> list[torch.Tensor]:
    """That of ten rows of uneven length, taken twice, with what is logged of it."""
    defense, model, task, streams = prepared(chosen, folder)
    outer = loop.Outer(model, task, streams, defense, chosen.train, loop.Accelerator(cpu=True), group)
    rows = sorted(outer.draw("restricted", 10), key=lambda e: e.targets)
    log: dict[str, float] = {}
    for _ in range(2):  # what is there already is not summed again
        outer.gradient(cross_entropy, rows, log, "loss", {"p(e)": probability(5)})()
    told = torch.tensor([log["loss"], log["p(e)"], outer.norm()], dtype=torch.float64)
    return [*(full(p.grad) for p in outer.params), told]


def trained(chosen: Recipe, folder: Path, group: Group, state: Path, optimizer: Any = None, stop: int | None = None):
    """Weights in the first process, and the log; with an optimizer of our own in place of the defence's, in float64."""
    defense, model, task, streams = prepared(chosen, folder, torch.float64 if optimizer else torch.float32)
    if optimizer is not None:
        names = list(defense.optimizers(list(model.parameters())))
        defense.optimizers = lambda params: {name: optimizer(params) for name in names}

    def tell(step: int, _: dict[str, float]) -> None:
        if step == stop:
            raise Stop

    log = loop.run(defense, model, task, streams, chosen.train, "cpu", States(state), tell, group)
    return (model.state_dict() if group.size == 1 else group.whole(model)), log


def plain(params: list[torch.nn.Parameter]) -> SGD:
    return SGD(params, lr=0.1)


def computed(recipes: dict[str, Recipe], folders: dict[str, Path], group: Group, out: Path) -> dict[str, Any]:
    """Everything that is compared."""
    chosen, letters = recipes["ctrap"], folders["letters"]
    found = {
        "gradient": gradient(chosen, letters, group),
        "sgd": trained(chosen, letters, group, out / "sgd", plain),
        "adamw": trained(chosen, letters, group, out / "adamw"),
    }
    if group.mesh is not None:
        with pytest.raises(RecipeError, match="a LoRA cannot be simulated on sharded weights"):
            trained(recipes["rollout"], letters, group, out / "rollout", plain)
        return found
    found["rollout"] = trained(recipes["rollout"], letters, group, out / "rollout", plain)
    found["sophon"] = trained(recipes["sophon"], folders["bert"], group, out / "sophon", plain)
    return found


def member(rank: int, recipes: dict[str, Recipe], folders: dict[str, Path], out: Path) -> None:
    """One of two processes."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    for way in WAYS:
        group = Group(rank, 2, init_device_mesh("cpu", (2,)) if way == "sharded" else None)
        found = computed(recipes, folders, group, out / way)
        try:
            trained(recipes["ctrap"], folders["letters"], group, out / way / "broken", stop=3)
        except Stop:
            torch.rand(rank)
            found["resumed"] = trained(recipes["ctrap"], folders["letters"], group, out / way / "broken")
        try:
            trained(recipes["steep"], folders["letters"], group, out / way / "steep")
        except DivergedError as error:  # one that ended for another reason is missed by the others, and all end
            found["steep"] = str(error)
        if rank == 0:
            torch.save(found, out / f"{way}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def recipes(paths, text_paths) -> dict[str, Recipe]:
    rows = "train.grad_accumulation=3"
    rollout = 'defense={"name": "ctrap-rollout", "inner_steps": [1, 3], "inner_adapter": {"r": 2, "alpha": 4}}'
    return {
        "ctrap": small.recipe(paths, rows),
        "rollout": small.recipe(paths, rows, rollout),
        "steep": small.recipe(paths, rows, "train.norm_limit=1.0e-9", "train.on_trouble=step-back"),
        "sophon": small.recipe(text_paths, rows, name="tiny-sophon-text"),
    }


@pytest.fixture(scope="module")
def folders(letters, bert) -> dict[str, Path]:
    return {"letters": letters, "bert": bert}


@pytest.fixture(scope="module")
def one(recipes, folders, tmp_path_factory) -> dict[str, Any]:
    """What one process computes."""
    return computed(recipes, folders, ALONE, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(recipes, folders, tmp_path_factory) -> dict[str, Any]:
    """What two processes compute, by how weights lie."""
    out = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(member, (recipes, folders, out), nprocs=2)
    return {way: torch.load(out / f"{way}.pt") for way in WAYS} | {"out": out}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_gradient_of_one(one, two, way):
    for mine, theirs in zip(one["gradient"], two[way]["gradient"], strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-9, atol=1e-12)


def near(theirs: Any, mine: Any, **how: float) -> None:
    """Weights and log."""
    torch.testing.assert_close(theirs[0], mine[0], **how)
    assert [set(point) for point in theirs[1]] == [set(point) for point in mine[1]]
    for one, other in zip(theirs[1], mine[1], strict=True):
        assert one == pytest.approx(other, rel=how["rtol"])


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_weights_of_one_after_a_walk_through_traps(one, two, way):
    near(two[way]["sgd"], one["sgd"], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["rollout", "sophon"])
def test_a_simulated_lora_and_a_fresh_head_are_the_same_in_all_processes(one, two, name):
    near(two["whole"][name], one[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_loss_curve_of_one(one, two, way):
    for theirs, mine in zip(two[way]["adamw"][1], one["adamw"][1], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_go_on_with_the_same_bits(two, way):
    weights, log = two[way]["resumed"]
    straight, its_log = two[way]["adamw"]
    assert all(torch.equal(weights[name], straight[name]) for name in straight)
    assert log == its_log


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_step_back_together(two, way):
    assert "stepped back 3 times" in two[way]["steep"]


@pytest.mark.parametrize("way", WAYS)
def test_one_process_goes_on_from_the_state_of_two(recipes, letters, two, tmp_path, way):
    shutil.copytree(two["out"] / way / "adamw" / "step-000003", tmp_path / "step-000003")
    weights, log = trained(recipes["ctrap"], letters, ALONE, tmp_path)
    near((weights, log), two[way]["adamw"], rtol=1e-3, atol=1e-5)


def test_messages_hold_what_fits_and_one_type(monkeypatch):
    monkeypatch.setattr("hardener.group.BUCKET", 6)
    sizes = [(2, torch.float32), (4, torch.float32), (1, torch.float32), (9, torch.float32), (3, torch.float64)]
    cut = list(buckets([torch.zeros(n, dtype=dtype) for n, dtype in sizes]))
    assert [[tensor.numel() for tensor in bucket] for bucket in cut] == [[2, 4], [1], [9], [3]]


def test_without_a_launcher_there_is_one_process():
    assert world() is NO_OTHERS


@pytest.mark.parametrize(
    ("codes", "code"),
    [({0: 4, 1: -15}, 4), ({1: 5}, 5), ({0: 143, 1: 5}, 143), ({1: 5, 0: 143}, 5), ({0: 1}, 1), ({1: -15}, 143)],
)
def test_the_exit_code_is_that_of_the_first_process_that_failed(codes, code):
    assert _code(codes, 2) == code


def test_a_killed_process_is_a_lost_one_whatever_the_others_ended_with():
    with pytest.raises(LostError, match=r"process 1 of 2 was lost \(SIGKILL\)") as caught:
        _code({0: 5, 1: -9}, 2)
    assert caught.value.exit_code == 5


# --- whole runs -------------------------------------------------------------------------------------------------------


class Runs:
    """`hardener harden` in processes of their own, killed with whatever they started."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *words: object, **variables: str) -> subprocess.Popen[str]:
        environment = small.environment(self.home, **{"HARDENER_CACHE": os.environ["HARDENER_CACHE"], **variables})
        process = subprocess.Popen(
            [*map(str, words)],
            env=environment,
            cwd=self.home,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.started.append(process)
        return process


@pytest.fixture
def runs(tmp_path):
    made = Runs(tmp_path)
    yield made
    for process in made.started:
        for pid in [*of_rank(process.pid, 0), *of_rank(process.pid, 1), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def of_rank(parent: int, rank: int) -> list[int]:
    """The process of this number that another one launched."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    pids = children.read_text().split() if children.exists() else []
    return [int(pid) for pid in pids if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{pid}/environ').read_text()}"]


def soon(ready: Callable[[], object], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.05)


def harden(letters: Path, paths: dict[str, Path], output: Path, *more: str) -> list[object]:
    chosen = [word for one in small.overrides(paths, *more) for word in ("--set", one)]
    return ["harden", letters, "--recipe", "tiny-ctrap", *chosen, "--device", "cpu", "--output", output]


LONG = ("train.steps=400", "train.save_every=2")


def test_a_killed_process_ends_the_run_with_exit_5_and_a_whole_state(runs, letters, paths, tmp_path):
    output = tmp_path / "run"
    process = runs.start(*small.command(*harden(letters, paths, output, *LONG), "--num-processes", 2))
    soon(lambda: len(States(output / "state").all()) > 1, process)
    os.kill(of_rank(process.pid, 1)[0], signal.SIGKILL)
    told = process.communicate(timeout=90)[1]
    assert process.returncode == 5, told
    assert "process 1 of 2 was lost (SIGKILL)" in told
    assert f"go on with: hardener harden --resume {output}" in told
    assert any(_read(state) for state in States(output / "state").all())


ATTACKS = ("probe.rates={full: [1.0e-3, 3.0e-3], lora: [1.0e-3, 3.0e-3], mixed: [1.0e-3], benign: [1.0e-3]}",)


def attacks(output: Path, subject: str) -> list[Path]:
    return sorted((output / "probe" / "runs" / subject).glob("*.json"))


@pytest.mark.slow
def test_a_process_killed_as_it_attacks_ends_the_run_with_exit_5_and_resumed_it_releases_the_same(
    runs, letters, paths, tmp_path
):
    def start(name: str, *words: object) -> subprocess.Popen[str]:
        cache = str(tmp_path / f"{name}-cache")
        return runs.start(*small.command(*words), "--num-processes", 2, HARDENER_CACHE=cache, SOURCE_DATE_EPOCH="0")

    whole, output = tmp_path / "whole" / "run", tmp_path / "broken" / "run"
    straight = start("whole", *harden(letters, paths, whole, *ATTACKS))
    told = straight.communicate(timeout=300)[1]
    assert straight.returncode == 4, told
    assert "made by process 1" in told
    go_on = ["harden", "--resume", output]
    for subject, words in (("original", harden(letters, paths, output, *ATTACKS)), ("hardened", go_on)):
        process = start("broken", *words)
        soon(lambda subject=subject: attacks(output, subject), process)
        os.kill(of_rank(process.pid, 1)[0], signal.SIGKILL)
        told = process.communicate(timeout=90)[1]
        assert process.returncode == 5, told
        assert "process 1 of 2 was lost (SIGKILL)" in told
        assert len(attacks(output, subject)) < len(attacks(whole, subject))
    resumed = start("broken", *go_on)
    told = resumed.communicate(timeout=300)[1]
    assert resumed.returncode == 4, told
    for subject in ("original", "hardened"):
        assert [path.read_bytes() for path in attacks(output, subject)] == [
            path.read_bytes() for path in attacks(whole, subject)
        ]
    assert (output / "release" / "SHA256SUMS").read_text() == (whole / "release" / "SHA256SUMS").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("shard", [(), ("--shard",)], ids=WAYS)
def test_a_run_of_two_processes_releases_what_a_run_of_one_does(runs, letters, paths, tmp_path, shard):
    few = "train.lr=1.0e-5"
    alone = runs.start(*small.command(*harden(letters, paths, tmp_path / "one", few)))
    alone.communicate(timeout=300)
    assert alone.returncode == 4  # nothing can be said of so short an attack
    both = runs.start(*small.command(*harden(letters, paths, tmp_path / "two", few), "--num-processes", 2, *shard))
    told = both.communicate(timeout=300)[1]
    assert both.returncode == 4, told
    assert told.count("Resolving") == 1  # one of them speaks
    one, two = (load_file(tmp_path / name / "release" / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=2e-6)
    assert reports.read(tmp_path / "two" / "release" / "hardener" / "report.json").environment["processes"] == "2"


def node(rank: int, port: int) -> list[str]:
    """accelerate's launcher on one of two machines; `--multi_gpu` is its word for several processes."""
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--machine_rank", str(rank)]
    how = ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *how, "--num_processes", "2"]
    return [*launcher, "--num_machines", "2", *where, "-m", "hardener"]


@pytest.fixture
def port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.slow
def test_two_machines_meet_over_the_network(runs, letters, paths, tmp_path, port):
    output = tmp_path / "run"
    nodes = [runs.start(*node(rank, port), *harden(letters, paths, output)) for rank in (0, 1)]
    told = [process.communicate(timeout=300)[1] for process in nodes]
    assert "exitcode  : 4" in told[0]  # the launcher itself ends with 1
    assert "Resolving" not in told[1]
    assert reports.read(output / "release" / "hardener" / "report.json").environment["processes"] == "2"


@pytest.mark.slow
def test_a_lost_machine_ends_the_run_on_the_other_with_exit_5(runs, letters, paths, tmp_path, port):
    output = tmp_path / "run"
    nodes = [runs.start(*node(rank, port), *harden(letters, paths, output, *LONG)) for rank in (0, 1)]
    soon(lambda: len(States(output / "state").all()) > 1, nodes[0])
    for pid in (nodes[1].pid, *of_rank(nodes[1].pid, 1)):
        os.kill(pid, signal.SIGKILL)
    told = nodes[0].communicate(timeout=120)[1]
    assert "exitcode  : 5" in told
    assert "one of 2 processes is gone" in told
    assert any(_read(state) for state in States(output / "state").all())
