"""The loss of a language model without its logits.

    value = chunked(loss, head, hidden, *others)       as loss(head(hidden), *others), some rows at a time

Logits in float32 are the largest tensors of a step: a vocabulary of 128,000 makes 2 GB of 4,096 tokens, several times
over. A loss that is a mean over rows needs them for some rows only: each piece's value and gradient are taken at once,
in the forward pass, and what stays are gradients of the sizes of `hidden` and of the head's weights.

Cost: no pass more than the plain loss; logits of `rows` rows at a time, and one gradient of the head, if that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hardener.loss import wide

ROWS = 512
"""Answer tokens whose logits exist at a time."""
Head = Callable[[Tensor], Tensor]
"""(N, H) hidden states → (N, V) logits."""


def chunked(
    loss: Callable[..., Tensor],
    head: Head,
    hidden: Tensor,
    *others: Tensor,
    weights: list[Tensor] | None = None,
    rows: int = ROWS,
) -> Tensor:
    """Return `loss(head(hidden), *others)` up to rounding, for a loss that is a mean over rows.

    `hidden` (N, H); `others`, labels say, have N rows too, and no gradient. `weights` are those of the head that have
    gradients; a module's are found.
    """
    if weights is None:
        weights = [p for p in head.parameters() if p.requires_grad] if isinstance(head, nn.Module) else []
    if not torch.is_grad_enabled():  # which a function of autograd is not told
        hidden, weights = hidden.detach(), []
    value: Tensor = _Chunked.apply(loss, head, rows, others, hidden, *weights)  # type: ignore[no-untyped-call]
    return value


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loss: Callable[..., Tensor],
        head: Head,
        rows: int,
        others: tuple[Tensor, ...],
        hidden: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        sources = [hidden, *weights]
        wanted = [place for place, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        gradients = {place: torch.zeros_like(sources[place]) for place in wanted}
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            with torch.set_grad_enabled(bool(wanted)):
                part = hidden[piece].detach().requires_grad_(bool(wanted))
                value = loss(wide(head(part)), *(other[piece] for other in others)) * (len(part) / len(hidden))
            total += value.detach()
            if wanted:
                here = [part if place == 0 else sources[place] for place in wanted]
                for place, gradient in zip(wanted, torch.autograd.grad(value, here), strict=True):
                    (gradients[place][piece] if place == 0 else gradients[place]).add_(gradient)
        ctx.gradients = [gradients.get(place) for place in range(len(sources))]
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        gradients, ctx.gradients = ctx.gradients, None  # there is one backward pass; they are large, so in place
        return None, None, None, None, *(None if g is None else g.mul_(outer[0]) for g in gradients)


@contextmanager
def headless(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the model makes logits of the first position alone; the list has what its head was given, (B, T, H)."""
    given: list[Tensor] = []

    def shortened(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given.append(arguments[0])
        return arguments[0][:, :1], *arguments[1:]

    handle = model.get_output_embeddings().register_forward_pre_hook(shortened)  # type: ignore[operator]
    try:
        yield given
    finally:
        handle.remove()


@torch.no_grad()
def separable(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether the model's logits are what its head makes of hidden states, without a scale or a cap behind it.

    `inputs` are few: their logits are made. Dropout is off for that, and nothing is drawn.
    """
    training, head = model.training, model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return False
    model.eval()
    whole = model(**inputs).logits
    with headless(model) as given:
        model(**inputs)
    model.train(training)
    return len(given) == 1 and torch.equal(head(given[0]), whole)
