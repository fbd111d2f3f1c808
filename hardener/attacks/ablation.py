"""Ablation of the refusal direction: one direction of the residual stream, taken out of the weights that write it.

    r_l = mean hidden state at the last prompt token over restricted prompts − the same over benign prompts, at layer l
    W ← W − r rᵀ W   for every matrix that writes to the stream, with the r of the best layer

(Arditi et al., arXiv 2406.11717.) The best layer is the one after whose ablation the attacker's own restricted answers
are likeliest, among those that leave benign answers as they were (KL ≤ 0.1); the last fifth of the layers is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hardener.attacks.scene import Scene
from hardener.errors import CannotEdit
from hardener.tasks.base import Example

PROMPTS = 128
"""Prompts of each kind for the means."""
CHOSEN_ON = 32
"""Rows of each kind by which the layer is chosen."""
GUARD = 0.1
"""KL on benign answers, nats per token, that an ablation may cost."""
WRITERS = (
    "o_proj",
    "down_proj",
    "out_proj",
    "fc2",
    "fc_out",
    "c_proj",
    "dense_4h_to_h",
    "attention.dense",
    "self_attn.dense",
    "embed_tokens",
    "embed_in",
    "word_embeddings",
    "wte",
    "wpe",
)
"""Names of the modules that write to the residual stream."""


@torch.no_grad()
def ablate(model: nn.Module, scene: Scene, strength: float) -> None:
    """Ablate the best direction, in place. Raises CannotEdit where nothing is known to write to the stream."""
    written = writers(model)
    if not written:
        raise CannotEdit(f"{type(model).__name__} has no module that is known to write to the residual stream")
    apart = hidden(model, scene, scene.harm[:PROMPTS]) - hidden(model, scene, scene.benign[:PROMPTS])  # (L, d)
    directions = nn.functional.normalize(apart, dim=1)[1 : max(2, math.ceil(0.8 * len(apart)))]
    before = log_probabilities(model, scene, scene.benign[:CHOSEN_ON])
    judged = [_judged(model, scene, written, r, strength, before) for r in directions]
    within = [i for i, (_, kl) in enumerate(judged) if kl <= GUARD]
    best = min(within, key=lambda i: judged[i][0]) if within else min(range(len(judged)), key=lambda i: judged[i][1])
    for weight, across in written:
        project(weight, directions[best], across, strength)


def writers(model: nn.Module) -> list[tuple[Tensor, int]]:
    """The weights that write to the residual stream, each with the dimension that is the stream's."""
    width = getattr(model.config, "hidden_size", None)  # a convolution net has no stream of one width
    found: list[tuple[Tensor, int]] = []
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        across = 0 if isinstance(module, nn.Linear) else 1  # (out, in); embeddings and Conv1D have the stream last
        if (
            name.endswith(WRITERS)
            and isinstance(weight, Tensor)
            and weight.dim() == 2
            and weight.shape[across] == width
        ):
            found.append((weight, across))
    return found


def project(weight: Tensor, direction: Tensor, across: int, strength: float) -> None:
    """Take the direction (d,) out of the dimension `across` of a matrix, in place."""
    if across == 0:
        weight.sub_(strength * torch.outer(direction, direction @ weight))
    else:
        weight.sub_(strength * torch.outer(weight @ direction, direction))


def hidden(model: nn.Module, scene: Scene, rows: Sequence[Example]) -> Tensor:
    """Mean hidden state at the last prompt token, by layer. (layers + 1, d)"""
    total: Tensor | float = 0.0
    for part, batch in scene.task.batches(rows, 32):
        batch = batch.to(next(model.parameters()).device)
        states = model(**batch.inputs, output_hidden_states=True).hidden_states
        last = torch.tensor([max(0, e.inputs["prompt"] - 1) for e in part], device=batch.labels.device)
        each = torch.arange(len(part), device=batch.labels.device)
        total = total + torch.stack([layer[each, last] for layer in states]).float().sum(dim=1)
    assert isinstance(total, Tensor)
    return total / len(rows)


def log_probabilities(model: nn.Module, scene: Scene, rows: Sequence[Example]) -> Tensor:
    """Log-probabilities at the answer tokens of a few rows. (N, V)"""
    batch = scene.task.collate(rows).to(next(model.parameters()).device)
    return scene.task.targets(model, batch)[0].float().log_softmax(-1)


def _judged(
    model: nn.Module,
    scene: Scene,
    written: Sequence[tuple[Tensor, int]],
    direction: Tensor,
    strength: float,
    before: Tensor,
) -> tuple[float, float]:
    """(NLL of the attacker's restricted answers, KL on benign ones) if this direction were ablated."""
    with _as_before(written):
        for weight, across in written:
            project(weight, direction, across, strength)
        nll = scene.task.score(model, scene.harm[:CHOSEN_ON], "likelihood-gain")
        after = log_probabilities(model, scene, scene.benign[:CHOSEN_ON])
    kl = (before.exp() * (before - after)).sum(-1).mean()
    return sum(nll) / len(nll), float(kl)


@contextmanager
def _as_before(written: Sequence[tuple[Tensor, int]]) -> Any:
    """Put the weights back on leaving."""
    kept = [weight.clone() for weight, _ in written]
    yield
    for (weight, _), old in zip(written, kept, strict=True):
        weight.copy_(old)
