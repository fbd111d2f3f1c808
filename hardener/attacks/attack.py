"""One attack to make: a family at one rate or dose, with one seed and a budget."""

from __future__ import annotations

from dataclasses import dataclass

from hardener.attacks.families import Family, Phase


@dataclass(frozen=True)
class Attack:
    """One run to make: how it trains, how long, on how many rows."""

    family: Family
    rate: float
    """Learning rate; of a family that does not train, the dose."""
    seed: int
    steps: int
    """Budget; a family that does not train has none."""
    batch_size: int
    setting: str = ""
    """What a search chose beside the rate, in words."""

    @property
    def dose(self) -> float:
        """Strength of the edit, or the way of asking."""
        return self.family.dose if self.family.trains else self.rate

    @property
    def length(self) -> int:
        """All optimizer steps, those beyond the budget too; 0 for a family that does not train."""
        return self.steps + sum(phase.extra for phase in self.family.phases) if self.family.trains else 0

    @property
    def stretches(self) -> list[tuple[Phase, int]]:
        """Each phase with the step at which it ends."""
        ends: list[tuple[Phase, int]] = []
        for phase in self.family.phases:
            begun = ends[-1][1] if ends else 0
            main = begun + phase.extra if phase.extra else self.steps
            lead = round((self.family.planned or self.steps) * phase.lead)
            ends.append((phase, begun + lead if phase.lead else main))
        return ends

    @property
    def points(self) -> list[int]:
        """Steps after which it is judged: the usual ones, and where a phase ends."""
        return sorted({*checkpoints(self.length), *(end for _, end in self.stretches)} - {0}) if self.length else []

    def owned(self, rows: int) -> int:
        """How many of so many restricted rows the attacker has; at least a batch."""
        return min(rows, max(self.batch_size, round(self.family.row_share * rows)))


def checkpoints(steps: int) -> list[int]:
    """Steps at which an attack is judged: 1, 2, 3, 4, 6, 8, 12, … at most × 1.5 apart from 2 on, and the last."""
    points, power = [1], 1
    while points[-1] < steps:
        power *= 2
        points += [power, power * 3 // 2] if power > 1 else [power]
    return sorted({p for p in points if p < steps} | {steps})
