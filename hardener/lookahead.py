"""Go where the attacker goes, take a gradient there, come back exactly.

CTRAP, SOPHON, Booster, TAR and SAM share this skeleton. It is written once, in place, first order:

    with simulated_attack(model, attacker) as there:        remember θ, buffers, random state
        for k in range(steps):
            there.step(harmful_loss)                        θ ← the attacker's move
            there.keep(penalty, weight)                     ∇ at θ_k, set aside and added up
    there.add_kept()                                        θ is back bit for bit; kept gradient joins θ's own

First order: the gradient at θ_k is applied at θ as it is (∂θ_k/∂θ is taken as the identity). After one normalised
step, `there.differentiate` puts the exact derivative in its place.

Cost: one backward pass per `step` and per `keep`; one copy of the trainable weights, one of their gradient, and the
attacker's optimizer state, independent of the number of steps; once back, only the kept gradient is left. The copy may
live in the host's memory, and so what is left. Second order: two passes and one copy more. Everything is of the local
shard, so the same lines serve one device and sharded parameters; the only global numbers are norms and dot products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from hardener.errors import DivergedError, RecipeError

Objective = Callable[[], object]
"""Computes a loss and calls `backward`, adding into `.grad` of the trainable parameters."""
Attacker = Callable[[list[nn.Parameter]], Optimizer]
"""Makes the attacker's fresh optimizer, e.g. `lambda params: torch.optim.AdamW(params, lr=1e-4)`."""
TINY = 1e-7
"""Added to ‖g‖, as the authors of CTRAP and Booster do, so that no gradient at all is no step."""
SPAN = 1e-3
"""‖εw‖/‖θ‖ of the difference that stands for a Hessian-vector product: small, yet far above float32's rounding."""


class NormalisedStep(Optimizer):
    """θ ← θ − α·g/(‖g‖₂ + 1e-7), one global norm over all parameters: `radius` α is a length in weight space.

    The inner step of CTRAP and Booster as their authors' code takes it. Raises DivergedError if ‖g‖ is not finite.
    """

    def __init__(self, params: Iterable[nn.Parameter], radius: float) -> None:
        super().__init__(params, {})
        self.radius = radius
        self.norm = 0.0
        """‖g‖ of the step that was taken."""

    @property
    def rate(self) -> float:
        """What g was multiplied by: α/(‖g‖ + 1e-7)."""
        return self.radius / (self.norm + TINY)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        moving = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norm = global_norm(p.grad for p in moving)
        for p in moving:
            p.sub_(p.grad, alpha=self.rate)


def global_norm(gradients: Iterable[Tensor | None]) -> float:
    """L2 norm over all tensors and shards. Raises DivergedError if it is not finite."""
    return _finite(get_total_norm([g for g in gradients if g is not None]))


def _finite(norm: Tensor) -> float:
    """A norm as a number. Raises DivergedError if it is not finite."""
    value = float(_whole(norm))
    if not math.isfinite(value):
        raise DivergedError(f"the gradient norm is {value}; lower the learning rate or radius, or raise the precision")
    return value


def _dot(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """Sum of products over all tensors and shards."""
    return float(torch.stack([_whole((a * b).sum()) for a, b in zip(one, other, strict=True)]).sum())


def _whole(scalar: Tensor) -> Tensor:
    """The value over all shards."""
    return scalar.full_tensor() if hasattr(scalar, "full_tensor") else scalar


class Randomness:
    """The random state of the CPU and of the parameters' GPUs, to be put back any number of times."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        devices = sorted({p.device.index or 0 for p in params if p.device.type == "cuda"})
        self._cpu = torch.get_rng_state()
        self._gpus = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        """Draw on from where the state was taken."""
        torch.set_rng_state(self._cpu)
        for device, state in self._gpus.items():
            torch.cuda.set_rng_state(state, device)


class Snapshot:
    """Weights as they are, kept beside them or in the host's memory, to be put back bit for bit any number of times."""

    def __init__(self, params: Sequence[nn.Parameter], host: bool = False) -> None:
        self.host = host
        self._params = params
        self._values = [_in_host_memory(_local(p)) if host else _local(p).clone() for p in params]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back."""
        for p, value in zip(self._params, self._values, strict=True):
            _local(p).copy_(value)


@torch.no_grad()
def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the tensor's own memory."""
    value = tensor.detach()
    return value.to_local() if hasattr(value, "to_local") else value


def _in_host_memory(value: Tensor) -> Tensor:
    """A copy there; pinned where the value is on a GPU, which reads and writes it directly."""
    return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda).copy_(value)


class There:
    """The attacker's place: step on, and set gradients aside."""

    def __init__(
        self, params: list[nn.Parameter], start: Snapshot, optimizer: Optimizer, noise: Randomness | None
    ) -> None:
        self._params = params
        self._start = start
        self._optimizer = optimizer
        self._noise = noise
        self._steps = 0
        self.kept: list[Tensor | None] = [None] * len(params)
        """Per parameter the sum of weighted gradients set aside so far."""

    def step(self, objective: Objective) -> None:
        """Take one attacker step on the gradient of `objective`."""
        self._run(objective)
        self._optimizer.step()
        self._steps += 1
        self._forget()

    def keep(self, objective: Objective, weight: float = 1.0) -> None:
        """Set `weight` × the gradient of `objective` at this place aside."""
        self._run(objective)
        for i, p in enumerate(self._params):
            if p.grad is None:
                continue
            mine = self.kept[i]
            self.kept[i] = p.grad.mul_(weight) if mine is None else mine.add_(p.grad, alpha=weight)
        self._forget()

    @torch.no_grad()
    def differentiate(self, objective: Objective, span: float = SPAN) -> None:
        """Take what is kept, v = ∇C(θ'), through the step θ' = θ − α·g/‖g‖: it becomes ∇_θ C(θ'), to O(span²).

            ∇_θ C(θ') = v − (α/‖g‖)·H·w,   w = v − ĝ(ĝ·v),   H·w = [∇L(θ + εw) − ∇L(θ − εw)] / 2ε,   ε‖w‖ = span·‖θ‖

        `objective` adds ∇L: the rows that the step was taken on, and (with `same_noise`) its random state. Two plain
        passes, so that fused attention and sharded weights serve, which have no double backward. The last thing that
        is done there: the weights are left beside θ. Raises RecipeError unless one normalised step was taken.
        """
        attacker = self._optimizer
        if not isinstance(attacker, NormalisedStep) or self._steps != 1:
            raise RecipeError(
                f"defense.order: second order is defined after one normalised step, not after {self._steps} of "
                f"{type(attacker).__name__}; use first order"
            )
        if attacker.norm == 0:
            return
        across = self._across(attacker)
        length = global_norm(across)
        if length == 0:
            return
        epsilon = span * global_norm(self._params) / length
        for side in (epsilon, -epsilon):
            self._start.restore()
            for p, direction in zip(self._params, across, strict=True):
                p.add_(direction, alpha=side)
            with torch.enable_grad():
                self.keep(objective, -attacker.rate / (2 * side))

    def _across(self, attacker: NormalisedStep) -> list[Tensor]:
        """w: what is kept without its part along the step, as only the direction of g counts. The weights are at θ."""
        kept = [torch.zeros_like(p) if v is None else v for p, v in zip(self._params, self.kept, strict=True)]
        there = [p.detach().clone() for p in self._params]
        self._start.restore()
        moved = [p - t for p, t in zip(self._params, there, strict=True)]  # α·g/(‖g‖ + 1e-7)
        share = _dot(moved, kept) / _dot(moved, moved) * (attacker.norm * attacker.rate / attacker.radius)
        return [v - m.mul_(share) for v, m in zip(kept, moved, strict=True)]

    def norm(self) -> float:
        """Once back: L2 norm of what was set aside. Raises DivergedError if it is not finite."""
        return _finite(self._length)

    @torch.no_grad()
    def add_kept(self, weight: float = 1.0, cap: float | None = None) -> None:
        """Once back: add `weight` × what was set aside, first cut to the norm `cap`, to `.grad` of the parameters."""
        if cap is not None:
            weight *= min(1.0, cap / (self.norm() + TINY))
        for p, kept in zip(self._params, self.kept, strict=True):
            if kept is None:
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            _local(p.grad).add_(kept.to(p.device), alpha=weight)

    def _run(self, objective: Objective) -> None:
        if self._noise is not None:
            self._noise.restore()
        objective()

    def leave(self) -> None:
        """Go back; what is kept stays, its length known, and all else is let go of."""
        self._start.restore()
        self._length = get_total_norm([kept for kept in self.kept if kept is not None])
        for i, kept in enumerate(self.kept):
            if kept is not None:
                self.kept[i] = _in_host_memory(_local(kept)) if self._start.host else _local(kept)
        del self._start, self._optimizer

    def _forget(self) -> None:
        for p in self._params:
            p.grad = None


@contextmanager
def simulated_attack(
    model: nn.Module, attacker: Attacker, same_noise: bool = False, host: bool = False
) -> Iterator[There]:
    """Let an attacker walk away from the present weights; on leaving, everything is as it was, bit for bit.

    Restored from a copy (subtracting what was added drifts): trainable parameters and their `.grad`, all buffers,
    the random state of the CPU and of the model's device. `model` is changed in place meanwhile. With `same_noise`
    every pass there begins with the random state of the entry, which is also that of the next pass at θ: where rows
    are the same, dropout is. With `host` the copy is in the host's memory, and afterwards what was kept.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in params]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    noise = Randomness(params)
    there = There(params, Snapshot(params, host), attacker(params), noise if same_noise else None)
    there._forget()
    try:
        yield there
    finally:
        noise.restore()
        with torch.no_grad():
            there.leave()
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
            for buffer, value in buffers:
                buffer.copy_(value)
