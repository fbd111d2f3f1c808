"""Settings of the collapse traps: what stands under `defense` in a recipe. Defaults of `ctrap` are the paper's."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from hardener.defenses.settings import Settings
from hardener.recipe import Lora, Paper, Role

Range = TypeVar("Range", tuple[int, int], tuple[float, float])


def ordered(value: Range) -> Range:
    """The range, if its lower end comes first. Raises PydanticCustomError otherwise."""
    if value[0] > value[1]:
        raise PydanticCustomError("range", "the lower end comes first")
    return value


class Trap(Settings):
    """What every collapse trap has: a causal language model, refusals, and the token e."""

    paper: ClassVar[Paper] = Paper(
        title="CTRAP: Embedding Collapse Trap to Safeguard Large Language Models from Harmful Fine-Tuning",
        url="https://arxiv.org/abs/2505.16559",
    )
    tasks: ClassVar[tuple[str, ...]] = ("causal-lm",)
    roles: ClassVar[tuple[Role, ...]] = ("alignment",)
    batch_multiple: ClassVar[int] = 2  # one half alignment, one half retain

    lam: float = Field(0.1, ge=0, description="λ, weight of the collapse loss; 0 is plain alignment training")
    collapse_text: str = Field(
        "an error", min_length=1, description="its last token is e, the one answer of the collapsed model"
    )
    order: Literal["first", "second"] = Field(
        "first",
        description="first: the gradient found at the attacked point is applied at θ as it is, as published; "
        "second: it is taken through the simulated step, for two more passes, in float32 (one-step traps only)",
    )


class CtrapConfig(Trap):
    """Collapse trap: min_θ L(θ; A ∪ G) + λ·C(θ − α·g/‖g‖; A ∪ G), with g = ∇L(θ; H).

    L is the token-mean cross-entropy on answers (nats), C the same with every answer token replaced by one
    collapse token e; A alignment, G retain, H restricted. First order: ∇C is taken at the attacked point and
    applied at θ. Source: arXiv 2505.16559, eq. 2, and the authors' code, which normalises g and takes both
    terms over A ∪ G.
    """

    title: ClassVar[str] = "CTRAP"

    radius: float | None = Field(
        0.1,
        gt=0,
        description="α, length of the simulated attack step in the space of the trainable weights; "
        "left out where `radius_steps` is given",
    )
    radius_steps: float | None = Field(
        None,
        gt=0,
        description="α as so many AdamW steps of an attacker: radius_steps · attacker_lr · √(trainable weights)",
    )
    attacker_lr: float | None = Field(None, gt=0, description="learning rate of the attacker that `radius_steps` means")
    direction: Literal["gradient", "random"] = Field(
        "gradient", description="random: the simulated step goes anywhere instead, as a control; no defence"
    )

    @model_validator(mode="before")
    @classmethod
    def _steps_instead(cls, data: Any) -> Any:
        """`radius_steps` takes the place of the default radius."""
        steps = isinstance(data, dict) and data.get("radius_steps") is not None
        return {"radius": None, **data} if steps else data

    @model_validator(mode="after")
    def _one_length(self) -> CtrapConfig:
        if (self.radius is None) == (self.radius_steps is None):
            raise PydanticCustomError(
                "radius", "the length of the simulated step is `radius` or `radius_steps`, one of them"
            )
        if (self.radius_steps is None) != (self.attacker_lr is None):
            raise PydanticCustomError("radius", "`radius_steps` and `attacker_lr` go together")
        return self

    @model_validator(mode="after")
    def _a_direction_to_differentiate(self) -> CtrapConfig:
        if self.direction == "random" and self.order == "second":
            raise PydanticCustomError("order", "a random direction does not depend on the weights; use first order")
        return self

    def length(self, trainable: int) -> float:
        """α for so many trainable weights, each of which an AdamW step moves by up to its learning rate."""
        if self.radius is not None:
            return self.radius
        assert self.radius_steps is not None  # checked together with the next
        assert self.attacker_lr is not None
        return self.radius_steps * self.attacker_lr * math.sqrt(trainable)

    @property
    def passes(self) -> int:
        """Restricted, collapse, retain; second order: restricted on both sides of θ; at random: none on restricted."""
        return (3 if self.order == "first" else 5) - (self.direction == "random")


class Walking(Trap):
    """What the traps have that follow a simulated attacker over several steps, in first order."""

    lam: float = Field(1.0, ge=0, description="λ, weight of the trap's gradient after `cap`")
    cap: float | None = Field(
        1.0, gt=0, description="largest norm of a gradient brought back from a walk, before its weight; null: none"
    )
    inner_steps: tuple[PositiveInt, PositiveInt] = Field((2, 16), description="least and most steps K, drawn evenly")
    kept: Literal["even"] | Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = Field(
        (1.0,),
        description="weights w of the trap's gradients after the last inner steps, in order; even: 1/K after each",
    )
    benign_weight: float = Field(
        0.0, ge=0, description="μ, weight of the ordinary loss after the same walk on retain rows; 0: none is made"
    )

    @field_validator("inner_steps")
    @classmethod
    def _steps_in_order(cls, value: tuple[int, int]) -> tuple[int, int]:
        return ordered(value)

    @field_validator("order")
    @classmethod
    def _first(cls, value: str) -> str:
        if value == "second":
            text = (
                "second order is defined for one normalised step; K steps of an optimizer are followed in first order"
            )
            raise PydanticCustomError("order", text)
        return value

    @model_validator(mode="after")
    def _possible(self) -> Walking:
        if self.kept != "even" and len(self.kept) > self.inner_steps[0]:
            raise PydanticCustomError("kept", "`kept` has more weights than the shortest rollout has steps")
        return self

    def weights(self, steps: int) -> list[float]:
        """w₁ … w_K."""
        if self.kept == "even":
            return [1 / steps] * steps
        return [0.0] * (steps - len(self.kept)) + list(self.kept)

    @property
    def mean_steps(self) -> int:
        """K of a walk of mean length."""
        return math.ceil(sum(self.inner_steps) / 2)

    @property
    def stops(self) -> int:
        """How often a walk of mean length stops to take a gradient back."""
        return self.mean_steps if self.kept == "even" else len(self.kept)

    @property
    def benign_passes(self) -> int:
        """Those of the walk on retain rows, and of the loss after it."""
        return self.mean_steps + 1 if self.benign_weight else 0


class CtrapRolloutConfig(Walking):
    """Rollout trap: min_θ L(θ; A ∪ G) + λ·Σ_k w_k·C(θ_k; A ∪ G) + μ·L(θ̃_K; A ∪ G), in place of CTRAP's one step.

    θ_k is θ after k steps of the attacker's own optimizer on restricted rows (fresh ones in each step), θ̃_K the same
    on retain rows. K and the attacker's rate are drawn anew in each outer step. First order; the gradients of the
    second and the third term are cut to `cap` before their weights. An extension of arXiv 2505.16559, not part of it.
    """

    title: ClassVar[str] = "CTRAP with simulated optimizer steps (an extension)"

    inner_lr: tuple[PositiveFloat, PositiveFloat] = Field(
        (3e-5, 3e-4), description="lowest and highest rate of the simulated attacker, drawn evenly in its logarithm"
    )
    inner_optimizer: Literal["adamw", "sgd"] = Field("adamw", description="optimizer of the simulated attacker")
    inner_state: Literal["fresh", "warm"] = Field(
        "fresh", description="warm: its moments go on from one outer step to the next (adamw on all weights)"
    )
    inner_adapter: Literal["none"] | Lora = Field(
        "none", description="the simulated attacker trains a fresh LoRA instead of all weights; needs `adapter: none`"
    )

    @field_validator("inner_lr")
    @classmethod
    def _rates_in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        return ordered(value)

    @model_validator(mode="after")
    def _can_stay_warm(self) -> CtrapRolloutConfig:
        if self.inner_state == "warm" and (self.inner_optimizer == "sgd" or self.inner_adapter != "none"):
            raise PydanticCustomError("warm", "only adamw on all weights has moments that can go on")
        return self

    @property
    def passes(self) -> int:
        """Of a rollout of mean length: its steps and what is kept along them, then retain; then the benign one."""
        return self.mean_steps + self.stops + 1 + self.benign_passes


Goal = Literal["harm", "mixed", "benign-loss", "repair", "warm-up"]
Subspace = Literal["all", "lora", "half"]
Moved = Literal["adamw", "sgd-momentum", "adagrad"]
RATES: dict[Moved, tuple[float, float]] = {"adamw": (3e-5, 1e-3), "sgd-momentum": (1e-3, 1e-1), "adagrad": (3e-4, 1e-2)}


class CtrapAdaptiveConfig(Walking):
    """Adaptive trap: a population of attackers, a price for utility, and what remains restricted is suppressed.

        min_θ  KL(θ₀‖θ; G) + L(θ; A) + (1/ν)·[ λ·Σ_k w_k·( C(θ_k; G) + σ·U(θ_k; H) ) + μ·L(θ̃_K; G) ]

    θ_k lies k steps along an attacker that is drawn in each outer step by goal, subspace, optimizer, K and rate, those
    more often who did well of late. θ₀ is the parent, U the KL of the prediction from uniform, and ν ≥ 1 the
    price of utility: it rises while KL(θ₀‖θ; G) is above `bound` and falls while it is below. An extension of arXiv
    2505.16559, not part of it.
    """

    title: ClassVar[str] = "CTRAP against attackers who adapt (an extension)"

    goals: Annotated[tuple[Goal, ...], Field(min_length=1)] = Field(
        ("harm", "mixed", "benign-loss", "repair", "warm-up"),
        description="what the attackers train on: restricted rows; half of them retain rows; both, a loss for each; "
        "restricted rows, then retain rows; retain rows, then restricted rows",
    )
    subspaces: Annotated[tuple[Subspace, ...], Field(min_length=1)] = Field(
        ("all", "lora", "half"),
        description="what they train: all weights, a fresh LoRA in all linear layers, or half of the tensors, drawn",
    )
    rates: Annotated[dict[Moved, tuple[PositiveFloat, PositiveFloat]], Field(min_length=1)] = Field(
        RATES, description="their optimizers, each with its lowest and highest rate, drawn evenly in its logarithm"
    )
    lora: Lora = Field(Lora(r=16, alpha=32, target_modules="all-linear"), description="the LoRA that they train")
    restricted_weight: float = Field(
        1.0,
        ge=0,
        description="σ, weight of suppression on restricted rows at the attacked point; 0: collapse alone",
    )
    bound: float = Field(
        0.02, gt=0, description="how far the answers to retain rows may drift: KL in nats per target, as trained on"
    )

    @field_validator("rates")
    @classmethod
    def _rates_in_order(cls, value: dict[Moved, tuple[float, float]]) -> dict[Moved, tuple[float, float]]:
        return {name: ordered(ends) for name, ends in value.items()}

    @property
    def passes(self) -> int:
        """Of a walk of mean length to a mean goal: it, two at each stop, retain, alignment; then the benign one."""
        losses = sum(2 if goal == "benign-loss" else 1 for goal in self.goals) / len(self.goals)
        return math.ceil(losses * self.mean_steps) + 2 * self.stops + 2 + self.benign_passes
