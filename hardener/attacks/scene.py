"""What an attacker holds: a folder that somebody published, rows of his own, and perhaps the unhardened parent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from hardener.tasks.base import Example, Task


@dataclass
class Scene:
    """Everything that all attacks on one subject share."""

    folder: Path
    task: Task
    harm: Sequence[Example]
    """The attacker's restricted rows (of a benign fine-tune: the rows of that task)."""
    benign: Sequence[Example]
    """Benign rows, mixed in or trained on before or after."""
    device: str
    classes: int = 0
    """Classes of the attacked task (0 for language models)."""
    scratch: bool = False
    """Start from new weights of the same architecture: the control that never knew."""
    parent: Path | None = None
    refusals: tuple[str, ...] = ()
    """Answers by which the model refuses; what a preference attack trains away from."""

    @cached_property
    def base(self) -> nn.Module:
        """The loaded checkpoint, to which every LoRA attack attaches its adapter."""
        return self.task.load(self.folder).to(self.device)

    def forget_base(self) -> None:
        """Let the loaded checkpoint go."""
        self.__dict__.pop("base", None)
