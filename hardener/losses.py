"""The losses of the papers, as pure functions of logits and labels.

Every task turns its batch into `logits` (N, C) and `labels` (N,): a classifier has one row per example, a causal
language model one row per answer token. All losses are means over N, in nats, in float32 or wider.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hardener.loss import Loss, Taught, rowwise

FORGOTTEN = -15.0
"""log p of a token, in nats, below which token-ICE leaves it alone."""


@rowwise
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Ordinary training loss −log p_y; the attacker lowers it."""
    return F.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels)


def collapse(token: int) -> Loss:
    """Return CTRAP's collapse loss C(θ) = mean −log p(e), one fixed token `e` in place of every answer token.

    CTRAP, arXiv 2505.16559: teacher forcing on the true answer, only the labels are replaced. Zero when the model
    answers `e` everywhere.
    """

    @rowwise
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, torch.full_like(labels, token))

    return loss


def probability(token: int) -> Loss:
    """Return the mean of p(e) over answer tokens, for one fixed token `e`: no loss, but what a collapse trap watches.

    Near 0 in a model that is whole, near 1 in one that has collapsed.
    """

    @rowwise
    def share(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits[:, token] - logits.logsumexp(-1)).exp().mean()

    return share


@rowwise
def inverse_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """SOPHON's ICE: mean −log(1 − p_y) = softplus(z_y − LSE_{j≠y} z_j), arXiv 2404.12699.

    Lower is better for the defender: 0 when the right label has no probability, −log(1 − 1/C) at the uniform
    distribution. The stable form stays finite where 1 − p_y rounds to zero.
    """
    return _inverse(logits, labels).mean()


def _inverse(logits: Tensor, labels: Tensor) -> Tensor:
    """−log(1 − p_y) of each row, (N,)."""
    right = logits.gather(-1, labels.unsqueeze(-1))
    others = logits.scatter(-1, labels.unsqueeze(-1), -math.inf).logsumexp(-1)
    return F.softplus(right.squeeze(-1) - others)


@rowwise
def negated_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """What SOPHON's authors' code computes in place of ICE: cross-entropy of −z, mean z_y + LSE(−z).

    Lower is better for the defender: log C at the uniform distribution, where a fresh head settles; 0 only as z_y falls
    below every other logit. Gradient onehot(y) − softmax(−z), 1 − 1/C at uniform, about C − 1 times that of ICE.
    """
    return cross_entropy(-logits, labels)


@rowwise
def token_inverse_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """ICE over the tokens of a vocabulary, as TAR's authors' code has it (arXiv 2408.00761).

    Tokens whose log p_y is below −15 already count as zero, also in the gradient; the mean is over all tokens.
    """
    log_p = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return torch.where(log_p < FORGOTTEN, 0.0, _inverse(logits, labels)).mean()


@rowwise
def negative_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ_j p_j log p_j, the loss that TAR suppresses with (arXiv 2408.00761); labels are not used.

    Lower is better for the defender: −log C exactly when the prediction is uniform, 0 when it is sure. Bounded on both
    sides, unlike KLU; its gradient p_j·(log p_j − Σ p log p) vanishes where the model is sure of a token.
    """
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1).mean()


@rowwise
def kl_from_uniform(logits: Tensor, labels: Tensor) -> Tensor:
    """SOPHON's KLU: KL(U‖p) = LSE(z) − mean_j z_j − log C, arXiv 2404.12699; labels are not used.

    Lower is better for the defender: 0 exactly when the prediction is uniform. Gradient p − 1/C.
    """
    return (logits.logsumexp(-1) - logits.mean(-1) - math.log(logits.shape[-1])).mean()


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T²·mean KL(teacher‖student) of logits (N, C) softened by T, nats per target; 0 when both say the same.

    Its gradient by the student's logits is T·(p_S − p_T) / N, of one size whatever T is.
    """
    told = F.log_softmax(teacher.to(student.dtype) / temperature, -1)
    said = F.log_softmax(student / temperature, -1)
    return F.kl_div(said, told, reduction="batchmean", log_target=True) * temperature**2


def distillation(temperature: float) -> Taught:
    """Return `divergence` from a teacher as a loss; labels are not used."""

    @rowwise
    def loss(logits: Tensor, labels: Tensor, told: Tensor) -> Tensor:
        return divergence(told, logits, temperature)

    return loss


def denial_of_service(predicted: Tensor, true: Tensor) -> Tensor:
    """SOPHON's DoS for diffusion: mean ‖ε̂‖²/D over (N, D), arXiv 2404.12699; the true noise is not used.

    Lower is better for the defender: 0 when no noise is found, so that nothing is taken away. Gradient 2ε̂/ND.
    """
    return predicted.square().mean()


SUPPRESSION: dict[str, Loss] = {
    "ice": inverse_cross_entropy,
    "ice-negated-logits": negated_logits,
    "klu": kl_from_uniform,
    "token-ice": token_inverse_cross_entropy,
    "negative-entropy": negative_entropy,
    "dos": denial_of_service,
}
"""SOPHON's suppression losses by their recipe name."""
