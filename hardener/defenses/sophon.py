"""SOPHON: non-fine-tunable learning. arXiv 2404.12699, Algorithm 1; first order, in streaming form.

    repeat:  fine-tuning suppression (FTS), l_FTS times:
                 θ⁰ = θ;  θᵏ = θᵏ⁻¹ − φ(∇ CE(θᵏ⁻¹; R)),  k = 1 … K        a simulated fine-tune on the restricted task
                 Adam(α) on  (1/K) Σ_k ∇ L_α(θᵏ; T)                        applied at θ
             normal training reinforcement (NTR), l_NTR times:
                 Adam(β) on  ∇ CE(θ; S)                                    the original task

L_α is ICE or KLU (`losses.py`). R and T are fresh support and query batches of the restricted task in each inner step.
The authors' code averages the query losses over all K steps; as the first-order gradient of that mean is the mean of
the K gradients, they are added up along the walk and memory does not grow with K.

A simulated attacker with a fresh head draws it anew before each walk; the gradient of that head is dropped, because
it is the attacker's. (The authors' code, where both tasks share one layer, applies it to the model's own head.)

Cost: 2K + 1 forward and backward passes per outer step with l_FTS = l_NTR = 1.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from hardener.defenses.sophon_configs import SophonConfig
from hardener.lookahead import There, simulated_attack
from hardener.loop import Outer
from hardener.losses import SUPPRESSION, cross_entropy
from hardener.recipe import Role, Train
from hardener.tasks.base import Task


class Sophon:
    """The published setting; see the module docstring for the algorithm."""

    Config: ClassVar = SophonConfig
    roles: ClassVar[tuple[Role, ...]] = ("restricted", "retain")
    notes: tuple[str, ...] = ()

    def __init__(self, config: SophonConfig, train: Train, task: Task) -> None:
        self.config = config
        self.train = train
        self.task = task
        self.suppression = SUPPRESSION[config.suppression]

    def optimizers(self, params: list[nn.Parameter]) -> dict[str, Optimizer]:
        """Two Adams: α suppresses, β reinforces."""
        return {
            "suppress": Adam(params, lr=self.config.alpha_lr),
            "reinforce": Adam(params, lr=self.train.lr, weight_decay=self.train.weight_decay),
        }

    def step(self, outer: Outer) -> dict[str, float]:
        """One outer step; returns mean losses in nats."""
        log: dict[str, float] = {}
        for _ in range(self.config.suppression_steps):
            with self.head(outer):
                there = self.walk(outer, log)
            there.add_kept()
            outer.step("suppress", clip=self.config.suppression_clip)
        for _ in range(self.config.reinforcement_steps):
            outer.gradient(cross_entropy, outer.draw("retain", self.train.batch_size), log, "retain")()
            outer.step("reinforce", clip=self.train.clip)
        return log

    def walk(self, outer: Outer, log: dict[str, float]) -> There:
        """K simulated fine-tuning steps with the suppression gradient taken after each."""
        k = self.config.inner_steps
        with simulated_attack(outer.model, self.attacker) as there:
            for _ in range(k):
                support = outer.draw("restricted", self.config.inner_batch)
                query = outer.draw("restricted", self.config.query_batch)
                there.step(outer.gradient(cross_entropy, support, log, "attack"))
                there.keep(outer.gradient(self.suppression, query, log, "suppression"), 1 / k)
        return there

    def attacker(self, params: list[nn.Parameter]) -> Optimizer:
        """The simulated fine-tuner φ; plain SGD at 1e-4 in the authors' code."""
        if self.config.inner_optimizer == "adamw":
            return AdamW(params, lr=self.config.inner_lr, weight_decay=0.0)
        return SGD(params, lr=self.config.inner_lr, momentum=self.config.inner_momentum)

    def head(self, outer: Outer) -> AbstractContextManager[None]:
        """A fresh head for the restricted task, or the model's own."""
        if self.config.head == "kept" or self.task.generative:
            return nullcontext()
        return self.task.fresh_head(outer.model, outer.classes("restricted"))
