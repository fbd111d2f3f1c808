"""CTRAP: a collapse trap. arXiv 2505.16559; the step as its authors' code runs it.

    min_θ  L(θ; A ∪ G) + λ · C( θ − α · g/‖g‖ ; A ∪ G ),    g = ∇L(θ; H)

L is token-mean cross-entropy on answers, A refusals, G general dialogue, H harmful answers; C is the loss of
predicting one fixed token e at every answer position. α is a radius in weight space: one normalised step, fresh H in
each outer step. First order as published (∇C of the attacked point, applied at θ); `order: second` takes ∇C through
the step as well, which the paper does not.

Dropout is off in the model; an adapter may have some. Then the passes at the attacked point begin with the random
state with which the pass at θ begins, so that C and L see the same network, and only the pass at θ draws from it.

Cost: 3 forward and 3 backward passes per outer step (ordinary training: 1; second order: 5), one copy of the trainable
weights and one of their gradient (second order: one copy more). Expect little against an AdamW attacker at ordinary
rates, and nothing against one who mixes in benign data.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from hardener.defenses.population import Dice
from hardener.defenses.trap_configs import CtrapConfig
from hardener.errors import RecipeError
from hardener.lookahead import NormalisedStep, Objective
from hardener.loop import Outer
from hardener.losses import collapse, cross_entropy, probability
from hardener.optimizers import made
from hardener.recipe import Role, Train
from hardener.tasks.base import Example, Task
from hardener.tasks.causal_lm import CausalLM


class Ctrap:
    """The published setting; see the module docstring for the objective."""

    Config: ClassVar = CtrapConfig
    roles: ClassVar[tuple[Role, ...]] = ("restricted", "alignment", "retain")

    def __init__(self, config: CtrapConfig, train: Train, task: Task) -> None:
        if config.order == "second" and train.dtype != "float32":
            raise RecipeError(
                f"defense.order: second order is a difference of gradients, which {train.dtype} rounds away; "
                "set train.dtype to float32, or use first order"
            )
        self.config = config
        self.train = train
        self.token = collapse_token(task, config.collapse_text)
        self.notes: tuple[str, ...] = (told(task, self.token),)
        """Sentences for the report."""

    def optimizers(self, params: list[nn.Parameter]) -> dict[str, Optimizer]:
        """The recipe's."""
        return {"outer": made(self.train, params)}

    def step(self, outer: Outer) -> dict[str, float]:
        """One outer step; returns losses in nats per token, p(e), the norms of both gradients and the clip factor."""
        h = outer.draw("restricted", self.train.batch_size)  # harmful answers
        r = answers(outer, self.train.batch_size)
        p = probability(self.token)
        radius = self.config.length(sum(p.numel() for p in outer.params))
        log: dict[str, float] = {}
        with outer.simulated_attack(lambda params: NormalisedStep(params, radius), same_noise=True) as there:
            there.step(self.attack(outer, h, log))  # 1, 2  θ' = θ − α g/‖g‖
            there.keep(outer.gradient(collapse(self.token), r, log, "collapse", {"p(e) attacked": p}))  # 3  ∇C(θ')
            if self.config.order == "second":
                there.differentiate(self.attack(outer, h, {}))
        # 4  leaving the block restored θ bit for bit
        outer.gradient(cross_entropy, r, log, "retain", {"p(e)": p})()  # 5  ∇L(θ)
        log |= {"norm retain": outer.norm(), "norm collapse": there.norm()}
        there.add_kept(self.config.lam)
        log["clip"] = outer.step("outer", clip=self.train.clip)  # 6  clipped on the sum
        return log

    def attack(self, outer: Outer, h: list[Example], log: dict[str, float]) -> Objective:
        """g = ∇L(θ; h); as a control, a direction drawn from the seed and the number of the step instead."""
        if self.config.direction == "gradient":
            return outer.gradient(cross_entropy, h, log, "harmful")
        dice = Dice.of(self.train.seed, outer.number)

        def anywhere() -> None:
            for p in outer.params:
                p.grad = torch.randn(p.shape, generator=dice.generator).to(p)

        return anywhere


def answers(outer: Outer, n: int) -> list[Example]:
    """A ∪ G: `n` rows, half of them refusals and half general dialogue."""
    return outer.draw("alignment", n // 2) + outer.draw("retain", n - n // 2)


def collapse_token(task: Task, text: str) -> int:
    """The id of e: the last sub-token of `text`, so that it is the mid-sentence form.

    Raises RecipeError if the task has no such tokens, or if that one is special or is not what the text ends in.
    """
    if not isinstance(task, CausalLM):
        raise RecipeError(f"ctrap hardens causal language models, not {task.name}; use sophon for classifiers")
    ids = task.tokenizer(text, add_special_tokens=False)["input_ids"]
    end = task.tokenizer.decode(ids[-1:]).strip().casefold()
    special = {*task.tokenizer.all_special_ids, task.tokenizer.unk_token_id}
    if not ids or ids[-1] in special or not end or not text.casefold().endswith(end):
        raise RecipeError(
            f"defense.collapse_text: {text!r} does not end in an ordinary token of this tokenizer; choose a common word"
        )
    return int(ids[-1])


def told(task: Task, token: int) -> str:
    """Which token the collapsed model is to answer, for the report."""
    assert isinstance(task, CausalLM)
    return f"the collapse token e is {token}, {task.tokenizer.decode([token])!r}"
