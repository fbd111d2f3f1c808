"""The losses of the papers, as pure functions of logits and labels.

Every task turns its batch into `logits` (N, C) and `labels` (N,): a classifier has one row per example, a causal
language model one row per answer token. All losses are means over N, in nats, in float32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""(N, C) logits, (N,) labels → scalar."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Ordinary training loss −log p_y; the attacker lowers it."""
    return F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels)


def collapse(token: int) -> Loss:
    """Return CTRAP's collapse loss C(θ) = mean −log p(e), one fixed token `e` in place of every answer token.

    CTRAP, arXiv 2505.16559: teacher forcing on the true answer, only the labels are replaced. Zero when the model
    answers `e` everywhere.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, torch.full_like(labels, token))

    return loss


def probability(token: int) -> Loss:
    """Return the mean of p(e) over answer tokens, for one fixed token `e`: no loss, but what a collapse trap watches.

    Near 0 in a model that is whole, near 1 in one that has collapsed.
    """

    def share(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits[:, token] - logits.logsumexp(-1)).exp().mean()

    return share


def inverse_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """SOPHON's ICE: mean −log(1 − p_y) = softplus(z_y − LSE_{j≠y} z_j), arXiv 2404.12699.

    Lower is better for the defender: 0 when the right label has no probability, −log(1 − 1/C) at the uniform
    distribution. The stable form stays finite where 1 − p_y rounds to zero.
    """
    right = logits.gather(-1, labels.unsqueeze(-1))
    others = logits.scatter(-1, labels.unsqueeze(-1), -math.inf).logsumexp(-1)
    return F.softplus(right.squeeze(-1) - others).mean()


def kl_from_uniform(logits: Tensor, labels: Tensor) -> Tensor:
    """SOPHON's KLU: KL(U‖p) = LSE(z) − mean_j z_j − log C, arXiv 2404.12699; labels are not used.

    Lower is better for the defender: 0 exactly when the prediction is uniform. Gradient p − 1/C.
    """
    return (logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1])).mean()


SUPPRESSION: dict[str, Loss] = {"ice": inverse_cross_entropy, "klu": kl_from_uniform}
"""SOPHON's suppression losses by their recipe name."""
