"""What happens during an attack, written down: the curve, the rates that were applied, why it ended early."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from hardener.attacks.attack import Attack
from hardener.measurement import Checkpoint

Judge = Callable[[nn.Module, int, bool], Checkpoint]
"""(attacked model, step, is it the last checkpoint) → what is measured there."""
Stop = Callable[[Sequence[Checkpoint]], bool]
"""The curve so far → whether the attack's question is answered."""
Watch = Callable[[int, float], bool]
"""(index of a logged loss, the loss) → whether to give the attack up."""


def never(curve: Sequence[Checkpoint]) -> bool:
    """The question is not answered before the end."""
    return False


def quietly(index: int, loss: float) -> bool:
    """The attack is not given up."""
    return False


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Judges the model at the checkpoints; stops a run whose loss is not finite, or whose question is answered."""

    def __init__(self, attack: Attack, judge: Judge, stop: Stop, watch: Watch) -> None:
        self.attack = attack
        self.curve: list[Checkpoint] = []
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.failed: str | None = None
        self.answered = False
        self._judge, self._stop, self._watch, self._points = judge, stop, watch, attack.points

    @property
    def warm_share(self) -> float:
        """Share of the steps whose rate was above 1 % of the highest; 1 where nothing was trained."""
        highest = max(self.rates, default=0.0)
        return sum(rate > 0.01 * highest for rate in self.rates) / len(self.rates) if self.rates else 1.0

    def judge_now(self, model: nn.Module, step: int) -> None:
        """Add a checkpoint, or end the run as failed if weights or scores are not finite."""
        if not all(p.isfinite().all() for p in model.parameters()):
            self.failed = f"the attacked weights were not finite at step {step}"
            return
        self._add(self._judged(model, step, last=step == self.attack.length))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Write down the rate that is about to be applied."""
        self.rates.append(float(optimizer.param_groups[0]["lr"]))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Judge at the checkpoints; stop where the question is answered, or the weights are broken."""
        step = state.global_step
        if step not in self._points or self.failed is not None:
            return
        self.judge_now(model, step)
        if self.failed is not None:
            control.should_training_stop = True
        elif step < self.attack.length and self._stop(self.curve):
            self.answered = True
            self._end(model, step, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **_: Any) -> None:
        """Write down the loss; stop where it is no number, or the watch gives the attack up."""
        loss, step = (logs or {}).get("loss"), state.global_step
        if loss is None or self.failed is not None:
            return
        if not math.isfinite(loss):
            self.failed = f"the attack's loss became {loss} by step {step}"
            control.should_training_stop = True
            return
        self.losses.append(loss)
        # The watch sees every loss, also one that comes too late: a finished run is shown to it again from the list.
        given_up = self._watch(len(self.losses) - 1, loss)
        if given_up and step < self.attack.length and not self.answered:
            self._end(model, step, control)

    def _end(self, model: nn.Module, step: int, control: Any) -> None:
        """Stop before the budget is spent; the checkpoint where it ends is a whole one."""
        self.curve = [point for point in self.curve if point.step < step]
        self._add(self._judged(model, step, last=True))
        control.should_training_stop = True

    def _add(self, point: Checkpoint) -> None:
        if all(map(math.isfinite, point.scores)):
            self.curve.append(point)
        else:
            self.failed = f"the attacked model's scores were not finite at step {point.step}"

    def _judged(self, model: nn.Module, step: int, last: bool) -> Checkpoint:
        training = model.training
        model.eval()
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            point = self._judge(model, step, last)
        model.train(training)
        return point
