"""Settings of SOPHON: what stands under `defense` in a recipe. Defaults are the paper's, or its authors' code's."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import Field

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
        "unconditional-diffusion",
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
