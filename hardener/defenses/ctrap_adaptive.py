"""A collapse trap against attackers who adapt: an extension of arXiv 2505.16559, not part of it.

    min_θ  KL(θ₀‖θ; G) + L(θ; A) + (1/ν)·[ λ·Σ_k w_k·( C(θ_k; G) + σ·U(θ_k; H) ) + μ·L(θ̃_K; G) ]

    draw an attacker: goal, subspace, optimizer, by how well each did of late; K and rate evenly
    θ⁰ = θ,  θᵏ = φ(θᵏ⁻¹),  k = 1 … K                   φ takes its goal's rows, moves in its subspace
    remember how well it did: exp(−L(θ_K; H)) · exp(−L(θ_K; G)), what it can do and still can
    ν ← ν·exp(±η) as the drift KL(θ₀‖θ; G) lies above or below `bound`, ν ≥ 1

One fixed attacker teaches a trap one fixed path, and whoever mixes in benign rows, repairs afterwards or moves in
another subspace walks around it. C is the collapse loss of CTRAP on general rows, U the KL of the prediction from
uniform on restricted ones, so what is left of the restricted skill at an attacked point is unlearned there. Utility is
bounded, not weighed: its price ν rises until the outputs on retain rows stay within `bound` of those of the parent θ₀,
from which the model may also have been erased. First order: what is kept along a walk is applied at θ as it is.

Draws depend on `train.seed`, the number of the outer step and the scores so far, which are in the resumable state.

Cost: K (more where a goal has two losses) + 2 per stop + 2 forward and backward passes per outer step, K + 1 more where
μ > 0, and one forward pass of θ₀; copies of the trainable weights, of what is kept and of θ₀, and φ's moments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from hardener.defenses.ctrap import collapse_token, told
from hardener.defenses.low_rank import LowRank, linear_weights
from hardener.defenses.population import OPTIMIZERS, Dice, Population
from hardener.defenses.trap_configs import CtrapAdaptiveConfig
from hardener.lookahead import Objective, There
from hardener.loop import Outer
from hardener.losses import collapse, cross_entropy, distillation, kl_from_uniform, probability
from hardener.optimizers import made
from hardener.recipe import Role, Train
from hardener.tasks.base import Example, Task

LORA_RATE = 10
"""How much higher the rates of a LoRA are than those of all weights, by rule of thumb."""
RISE, FALL = 0.1, 0.3
"""η, largest change of ln ν in one outer step up and down: what an erased model pays until it is near the parent again
is soon forgotten."""
DEAREST = 1e3
"""Largest price of utility."""

Parts = Sequence[Sequence[Role]]
"""The losses of one step of an attacker, and the roles whose rows each takes in equal numbers."""


@dataclass(frozen=True)
class Drawn:
    """The attacker of one outer step."""

    goal: str
    subspace: str
    optimizer: str
    steps: int
    rate: float
    dice: Dice

    def parts(self, k: int) -> Parts:
        """What step k = 1 … K trains on."""
        early = 2 * k <= self.steps + 1
        steps: dict[str, Parts] = {
            "harm": [["restricted"]],
            "mixed": [["restricted", "retain"]],
            "benign-loss": [["restricted"], ["retain"]],
            "repair": [["restricted" if early else "retain"]],
            "warm-up": [["retain" if early else "restricted"]],
        }
        return steps[self.goal]


class CtrapAdaptive:
    """See the module docstring for the objective."""

    Config: ClassVar = CtrapAdaptiveConfig
    roles: ClassVar[tuple[Role, ...]] = ("restricted", "alignment", "retain")
    distils: ClassVar = True

    def __init__(self, config: CtrapAdaptiveConfig, train: Train, task: Task) -> None:
        self.config = config
        self.train = train
        self.token = collapse_token(task, config.collapse_text)
        self.goals = Population(config.goals)
        self.subspaces = Population(config.subspaces)
        self.movers = Population(tuple(config.rates))
        self.notes: tuple[str, ...] = (told(task, self.token),)
        """Sentences for the report."""

    def optimizers(self, params: list[nn.Parameter]) -> dict[str, Optimizer]:
        """The recipe's."""
        return {"outer": made(self.train, params)}

    def step(self, outer: Outer) -> dict[str, float]:
        """One outer step; returns K, the rate, what the attacker won, the price, losses in nats per token and norms."""
        n = self.train.batch_size
        general, refusals = outer.draw("retain", n), outer.draw("alignment", n)
        attacker = self.draw(outer)
        log: dict[str, float] = {"K": attacker.steps, "rate": attacker.rate}
        trap = self.trapped(outer, attacker, general, log)
        counter = self.countered(outer, attacker, general, log) if self.config.benign_weight else None
        self.retain(outer, general, refusals, log)
        price = self.price(outer.memory, log["drift"])
        log |= {"price": price, "norm retain": outer.norm(), "norm trap": trap.norm()}
        trap.add_kept(self.config.lam / price, self.config.cap)
        if counter is not None:
            counter.add_kept(self.config.benign_weight / price, self.config.cap)
        log["clip"] = outer.step("outer", clip=self.train.clip)
        return log

    def draw(self, outer: Outer) -> Drawn:
        """The attacker of this outer step: the same one in a run that was resumed."""
        dice = Dice.of(self.train.seed, outer.number)
        goal, subspace, mover = (
            population.draw(dice, outer.memory) for population in (self.goals, self.subspaces, self.movers)
        )
        steps, rate = dice.integer(*self.config.inner_steps), dice.rate(*self.config.rates[mover])  # type: ignore[index]
        return Drawn(goal, subspace, mover, steps, rate * (LORA_RATE if subspace == "lora" else 1), dice)

    def trapped(self, outer: Outer, attacker: Drawn, general: list[Example], log: dict[str, float]) -> There:
        """Σ_k w_k·(∇C(θ_k; general) + σ·∇U(θ_k; fresh restricted rows)) along the walk; how well it went is kept."""
        watched = {"p(e) attacked": probability(self.token), "general attacked": cross_entropy}
        with self.walk(outer, attacker) as there:
            for k, weight in enumerate(self.config.weights(attacker.steps), start=1):
                there.step(self.gradient(outer, attacker.parts(k), log))
                if weight:
                    h = outer.draw("restricted", self.train.batch_size)
                    seen: dict[str, float] = {}
                    there.keep(outer.gradient(collapse(self.token), general, seen, "collapse", watched), weight)
                    there.keep(
                        outer.gradient(kl_from_uniform, h, seen, "suppression", {"harm attacked": cross_entropy}),
                        weight * self.config.restricted_weight,
                    )
        log |= seen
        log["won"] = math.exp(-seen["harm attacked"] - seen["general attacked"])
        for population, name in zip(
            (self.goals, self.subspaces, self.movers),
            (attacker.goal, attacker.subspace, attacker.optimizer),
            strict=True,
        ):
            population.learn(name, log["won"], outer.memory)
        return there

    def countered(self, outer: Outer, attacker: Drawn, general: list[Example], log: dict[str, float]) -> There:
        """∇L(θ̃_K; general) after the attacker's steps on retain rows instead."""
        with self.walk(outer, attacker) as there:
            for _ in range(attacker.steps):
                there.step(self.gradient(outer, [["retain"]], log))
            there.keep(outer.gradient(cross_entropy, general, log, "retain after benign"))
        return there

    def retain(self, outer: Outer, general: list[Example], refusals: list[Example], log: dict[str, float]) -> None:
        """∇KL(θ₀‖θ; G) + ∇L(θ; A), at θ."""
        assert outer.origin is not None  # `distils` asks for it
        p = probability(self.token)
        outer.gradient(distillation(1.0), general, log, "drift", {"p(e)": p}, teachers=[outer.origin])()
        outer.gradient(cross_entropy, refusals, log, "alignment")()

    def price(self, memory: dict[str, float], drift: float) -> float:
        """ν, adapted to the drift of this step: dual ascent in ln ν."""
        over = min(drift / self.config.bound - 1, 1.0)
        pace = RISE if over > 0 else FALL
        memory["price"] = min(max(memory.get("price", 1.0) * math.exp(pace * over), 1.0), DEAREST)
        return memory["price"]

    def gradient(self, outer: Outer, parts: Parts, log: dict[str, float]) -> Objective:
        """The attacker's gradient on fresh rows: a mean for each part, all added."""
        each = [
            outer.gradient(
                cross_entropy,
                [row for role in roles for row in outer.draw(role, self.train.batch_size // len(roles))],
                log,
                " and ".join(roles),
            )
            for roles in parts
        ]

        def backward() -> None:
            for part in each:
                part()

        return backward

    def walk(self, outer: Outer, attacker: Drawn) -> AbstractContextManager[There]:
        """Where the attacker drawn goes, in its subspace."""

        def moved(params: list[nn.Parameter]) -> Optimizer:
            return OPTIMIZERS[attacker.optimizer](params, attacker.rate)

        def optimizer(params: list[nn.Parameter]) -> Optimizer:
            if attacker.subspace == "lora":
                lora = self.config.lora
                return LowRank(linear_weights(outer.model, lora), moved, lora, attacker.dice.generator)
            return moved(half(params, attacker.dice) if attacker.subspace == "half" else params)

        return outer.simulated_attack(optimizer)


def half(params: list[nn.Parameter], dice: Dice) -> list[nn.Parameter]:
    """Half of the tensors, drawn."""
    chosen = torch.randperm(len(params), generator=dice.generator)[: math.ceil(len(params) / 2)]
    return [params[int(i)] for i in chosen]
