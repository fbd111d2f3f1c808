"""`docs/features.md` claims nothing that is not proven: the tests that it names are there, or a reason is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from test_traps import names, references

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "features.md"
FEATURES = 33
COLUMNS = "HLMTEBS"
NEVER = re.compile(r"\b(never|no (Job|test))\b", re.IGNORECASE)


class Row(NamedTuple):
    """One line of the table."""

    feature: str
    others: list[str]
    mark: str
    proof: str

    @property
    def tests(self) -> list[tuple[str, str]]:
        """(file, name) of each test."""
        return references(self.proof)

    @property
    def reason(self) -> str:
        """What is said beside the names of tests."""
        return re.sub(r"`[^`]+`[,.]?", "", self.proof).strip()


def rows() -> dict[int, Row]:
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text("utf-8").splitlines() if re.match(r"\| \d", line)]
    return {int(number): Row(feature, others, mark, proof) for number, feature, *others, mark, proof in lines}


def test_every_feature_has_its_row_in_order() -> None:
    assert list(rows()) == list(range(1, FEATURES + 1))
    header = next(line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| # |"))
    assert [cell.strip() for cell in header.strip("|").split("|")][2:-2] == [*COLUMNS]


@pytest.mark.parametrize("number", range(1, FEATURES + 1))
def test_a_row_has_its_marks_and_what_they_rest_on(number: int) -> None:
    row = rows()[number]
    assert row.mark in ("●", "◐", "○")
    assert len(row.others) == len(COLUMNS)
    assert all(cell[0] in "●◐○–?" for cell in row.others)
    assert row.tests if row.mark == "●" else len(row.reason.split()) > 3
    for path, name in row.tests:
        assert name.startswith("test_")
        assert name in names(ROOT / path), f"{path} has no {name}"


def test_nothing_that_was_never_run_counts_as_done() -> None:
    never = [row for row in rows().values() if NEVER.search(row.reason)]
    assert len(never) > 8
    assert {row.mark for row in never} == {"◐"}
