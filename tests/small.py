"""Shipped recipes cut down to seconds, for the tiny models and data of `tiny.py`."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from hardener import data, loop, recipe_file, registry, sources
from hardener.defenses import configs
from hardener.recipe import Recipe
from hardener.stages import label2id

GENERATIVE = "probe.rates={full: [1.0e-3], lora: [1.0e-3], mixed: [1.0e-3], benign: [1.0e-3]}"
CLASSIFIER = "probe.rates={fresh-head: [1.0e-3], fresh-head-sgd: [1.0e-2], kept-head: [1.0e-3], benign: [1.0e-3]}"
DIFFUSION = "probe.rates={full: [1.0e-3], lora: [1.0e-3], relative: [1.0e-2], benign: [1.0e-3]}"
SMALL = (
    *("train.steps=4", "train.save_every=1", "train.batch_size=8", "train.warmup_steps=0"),
    *("probe.preset=quick", "probe.steps=2", "probe.max_steps=4", "probe.batch_size=8", "probe.benign_steps=2"),
    *("probe.attack_rows=16", "probe.evaluation_rows=16", "probe.utility_rows=16"),
)
SOPHON = ("defense.inner_steps=2", "defense.inner_batch=8", "defense.query_batch=4")


VERIFIED = {
    **dict.fromkeys(("sums", "report", "recipe", "bom"), "ok"),
    **{"parent": "not checked (a local folder)", "signature": "none"},
}
"""What `verify` says of an unsigned release whose parent was a folder."""


def overrides(paths: Mapping[str, Path], *more: str, name: str = "tiny-ctrap") -> list[str]:
    """What makes a tiny recipe small."""
    rates = DIFFUSION if name == "tiny-sophon-diffusion" else CLASSIFIER
    own = (GENERATIVE,) if name == "tiny-ctrap" else (rates, *SOPHON)
    return [*(f"data.{role}.dataset={path}" for role, path in paths.items()), *SMALL, *own, *more]


def recipe(paths: Mapping[str, Path], *more: str, name: str = "tiny-ctrap") -> Recipe:
    return sources.pin(recipe_file.load(name, overrides(paths, *more, name=name)))


def opened(chosen: Recipe, folder: Path):
    """The task and the streams of a recipe."""
    found = registry.find("tasks", chosen.task)
    task = found(folder, template=chosen.data.template, max_length=chosen.data.max_length)
    return task, data.open_streams(chosen, task, label2id(folder))


def defended(chosen: Recipe, folder: Path):
    """A defence at its starting point: (defense, outer)."""
    from accelerate import Accelerator

    task, streams = opened(chosen, folder)
    defense = registry.find("defenses", chosen.defense.name)
    made = defense(configs.CONFIGS[chosen.defense.name](**chosen.defense.settings), chosen.train, task)
    model = task.load(folder).train()
    return made, loop.Outer(model, task, streams, made, chosen.train, Accelerator(cpu=True))


def command(*arguments: object) -> list[str]:
    """The command line in a process of its own."""
    return [sys.executable, "-m", "hardener", *map(str, arguments)]


def environment(home: Path, **more: str) -> dict[str, str]:
    """A child's environment, with caches of its own and without any token or network."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HARDENER_"))}
    own = {"HARDENER_CACHE": str(home / "cache"), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    return {**kept, "OMP_NUM_THREADS": "1", **own, **more}


EASY = (
    *("train.steps=12", "train.lr=1.0e-4", "train.batch_size=8", "train.warmup_steps=0", "probe.preset=quick"),
    *("probe.steps=10", "probe.max_steps=64", "probe.batch_size=8", "probe.benign_steps=8", "probe.attack_rows=64"),
    *("probe.evaluation_rows=200", "probe.utility_rows=200"),
    "probe.rates={full: [3.0e-3], lora: [1.0e-2], mixed: [3.0e-3], benign: [3.0e-3]}",
)
"""For `tiny.easy`: enough rows and steps for a verdict, which is "no measurable protection"."""


class Command:
    """The command line in a real process, forked from one that has imported the libraries already."""

    def __init__(self, *arguments: object, home: Path, cwd: Path | None = None, limit: int | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        words = [str(argument) for argument in arguments]
        self.process = context.Process(target=_child, args=(words, environment(home), home, cwd or home, limit))
        self.process.start()

    def signal_when(self, ready: Callable[[], object], number: int) -> None:
        """Send a signal as soon as something is true."""
        until = time.monotonic() + 120
        while not ready():
            assert self.process.is_alive(), self.error
            assert time.monotonic() < until
            time.sleep(0.002)
        os.kill(self.process.pid, number)

    @property
    def error(self) -> str:
        return (self.home / "stderr").read_text()

    def end(self) -> tuple[int, str, str]:
        """Wait for it; (exit code, stdout, stderr)."""
        self.process.join(120)
        assert self.process.exitcode is not None
        return self.process.exitcode, (self.home / "stdout").read_text(), self.error


PRELOADED = [
    *("hardener.cli", "hardener.stages", "hardener.summary", "hardener.card", "hardener.plots", "datasets", "peft"),
    *("transformers.trainer", "transformers.models.llama.modeling_llama", "matplotlib.pyplot"),
]


def warm() -> None:
    """Import what an attack needs, and spare it the walk through all that: accelerate collects garbage after each."""
    for name in PRELOADED:
        import_module(name)
    gc.collect()
    gc.freeze()


def _child(words: list[str], variables: dict[str, str], home: Path, cwd: Path, limit: int | None) -> None:
    gc.freeze()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(home / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(variables)
    os.chdir(cwd)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["hardener", *words]
    from hardener import cli

    cli.main()
