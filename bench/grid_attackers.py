"""The attackers of the grid, as rows of data: fine-tuning methods, optimizers with their rates, adaptive preparations.

Methods, optimizers and the idea of the grid are those of SOPHON's evaluation (arXiv 2404.12699, section on robustness);
the exact lists of the paper are not published, so those below are ours. Each attack is made by the probe's own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hardener.attacks import families
from hardener.attacks.attack import Attack
from hardener.attacks.families import Edit, Family

BATCH, PER_CLASS = 16, 20
"""What the attacks of the whole cross product are made with."""


@dataclass(frozen=True)
class Method:
    """What is trained."""

    title: str
    head: str
    scope: str
    factor: float = 1.0
    """By how much its rates exceed those of the optimizer's ladder."""


METHODS = {
    "kept-all": Method("kept head, all weights", "kept", "all"),
    "fresh-all": Method("fresh head, all weights", "fresh", "all"),
    "fresh-only": Method("fresh head alone", "fresh", "head", factor=10.0),
    "fresh-lora": Method("fresh head, LoRA", "fresh", "lora"),
}


@dataclass(frozen=True)
class Ladder:
    """An optimizer with its four learning rates, a decade apart."""

    title: str
    row: families.Optimizer
    """Its name among the probe's optimizers."""
    rates: tuple[float, ...]


OPTIMIZERS = {
    "sgd": Ladder("SGD, momentum 0.9", "sgd", (1e-4, 1e-3, 1e-2, 1e-1)),
    "adam": Ladder("Adam", "adamw", (1e-4, 1e-3, 1e-2, 1e-1)),  # the probe's AdamW has no decay: it is Adam
    "adamw": Ladder("AdamW, decay 0.01", "adamw-0.01", (1e-4, 1e-3, 1e-2, 1e-1)),
    "adagrad": Ladder("Adagrad", "adagrad", (1e-3, 1e-2, 1e-1, 1.0)),
    "adadelta": Ladder("Adadelta", "adadelta", (1e-2, 1e-1, 1.0, 10.0)),
}


@dataclass(frozen=True)
class Preparation:
    """What is done beside plain fine-tuning."""

    title: str
    edit: Edit | None = None
    dose: float = 0.0
    schedule: str = "constant"


PLAIN = "plain"
PREPARATIONS = {
    PLAIN: Preparation("nothing"),
    "healed": Preparation("healed first: 16 AdamW steps at 1e-3 on its own task", edit="healed", dose=1e-3),
    "rescaled": Preparation("re-scaled first: each weight to its norm in a fresh model", edit="rescaled"),
    "cosine": Preparation("10 % warm-up, then a cosine to zero", schedule="cosine"),
}
"""Healing and re-scaling start from what a model knows, so they are no attacks on new weights."""


class Attacker(NamedTuple):
    """One attack but for its seed."""

    method: str
    optimizer: str
    rate: float
    batch: int = BATCH
    per_class: int = PER_CLASS
    """Labelled restricted rows of each class that it has."""
    preparation: str = PLAIN

    @property
    def title(self) -> str:
        """The attack in words, but for its rows."""
        words = [METHODS[self.method].title, OPTIMIZERS[self.optimizer].title, f"rate {self.rate:g}"]
        words += [f"batch {self.batch}"] if self.batch != BATCH else []
        words += [self.preparation] if self.preparation != PLAIN else []
        return ", ".join(words)

    def attack(self, steps: int, seed: int) -> Attack:
        """The attack as the probe makes it."""
        method, prepared = METHODS[self.method], PREPARATIONS[self.preparation]
        family = Family(
            name=f"{self.method}-{self.optimizer}-{self.preparation}",
            title=self.title,
            generative=False,
            optimizer=OPTIMIZERS[self.optimizer].row,
            schedule=prepared.schedule,
            scope=method.scope,
            head=method.head,
            edit=prepared.edit,
            dose=prepared.dose,
        )
        return Attack(family, self.rate, seed, steps, self.batch, f"batch {self.batch}, {self.per_class} per class")


AUTHORS = Attacker("kept-all", "sgd", 1e-4)
"""The one attack that SOPHON's authors tested with (their decay of 1e-4 is left out: at this rate it moves nothing)."""


def rates(method: str, optimizer: str) -> tuple[float, ...]:
    """The learning rates of a method with an optimizer, rising."""
    return tuple(float(f"{rate * METHODS[method].factor:.3g}") for rate in OPTIMIZERS[optimizer].rates)
