"""Processes that attack together: each takes the next piece of work that no other has, and tells what it measured.

Every process walks the same plan of a probe. Pieces of it that do not wait for each other are spread: whoever is free
takes one, until none is left, and all go on together, each with everything that was measured. Runs travel as text
through the store of `processes.py`, so no disk need be shared. Nobody waits in a collective of torch, which has a time
limit: a piece takes as long as it takes, while the process that does it gives signs of life.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from hardener.errors import UsageError
from hardener.processes import Pulses, World, awaited, reaching

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]


class Told(NamedTuple):
    """A run that another process measured."""

    rank: int
    name: str
    """Of its file."""
    run: str
    """As JSON."""


@dataclass
class Crew:
    """This process among those that attack together; alone by default."""

    rank: int = 0
    size: int = 1
    board: Store | None = None
    """What all can read and write, where they are several."""
    pulses: Pulses | None = None
    _rounds: int = field(default=0, init=False)
    _heard: int = field(default=0, init=False)

    @property
    def first(self) -> bool:
        """Whether this process reports."""
        return self.rank == 0

    def agree(self, context: str) -> None:
        """Raise UsageError where this process would measure something else than the first one."""
        if self.board is None:
            return
        with reaching():
            if self.first:
                self.board.set("context", context)
            elif awaited(self.board, "context").decode() != context:
                raise UsageError(
                    "this process has another model, other rows or other versions of the packages than the first one; "
                    "install and copy the same on every machine"
                )

    def spread(self, pieces: Sequence[Callable[[], object]], listen: Callable[[], None]) -> None:
        """Do each piece in one of the processes, and `listen` to the others until all are done.

        Alone, nothing is done: whoever needs a piece does it then. Raises LostError where a process is gone.
        """
        if self.board is None:
            return
        self._rounds += 1
        while (mine := self._add(f"taken {self._rounds}") - 1) < len(pieces):
            pieces[mine]()
        self._add(f"done {self._rounds}")
        while self._add(f"done {self._rounds}", 0) < self.size:
            time.sleep(0.1)
            listen()
            if self.pulses is not None:
                self.pulses.check()
        listen()

    def tell(self, name: str, run: str) -> None:
        """Tell the others what was measured."""
        if self.board is not None:
            number = self._add("told")
            with reaching():
                self.board.set(f"told {number}", json.dumps(Told(self.rank, name, run)))

    def heard(self) -> Iterator[Told]:
        """What the others told since this was last asked, in order."""
        while self.board is not None:
            key = f"told {self._heard + 1}"
            with reaching():
                if not self.board.check([key]):
                    return
                told = Told(*json.loads(self.board.get(key)))
            self._heard += 1
            if told.rank != self.rank:
                yield told

    def _add(self, key: str, by: int = 1) -> int:
        assert self.board is not None
        with reaching():
            return int(self.board.add(key, by))


ALONE = Crew()


def crew(world: World) -> Crew:
    """The processes of the world, for the probe that was ordered last."""
    if world.store is None:
        return ALONE
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    board = PrefixStore(f"probe {world.orders_given}", world.store)
    return Crew(world.rank, world.size, board, Pulses(world.store, world))
