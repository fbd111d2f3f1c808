"""The loss of a language model, some rows at a time: its value, its gradients, and no logits of all rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hardener import demo, losses
from hardener.chunked import chunked, headless, separable

LOSSES = {
    "cross-entropy": losses.cross_entropy,
    "collapse": losses.collapse(3),
    "p(e)": losses.probability(3),
    **{name: loss for name, loss in losses.SUPPRESSION.items() if name != "dos"},
}
N, H, V = 37, 6, 50


class Largest(TorchDispatchMode):
    """The most elements of any tensor that was made."""

    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.seen = max(self.seen, tensor.numel())
        return made


def case(seed: int = 0):
    torch.manual_seed(seed)
    head = nn.Linear(H, V).double()
    hidden = (3 * torch.randn(N, H, dtype=torch.float64)).requires_grad_()
    return head, hidden, torch.randint(0, V, (N,))


@pytest.mark.parametrize("rows", [1, 8, 37, 100])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_the_plain_loss(name, rows):
    head, hidden, labels = case()
    found = []
    for value in (LOSSES[name](head(hidden), labels), chunked(LOSSES[name], head, hidden, labels, rows=rows)):
        gradients = torch.autograd.grad(value * 0.7, [hidden, *head.parameters()])
        found.append([value.detach(), *gradients])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-13)


def test_a_frozen_head_has_no_gradient_and_hidden_states_have():
    head, hidden, labels = case()
    head.requires_grad_(False)
    chunked(losses.cross_entropy, head, hidden, labels, rows=8).backward()
    assert all(p.grad is None for p in head.parameters())
    assert float(hidden.grad.abs().sum()) > 0


def test_logits_of_all_rows_never_exist():
    head, hidden, labels = case()
    with Largest() as plain:
        losses.cross_entropy(head(hidden), labels).backward()
    assert plain.seen == N * V
    with Largest() as pieces:
        chunked(losses.cross_entropy, head, hidden, labels, rows=4).backward()
    assert pieces.seen <= max(4 * V, V * H, N * H)


def test_the_head_of_a_model_is_told_what_to_leave_out():
    tokenizer = demo.letters_tokenizer()
    model = demo.tiny_llama(tokenizer, 0)
    inputs = {"input_ids": torch.randint(0, len(tokenizer), (2, 9)), "attention_mask": torch.ones(2, 9).long()}
    assert separable(model, inputs)
    whole = model(**inputs).logits
    with headless(model) as given:
        assert model(**inputs).logits.shape[1] == 1
    assert torch.equal(model.get_output_embeddings()(given[0]), whole)
    assert torch.equal(model(**inputs).logits, whole)


def test_a_model_with_a_cap_behind_its_head_is_not_separable():
    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = demo.tiny_llama(demo.letters_tokenizer(), 0)

        def get_output_embeddings(self) -> nn.Module:
            return self.inside.get_output_embeddings()

        def forward(self, **inputs):
            made = self.inside(**inputs)
            made.logits = made.logits.tanh()
            return made

    assert not separable(Capped(), {"input_ids": torch.randint(0, 5, (2, 9))})
