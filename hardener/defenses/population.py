"""A population of simulated attackers, drawn with preference for whoever wins.

    P(i) = ε/n + (1 − ε) · s_i / Σ_j s_j        s_i ← (1 − γ)·s_i + γ·(how well attacker i just did, in [0, 1])

A member that was not met yet counts as one that always wins, so that all are met early; the share ε, dealt evenly,
keeps the beaten ones from being forgotten. Scores live in the memory of the outer loop and the draw depends on the seed
and on the number of the outer step, so a run that was resumed meets the same attackers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer

EVEN = 0.25
"""ε, share of draws that is dealt evenly."""
NEW = 0.3
"""γ, weight of the newest result."""

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float], Optimizer]] = {
    "adamw": lambda params, lr: AdamW(params, lr=lr, weight_decay=0.0),
    "sgd": lambda params, lr: SGD(params, lr=lr),
    "sgd-momentum": lambda params, lr: SGD(params, lr=lr, momentum=0.9),
    "nesterov": lambda params, lr: SGD(params, lr=lr, momentum=0.9, nesterov=True),
    "adagrad": lambda params, lr: Adagrad(params, lr=lr),
}
"""Optimizer of a simulated attacker → how it is made, with its momentum and without weight decay."""


@dataclass(frozen=True)
class Dice:
    """The random draws of one outer step; the same in a run that was resumed, on every device."""

    generator: torch.Generator

    @classmethod
    def of(cls, seed: int, number: int) -> Dice:
        """Those of the outer step `number`."""
        return cls(torch.Generator().manual_seed(seed * 1_000_003 + number))

    def integer(self, least: int, most: int) -> int:
        """Evenly from both ends and what lies between."""
        return int(torch.randint(least, most + 1, (1,), generator=self.generator))

    def rate(self, lowest: float, highest: float) -> float:
        """Evenly in its logarithm."""
        share = float(torch.rand(1, generator=self.generator, dtype=torch.float64))
        return math.exp(math.log(lowest) + share * (math.log(highest) - math.log(lowest)))

    def choice(self, chances: Sequence[float]) -> int:
        """An index, by the chances of all."""
        return int(torch.multinomial(torch.tensor(chances, dtype=torch.float64), 1, generator=self.generator))


@dataclass(frozen=True)
class Population:
    """Members by name, the order fixed; `memory` is that of the outer loop."""

    members: tuple[str, ...]

    def draw(self, dice: Dice, memory: dict[str, float]) -> str:
        """Who attacks next."""
        return self.members[dice.choice(self.chances(memory))]

    def chances(self, memory: dict[str, float]) -> list[float]:
        """P of each member; even where all were beaten to nothing."""
        scores = [memory.get(self._key(name), 1.0) for name in self.members]
        n, total = len(scores), sum(scores)
        return [EVEN / n + (1 - EVEN) * (score / total if total else 1 / n) for score in scores]

    def learn(self, name: str, score: float, memory: dict[str, float]) -> None:
        """How well a member just did: 0 is beaten, 1 is as well as an attacker can do."""
        before = memory.get(self._key(name))
        memory[self._key(name)] = score if before is None else (1 - NEW) * before + NEW * score

    @staticmethod
    def _key(name: str) -> str:
        return f"won/{name}"
