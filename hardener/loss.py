"""What a loss is, whoever takes it: to tasks, to the loop, and to those who judge and know of no defence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
"""(N, C) logits, (N,) labels → scalar."""
Taught = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The same, and (N, C) logits of a teacher for the same rows → scalar."""
AnyLoss = TypeVar("AnyLoss", bound=Callable[..., Tensor])
ROWWISE = "rowwise"


def rowwise(loss: AnyLoss) -> AnyLoss:
    """Mark a loss that is a mean over rows, each by itself: it may be taken some rows at a time."""
    vars(loss)[ROWWISE] = True
    return loss


def is_rowwise(loss: Callable[..., Any]) -> bool:
    """Whether a loss is marked so."""
    return getattr(loss, ROWWISE, False)


def wide(logits: Tensor) -> Tensor:
    """In float32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
