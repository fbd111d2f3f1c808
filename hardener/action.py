"""The GitHub Action's step: inputs from environment variables, one `hardener harden`, outputs and job summary.

    python -m hardener.action

Nothing of an input is ever part of a script: each is one argument of the command, whatever it holds. The exit code is
that of the command (`errors.py`); outputs are written whenever there is a report, also where the gate was missed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

OPTIONS = {
    "INPUT_RECIPE": "--recipe",
    "INPUT_REVISION": "--revision",
    "INPUT_PUSH_TO": "--push-to",
    "INPUT_FAIL_UNDER": "--fail-under",
    "INPUT_PROBE": "--probe",
}
"""Variable → option; one that is empty or not set is left out."""


def main() -> int:
    """Run the command that the environment asks for; returns its exit code."""
    env = os.environ
    output = tempfile.mkdtemp(prefix="hardener-", dir=env.get("RUNNER_TEMP"))
    # What a model or dataset is called must not reach the runner as a workflow command.
    again = token_hex(16)
    print(f"::stop-commands::{again}", flush=True)
    ran = subprocess.run(
        [sys.executable, "-m", "hardener", *arguments(env, output)], stdout=subprocess.PIPE, text=True, check=False
    )
    print(f"::{again}::", flush=True)
    if ran.stdout.strip():
        outcome = json.loads(ran.stdout)
        append(Path(env["GITHUB_OUTPUT"]), outputs(outcome))
        with Path(env["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as summary:
            summary.write(markdown(outcome))
    return ran.returncode


def arguments(env: Mapping[str, str], output: str) -> list[str]:
    """The command line of `hardener harden`, with the run in the folder `output`."""
    chosen = [f"{option}={env[name]}" for name, option in OPTIONS.items() if env.get(name)]
    overrides = [f"--set={line.strip()}" for line in env.get("INPUT_SET", "").splitlines() if line.strip()]
    pull_request = ["--create-pr"] if env.get("INPUT_CREATE_PR") == "true" else []
    fixed = [f"--output={output}", "--format=json", "--yes"]
    return ["harden", *chosen, *overrides, *pull_request, *fixed, "--", env["INPUT_MODEL"]]


def outputs(outcome: Mapping[str, Any]) -> dict[str, str]:
    """The action's outputs from what `--format json` printed; empty where there is nothing to say."""
    pushed = outcome["pushed"] or {}
    return {
        "verdict": outcome["report"]["evidence"]["word"],
        "report": str(Path(outcome["run"]) / "release" / "hardener" / "report.json"),
        "commit": pushed.get("commit") or "",
        "pr-url": pushed.get("pr_url") or "",
    }


def append(path: Path, values: Mapping[str, str]) -> None:
    """Write outputs in the form whose end no value can forge: a random delimiter."""
    end = token_hex(16)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{name}<<{end}\n{value}\n{end}\n" for name, value in values.items())


def markdown(outcome: Mapping[str, Any]) -> str:
    """The job summary: the card's facts, and why nothing was pushed."""
    from hardener.markdown import in_short
    from hardener.report import Report
    from hardener.tables import escape

    text = in_short(Report.model_validate(outcome["report"]))
    return text + (f"\n**Not pushed:** {escape(outcome['withheld'])}\n" if outcome["withheld"] else "")


if __name__ == "__main__":
    sys.exit(main())
