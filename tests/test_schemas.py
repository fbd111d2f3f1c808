"""What commands print is what their schema says: a pipeline can check it, and a wrong document is found."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from journey import Journey
from jsonschema import Draft202012Validator

from hardener import schemas

STEPS = {"plan": "harden", "harden": "harden", "probe": "probe", "push": "push", "verify": "verify"}
STEPS |= {"recipes": "recipes-list"}
"""Step of the journey → the schema of what it printed."""
CHECKERS = {command: Draft202012Validator(schemas.schema(command)) for command in schemas.printed()}


def printed(journey: Journey, step: str) -> Any:
    return json.loads(journey.said[step].stdout)


@pytest.mark.parametrize("command", CHECKERS)
def test_every_schema_is_one(command: str) -> None:
    Draft202012Validator.check_schema(CHECKERS[command].schema)


def test_the_command_prints_the_schema(journey: Journey) -> None:
    assert printed(journey, "schema") == schemas.schema("harden")


@pytest.mark.parametrize("step", STEPS)
def test_what_a_command_prints_is_valid_under_its_schema(journey: Journey, step: str) -> None:
    found = printed(journey, step)
    assert found
    CHECKERS[STEPS[step]].validate(found)


@pytest.mark.parametrize("folder", ["run", "probed"])
def test_the_report_of_a_release_is_valid_under_its_schema(journey: Journey, folder: str) -> None:
    path = journey.home / folder / "release" / "hardener" / "report.json"
    CHECKERS["report"].validate(json.loads(path.read_bytes()))


def test_the_report_in_an_outcome_is_the_one_of_the_release(journey: Journey) -> None:
    report = json.loads((journey.release / "hardener" / "report.json").read_bytes())
    assert printed(journey, "harden")["report"] == report


class Nothing:
    """A value of no type that JSON has a schema for."""


@pytest.mark.parametrize("step", STEPS)
def test_a_document_without_a_key_or_with_a_value_of_another_kind_is_refused(journey: Journey, step: str) -> None:
    checker, found = CHECKERS[STEPS[step]], printed(journey, step)
    keys = list(one(found))
    assert keys
    for key in keys:
        other = copy.deepcopy(found)
        one(other)[key] = Nothing()
        assert not checker.is_valid(other), key
    for key in required(checker.schema):
        other = copy.deepcopy(found)
        del one(other)[key]
        assert not checker.is_valid(other), key


def one(document: Any) -> dict[str, Any]:
    """The document, or the first of a list of them."""
    return document[0] if isinstance(document, list) else document


def required(schema: dict[str, Any]) -> list[str]:
    """The keys that a document must have."""
    inner = schema["items"] if schema.get("type") == "array" else schema
    name = inner.get("$ref", "").removeprefix("#/$defs/")
    found: list[str] = (schema["$defs"][name] if name else inner)["required"]
    assert found
    return found


def test_a_wrong_figure_deep_in_a_report_is_refused(journey: Journey) -> None:
    found = printed(journey, "harden")
    found["report"]["evidence"]["word"] = "safe"
    assert not CHECKERS["harden"].is_valid(found)
    assert not CHECKERS["report"].is_valid(found["report"])
