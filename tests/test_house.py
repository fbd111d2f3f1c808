"""The house: the Makefile, the pins and the CI script."""

from __future__ import annotations

import os
import re
import subprocess
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    exact = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in exact}


def test_every_requirement_is_pinned_within_its_range() -> None:
    wanted = [r for r in map(Requirement, requires("hardener") or []) if r.name != "hardener"]
    pinned = pins()
    assert len(wanted) > 15
    assert [str(r) for r in wanted if canonicalize_name(r.name) not in pinned] == []
    assert [str(r) for r in wanted if pinned[canonicalize_name(r.name)] not in r.specifier] == []


def dry(*targets: str) -> list[str]:
    """The commands of a target on a fresh machine."""
    call = ["make", "--dry-run", "--always-make", "--no-print-directory", *targets]
    # The tests themselves may run under make, whose own flags are none of this one's.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


def test_torch_is_installed_first_alone_and_at_its_pin() -> None:
    installs = [line for line in dry("test") if " install " in line]
    found = subprocess.run(["bash", "-c", f"echo {installs[0]}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == f"torch=={pins()['torch']}"
    assert "torch" not in installs[1]
    assert "-c constraints.txt" in installs[1]


@pytest.mark.parametrize(
    ("target", "last"),
    [
        ("demo", ".venv/bin/hardener demo"),
        ("test", ".venv/bin/pytest"),
        ("test-slow", ".venv/bin/pytest -m slow"),
        ("check", ".venv/bin/mypy"),
        ("docs", ".venv/bin/python docs/reference.py"),
    ],
)
def test_a_target_sets_up_what_it_needs_and_then_does_its_work(target: str, last: str) -> None:
    commands = dry(target)
    assert commands[0].endswith("-m venv .venv")
    assert commands[-1] == last


def test_ci_runs_check_and_tests_and_stops_at_the_first_failure() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text("utf-8")
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in text
    assert re.findall(r"^make .*", text, re.MULTILINE) == ["make check", "make test"]
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_workflow_runs_the_script_with_pinned_steps_and_no_rights_to_spare() -> None:
    steps = WORKFLOW["jobs"]["check-and-test"]["steps"]
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert steps[-1] == {"run": ".ci/run"}
    assert all(re.search(r"@[0-9a-f]{40}$", step["uses"]) for step in steps if "uses" in step)
