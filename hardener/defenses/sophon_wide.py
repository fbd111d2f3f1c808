"""SOPHON against a population of attackers: an extension of arXiv 2404.12699, not part of it.

    repeat:  draw an attacker φ: optimizer and rate, head, what is trained, batch, K, length w of a warm-up
             θ⁰ = θ, after w steps of φ on the original task S
             θᵏ = θᵏ⁻¹ − φ(∇L(θᵏ⁻¹; R)),  k = 1 … K
             FTS:    Adam(α) on  mean over every m-th k of ∇L_α(θᵏ; T)
             NTR:    l_NTR times Adam(β) on  ∇[ L(θ; S) + κ·KL(f₀ ‖ f_θ; S) ]
             floor:  below it, θ goes back to the last look and α is halved

The published setting simulates one attacker and falls to any that is unlike it: ten times the rate, another optimizer,
the head that was not simulated. Here each outer step draws another one, with preference for whoever ended its walks
with the restricted task best learned (`population.py`): optimizer and decade of its rate, head (kept, fresh) and scope
(all weights, the head, a LoRA) have scores of their own. The rate is drawn evenly in its logarithm within the decade;
batch, K and w evenly.

An attacker that ends in infinite weights has beaten itself: nothing is suppressed in that step, and it scores zero.
Draws depend on `train.seed`, the number of the outer step and the scores, which are in the resumable state. f₀ is the
parent, also after an erasure. LoRA is simulated on linear and convolution layers, a new head trained in full beside it.

Cost: K(1 + 1/m) + w + l_NTR forward and backward passes per outer step and l_NTR forward passes of f₀; two copies of
the weights, three with a warm-up, one of their gradient, and φ's moments, whatever K is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Adadelta, Optimizer
from transformers.pytorch_utils import Conv1D

from hardener.defenses import population
from hardener.defenses.low_rank import LowRank
from hardener.defenses.population import Dice, Population
from hardener.defenses.sophon import Alternating, fits
from hardener.defenses.sophon_configs import SophonWideConfig
from hardener.errors import DivergedError, RecipeError
from hardener.lookahead import There
from hardener.loop import Outer
from hardener.loss import rowwise
from hardener.losses import divergence
from hardener.recipe import Lora, Train
from hardener.tasks.base import Task

LORA = Lora(r=16, alpha=32)
"""The adapter that the probe's own attack trains."""
Make = Callable[[Iterable[nn.Parameter], float], Optimizer]
OPTIMIZERS: dict[str, Make] = population.OPTIMIZERS | {"adadelta": lambda params, lr: Adadelta(params, lr=lr)}


@dataclass(frozen=True)
class Drawn:
    """The attacker of one outer step."""

    names: dict[str, str]
    """What it was drawn from → who was drawn there: `rate`, `head`, `scope`."""
    optimizer: str
    rate: float
    batch: int
    steps: int
    warm_up: int
    dice: Dice
    """What a simulated LoRA is drawn from."""


class SophonWide(Alternating):
    """See the module docstring for the algorithm."""

    Config: ClassVar = SophonWideConfig
    config: SophonWideConfig

    def __init__(self, config: SophonWideConfig, train: Train, task: Task) -> None:
        super().__init__(config, train, task)
        self.distils = config.distil > 0 and task.kind != "encoder"
        """Asks the loop to keep the parent; the own loss of an encoder's task is its distillation."""

    def step(self, outer: Outer) -> dict[str, float]:
        """One outer step; returns losses in nats, the attacker's rate, K and how well it did, and α once it fell."""
        self.floor.begin(outer)
        attacker = self.draw(outer)
        log: dict[str, float] = {"rate": attacker.rate, "K": attacker.steps}
        log["won"] = self.suppress(outer, attacker, log)
        for kind, members in self.populations(outer).items():
            members.learn(attacker.names[kind], log["won"], outer.memory)
        for _ in range(self.config.reinforcement_steps):
            self.reinforce(outer, log)
        if self.floor.fell(outer, log):
            log["alpha"] = self.halve(outer)
        return log

    def halve(self, outer: Outer) -> float:
        """α for the steps to come. The schedule reads it from its own state, which is resumable."""
        schedule = outer.schedules["suppress"]
        half = float(schedule.base_lrs[0]) / 2
        schedule.base_lrs = [half]
        return half

    # --- who attacks --------------------------------------------------------------------------------------

    def populations(self, outer: Outer) -> dict[str, Population]:
        """What is drawn with preference; a language model has no head of its own to draw or to train alone."""
        config, classifies = self.config, not self.task.generative
        heads = [head for head in config.heads if head == "fresh" or fits(outer)] if classifies else ["kept"]
        scopes = [scope for scope in config.scopes if scope != "head" or classifies]
        if not heads or not scopes:
            raise RecipeError(
                "defense.heads, defense.scopes: no attacker is left; a language model has no head of its own, and a "
                "kept one needs an output for each restricted class"
            )
        drawn = {"rate": list(self.bands()), "head": heads, "scope": scopes}
        return {kind: Population(tuple(f"{kind} {name}" for name in names)) for kind, names in drawn.items()}

    def bands(self) -> dict[str, tuple[str, float, float]]:
        """Name → optimizer, lowest and highest rate: about a decade each."""
        found: dict[str, tuple[str, float, float]] = {}
        for optimizer, (low, high) in self.config.rates.items():
            count = max(1, round(math.log10(high / low)))
            edges = [low * (high / low) ** (i / count) for i in range(count + 1)]
            for lower, upper in itertools.pairwise(edges):
                found[f"{optimizer} {lower:.1e}"] = (optimizer, lower, upper)
        return found

    def draw(self, outer: Outer) -> Drawn:
        """The attacker of this outer step: the same one in a run that was resumed."""
        dice, config = Dice.of(self.train.seed, outer.number), self.config
        names = {kind: members.draw(dice, outer.memory) for kind, members in self.populations(outer).items()}
        optimizer, low, high = self.bands()[names["rate"].removeprefix("rate ")]
        return Drawn(
            names=names,
            optimizer=optimizer,
            rate=dice.rate(low, high),
            batch=config.inner_batches[dice.integer(0, len(config.inner_batches) - 1)],
            steps=dice.integer(*config.inner_steps),
            warm_up=dice.integer(*config.warm_up),
            dice=dice,
        )

    # --- what it does -------------------------------------------------------------------------------------

    def suppress(self, outer: Outer, attacker: Drawn, log: dict[str, float]) -> float:
        """FTS; returns how well the attacker ended, exp(−loss) on rows it was not trained on, 0 if it diverged."""
        try:
            there, won = self.walk(outer, attacker, log)
            there.norm()  # raises where a gradient on the way was not finite
        except DivergedError:
            won = 0.0
        else:
            there.add_kept()
        outer.step("suppress", clip=self.config.suppression_clip)
        return won

    def walk(self, outer: Outer, attacker: Drawn, log: dict[str, float]) -> tuple[There, float]:
        """Warm-up, then K steps on restricted rows with suppression gradients set aside on the way."""
        with ExitStack() as stack:
            if attacker.warm_up:
                self.warm(outer, attacker, stack, log)
            if attacker.names["head"] == "head fresh":
                stack.enter_context(self.task.fresh_head(outer.model, outer.classes("restricted")))
            there = stack.enter_context(outer.simulated_attack(lambda p: self.optimizer(outer, attacker, p)))
            last: dict[str, float] = {}
            looks = self.looks(attacker.steps)
            for k in range(1, attacker.steps + 1):
                rows = outer.draw("restricted", attacker.batch)
                there.step(outer.gradient(self.task.loss, rows, log, "attack"))
                if k in looks:
                    query, last = outer.draw("restricted", self.config.query_batch), {}
                    beside = {"attacked": self.task.loss}
                    there.keep(outer.gradient(self.suppression, query, last, "suppression", beside), 1 / len(looks))
        log |= last
        return there, math.exp(-last["attacked"])

    def looks(self, steps: int) -> range:
        """Every m-th step, the last one for certain."""
        return range(steps, 0, -self.config.query_every)

    def warm(self, outer: Outer, attacker: Drawn, stack: ExitStack, log: dict[str, float]) -> None:
        """Walk away on the original task first, with the model's own head, until `stack` is left."""
        make = OPTIMIZERS[attacker.optimizer]
        there = stack.enter_context(outer.simulated_attack(lambda params: make(params, attacker.rate)))
        for _ in range(attacker.warm_up):
            there.step(outer.gradient(self.task.loss, outer.draw("retain", attacker.batch), log, "warm-up"))

    def optimizer(self, outer: Outer, attacker: Drawn, params: list[nn.Parameter]) -> Optimizer:
        """φ on what it trains."""
        make, scope = OPTIMIZERS[attacker.optimizer], attacker.names["scope"]
        if scope == "scope all":
            return make(params, attacker.rate)
        head = [outer.model.get_parameter(name) for name in outer.task.head(outer.model)]
        if scope == "scope head":
            return make(head, attacker.rate)
        matrices = list(adaptable(outer.model, head))
        return Adapter(matrices, lambda ab: make([*ab, *head], attacker.rate), LORA, attacker.dice.generator)

    def reinforce(self, outer: Outer, log: dict[str, float]) -> None:
        """One NTR step: the ordinary loss, and what the parent says of the same rows."""
        rows = outer.draw("retain", self.train.batch_size)
        if outer.origin is None:
            outer.gradient(self.task.loss, rows, log, "retain")()
        else:
            alone = {"retain alone": self.task.loss}
            outer.gradient(self.distilled, rows, log, "retain", alone, teachers=[outer.origin])()
        outer.step("reinforce", clip=self.train.clip)

    @rowwise
    def distilled(self, logits: Tensor, labels: Tensor, told: Tensor) -> Tensor:
        """The loss of the original task, and κ times the divergence from the parent."""
        return self.task.loss(logits, labels) + self.config.distil * divergence(told, logits, 1.0)


class Adapter(LowRank):
    """A simulated LoRA on matrices and convolutions: to peft a kernel (out, in, height, width) is (out, the rest)."""

    def __init__(self, params: list[nn.Parameter], *how: Any) -> None:
        self.whole = params
        self.flat = [nn.Parameter(p.detach().view(len(p), -1)) for p in params]  # the same memory
        super().__init__(self.flat, *how)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of the factors, and of whatever else the inner optimizer trains."""
        for p, flat in zip(self.whole, self.flat, strict=True):
            assert p.grad is not None  # every layer takes part in the answer
            flat.grad = p.grad.view(len(p), -1)
        super().step()


def adaptable(model: nn.Module, head: Sequence[nn.Parameter]) -> Iterator[nn.Parameter]:
    """Trainable weights of linear and ungrouped convolution layers but the head. Raises RecipeError on an adapter."""
    if hasattr(model, "peft_config"):
        raise RecipeError("defense.scopes: a simulated LoRA needs `adapter: none`, or leave `lora` out")
    ends = {id(p) for p in head} | {id(p) for p in outputs(model)}
    for module in model.modules():
        whole = isinstance(module, nn.Linear | Conv1D) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        weight = module.weight if whole else None
        if isinstance(weight, nn.Parameter) and id(weight) not in ends and weight.requires_grad:
            yield weight


def outputs(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a language model's last layer."""
    last = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return list(last.parameters()) if last is not None else []
