"""One journey through every command, made once for all tests that look at what it printed and what it left.

Each command is a real process of a user whose name and token are canaries, in a home of his own, against the loopback
Hub. There is no terminal, and whatever would ask has nobody to answer.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import small
import tiny
from hub_server import Hub, hub_server

USER = "canary-user"
Ran = subprocess.CompletedProcess[str]


@dataclass
class Journey:
    """A user at his machine."""

    home: Path
    hub: Hub
    data: dict[str, Path]
    said: dict[str, Ran] = field(default_factory=dict)
    """Name of a step → what came of it."""

    @property
    def release(self) -> Path:
        return self.home / "run" / "release"

    @property
    def environment(self) -> dict[str, str]:
        """Everything of this user's is below his home."""
        temporary = self.home / "tmp"
        temporary.mkdir(exist_ok=True)
        own = {"HOME": str(self.home), "USER": USER, "LOGNAME": USER, "TMPDIR": str(temporary)}
        return small.environment(self.home, **self.hub.environment, **own, HF_HUB_OFFLINE="0")

    def run(self, *words: object, **more: str) -> Ran:
        """One command, with the traceback of whatever goes wrong."""
        words = (*words, "--debug")
        return subprocess.run(
            small.command(*words),
            cwd=self.home,
            env=self.environment | more,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def overrides(self) -> list[str]:
        return [word for one in small.overrides(self.data) for word in ("--set", one)]

    def make(self) -> None:
        """Take every step once."""
        how = ("--recipe", "tiny-ctrap", *self.overrides(), "--format", "json")
        steps: dict[str, tuple[object, ...]] = {
            "plan": ("harden", "./checkpoint", *how, "--push-to", "me/mine", "--dry-run"),
            "job": ("harden", "org/parent", "--recipe=ctrap", "--push-to=me/mine", "--on=hf-jobs", "--dry-run"),
            "harden": ("harden", "./checkpoint", *how, "--push-to", "me/mine", "--output", "run", "--push-anyway"),
            "card": ("card", "run"),
            "push": ("push", "run", "me/second", "--push-anyway", "--format", "json"),
            "verify": ("verify", "me/mine", "--format", "json"),
            "probe": ("probe", "me/mine", "--against", "org/parent", *how, "--output", "probed"),
            "recipes": ("recipes", "list", "--format", "json"),
            "recipe": ("recipes", "show", "ctrap", "--resolved"),
            "schema": ("schema", "harden"),
        }
        self.said = {name: self.run(*words) for name, words in steps.items()}


@pytest.fixture(scope="session")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Journey]:
    home = tmp_path_factory.mktemp("homes") / USER
    home.mkdir()
    with hub_server(home / "hf") as hub:
        hub.add_model("org/parent", tiny.letters(home / "checkpoint"), card={"license": "mit"})
        made = Journey(home, hub, tiny.letter_data(home / "private"))
        made.make()
        yield made
