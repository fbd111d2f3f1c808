"""Muon on the hidden matrices, AdamW on all else, in one optimizer and at one rate.

Muon moves a matrix along its momentum with all singular values brought to about one. Here its step has the root mean
square of AdamW's (arXiv 2502.16982), so one learning rate serves both. What embeds the input, the head, norms and
biases are not for Muon.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim import Muon as Matrices
from transformers.pytorch_utils import Conv1D

from hardener.errors import RecipeError


class Muon(Optimizer):
    """Two optimizers that share their groups and state with this one; see the module docstring.

    Raises RecipeError where there is no hidden matrix.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float = 0.0) -> None:
        hidden = list(matrices(model))
        if not hidden:
            raise RecipeError(
                "muon trains the matrices of linear layers in blocks, and this model has none; take adamw"
            )
        inside = {id(p) for p in hidden}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
        plan = {"lr": lr, "weight_decay": weight_decay}
        self.parts: list[Optimizer] = [Matrices(hidden, adjust_lr_fn="match_rms_adamw", **plan)]  # type: ignore[arg-type]
        if others:
            self.parts.append(AdamW(others, **plan))  # type: ignore[arg-type]
        super().__init__([group for part in self.parts for group in part.param_groups], plan)
        self._share()

    def _share(self) -> None:
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over groups and state, in the parts as well."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part in self.parts:
            part.step()


def matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """Trainable weights of linear layers in the blocks of the model: whatever lies in a list of modules."""
    inside = (module for blocks in model.modules() if isinstance(blocks, nn.ModuleList) for module in blocks.modules())
    for module in dict.fromkeys(inside):  # a list may lie in another
        weight = module.weight if isinstance(module, nn.Linear | Conv1D) else None
        if isinstance(weight, nn.Parameter) and weight.requires_grad:
            yield weight
