"""Where the shipped recipes and cards are: inside the wheel, or beside the package in a checkout."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def shipped(kind: str) -> Path:
    """Return the folder of shipped data, `kind` being "recipes" or "cards"."""
    package = Path(str(files("hardener")))
    packaged = package / "_data"
    root = packaged if packaged.is_dir() else package.parent
    return root / kind


def recipes() -> dict[str, Path]:
    """The shipped recipes, name → file, in order of their names."""
    return {path.stem: path for path in sorted(shipped("recipes").glob("*.yaml"), key=lambda path: path.stem)}
