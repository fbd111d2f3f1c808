"""A run whose processes are killed at chosen moments, and resumed, until it ends by itself.

A *life* is one process of the command line. SIGKILL ends it after some seconds, right before its n-th change to the
disk, or some tenths of a millisecond after that change began, which is inside a write as often as not. What a life
left is what the next one finds: kills add up on one folder, and one run survives several.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import small

from hardener import files

How = Literal["after seconds", "before a write", "within a write", "disk full"]
HOW: tuple[How, ...] = ("after seconds", "before a write", "within a write")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
WITHIN = 0.003
"""A write takes less than so many seconds."""


@dataclass(frozen=True)
class Kill:
    """When to kill: `at` counts seconds or changes to the disk from the beginning of a life.

    A full disk kills nobody: from that change on nothing can be made or written any more.
    """

    how: How
    at: float
    after: float = 0.0
    """Seconds from the change to the signal, for a kill within a write."""


@dataclass
class Ending:
    """How a life ended."""

    code: int
    seconds: float
    cpu: float
    """Seconds of a processor, which do not depend on what else the machine does."""
    changes: int
    error: str


@dataclass
class Chain:
    """One run folder and its lives."""

    home: Path
    command: tuple[object, ...]
    """The line that begins the run, without --output."""
    kills: list[Kill] = field(default_factory=list)
    """Those that hit, in their order."""
    stages: list[str] = field(default_factory=list)
    """What the process was doing when each of them hit, as it last said."""

    @property
    def run(self) -> Path:
        return self.home / "run"

    def line(self) -> tuple[object, ...]:
        """How a person goes on: by --resume once there is a journal, else by the same line again."""
        if (self.run / "run.json").exists():
            return ("harden", "--resume", self.run)
        return (*self.command, "--output", self.run)

    def live(self, kill: Kill | None) -> Ending:
        """One process, killed or not."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*small.PRELOADED, "small"])
        here, there = context.Pipe(duplex=False)
        words = [str(word) for word in self.line()]
        self.home.mkdir(parents=True, exist_ok=True)
        variables = small.environment(self.home, SOURCE_DATE_EPOCH="1700000000")
        process = context.Process(target=_life, args=(words, variables, self.home, kill, there))
        process.start()
        there.close()
        if kill is not None:
            _end(process.pid, here, kill)
        process.join(900)  # as long as a crowded machine may need
        assert process.exitcode is not None
        error = self.home / "stderr"
        ending = Ending(process.exitcode, *_told(here), error.read_text() if error.exists() else "")
        if kill is not None and ending.code == -signal.SIGKILL:
            self.kills.append(kill)
            self.stages.append(_doing(ending.error))
        return ending


def _end(pid: int, events: Connection, kill: Kill) -> None:
    """Kill the process at its moment, unless it ended before."""
    if kill.how == "after seconds":
        _wait(pid, kill.at)
    elif kill.how == "within a write" and _heard(events):
        _wait(pid, kill.after)
    else:
        return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _wait(pid: int, seconds: float) -> None:
    """Sleep, or less where the process ends before."""
    handle = os.pidfd_open(pid)
    try:
        select.select([handle], [], [], seconds)
    finally:
        os.close(handle)


def _heard(events: Connection) -> bool:
    """Wait for the n-th change; False where the process ended without it."""
    try:
        return events.recv() == "now"
    except EOFError:
        return False


def _told(events: Connection) -> tuple[float, float, int]:
    """Seconds, those of a processor, and changes of a life that ended by itself, which it tells at last."""
    told = (0.0, 0.0, 0)
    with suppress(EOFError):
        while True:
            heard = events.recv()
            told = heard if isinstance(heard, tuple) else told
    return told


def _doing(error: str) -> str:
    """The last stage that a process announced."""
    stages = [line.removeprefix("▸ ") for line in error.splitlines() if line.startswith("▸ ")]
    return stages[-1] if stages else "Starting"


def _life(words: list[str], variables: dict[str, str], home: Path, kill: Kill | None, told: Connection) -> None:
    """In the child: count what changes the disk below `home`, and meet the kill."""
    changes, began = 0, time.monotonic()
    mine = str(home)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal changes
        if event not in CHANGES and not (event == "open" and _writes(mine, *arguments)):
            return
        changes += 1
        if kill is not None and kill.how == "disk full" and changes >= kill.at and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if kill is None or kill.how == "after seconds" or changes != kill.at:
            return
        if kill.how == "before a write":
            os.kill(os.getpid(), signal.SIGKILL)
        told.send("now")

    sys.addaudithook(watch)
    try:
        small._child(words, variables, home, home, None)
    finally:
        told.send((time.monotonic() - began, time.process_time(), changes))


def _writes(mine: str, path: object, mode: object, flags: object) -> bool:
    """Whether an `open` can change a file of this run."""
    return str(path).startswith(mine) and isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def spread(number: int, seconds: float, changes: int, rng: random.Random) -> list[Kill]:
    """So many kills of all kinds, each kind spread evenly over the whole of an undisturbed run; the early ones first.

    Those that come early in a life leave work for others, so that few runs take many kills.
    """
    kills = []
    for index in range(number):
        how = HOW[index % len(HOW)]
        place = (index // len(HOW) + rng.random()) / -(-number // len(HOW))
        at = place * seconds if how == "after seconds" else 1 + int(place * changes)
        kills.append(Kill(how, at, rng.random() * WITHIN if how == "within a write" else 0.0))
    return sorted(kills, key=lambda kill: kill.at / (seconds if kill.how == "after seconds" else changes))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lost(left: Path, whole: Path) -> list[str]:
    """What two run folders differ in: the release, every measurement, the states, whatever lies there.

    Of the journal, the process and the wall times are left out.
    """
    there, here = contents(left), contents(whole)
    there["run.json"], here["run.json"] = journal(left), journal(whole)
    return sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))


def journal(run: Path) -> bytes:
    """The journal without what differs from process to process."""
    read = json.loads((run / "run.json").read_bytes())
    del read["pid"], read[files.SEAL]
    for stage in read["stages"].values():
        del stage["seconds"]
    return json.dumps(read).encode()


@dataclass
class Tally:
    """What came of many kills."""

    hit: list[tuple[Kill, str]] = field(default_factory=list)
    """Kills, each with what the process was doing."""
    runs: int = 0
    wrong: list[str] = field(default_factory=list)
    """Of each run that did not end as the undisturbed one, its kills and how it differs."""


def sooner(kill: Kill) -> float:
    """A tenth earlier."""
    return 0.9 * kill.at if kill.how == "after seconds" else max(1, int(0.9 * kill.at))


def survived(kills: Sequence[Kill], begin: Callable[[int], Chain], whole: Path, code: int) -> Tally:
    """Let runs live through all kills; a kill that comes too late for a life waits for the next run."""
    left, tally = list(kills), Tally()
    while left:
        chain = begin(tally.runs)
        tally.runs += 1
        ending = chain.live(left[0])
        while ending.code == -signal.SIGKILL:
            del left[0]
            ending = chain.live(left[0] if left else None)
        if left and not chain.kills:  # the whole run was over before: the machine is quicker now
            left[0] = replace(left[0], at=sooner(left[0]))
        tally.hit += zip(chain.kills, chain.stages, strict=True)
        differing = lost(chain.run, whole) if ending.code == code else [ending.error]
        if differing:
            tally.wrong.append(f"after {list(zip(chain.kills, chain.stages, strict=True))}: {differing}")
    return tally
