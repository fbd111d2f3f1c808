"""The rows that an attacker draws, without end, in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from hardener.attacks.attack import Attack
from hardener.attacks.families import Phase
from hardener.tasks.base import Example

Row = tuple[bool, Example]
"""(is it restricted, the row)"""


class Mixture(torch.utils.data.IterableDataset[Row]):
    """Restricted rows in endless reshuffled epochs, each draw benign with the phase's probability.

    The order depends on the seed alone, so a longer attack of one phase begins with the very steps of a shorter one:
    runs of different budgets stay paired. (The trainer would shuffle a data set with a length once more.)
    """

    def __init__(self, rows: Sequence[Example], benign: Sequence[Example], attack: Attack) -> None:
        self._rows, self._benign, self._attack = rows, benign, attack

    def __iter__(self) -> Iterator[Row]:
        generators = [torch.Generator().manual_seed(3 * self._attack.seed + i) for i in range(3)]
        harmful = _epochs(self._rows, generators[0])
        drawn = 0
        for phase, end in self._attack.stretches:
            mixed = _epochs(self._benign[: phase.rows or None], generators[1])
            last = phase is self._attack.family.phases[-1]  # the trainer may fetch ahead of its last step
            while last or drawn < end * self._attack.batch_size:
                drawn += 1
                yield _drawn(phase, harmful, mixed, generators[2])


def _drawn(phase: Phase, harmful: Iterator[Example], mixed: Iterator[Example], coin: torch.Generator) -> Row:
    restricted = torch.rand((), generator=coin).item() < phase.harm
    return restricted, next(harmful if restricted else mixed)


def _epochs(rows: Sequence[Example], generator: torch.Generator) -> Iterator[Example]:
    """Endless epochs of `rows`, each in a new order; none of no rows."""
    while rows:
        for index in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[index]
