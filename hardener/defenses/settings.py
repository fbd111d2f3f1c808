"""What the settings of every defence have; free of torch, so that a recipe is checked without what it will run."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from hardener.recipe import Paper, Role, Strict


class Settings(Strict):
    """Settings of one defence, and what that defence asks of the rest of the recipe."""

    title: ClassVar[str]
    paper: ClassVar[Paper]
    tasks: ClassVar[tuple[str, ...]]
    """Tasks for which the defence is defined."""
    roles: ClassVar[tuple[Role, ...]] = ()
    """Roles it reads beyond `restricted` and `retain`."""
    batch_multiple: ClassVar[int] = 1
    """`train.batch_size` must be a multiple of this."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Forward and backward passes of one outer step."""
