"""Settings of SOPHON: what stands under `defense` in a recipe. Defaults are the paper's, or its authors' code's."""

from __future__ import annotations

import math
from abc import abstractmethod
from statistics import mean
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from pydantic_core import PydanticCustomError

from hardener.defenses.settings import Settings
from hardener.recipe import Paper

Suppression = Literal["ice", "ice-negated-logits", "klu", "token-ice", "negative-entropy", "dos"]


class Guarded(Settings):
    """What has a floor under the retain task."""

    floor: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="least share of the first score that held-back retain rows must stay above; null: no floor",
    )
    floor_every: int = Field(10, ge=1, description="outer steps between two looks at the floor")
    floor_by: Literal["score", "loss"] = Field(
        "score", description="what is looked at: the score of the retain rows, or 1/loss (cross-entropy per target)"
    )

    @abstractmethod
    def rows(self, batch_size: int) -> int:
        """Rows on which gradients are taken in one outer step; `batch_size` is that of `train`."""


class SophonConfig(Guarded):
    """SOPHON: alternate l_FTS suppression steps along simulated attacks with l_NTR steps on the retain task.

    Suppression minimises (1/K) Σ_k ℓ(θ_k; query) over the points θ_k of an attack of K steps, first order;
    ℓ is ICE, −log(1 − p_y), or KLU, KL(uniform‖p). Reinforcement minimises cross-entropy on retain; its rate
    β is `train.lr`, its batch `train.batch_size`. Below `floor` the weights go back to the last look and training
    ends. Source: arXiv 2404.12699, algorithm 1; clip, head, floor and `ice-negated-logits` are from the authors' code;
    `token-ice` and `negative-entropy`, for language models, from that of arXiv 2408.00761.
    """

    title: ClassVar[str] = "SOPHON"
    paper: ClassVar[Paper] = Paper(
        title="SOPHON: Non-Fine-Tunable Learning to Restrain Task Transferability For Pre-trained Models",
        url="https://arxiv.org/abs/2404.12699",
    )
    tasks: ClassVar[tuple[str, ...]] = (
        *("image-classification", "sequence-classification", "causal-lm"),
        *("image-encoder", "text-encoder", "unconditional-diffusion"),
    )

    suppression: Suppression = Field(
        "klu",
        description="suppression loss; `ice-negated-logits` is what the authors' code computes in place of ICE, "
        "`token-ice` is ICE without tokens that are forgotten already; klu and negative-entropy need no labels; `dos` "
        "is for diffusion models, and they have no other",
    )
    alpha_lr: float = Field(
        3e-4, ge=0, description="α, learning rate of the suppression loop's own Adam; 0 is plain training on retain"
    )
    suppression_clip: float | None = Field(
        0.5, gt=0, description="global norm of the suppression gradient; null: no clipping"
    )
    suppression_steps: int = Field(1, ge=1, description="l_FTS, suppression steps per outer step")
    reinforcement_steps: int = Field(1, ge=1, description="l_NTR, reinforcement steps per outer step")
    inner_steps: int = Field(
        50, ge=0, description="K, steps of the simulated attacker; 0 suppresses the model as it is"
    )
    inner_lr: float = Field(1e-4, gt=0, description="learning rate of the simulated attacker")
    inner_batch: int = Field(135, ge=1, description="restricted rows per simulated step")
    query_batch: int = Field(15, ge=1, description="restricted rows per suppression loss")
    inner_optimizer: Literal["sgd", "adamw"] = Field("sgd", description="optimizer of the simulated attacker")
    inner_momentum: float = Field(0.0, ge=0, lt=1, description="momentum of the simulated attacker, with sgd")
    head: Literal["fresh", "kept"] = Field(
        "fresh", description="fresh: the simulated attacker draws a new classifier head, as a real one does"
    )

    def rows(self, batch_size: int) -> int:
        """Support and query of each simulated step, and the reinforcement's."""
        walk = self.inner_steps * self.inner_batch + max(1, self.inner_steps) * self.query_batch
        return self.suppression_steps * walk + self.reinforcement_steps * batch_size

    @property
    def passes(self) -> int:
        """Two per simulated step, one per reinforcement step."""
        return max(1, 2 * self.inner_steps) * self.suppression_steps + self.reinforcement_steps


Optimizers = Literal["sgd", "sgd-momentum", "nesterov", "adamw", "adagrad", "adadelta"]
RATES: dict[Optimizers, tuple[float, float]] = {
    "sgd-momentum": (1e-4, 1e-1),
    "nesterov": (1e-4, 1e-1),
    "adamw": (1e-5, 1e-2),
    "adagrad": (1e-4, 1e-1),
    "adadelta": (1e-2, 1e1),
}
"""Three decades each, about where each of them learns."""


class SophonWideConfig(Guarded):
    """SOPHON against a population: each outer step simulates another attacker, drawn with preference for who wins.

    Drawn are optimizer and rate, the head (kept or fresh), what is trained (all weights, the head, a LoRA), batch,
    number of steps and a warm-up on the retain task. Suppression as in `sophon`, at every `query_every`-th step;
    reinforcement adds κ·KL(parent‖model) to the loss of the retain task. Below `floor` the weights go back to the
    last look and α is halved. An extension of arXiv 2404.12699, not part of it.
    """

    title: ClassVar[str] = "SOPHON against a population of attackers (an extension)"
    paper: ClassVar[Paper] = SophonConfig.paper
    tasks: ClassVar[tuple[str, ...]] = (
        *("image-classification", "sequence-classification", "causal-lm"),
        *("image-encoder", "text-encoder"),
    )

    floor: float | None = Field(
        0.98,
        gt=0,
        lt=1,
        description="least share of the first score that held-back retain rows must stay above; null: no floor",
    )
    suppression: Suppression = Field("klu", description="suppression loss, as in `sophon`")
    alpha_lr: float = Field(3e-4, ge=0, description="α, learning rate of the suppression loop's own Adam")
    suppression_clip: float | None = Field(
        0.5, gt=0, description="global norm of the suppression gradient; null: no clipping"
    )
    reinforcement_steps: int = Field(2, ge=1, description="l_NTR, reinforcement steps per outer step")
    distil: float = Field(1.0, ge=0, description="κ, weight of KL(parent‖model) on retain rows; 0: no parent is kept")
    rates: dict[Optimizers, tuple[PositiveFloat, PositiveFloat]] = Field(
        RATES, min_length=1, description="optimizer → lowest and highest rate, cut into decades that are drawn from"
    )
    heads: tuple[Literal["kept", "fresh"], ...] = Field(
        ("kept", "fresh"), min_length=1, description="heads of simulated attackers; of a language model always kept"
    )
    scopes: tuple[Literal["all", "head", "lora"], ...] = Field(
        ("all", "head", "lora"),
        min_length=1,
        description="what simulated attackers train; a language model has no head",
    )
    inner_steps: tuple[PositiveInt, PositiveInt] = Field((10, 50), description="least and most steps K, drawn evenly")
    inner_batches: tuple[PositiveInt, ...] = Field(
        (8, 32, 128), min_length=1, description="restricted rows per simulated step, one of these"
    )
    warm_up: tuple[NonNegativeInt, NonNegativeInt] = Field(
        (0, 4), description="least and most steps on retain rows before the walk, drawn evenly"
    )
    query_every: int = Field(4, ge=1, description="m, simulated steps between two suppression gradients")
    query_batch: int = Field(32, ge=1, description="restricted rows per suppression gradient")

    @field_validator("inner_steps", "warm_up")
    @classmethod
    def _in_order(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] > value[1]:
            raise PydanticCustomError("range", "the lower end comes first")
        return value

    @field_validator("rates")
    @classmethod
    def _rates_in_order(cls, value: dict[Optimizers, tuple[float, float]]) -> dict[Optimizers, tuple[float, float]]:
        if any(low > high for low, high in value.values()):
            raise PydanticCustomError("range", "the lower end comes first")
        return value

    def rows(self, batch_size: int) -> int:
        """At the mean length, batch and warm-up of the population."""
        batch = mean(self.inner_batches)
        walk = (mean(self.inner_steps) + mean(self.warm_up)) * batch + self.looks * self.query_batch
        return round(walk) + self.reinforcement_steps * batch_size

    @property
    def looks(self) -> int:
        """Suppression gradients of a walk of mean length."""
        return math.ceil(mean(self.inner_steps) / self.query_every)

    @property
    def passes(self) -> int:
        """One per simulated step, per look and per reinforcement step, at the mean length of a walk."""
        return round(mean(self.inner_steps) + mean(self.warm_up)) + self.looks + self.reinforcement_steps
