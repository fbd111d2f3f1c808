"""SOPHON: non-fine-tunable learning. arXiv 2404.12699, Algorithm 1; first order, in streaming form.

    repeat:  fine-tuning suppression (FTS), l_FTS times:
                 θ⁰ = θ;  θᵏ = θᵏ⁻¹ − φ(∇ CE(θᵏ⁻¹; R)),  k = 1 … K        a simulated fine-tune on the restricted task
                 Adam(α) on  (1/K) Σ_k ∇ L_α(θᵏ; T)                        applied at θ
             normal training reinforcement (NTR), l_NTR times:
                 Adam(β) on  ∇ CE(θ; S)                                    the original task

L_α is ICE, KLU or another of `losses.py`. R and T are fresh support and query batches of the restricted task in each
inner step. The authors' code averages the query losses over all K steps; as the first-order gradient of that mean is
the mean of the K gradients, they are added up along the walk and memory does not grow with K.

A simulated attacker with a fresh head draws it anew before each walk; the gradient of that head is dropped, because
it is the attacker's. (The authors' code, where both tasks share one layer, applies it to the model's own head.)

Where the recipe has a floor, the original task is looked at every so often; below it the weights go back to the last
look and training ends (`floor.py`): the steps that are left do nothing.

Cost: 2K + 1 forward and backward passes per outer step with l_FTS = l_NTR = 1.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from hardener.defenses.floor import Floor
from hardener.defenses.sophon_configs import SophonConfig, SophonWideConfig
from hardener.errors import RecipeError
from hardener.lookahead import Objective, There
from hardener.loop import Outer
from hardener.losses import SUPPRESSION
from hardener.recipe import Role, Train
from hardener.tasks.base import Task

STOPPED = "stopped"
"""In memory and log: the outer step after which the weights went back."""


class Alternating:
    """What is suppressed, and what is kept, each by an Adam of its own, above a floor."""

    roles: ClassVar[tuple[Role, ...]] = ("restricted", "retain")
    notes: tuple[str, ...] = ()
    config: SophonConfig | SophonWideConfig

    def __init__(self, config: SophonConfig | SophonWideConfig, train: Train, task: Task) -> None:
        self.config = config
        self.train = train
        self.task = task
        self.suppression = SUPPRESSION[config.suppression]
        self.floor = Floor(config)

    def optimizers(self, params: list[nn.Parameter]) -> dict[str, Optimizer]:
        """Two Adams: α suppresses, β reinforces; and the point to go back to, where there is a floor."""
        return {
            "suppress": Adam(params, lr=self.config.alpha_lr),
            "reinforce": Adam(params, lr=self.train.lr, weight_decay=self.train.weight_decay),
            **self.floor.optimizers(params),
        }


class Sophon(Alternating):
    """The published setting; see the module docstring for the algorithm."""

    Config: ClassVar = SophonConfig
    config: SophonConfig

    def step(self, outer: Outer) -> dict[str, float]:
        """One outer step; returns mean losses in nats, and once the floor was broken the step at which it was."""
        self.floor.begin(outer)
        if STOPPED in outer.memory:
            return {STOPPED: outer.memory[STOPPED]}
        log = self.trained(outer)
        if self.floor.fell(outer, log):
            outer.memory[STOPPED] = outer.number
        return log

    def trained(self, outer: Outer) -> dict[str, float]:
        """FTS, then NTR; returns mean losses in nats."""
        log: dict[str, float] = {}
        for _ in range(self.config.suppression_steps):
            with self.head(outer):
                there = self.walk(outer, log)
            there.add_kept()
            outer.step("suppress", clip=self.config.suppression_clip)
        for _ in range(self.config.reinforcement_steps):
            outer.gradient(self.task.loss, outer.draw("retain", self.train.batch_size), log, "retain")()
            outer.step("reinforce", clip=self.train.clip)
        return log

    def walk(self, outer: Outer, log: dict[str, float]) -> There:
        """K simulated fine-tuning steps with the suppression gradient taken after each; K = 0: at θ itself."""
        k = self.config.inner_steps
        with outer.simulated_attack(self.attacker) as there:
            for _ in range(k):
                support = outer.draw("restricted", self.config.inner_batch)
                there.step(outer.gradient(self.task.loss, support, log, "attack"))
                there.keep(self.suppressing(outer, log), 1 / k)
            if k == 0:
                there.keep(self.suppressing(outer, log))
        return there

    def suppressing(self, outer: Outer, log: dict[str, float]) -> Objective:
        """∇ L_α on a fresh query batch."""
        query = outer.draw("restricted", self.config.query_batch)
        return outer.gradient(self.suppression, query, log, "suppression")

    def attacker(self, params: list[nn.Parameter]) -> Optimizer:
        """The simulated fine-tuner φ; plain SGD at 1e-4 in the authors' code."""
        if self.config.inner_optimizer == "adamw":
            return AdamW(params, lr=self.config.inner_lr, weight_decay=0.0)
        return SGD(params, lr=self.config.inner_lr, momentum=self.config.inner_momentum)

    def head(self, outer: Outer) -> AbstractContextManager[None]:
        """A fresh head for restricted classes, or the model's own. Raises RecipeError if that has too few outputs."""
        if not outer.classes("restricted"):
            return nullcontext()
        if self.config.head == "fresh":
            return self.task.fresh_head(outer.model, outer.classes("restricted"))
        if not fits(outer):
            raise RecipeError(
                "defense.head: the model's own head has fewer outputs than the "
                f"{outer.classes('restricted')} restricted classes; use `head: fresh`"
            )
        return nullcontext()


def fits(outer: Outer) -> bool:
    """Whether the model's own head has an output for each restricted class."""
    return outer.classes("restricted") <= int(outer.model.config.num_labels)  # type: ignore[union-attr, arg-type]
