"""A simulated attacker who trains a fresh LoRA (arXiv 2106.09685), without an adapter in the model.

    ΔW = s·B·A,  s = alpha/r,    ∂L/∂B = s·G·Aᵀ,   ∂L/∂A = s·Bᵀ·G,    G = ∂L/∂W at W + ΔW

The chain rule gives the factors' gradients from that of the merged weight, so the model is always at the merged point,
where the base weights have their own gradients: what a defence keeps there is for W. Equal to peft's layer up to
rounding; its dropout is not simulated.

Cost: beside one gradient of the base weights, the factors and their optimizer's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hardener.errors import RecipeError
from hardener.recipe import Lora


class LowRank(Optimizer):
    """Moves matrices (out, in) by s·B·A, where `inner` trains B (out, r) and A (r, in).

    A is drawn evenly from ±1/√in and B is zero, as peft begins.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        inner: Callable[[list[nn.Parameter]], Optimizer],
        lora: Lora,
        generator: torch.Generator,
    ) -> None:
        super().__init__(params, {})
        self.scale = lora.alpha / lora.r
        self.factors = [(p, fresh(p.shape[0], lora.r, p), drawn(lora.r, p, generator)) for p in params]
        self.inner = inner([factor for _, b, a in self.factors for factor in (b, a)])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of the factors on the gradient of the merged weights."""
        for p, b, a in self.factors:
            assert p.grad is not None  # every linear layer of a language model takes part in its answer
            b.grad, a.grad = self.scale * p.grad @ a.T, self.scale * b.T @ p.grad
            p.addmm_(b, a, alpha=-self.scale)
        self.inner.step()
        for p, b, a in self.factors:
            p.addmm_(b, a, alpha=self.scale)


def fresh(rows: int, r: int, like: Tensor) -> nn.Parameter:
    """B: nothing is added yet."""
    return nn.Parameter(torch.zeros(rows, r, dtype=like.dtype, device=like.device))


def drawn(r: int, like: Tensor, generator: torch.Generator) -> nn.Parameter:
    """A, from the CPU's `generator`, so that it is the same on every device."""
    columns = like.shape[1]
    value = (torch.rand(r, columns, generator=generator, dtype=torch.float64) * 2 - 1) / math.sqrt(columns)
    return nn.Parameter(value.to(like.device, like.dtype))


def linear_weights(model: nn.Module, lora: Lora) -> list[nn.Parameter]:
    """The trainable linear weights that the LoRA is for; `all-linear` leaves the output layer out, as peft does.

    Raises RecipeError if there are none, if they are sharded, or if the model is hardened through an adapter.
    """
    if hasattr(model, "peft_config"):
        raise RecipeError("a simulated LoRA needs `adapter: none`: it is added to trainable weights")
    head = model.get_output_embeddings()  # type: ignore[operator]
    ends = None if lora.target_modules == "all-linear" else tuple(f".{end}" for end in lora.target_modules)
    chosen = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (module is not head if ends is None else f".{name}".endswith(ends))
    ]
    found = [weight for weight in chosen if isinstance(weight, nn.Parameter) and weight.requires_grad]
    if not found:
        raise RecipeError(f"target_modules of the simulated LoRA: no trainable linear layer is {lora.target_modules!r}")
    if hasattr(found[0], "full_tensor"):
        raise RecipeError("a LoRA cannot be simulated on sharded weights; leave --shard out")
    return found
