"""The floor: what is allowed must stay as good as it was, or the weights go back.

    at the first outer step           s₀ = score(θ⁰; held),  keep θ⁰
    after every n-th, and the last    score(θ; held) > floor · s₀:   keep θ
                                      otherwise:                     θ ← the point kept last

`held` are retain rows held back from training. SOPHON's authors evaluate after each outer step and stop at 80 %.

A point is the trainable weights and all buffers, bit for bit. It lives in the state of an optimizer that never moves
anything, so it is saved and resumed with the others. Their moments led below the floor and begin anew.

Cost: a forward pass over `held` per look; one copy of the trainable weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hardener.defenses.sophon_configs import Guarded
from hardener.erase import held_back
from hardener.errors import RecipeError
from hardener.group import full
from hardener.loop import Outer
from hardener.tasks.base import Example
from hardener.trouble import mean_loss

NAME = "kept"
"""Of the optimizer that holds the point, and of what the log says of it."""
START = "floor/start"
HIGHER = {"likelihood-gain": "likelihood"}
"""A score that is lower for a better model → the one of the same passes that is higher."""


class Kept(Optimizer):
    """A point in weight space: each parameter's state holds its weights, the first one's also the buffers."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Keep the present weights."""
        for p in self.param_groups[0]["params"]:
            self.state[p]["weight"] = p.detach().clone()

    @torch.no_grad()
    def keep(self, model: nn.Module) -> None:
        """Keep the present point."""
        self.step()
        for name, buffer in model.named_buffers():
            self.state[self.param_groups[0]["params"][0]][f"buffer {name}"] = buffer.detach().clone()

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Go back to the point."""
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["weight"])
        for name, buffer in model.named_buffers():
            buffer.copy_(full(self.state[self.param_groups[0]["params"][0]][f"buffer {name}"]))


class Floor:
    """Looks at the floor for one defence; without a floor it does nothing."""

    def __init__(self, config: Guarded) -> None:
        self.config = config
        self.held: list[tuple[str, list[Example]]] | None = None
        """Score → rows held back, once they are."""

    def optimizers(self, params: list[nn.Parameter]) -> dict[str, Optimizer]:
        """The keeper of the point, where there is a floor."""
        return {NAME: Kept(params)} if self.config.floor is not None else {}

    def begin(self, outer: Outer) -> None:
        """Before anything is drawn: hold rows back; at the first outer step, measure and keep the start.

        Raises RecipeError if there is nothing to fall from.
        """
        if self.config.floor is None:
            return
        if self.held is None:
            self.held = list(hold_back(outer))
        if START not in outer.memory:
            outer.memory[START] = self.measured(outer)
            if outer.memory[START] == 0:
                raise RecipeError(
                    "defense.floor: the model scores 0 on retain rows, so nothing can be kept; set `floor_by: loss`"
                )
            self.kept(outer).keep(outer.model)

    def fell(self, outer: Outer, log: dict[str, float]) -> bool:
        """Where a look is due, keep the point or go back to the last one; True if that was needed."""
        if self.config.floor is None or not self.due(outer):
            return False
        share = outer.group.told(self.measured(outer) / outer.memory[START])  # all processes decide alike
        log[NAME] = share
        if share > self.config.floor:
            self.kept(outer).keep(outer.model)
            return False
        self.kept(outer).restore(outer.model)
        for name, optimizer in outer.optimizers.items():
            if name != NAME:
                optimizer.state.clear()
        return True

    def due(self, outer: Outer) -> bool:
        """After every n-th outer step and the last, so that what is released was looked at."""
        return outer.number % self.config.floor_every == 0 or outer.number == outer.train.steps

    def kept(self, outer: Outer) -> Kept:
        """The point kept last."""
        keeper = outer.optimizers[NAME]
        assert isinstance(keeper, Kept)
        return keeper

    def measured(self, outer: Outer) -> float:
        """How good the model is on the rows held back, higher is better: the mean score of the sources, or 1/loss."""
        assert self.held is not None  # `begin` comes first
        model, task = outer.model, outer.task
        if self.config.floor_by == "loss":
            return 1 / mean_loss(model, task, [row for _, rows in self.held for row in rows])
        model.eval()
        scores = [mean(task.score(model, rows, name)) for name, rows in self.held]
        model.train()
        return mean(scores)


def hold_back(outer: Outer) -> Iterator[tuple[str, list[Example]]]:
    """Take every tenth retain row or fewer out of what is drawn; yield score and rows of each source that has any."""
    held, rest = held_back(outer.streams)
    outer.samplers["retain"].examples = rest.rows("retain", "defence")
    keys = {example.key for example in held}
    for part in outer.streams.of("retain", "defence"):
        rows = [example for example in part.examples if example.key in keys]
        if rows:
            yield HIGHER.get(part.score, part.score), rows
