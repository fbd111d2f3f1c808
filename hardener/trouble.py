"""When numbers go wrong in the loop: stop, or step back to the last good state, as the recipe says.

    not finite     a loss or a gradient norm is NaN or infinite
    exploding      a gradient norm is above `train.norm_limit`
    utility lost   the loss on retain rows is above the start's by more than `train.utility_limit` nats; looked at
                   whenever a state is due, so that every state that is kept is a good one

All three are a DivergedError. A step back puts the last good state back and halves every learning rate, three times
at most. Out of memory is no fault of the numbers: the step is taken again with twice as many micro-batches, whose
gradients sum to that of the same batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from hardener.errors import DivergedError, ResourceError, out_of_memory
from hardener.lookahead import Randomness
from hardener.state import States
from hardener.tasks.base import Example, Task

if TYPE_CHECKING:
    from hardener.loop import Outer

MOST = 3
"""Steps back before the run ends after all."""
LOOKED_AT = 256
"""Retain rows by which utility is judged, at most."""
START, TIMES, PARTS = "loss at the start", "steps back", "micro-batches"
"""What `outer.memory` remembers for this file; PARTS is read by the loop."""
BACK_TO = "stepped_back_to"


class Guard:
    """Looks after one run of the loop."""

    def __init__(self, outer: Outer, states: States, log: list[dict[str, float]]) -> None:
        self.outer = outer
        self.states = states
        self.log = log
        self.times = 0
        rows = outer.streams.rows("retain", "defence")
        self.rows = rows[:: 1 + len(rows) // LOOKED_AT]

    def begin(self) -> int:
        """Put the newest state back, or note where the run starts; returns the number of steps that are done."""
        train, memory = self.outer.train, self.outer.memory
        done = self.states.restore(self.outer, self.log)
        if done == 0 and train.utility_limit is not None:
            memory[START] = self._loss()
        if done == 0 and train.on_trouble == "step-back":
            self.states.save(self.outer, 0, self.log)
        self.times = int(self.outer.memory.get(TIMES, 0))
        return done

    def mark(self) -> None:
        """Remember what a step can change beside weights, before it is taken."""
        self.outer.moved = False
        self.drawn = {role: sampler.drawn for role, sampler in self.outer.samplers.items()}
        self.memory = dict(self.outer.memory)
        self.noise = Randomness(self.outer.params)

    def look(self) -> None:
        """Raise DivergedError if utility is below the recipe's bound."""
        limit = self.outer.train.utility_limit
        if limit is None:
            return
        rise = self.outer.group.told(self._loss() - self.outer.memory[START])
        if not rise <= limit:
            raise DivergedError(
                f"the loss on retain rows rose by {rise:.3g} nats, train.utility_limit is {limit:g}; "
                "lower the learning rate, or the weight of the defence"
            )

    def recovered(self, error: Exception, done: int) -> int:
        """Make good what happened in the step after `done`; returns how many steps are done now, or raises."""
        if out_of_memory(error):
            return self._with_smaller_parts(error, done)
        if not isinstance(error, DivergedError) or self.outer.train.on_trouble == "stop":
            raise error
        if self.times == MOST:
            raise DivergedError(f"{error} (stepped back {MOST} times, with half the rate each time)") from error
        self.times += 1
        back = self._back()
        slower = 0.5 ** (self.times - int(self.outer.memory.get(TIMES, 0)))
        for schedule in self.outer.schedules.values():
            schedule.base_lrs = [rate * slower for rate in schedule.base_lrs]
        for optimizer in self.outer.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] *= slower
        self.outer.memory[TIMES] = self.times
        self.log.append({"step": done + 1, BACK_TO: back, "times": self.times})
        return back

    def _with_smaller_parts(self, error: Exception, done: int) -> int:
        parts = 2 * self.outer.parts
        if parts > self.outer.train.batch_size or self.outer.group.size > 1:
            raise ResourceError(
                f"out of memory ({error}) with {self.outer.parts} micro-batches per batch; lower train.batch_size or "
                "data.max_length, set train.checkpointing=true, or harden through an `adapter`"
            ) from error
        if self.outer.moved:
            done = self._back()
        else:
            self._rewind()
        self.outer.memory[PARTS] = parts
        self.log.append({"step": done + 1, "micro_batches": parts})
        return done

    def _back(self) -> int:
        """Put the last good state back. Raises ResourceError where there is none."""
        if not self.outer.group.told(self.states.all()):
            raise ResourceError("a step failed half-way before there was a state; raise train.grad_accumulation")
        self._clear()
        return self.states.restore(self.outer, self.log)

    def _rewind(self) -> None:
        """Undo a step that has moved no weight."""
        self._clear()
        for role, sampler in self.outer.samplers.items():
            sampler.drawn = self.drawn[role]
        self.outer.memory = dict(self.memory)
        self.noise.restore()

    def _clear(self) -> None:
        for p in self.outer.params:
            p.grad = None

    def _loss(self) -> float:
        return mean_loss(self.outer.model, self.outer.task, self.rows)


def told(log: Sequence[dict[str, float]]) -> Iterator[str]:
    """What a reader of the report should know of a log: steps back, and a batch that was cut smaller."""
    for point in log:
        if BACK_TO in point:
            yield (
                f"at step {point['step']:.0f} the training went wrong and stepped back to step {point[BACK_TO]:.0f}, "
                f"{point['times']:.0f} times in all so far, with half the learning rate each time"
            )
        if "micro_batches" in point:
            parts = f"{point['micro_batches']:.0f} micro-batches"
            yield f"memory ran out before step {point['step']:.0f}; from there on {parts}"


@torch.no_grad()
def mean_loss(model: nn.Module, task: Task, rows: Sequence[Example]) -> float:
    """The task's own loss per target (nats, or squared error of noise); the model stays in the mode it was in.

    What a task draws at random is drawn alike each time.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    total = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _, batch in task.batches(rows):
            total += float(task.mean(model, batch.to(device), task.loss)) * batch.targets
    model.train(training)
    return total / sum(example.targets for example in rows)
