"""The losses are the papers' formulas, finite where the naive forms are not."""

from __future__ import annotations

import math

import pytest
import torch

from hardener.losses import (
    SUPPRESSION,
    collapse,
    cross_entropy,
    inverse_cross_entropy,
    kl_from_uniform,
    negated_logits,
    negative_entropy,
    probability,
    token_inverse_cross_entropy,
)


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(6, 5, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 3, 4, 0])


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logits)[0]


def test_ice_is_minus_log_of_one_minus_the_right_probability(logits, labels):
    p = logits.softmax(-1)[torch.arange(6), labels]
    assert torch.allclose(inverse_cross_entropy(logits, labels), -(1 - p).log().mean(), atol=1e-12)


def test_ice_gradient_is_the_papers(logits, labels):
    p = logits.detach().softmax(-1)
    right = p[torch.arange(6), labels].unsqueeze(-1)
    expected = -p * right / (1 - right)
    expected[torch.arange(6), labels] = right.squeeze(-1)
    assert torch.allclose(gradient(inverse_cross_entropy(logits, labels), logits) * 6, expected, atol=1e-12)


def test_klu_is_the_divergence_of_the_prediction_from_uniform(logits, labels):
    uniform = torch.full((6, 5), 0.2, dtype=torch.float64)
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), uniform, reduction="batchmean")
    assert torch.allclose(kl_from_uniform(logits, labels), expected, atol=1e-12)


def test_klu_gradient_is_p_minus_uniform(logits, labels):
    expected = logits.detach().softmax(-1) - 0.2
    assert torch.allclose(gradient(kl_from_uniform(logits, labels), logits) * 6, expected, atol=1e-12)


def test_ice_of_the_authors_code_is_cross_entropy_on_negated_logits(logits, labels):
    """Both as their code writes it, with 1 − z, and as the formula mean z_y + LSE(−z)."""
    loss = negated_logits(logits, labels)
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(1 - logits, labels), atol=1e-12)
    right = logits[torch.arange(6), labels]
    assert torch.allclose(loss, (right + (-logits).logsumexp(-1)).mean(), atol=1e-12)


def test_the_gradient_of_negated_logits_is_onehot_minus_softmax_of_the_negated(logits, labels):
    expected = torch.eye(5, dtype=torch.float64)[labels] - (-logits.detach()).softmax(-1)
    assert torch.allclose(gradient(negated_logits(logits, labels), logits) * 6, expected, atol=1e-12)


def test_negative_entropy_is_sum_p_log_p_with_its_gradient(logits, labels):
    p = logits.detach().softmax(-1)
    each = (p * p.log()).sum(-1, keepdim=True)
    loss = negative_entropy(logits, labels)
    assert torch.allclose(loss, each.mean(), atol=1e-12)
    assert torch.allclose(gradient(loss, logits) * 6, p * (p.log() - each), atol=1e-12)


def test_token_ice_is_ice_but_for_tokens_that_are_forgotten_already(logits, labels):
    assert torch.equal(token_inverse_cross_entropy(logits, labels), inverse_cross_entropy(logits, labels))
    wide = logits.detach().clone()
    wide[:2, labels[:2]] -= 20.0  # the first two rows: log p far below −15
    wide.requires_grad_(True)
    rest = inverse_cross_entropy(wide[2:], labels[2:]) * 4 / 6
    found = token_inverse_cross_entropy(wide, labels)
    assert torch.allclose(found, rest, atol=1e-12)
    slopes = gradient(found, wide)
    assert torch.equal(slopes[:2], torch.zeros(2, 5, dtype=torch.float64))
    assert slopes[2:].abs().min() > 0


@pytest.mark.parametrize("name", SUPPRESSION)
def test_every_suppression_loss_is_lower_where_the_right_label_is_less_likely(name):
    sure = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    assert float(SUPPRESSION[name](sure / 2, labels)) < float(SUPPRESSION[name](sure, labels))


@pytest.mark.parametrize("classes", [2, 5, 10])
def test_values_at_the_uniform_prediction(classes):
    flat, labels = torch.zeros(3, classes, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    assert float(kl_from_uniform(flat, labels)) == pytest.approx(0.0, abs=1e-12)
    assert float(inverse_cross_entropy(flat, labels)) == pytest.approx(-math.log(1 - 1 / classes))
    assert float(token_inverse_cross_entropy(flat, labels)) == pytest.approx(-math.log(1 - 1 / classes))
    assert float(negated_logits(flat, labels)) == pytest.approx(math.log(classes))
    assert float(negative_entropy(flat, labels)) == pytest.approx(-math.log(classes))


@pytest.mark.parametrize("loss", [*SUPPRESSION.values(), cross_entropy, collapse(1)])
@pytest.mark.parametrize("extreme", [60.0, -60.0, 1e4])
def test_losses_and_gradients_are_finite_at_extreme_logits(loss, extreme):
    logits = torch.zeros(2, 5)
    logits[:, 0] = extreme
    logits.requires_grad_(True)
    value = loss(logits, torch.zeros(2, dtype=torch.long))
    assert torch.isfinite(value)
    assert torch.isfinite(gradient(value, logits)).all()


def test_collapse_is_the_cross_entropy_of_one_token_everywhere(logits, labels):
    assert collapse(3)(logits, labels) == cross_entropy(logits, torch.full_like(labels, 3))


def test_the_watched_probability_is_that_of_the_token_and_finite_where_the_loss_is_large(logits, labels):
    assert torch.allclose(probability(3)(logits, labels), logits.softmax(-1)[:, 3].mean())
    extreme = torch.tensor([[0.0, 1e4], [1e4, 0.0]])
    assert float(probability(1)(extreme, labels[:2])) == 0.5


def test_collapse_is_zero_for_a_model_that_always_answers_the_token():
    logits = torch.zeros(4, 5)
    logits[:, 2] = 50.0
    assert float(collapse(2)(logits, torch.tensor([0, 1, 3, 4]))) == pytest.approx(0.0, abs=1e-6)
