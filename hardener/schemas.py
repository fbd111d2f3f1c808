"""What each command prints on stdout with `--format json`, as a JSON schema.

    hardener schema harden > outcome.schema.json

The schemas are made from the types that the commands print, so they cannot say anything else.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict


class Listed(TypedDict):
    """One line of `hardener recipes list`."""

    name: str
    title: str
    task: str


def printed() -> dict[str, Any]:
    """Command (`job`: harden on the Hub's machines), or `report` for report.json → the type of what is printed."""
    from hardener.jobs import Ended
    from hardener.pipeline import Outcome
    from hardener.push import Pushed
    from hardener.report import Report
    from hardener.verification import Verified

    runs = dict.fromkeys(("harden", "probe", "demo"), Outcome)
    made = {"push": Pushed, "job": Ended, "verify": Verified, "recipes-list": list[Listed], "report": Report}
    return {**runs, **made}


def schema(command: str) -> dict[str, Any]:
    """The schema of what a command prints; JSON Schema, draft 2020-12."""
    from pydantic import TypeAdapter

    made = TypeAdapter(printed()[command]).json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}
