"""How long a probe will take: told before it starts, and again before every run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hardener.attacks.attack import checkpoints
from hardener.bench import Bench
from hardener.judging import Judge
from hardener.measurement import Subject

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Pace:
    """Seconds that things take on this machine."""

    step: float
    """One optimizer step of a full fine-tune."""
    point: float
    """One checkpoint: scoring the judged rows, and general utility."""

    @staticmethod
    def measured(model: nn.Module, bench: Bench, judge: Judge) -> Pace:
        """Time one batch forward and backward, and one judging; the weights stay as they are."""
        rows = bench.streams.rows("restricted", "attack")[: bench.probe.batch_size]
        batch = bench.task.collate(rows).to(torch.device(bench.device))
        step = _seconds(lambda: torch.autograd.backward(bench.task.loss(*bench.task.targets(model, batch))))
        model.zero_grad(set_to_none=True)
        views = [bench.judged.examples]
        return Pace(step, _seconds(lambda: judge.attack(model, 1, False, views=views)) + _gating(model, bench, judge))

    def of(self, steps: int) -> float:
        """Seconds of a run of so many steps (0: one that does not train)."""
        return self.step * steps + self.point * (1 + len(checkpoints(steps)) if steps else 1)


def _gating(model: nn.Module, bench: Bench, judge: Judge) -> float:
    """Seconds of a look at general utility, where there is one."""
    return _seconds(lambda: judge.gate(model, untouched=False)) if bench.task.generative else 0.0


def _seconds(action: Callable[[], object]) -> float:
    """How long an action takes the second time, when everything is warm."""
    action()
    began = time.monotonic()
    action()
    return time.monotonic() - began


class Progress:
    """Says how long the runs will take, which one begins, and about how long the rest will take."""

    def __init__(self, subject: Subject, tell: Tell) -> None:
        self.subject = subject
        self.tell = tell
        self.pace: Pace | None = None
        self._lengths: list[int] = []
        self._began = time.monotonic()
        self._reached = self._made = 0

    def start(self, lengths: Sequence[int]) -> None:
        """Runs of so many steps each are next."""
        self._lengths, self._began = list(lengths), time.monotonic()
        if self.pace is not None:
            minutes = sum(map(self.pace.of, lengths)) / 60
            self.tell(f"{self.subject}: {len(lengths)} attacks planned, about {max(1, round(minutes))} min")

    def reach(self) -> None:
        """The next run is due, be it finished already or not."""
        self._reached += 1

    def announce(self, text: str) -> None:
        """The run that is due begins now."""
        planned = max(len(self._lengths), self._reached)
        minutes = (time.monotonic() - self._began) / max(self._made, 1) * (planned - self._reached + 1) / 60
        left = f"  (about {minutes:.0f} min left)" if self._made else ""
        self._made += 1
        self.tell(f"{self.subject} {self._reached}/{planned}: {text}{left}")
