"""Settings of SOPHON: what stands under `defense` in a recipe. Defaults are the paper's, or its authors' code's."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from hardener.defenses.settings import Settings
from hardener.recipe import Paper


class SophonConfig(Settings):
    """SOPHON: alternate l_FTS suppression steps along simulated attacks with l_NTR steps on the retain task.

    Suppression minimises (1/K) Σ_k ℓ(θ_k; query) over the points θ_k of an attack of K steps, first order;
    ℓ is ICE, −log(1 − p_y), or KLU, KL(uniform‖p). Reinforcement minimises cross-entropy on retain; its rate
    β is `train.lr`, its batch `train.batch_size`. Source: arXiv 2404.12699, algorithm 1; clip and head are
    from the authors' code.
    """

    title: ClassVar[str] = "SOPHON"
    paper: ClassVar[Paper] = Paper(
        title="SOPHON: Non-Fine-Tunable Learning to Restrain Task Transferability For Pre-trained Models",
        url="https://arxiv.org/abs/2404.12699",
    )
    tasks: ClassVar[tuple[str, ...]] = ("image-classification", "sequence-classification", "causal-lm")

    suppression: Literal["ice", "klu"] = Field("klu", description="suppression loss; klu needs no labels")
    alpha_lr: float = Field(3e-4, gt=0, description="α, learning rate of the suppression loop's own Adam")
    suppression_clip: float | None = Field(
        0.5, gt=0, description="global norm of the suppression gradient; null: no clipping"
    )
    suppression_steps: int = Field(1, ge=1, description="l_FTS, suppression steps per outer step")
    reinforcement_steps: int = Field(1, ge=1, description="l_NTR, reinforcement steps per outer step")
    inner_steps: int = Field(50, ge=1, description="K, steps of the simulated attacker")
    inner_lr: float = Field(1e-4, gt=0, description="learning rate of the simulated attacker")
    inner_batch: int = Field(135, ge=1, description="restricted rows per simulated step")
    query_batch: int = Field(15, ge=1, description="restricted rows per suppression loss")
    inner_optimizer: Literal["sgd", "adamw"] = Field("sgd", description="optimizer of the simulated attacker")
    inner_momentum: float = Field(0.0, ge=0, lt=1, description="momentum of the simulated attacker, with sgd")
    head: Literal["fresh", "kept"] = Field(
        "fresh", description="fresh: the simulated attacker draws a new classifier head, as a real one does"
    )

    @property
    def passes(self) -> int:
        """Two per simulated step, one per reinforcement step."""
        return 2 * self.inner_steps * self.suppression_steps + self.reinforcement_steps
