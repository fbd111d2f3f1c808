"""CTRAP with a rollout in place of its one step: an extension of arXiv 2505.16559, not part of it.

    min_θ  L(θ; A ∪ G) + λ · Σ_k w_k C( θ_k ; A ∪ G ) + μ · L( θ̃_K ; A ∪ G )

    θ⁰ = θ,  θᵏ = φ(θᵏ⁻¹, ∇L(θᵏ⁻¹; Hᵏ)),  k = 1 … K      the attacker's own optimizer φ: AdamW or SGD
    θ̃                                                     the same on retain rows G instead of harmful rows H

The one normalised step of CTRAP does not look like what an attacker does, and AdamW walks around the trap that it sets.
Here K and the rate are drawn in each outer step (K evenly, the rate evenly in its logarithm), the rows are fresh in
each inner step, and φ begins without moments unless they are kept warm. Through a simulated LoRA the gradients kept are
those of the base weights W at W + BA. First order: they are applied at θ as they are. Each sum is cut to the norm
`cap` before its weight, since collapse gradients far away may be of any size.

Draws depend on `train.seed` and the number of the outer step alone; warm moments are in the resumable state.

Cost: K + (weights in w) + 1 forward and backward passes per outer step, K + 1 more where μ > 0; one copy of the
trainable weights, one of their gradient (two where μ > 0) and φ's moments, whatever K is.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from hardener.defenses.ctrap import answers, collapse_token, told
from hardener.defenses.low_rank import LowRank, linear_weights
from hardener.defenses.population import OPTIMIZERS, Dice
from hardener.defenses.trap_configs import CtrapRolloutConfig
from hardener.lookahead import There
from hardener.loop import Outer
from hardener.losses import collapse, cross_entropy, probability
from hardener.optimizers import made
from hardener.recipe import Role, Train
from hardener.tasks.base import Example, Task


@dataclass(frozen=True)
class Drawn:
    """The attacker of one outer step."""

    steps: int
    rate: float
    generator: torch.Generator
    """What a fresh LoRA is drawn from."""


class CtrapRollout:
    """See the module docstring for the objective."""

    Config: ClassVar = CtrapRolloutConfig
    roles: ClassVar[tuple[Role, ...]] = ("restricted", "alignment", "retain")

    def __init__(self, config: CtrapRolloutConfig, train: Train, task: Task) -> None:
        self.config = config
        self.train = train
        self.token = collapse_token(task, config.collapse_text)
        self.notes: tuple[str, ...] = (told(task, self.token),)
        """Sentences for the report."""

    def optimizers(self, params: list[nn.Parameter]) -> dict[str, Optimizer]:
        """The recipe's; beside it the attackers' own if they stay warm, and so are part of the resumable state."""
        outer: dict[str, Optimizer] = {"outer": made(self.train, params)}
        walks: tuple[Role, ...] = ("restricted", "retain") if self.config.benign_weight else ("restricted",)
        warm = walks if self.config.inner_state == "warm" else ()
        return outer | {walk: self.optimizer(params, self.config.inner_lr[1]) for walk in warm}

    def step(self, outer: Outer) -> dict[str, float]:
        """One outer step; returns K, the rate, losses in nats per token, p(e), gradient norms and the clip factor."""
        r = answers(outer, self.train.batch_size)
        attacker = self.draw(outer.number)
        log: dict[str, float] = {"K": attacker.steps, "rate": attacker.rate}
        trap = self.trapped(outer, attacker, r, log)
        counter = self.countered(outer, attacker, r, log) if self.config.benign_weight else None
        outer.gradient(cross_entropy, r, log, "retain", {"p(e)": probability(self.token)})()
        log |= {"norm retain": outer.norm(), "norm collapse": trap.norm()}
        trap.add_kept(self.config.lam, self.config.cap)
        if counter is not None:
            log["norm benign"] = counter.norm()
            counter.add_kept(self.config.benign_weight, self.config.cap)
        log["clip"] = outer.step("outer", clip=self.train.clip)
        return log

    def trapped(self, outer: Outer, attacker: Drawn, r: list[Example], log: dict[str, float]) -> There:
        """Σ_k w_k ∇C(θ_k; r) along K steps on restricted rows."""
        watched = {"p(e) attacked": probability(self.token)}
        with self.walk(outer, "restricted", attacker) as there:
            for weight in self.config.weights(attacker.steps):
                h = outer.draw("restricted", self.train.batch_size)
                there.step(outer.gradient(cross_entropy, h, log, "harmful"))
                if weight:
                    there.keep(outer.gradient(collapse(self.token), r, log, "collapse", watched), weight)
        return there

    def countered(self, outer: Outer, attacker: Drawn, r: list[Example], log: dict[str, float]) -> There:
        """∇L(θ̃_K; r) after K steps on retain rows."""
        with self.walk(outer, "retain", attacker) as there:
            for _ in range(attacker.steps):
                g = outer.draw("retain", self.train.batch_size)
                there.step(outer.gradient(cross_entropy, g, log, "benign"))
            there.keep(outer.gradient(cross_entropy, r, log, "retain after benign"))
        return there

    def draw(self, number: int) -> Drawn:
        """The attacker of the outer step `number`: the same one in a run that was resumed."""
        dice = Dice.of(self.train.seed, number)
        return Drawn(dice.integer(*self.config.inner_steps), dice.rate(*self.config.inner_lr), dice.generator)

    def walk(self, outer: Outer, role: Role, attacker: Drawn) -> AbstractContextManager[There]:
        """Where the attacker drawn goes with rows of `role`."""

        def optimizer(params: list[nn.Parameter]) -> Optimizer:
            warm = outer.optimizers.get(role)
            if warm is not None:
                for group in warm.param_groups:
                    group["lr"] = attacker.rate
                return warm
            lora = self.config.inner_adapter
            if lora == "none":
                return self.optimizer(params, attacker.rate)
            targets = linear_weights(outer.model, lora)
            return LowRank(targets, lambda factors: self.optimizer(factors, attacker.rate), lora, attacker.generator)

        return outer.simulated_attack(optimizer)

    def optimizer(self, params: list[nn.Parameter], rate: float) -> Optimizer:
        """φ, without moments yet."""
        return OPTIMIZERS[self.config.inner_optimizer](params, rate)
