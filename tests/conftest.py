"""What all tests share: one thread, caches of their own, and tiny models made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import small
import tiny
from journey import journey  # noqa: F401 - a fixture
from judge_models import classifier, guard  # noqa: F401 - fixtures


@pytest.fixture(scope="session", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the caches of the person who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HARDENER_CACHE", str(tmp_path_factory.mktemp("hardener-cache")))
        yield


@pytest.fixture(scope="session")
def warm() -> None:
    """For tests that attack: quicker by the time that the garbage collector takes to look at the libraries."""
    small.warm()


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained letters Llama."""
    return tiny.letters(tmp_path_factory.mktemp("models") / "letters")


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data files of the four roles for the letters Llama."""
    return tiny.letter_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.resnet(tmp_path_factory.mktemp("models") / "resnet")


@pytest.fixture(scope="session")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.image_data(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def text_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three roles for a text classifier: which letter comes first."""
    folder = tmp_path_factory.mktemp("texts")

    def rows(letters: str, tail: str) -> list[dict[str, object]]:
        return [
            {"text": f"{x} {tail} {y} {z}", "label": i} for i, x in enumerate(letters) for y in LETTERS for z in "ab"
        ]

    roles = {"retain": rows("abc", "x"), "restricted": rows("klm", "y"), "benign": rows("pq", "z")}
    return {role: tiny.jsonl(folder / f"{role}.jsonl", made) for role, made in roles.items()}


LETTERS = "abcdefghijklmnopqrstuvwxyz"
