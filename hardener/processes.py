"""Several processes: which one this is, what the first has the others do, and how they are launched.

    hardener harden … --num-processes 2            one machine
    accelerate launch … -m hardener harden …       one machine or several

Each process is started with the same command line. The first runs it; the others wait for its orders, and take their
part where weights change or are attacked. What the launcher wrote into the environment is taken out of it, and each
process is left with one GPU: so it is an ordinary process to every library, and an attacker's `Trainer` does not train
together with the others unasked. The group that computes together is joined for one order and left again (`group.py`);
those that attack side by side meet in the store alone (`crew.py`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from hardener.errors import LostError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What every launcher sets in each process that it starts."""
SHARD = "ACCELERATE_USE_FSDP"
"""What `accelerate launch --use_fsdp` sets."""
END = "end"
FAREWELL = 10.0
"""Seconds that the first process waits for the others to have heard of its end, since they ask it."""
PATIENCE = 5.0
"""Seconds that another process waits when the first is gone: if that one can say what happened, it says so first."""
BEAT = 5.0
"""Seconds between two signs of life."""
SILENCE = 120.0
"""Seconds without a sign of life after which a process is lost."""


@dataclass
class World:
    """All processes of a run, as one of them sees them."""

    rank: int = 0
    """Its number; 0 is the first."""
    size: int = 1
    shard: bool = False
    """Whether weights are to be spread over the processes, as against a copy in each; the first one's word counts."""
    store: Store | None = None
    """What all can read and write, where they are several."""
    orders_given: int = field(default=0, init=False)

    def order(self, what: str, **how: Any) -> World:
        """Have the others do something; `how` is plain data. Returns the world, in which it is now done."""
        self.orders_given += 1
        if self.store is not None:
            self.store.set(f"order {self.orders_given}", json.dumps({"what": what, "shard": self.shard, **how}))
        return self

    def orders(self) -> Iterator[dict[str, Any]]:
        """What the first process has this one do, in order. Raises LostError where that one is gone."""
        assert self.store is not None
        while True:
            self.orders_given += 1
            order = json.loads(awaited(self.store, f"order {self.orders_given}"))
            if order["what"] == END:
                self.store.add("left", 1)
                return
            self.shard = order.pop("shard")
            yield order

    def dismiss(self) -> None:
        """Let the others end."""
        self.order(END)
        until = time.monotonic() + FAREWELL
        while self.store is not None and self.store.add("left", 0) < self.size - 1 and time.monotonic() < until:
            time.sleep(0.01)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Give signs of life, so that others can wait for this process however long it takes."""
        if self.store is None:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=_beat, args=(self.store, self.rank, ended))
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


ALONE = World()


def _beat(store: Store, rank: int, ended: threading.Event) -> None:
    """One sign of life after the other; where the store is gone, whoever waits for something there says so."""
    with suppress(RuntimeError):
        while not ended.wait(BEAT):
            store.add(f"beat {rank}", 1)


class Pulses:
    """The signs of life of all other processes."""

    def __init__(self, store: Store, world: World) -> None:
        self.store = store
        self._seen = {rank: (0, time.monotonic()) for rank in range(world.size) if rank != world.rank}
        """Rank → how many there were, and when that was new."""
        self._looked = time.monotonic()

    def check(self) -> None:
        """Look, if it is time to. Raises LostError for a process that is silent."""
        now = time.monotonic()
        if now - self._looked < BEAT:
            return
        self._looked = now
        for rank, (beats, since) in self._seen.items():
            with reaching():
                there = self.store.add(f"beat {rank}", 0)
            if there != beats:
                self._seen[rank] = there, now
            elif now - since > SILENCE:
                raise LostError(f"process {rank} of {1 + len(self._seen)} gives no sign of life any more")


@contextmanager
def reaching() -> Iterator[None]:
    """Turn an unreachable store into a LostError: it is gone with the first process, or with its machine."""
    try:
        yield
    except RuntimeError as error:
        time.sleep(PATIENCE)
        raise LostError("the first process is gone") from error


def awaited(store: Store, key: str) -> bytes:
    """The value of a key that will be set, however late."""
    with reaching():
        while not store.check([key]):
            time.sleep(0.1)
        return store.get(key)


def place() -> int:
    """The number of this process, known before the others are met."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


@cache
def world() -> World:
    """The processes of this run, as the launcher tells it; the environment is then that of a single process."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ALONE
    rank, size, local, address, port = (os.environ.pop(name) for name in LAUNCHED)
    shard = os.environ.pop(SHARD, "false").lower() == "true"
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC_", "FSDP_"))]:
        del os.environ[name]
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = local if seen is None else seen.split(",")[int(local)]
    return World(int(rank), int(size), shard, _store(address, int(port), host=rank == "0" and not hosted))


def _store(address: str, port: int, *, host: bool) -> Store:
    """What the launcher or the first process hosts."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore(address, port, is_master=host, wait_for_workers=False)
    except RuntimeError as error:
        raise LostError(f"the processes cannot meet at {address}:{port}: {error}") from error
    return PrefixStore("hardener", store)


def launch(n: int, words: Sequence[str]) -> int:
    """Run the command line `words` in `n` processes of this machine; the exit code, which is that of the first.

    Raises LostError where a process was killed.
    """
    import logging

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each process speaks for itself
    here = {"run_id": "hardener", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    config = LaunchConfig(1, 1, n, max_restarts=0, **here)  # type: ignore[arg-type]
    try:
        elastic_launch(config, sys.executable)("-m", "hardener", *words)
    except ChildFailedError as failed:
        return _code({rank: failure.exitcode for rank, failure in failed.failures.items()}, n)
    return 0


def _code(codes: dict[int, int], n: int) -> int:
    """The exit code of processes of which some failed: rank → code, or minus the signal by which one was killed.

    In the order in which they failed; the launcher itself sends SIGTERM to those that go on when another has failed.
    """
    killed = {rank: signal.Signals(-code).name for rank, code in codes.items() if code < 0 and -code != signal.SIGTERM}
    if killed:
        rank, name = min(killed.items())
        raise LostError(
            f"process {rank} of {n} was lost ({name}), and the others were ended; where the system killed it for "
            "memory, raise train.grad_accumulation or use fewer processes. Go on with --resume and the run's folder"
        )
    return next((code for code in codes.values() if code > 0), 128 + signal.SIGTERM)
