"""The optimizers that harden, by their recipe name: what each keeps per weight that it trains, and how it is made.

    adamw         two moments: 8 bytes
    adafactor     rows and columns of the second moment of a matrix: next to nothing. As `Trainer` sets it, with the
                  recipe's learning rate instead of one that follows from the weights (arXiv 1804.04235)
    adamw-8bit    two moments of a byte each, in blocks (arXiv 2110.02861); tensors of up to 4,096 weights have 8 bytes
    adamw-paged   8 bytes, which CUDA moves to the host's memory where the GPU's is full

The last two are bitsandbytes'. Sharded weights are trained by AdamW alone: the others know no shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hardener.errors import UsageError
from hardener.recipe import Recipe, Train

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

PACKAGED = ("adamw-8bit", "adamw-paged")
"""Those that need bitsandbytes."""


WHOLE, BLOCK = 4096, 256
"""bitsandbytes: tensors of more weights are in bytes, blocks of so many with a scale of their own."""


def made(train: Train, params: list[nn.Parameter]) -> Optimizer:
    """The optimizer that `train` names, at its rate and weight decay.

    Raises UsageError where its package is missing, or where weights are sharded and it knows no shards.
    """
    installed("train.optimizer", train.optimizer)
    if train.optimizer != "adamw" and any(hasattr(p, "full_tensor") for p in params):
        raise UsageError(f"train.optimizer: sharded weights are trained by adamw, not by {train.optimizer}")
    return MAKE[train.optimizer](params, lr=train.lr, weight_decay=train.weight_decay)


def kept(name: str, shapes: Sequence[Sequence[int]]) -> int:
    """Bytes of what the optimizer `name` holds from step to step for weights of these shapes; Muon at most AdamW's."""
    return sum(_kept(name, shape) for shape in shapes)


def _kept(name: str, shape: Sequence[int]) -> int:
    count = math.prod(shape)
    if name == "adafactor" and len(shape) > 1:
        return 4 * (count // shape[-1] + count // shape[-2])
    if name == "adamw-8bit" and count > WHOLE:
        return 2 * count + 2 * 4 * math.ceil(count / BLOCK)
    return 4 * count if name == "adafactor" else 8 * count


def check(recipe: Recipe) -> None:
    """Raise UsageError if an optimizer of the recipe needs a package that is not installed."""
    for place, section in (("train", recipe.train), ("erase", recipe.erase)):
        if isinstance(section, Train):
            installed(f"{place}.optimizer", section.optimizer)


def installed(key: str, name: str) -> None:
    """Raise UsageError if the optimizer `name`, of the recipe's `key`, needs a package that is not installed."""
    if name in PACKAGED and find_spec("bitsandbytes") is None:
        raise UsageError(f'{key}: {name} needs bitsandbytes; pip install "hardener[optimizers]", or take adafactor')


def _adamw(params: list[nn.Parameter], **how: Any) -> Optimizer:
    from torch.optim import AdamW

    return AdamW(params, **how)


def _adafactor(params: list[nn.Parameter], **how: Any) -> Optimizer:
    from transformers.optimization import Adafactor

    found: Optimizer = Adafactor(params, scale_parameter=False, relative_step=False, **how)
    return found


def _packaged(**kind: Any) -> Callable[..., Optimizer]:
    def make(params: list[nn.Parameter], **how: Any) -> Optimizer:
        found: Optimizer = import_module("bitsandbytes.optim").AdamW(params, **kind, **how)
        return found

    return make


MAKE: dict[str, Callable[..., Optimizer]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "adamw-8bit": _packaged(optim_bits=8),
    "adamw-paged": _packaged(is_paged=True),
}
"""Recipe name → how it is made of weights, rate and decay."""
