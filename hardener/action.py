"""The GitHub Action's step: inputs from environment variables, one `hardener` command, outputs and job summary.

    python -m hardener.action

Nothing of an input is ever part of a script: each is one argument of the command, whatever it holds. The exit code is
that of the command (`errors.py`), but for a missed gate where the step is asked only to inform. Outputs, summary and
SARIF are written whenever there is a report, also where the gate was missed.
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

from hardener.errors import UsageError
from hardener.report import Interval, Report

MODES = ("harden", "probe")
OPTIONS = {
    "INPUT_RECIPE": "--recipe",
    "INPUT_REVISION": "--revision",
    "INPUT_AGAINST": "--against",
    "INPUT_PUSH_TO": "--push-to",
    "INPUT_FAIL_UNDER": "--fail-under",
    "INPUT_PROBE": "--probe",
}
"""Variable → option; one that is empty or not set is left out, one that the command does not have it refuses."""
ABOUT_THE_MODEL = (1, 4)
"""Exit codes that say what the evidence is worth, and not that something went wrong."""


def main() -> int:
    """Run the command that the environment asks for; returns the exit code of the step."""
    env = os.environ
    run = tempfile.mkdtemp(prefix="hardener-", dir=env.get("RUNNER_TEMP"))
    try:
        asked = arguments(env, run)
    except UsageError as error:
        annotate("error", str(error))
        return error.exit_code
    append(Path(env["GITHUB_OUTPUT"]), {"run": run})  # what is there when something fails can be kept, too
    # What a model or dataset is called must not reach the runner as a workflow command.
    again = token_hex(16)
    print(f"::stop-commands::{again}", flush=True)
    # -I: a module that lies in the folder of the checkout is not imported.
    command = [sys.executable, "-I", "-m", "hardener", *asked]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(f"::{again}::", flush=True)
    if not ran.stdout.strip():
        return ran.returncode
    return told(json.loads(ran.stdout), ran.returncode, env)


def arguments(env: Mapping[str, str], output: str) -> list[str]:
    """The command line of `hardener`, with the run in the folder `output`. Raises UsageError for an unknown mode."""
    mode = env.get("INPUT_MODE") or "harden"
    if mode not in MODES:
        raise UsageError(f"mode: {mode!r} is not one of {', '.join(MODES)}")
    chosen = [f"{option}={env[name]}" for name, option in OPTIONS.items() if env.get(name)]
    overrides = [f"--set={line.strip()}" for line in env.get("INPUT_SET", "").splitlines() if line.strip()]
    pull_request = ["--create-pr"] if env.get("INPUT_CREATE_PR") == "true" else []
    consent = ["--yes"] if mode == "harden" else []
    fixed = [f"--output={output}", "--format=json", *consent]
    return [mode, *chosen, *overrides, *pull_request, *fixed, "--", env["INPUT_MODEL"]]


def told(outcome: Mapping[str, Any], code: int, env: Mapping[str, str]) -> int:
    """Hand a finished run to the runner: outputs, summary, SARIF and one annotation; returns the step's exit code."""
    report = Report.model_validate(outcome["report"])
    sarif = write_sarif(report, outcome["run"], env) if env.get("INPUT_SARIF") == "true" else ""
    append(Path(env["GITHUB_OUTPUT"]), outputs(outcome, report, sarif))
    with Path(env["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as summary:
        summary.write(markdown(outcome, report))
    inform = env.get("INPUT_INFORM_ONLY") == "true" and code in ABOUT_THE_MODEL
    assert report.evidence is not None
    annotate("notice" if code == 0 else "warning" if inform else "error", f"Verdict: {report.evidence.word}")
    return 0 if inform else code


def outputs(outcome: Mapping[str, Any], report: Report, sarif: str = "") -> dict[str, str]:
    """The action's outputs from what `--format json` printed; empty where there is nothing to say."""
    assert report.evidence is not None
    measures = report.evidence.measures
    pushed = outcome["pushed"] or {}
    release = Path(outcome["run"]) / "release"
    return {
        "verdict": report.evidence.word,
        "w-original": figure(measures.w_original),
        "w-hardened": figure(measures.w_hardened),
        "cost-multiplier": figure(measures.multiplier),
        "report": str(release / "hardener" / "report.json"),
        "card": str(release / "README.md"),
        "sarif": sarif,
        "commit": pushed.get("commit") or "",
        "pr-url": pushed.get("pr_url") or "",
    }


def figure(interval: Interval | None) -> str:
    """A number that an expression can compare; `>=` before one whose budget ended first."""
    return "" if interval is None else f"{'>=' if interval.censored else ''}{interval.value:.4g}"


def write_sarif(report: Report, run: str, env: Mapping[str, str]) -> str:
    """Write the report as SARIF beside the release; returns the path.

    Results stand beside the recipe where that is a file of the checkout.
    """
    from hardener.sarif import sarif

    recipe = Path(env["INPUT_RECIPE"])
    place = recipe.as_posix() if recipe.is_file() and not recipe.is_absolute() else "hardener/report.json"
    path = Path(run) / "hardener.sarif"
    path.write_text(json.dumps(sarif(report, place), indent=1), encoding="utf-8")
    return str(path)


def append(path: Path, values: Mapping[str, str]) -> None:
    """Write outputs in the form whose end no value can forge: a random delimiter."""
    end = token_hex(16)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(f"{name}<<{end}\n{value}\n{end}\n" for name, value in values.items())


def annotate(level: str, text: str) -> None:
    """Say one thing on the page of the run, as a workflow command that no text can end early."""
    inert = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    print(f"::{level} title=hardener::{inert}", flush=True)


def markdown(outcome: Mapping[str, Any], report: Report) -> str:
    """The job summary: the card's facts, and why nothing was pushed."""
    from hardener.markdown import in_short
    from hardener.tables import escape

    withheld = outcome["withheld"]
    return in_short(report) + (f"\n**Not pushed:** {escape(withheld)}\n" if withheld else "")


if __name__ == "__main__":
    sys.exit(main())
