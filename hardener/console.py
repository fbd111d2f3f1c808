"""Stages and progress on stderr: rich bars with remaining time on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_EVERY = 15.0
"""Seconds between progress lines where there is no terminal."""


class Narrator:
    """Tells a person what is happening. `silent` says nothing at all."""

    def __init__(self, *, silent: bool = False) -> None:
        self.console = Console(
            file=sys.stderr, quiet=silent, highlight=False, width=None if sys.stderr.isatty() else 100
        )

    def stage(self, title: str) -> None:
        """Announce a stage."""
        self.console.print(f"[bold]▸ {title}[/bold]")

    def note(self, text: str) -> None:
        """Say one thing within a stage."""
        self.console.print(f"  {text}", markup=False)

    def warn(self, text: str) -> None:
        """Say something that a person should not miss."""
        self.console.print(f"[bold yellow]  {text}[/bold yellow]")

    @contextmanager
    def steps(self, title: str, total: int) -> Iterator[Steps]:
        """A bar of `total` steps with the remaining time; a line now and then off a terminal."""
        if not self.console.is_terminal:
            yield Steps(self, title, total)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield Bar(progress, title, total)


class Steps:
    """Progress in plain lines."""

    def __init__(self, narrator: Narrator, title: str, total: int) -> None:
        self._narrator, self._title, self._total = narrator, title, total
        self._began = self._told = time.monotonic()

    def update(self, done: int, text: str) -> None:
        """Say how far it is, not too often."""
        now = time.monotonic()
        if now - self._told < PLAIN_EVERY and done < self._total:
            return
        self._told = now
        left = (now - self._began) / max(done, 1) * (self._total - done)
        self._narrator.note(f"{self._title} {done}/{self._total}  {text}  {left:.0f} s left")


class Bar(Steps):
    """Progress as a bar."""

    def __init__(self, progress: Progress, title: str, total: int) -> None:
        self._progress = progress
        self._title = title
        self._task = progress.add_task(title, total=total)

    def update(self, done: int, text: str) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=done, description=f"{self._title}  {text}")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from printing into the caller's terminal; their settings are put back."""
    import datasets
    import transformers

    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():  # deprecations between transformers and peft are not the user's
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def values(log: dict[str, float]) -> str:
    """Logged values in one short line: those named by one word. The report has all."""
    return "  ".join(f"{name} {value:.3f}" for name, value in log.items() if name.isalpha() and name != "step")
