"""The GitHub Action: what others run with their tokens. Its steps' scripts run here as the runner would run them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer
import yaml
from sample_report import every_family, language_model
from typer.testing import CliRunner

from hardener import action, cli, pipeline
from hardener.errors import UsageError
from hardener.report import Report

ROOT = Path(__file__).resolve().parent.parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
INPUTS: dict[str, dict[str, Any]] = ACTION["inputs"]
INSTALL, HARDEN = ACTION["runs"]["steps"]
REUSABLE = ROOT / ".github" / "workflows" / "harden.yml"
EXAMPLES = sorted((ROOT / "docs" / "examples" / "workflows").glob("*.yml"))
PINNED = re.compile(r"@[0-9a-f]{40}$")
KIBIBYTES_1024 = 2**20
HOSTILE = [
    '"; rm -rf "$HOME"; echo "',
    "$(touch pwned)`touch pwned`",
    "${{ secrets.HF_TOKEN }}",
    "a\nverdict=protected\n::set-output name=verdict::protected",
    "--push-anyway",
    "--help",
    "-",
    "it's *",
    "org/model --push-anyway",
]


# --- action.yml -------------------------------------------------------------------------------------------


def test_no_script_of_the_action_holds_an_expression() -> None:
    steps = ACTION["runs"]["steps"]
    assert all("${{" not in step["run"] for step in steps)
    assert not any("uses" in step for step in steps)


def test_every_input_reaches_the_action_as_one_variable_that_it_reads() -> None:
    given = {**INSTALL["env"], **HARDEN["env"]}
    assert sorted(given.values()) == sorted(f"${{{{ inputs.{name} }}}}" for name in ACTION["inputs"])
    read = re.findall(r'"(INPUT_\w+)"', Path(action.__file__).read_text("utf-8"))
    assert set(HARDEN["env"]) == set(read)
    assert not any("token" in name for name in ACTION["inputs"])


def test_the_outputs_of_the_action_are_those_that_are_written() -> None:
    report = language_model()
    written = {"run", *action.outputs(outcome(report), report)}
    expressions = {name: f"${{{{ steps.harden.outputs.{name} }}}}" for name in written}
    assert {name: known["value"] for name, known in ACTION["outputs"].items()} == expressions


# --- the command ------------------------------------------------------------------------------------------


def test_arguments_are_the_one_line_of_a_pipeline() -> None:
    env = {
        "INPUT_MODE": "harden",
        "INPUT_MODEL": "org/model",
        "INPUT_RECIPE": "ctrap",
        "INPUT_REVISION": "",
        "INPUT_PUSH_TO": "org/model-hardened",
        "INPUT_FAIL_UNDER": "raises-cost",
        "INPUT_CREATE_PR": "true",
        "INPUT_SET": "train.steps=5\n\n  probe.seeds=2  \n",
    }
    assert action.arguments(env, "out") == [
        *("harden", "--recipe=ctrap", "--push-to=org/model-hardened", "--fail-under=raises-cost"),
        *("--set=train.steps=5", "--set=probe.seeds=2", "--create-pr"),
        *("--output=out", "--format=json", "--yes", "--", "org/model"),
    ]


def test_a_probe_names_the_original() -> None:
    env = {"INPUT_MODE": "probe", "INPUT_MODEL": "org/a", "INPUT_AGAINST": "org/b", "INPUT_RECIPE": "ctrap"}
    expected = ["probe", "--recipe=ctrap", "--against=org/b", "--output=out", "--format=json", "--", "org/a"]
    assert action.arguments(env, "out") == expected


@pytest.mark.parametrize("mode", [*HOSTILE, "push", "demo", "Harden"])
def test_no_other_command_can_be_asked_for(mode: str) -> None:
    with pytest.raises(UsageError, match="mode"):
        action.arguments({"INPUT_MODE": mode, "INPUT_MODEL": "m"}, "out")


@pytest.mark.parametrize("mode", action.MODES)
@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_value_reaches_the_library_as_that_value_and_nothing_else(
    value: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def library(model: str, **known: Any) -> None:
        seen.update(known, model=model)
        raise typer.Exit

    monkeypatch.setattr(pipeline, mode, library)
    names = {"harden": ("recipe", "revision", "push_to"), "probe": ("recipe", "revision", "against")}[mode]
    env = {"INPUT_MODE": mode, "INPUT_MODEL": value, **{f"INPUT_{name.upper()}": value for name in names}}
    result = CliRunner().invoke(cli.app, action.arguments(env, "out"))
    assert result.exit_code == 0, result.output
    assert [seen[key] for key in ("model", *names)] == [value] * 4
    assert seen.get("push_anyway", False) is False


def test_overrides_are_one_per_line_and_cannot_become_options() -> None:
    env = {"INPUT_MODEL": "m", "INPUT_SET": "--push-anyway\n$(touch pwned)"}
    assert [a for a in action.arguments(env, "out") if a.startswith("--set")] == [
        "--set=--push-anyway",
        "--set=$(touch pwned)",
    ]


# --- outputs, summary, annotation -------------------------------------------------------------------------


def outcome(report: Report, **changes: Any) -> dict[str, Any]:
    """What `--format json` prints at the end of a run."""
    known = {"plan": {}, "run": "/run", "report": report.model_dump(mode="json"), "pushed": None, "withheld": None}
    return {**known, "exit_code": 0, **changes}


def read_outputs(path: Path) -> dict[str, str]:
    """As the runner reads GITHUB_OUTPUT: NAME<<END, lines, END."""
    found, lines = {}, iter(path.read_text("utf-8").splitlines())
    for line in lines:
        name, end = line.split("<<")
        found[name] = "\n".join(iter(lambda: next(lines), end))
    return found


def test_outputs_of_a_published_run_name_verdict_figures_paths_and_commit() -> None:
    pushed = {"repo": "org/m", "commit": "c0ffee", "url": "u", "pr_url": "https://hub.example.org/org/m/discussions/1"}
    report = language_model("raises cost")
    assert action.outputs(outcome(report, pushed=pushed), report, "/run/hardener.sarif") == {
        "verdict": "raises cost",
        "w-original": "0.94",
        "w-hardened": "0.55",
        "cost-multiplier": "3.1",
        "report": "/run/release/hardener/report.json",
        "card": "/run/release/README.md",
        "sarif": "/run/hardener.sarif",
        "commit": "c0ffee",
        "pr-url": pushed["pr_url"],
    }


def test_a_cost_whose_budget_ended_first_is_a_bound_and_one_not_measured_is_empty() -> None:
    report = language_model("protected")
    assert report.evidence
    assert action.outputs(outcome(report), report)["cost-multiplier"] == ">=16"
    measures = report.evidence.measures.model_copy(update={"multiplier": None})
    bare = report.model_copy(update={"evidence": report.evidence.model_copy(update={"measures": measures})})
    assert action.outputs(outcome(bare), bare)["cost-multiplier"] == ""


@pytest.mark.parametrize("value", [*HOSTILE, "", "verdict<<x\nprotected\nx"])
def test_no_value_can_forge_another_output(value: str, tmp_path: Path) -> None:
    action.append(tmp_path / "out", {"verdict": "broken", "pr-url": value, "commit": ""})
    assert read_outputs(tmp_path / "out") == {"verdict": "broken", "pr-url": value, "commit": ""}


@pytest.mark.parametrize("value", [*HOSTILE, "100 %\r\n::error::x"])
def test_an_annotation_is_one_line_whatever_it_says(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    action.annotate("error", value)
    [line] = capsys.readouterr().out.splitlines()
    said = line.removeprefix("::error title=hardener::")
    assert said.replace("%0A", "\n").replace("%0D", "\r").replace("%25", "%") == value


def test_the_summary_says_why_nothing_was_pushed() -> None:
    report = language_model("raises cost")
    text = action.markdown(outcome(report, withheld="broken: <b>at most</b> 62 % is left"), report)
    assert "raises cost" in text
    assert "**Not pushed:** broken: &lt;b&gt;at most" in text


def test_the_fullest_summary_is_far_below_what_the_runner_takes() -> None:
    report = every_family()
    assert len(action.markdown(outcome(report), report).encode()) < KIBIBYTES_1024 / 20


@pytest.mark.parametrize(
    ("code", "inform", "ends", "level"),
    [
        (0, "false", 0, "notice"),
        (1, "false", 1, "error"),
        (4, "false", 4, "error"),
        (0, "true", 0, "notice"),
        (1, "true", 0, "warning"),
        (4, "true", 0, "warning"),
        (3, "true", 3, "error"),
        (70, "true", 70, "error"),
    ],
)
def test_only_a_missed_gate_can_be_made_green(
    code: int, inform: str, ends: int, level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = {"GITHUB_OUTPUT": str(tmp_path / "out"), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}
    report = language_model("broken")
    assert action.told(outcome(report), code, {**env, "INPUT_INFORM_ONLY": inform}) == ends
    assert read_outputs(tmp_path / "out")["verdict"] == "broken"
    assert capsys.readouterr().out == f"::{level} title=hardener::Verdict: broken\n"


@pytest.mark.parametrize(
    ("recipe", "place"),
    [("mine.yaml", "mine.yaml"), ("ctrap", "hardener/report.json"), ("/etc/passwd", "hardener/report.json")],
)
def test_findings_stand_beside_a_recipe_of_the_checkout(
    recipe: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    path = action.write_sarif(language_model("broken"), str(tmp_path), {"INPUT_RECIPE": recipe})
    results = json.loads(Path(path).read_text("utf-8"))["runs"][0]["results"]
    assert {r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in results} == {place}


# --- the steps, as the runner starts them -----------------------------------------------------------------


def start(step: dict[str, Any], folder: Path, env: dict[str, str], **inputs: str) -> subprocess.CompletedProcess[str]:
    """A step's script by the runner's bash, with inputs or their defaults in the variables that action.yml names."""
    known = {name: inputs.pop(name.replace("-", "_"), str(given.get("default", ""))) for name, given in INPUTS.items()}
    assert not inputs
    variables = {
        name: known[text.removeprefix("${{ inputs.").removesuffix(" }}")] for name, text in step["env"].items()
    }
    temp = folder / "temp"
    temp.mkdir(exist_ok=True)
    runner = {
        "RUNNER_TEMP": str(temp),
        "GITHUB_OUTPUT": str(folder / "output"),
        "GITHUB_STEP_SUMMARY": str(folder / "summary"),
        "GITHUB_ACTION_PATH": "/the/action",
        "HARDENER_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    script = temp / "script.sh"
    script.write_text(step["run"])
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
    whole = {**os.environ, **runner, **variables, **env}
    return subprocess.run(command, cwd=folder, env=whole, capture_output=True, text=True)


def run_step(folder: Path, env: dict[str, str] | None = None, **inputs: str) -> subprocess.CompletedProcess[str]:
    """The second step, where the first one has installed this interpreter's environment."""
    (folder / "temp").mkdir()
    (folder / "temp" / "hardener").symlink_to(sys.prefix)
    return start(HARDEN, folder, env or {}, **inputs)


SHIM = """#!/bin/sh
printf '%s\\0' "$@" >> "$RUNNER_TEMP/asked"
if [ "$1" = -m ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/pip"; fi
"""


@pytest.mark.parametrize("version", ["", "hardener==0.1.0", *HOSTILE])
def test_what_is_installed_is_one_argument_of_pip(version: str, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin" / "python3"
    shim.write_text(SHIM)
    shim.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    ran = start(INSTALL, tmp_path, {"PATH": path}, version=version)
    assert ran.returncode == 0, ran.stderr
    asked = (tmp_path / "temp" / "asked").read_text().split("\0")[:-1]
    place = str(tmp_path / "temp" / "hardener")
    assert asked == ["-m", "venv", place, "install", "--quiet", "--", version or "/the/action"]
    assert not (tmp_path / "pwned").exists()


def test_the_exit_code_of_the_command_is_that_of_the_step(tmp_path: Path) -> None:
    ran = run_step(tmp_path, model="$(touch pwned)", recipe="tiny-ctrap", set="train.stps=1")
    assert ran.returncode == 2
    assert "train.stps" in ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"temp", "output"}
    assert set(read_outputs(tmp_path / "output")) == {"run"}


@pytest.mark.parametrize("value", HOSTILE[:6])
def test_no_hostile_input_starts_anything(value: str, tmp_path: Path) -> None:
    given = dict.fromkeys(("model", "recipe", "revision", "push_to", "set", "fail_under", "probe", "create_pr"), value)
    ran = run_step(tmp_path, **given, inform_only=value, sarif=value)
    assert ran.returncode == 2, ran.stderr
    assert not list(tmp_path.rglob("pwned"))
    assert not (tmp_path / "summary").exists()
    assert set(read_outputs(tmp_path / "output")) == {"run"}


@pytest.mark.parametrize("value", HOSTILE[3:5])
def test_an_unknown_mode_is_said_in_one_annotation(value: str, tmp_path: Path) -> None:
    ran = run_step(tmp_path, mode=value, model="m", recipe="ctrap")
    assert ran.returncode == 2
    assert [line.split("::")[1] for line in ran.stdout.splitlines()] == ["error title=hardener"]


def test_nothing_that_the_command_prints_is_a_workflow_command(tmp_path: Path) -> None:
    ran = run_step(tmp_path, model="m", recipe="x\n::set-output name=verdict::protected")
    first, last = ran.stdout.splitlines()
    token = first.removeprefix("::stop-commands::")
    assert len(token) == 32
    assert last == f"::{token}::"


def test_no_module_of_the_checkout_is_imported(tmp_path: Path) -> None:
    for name in ("hardener", "json", "typer"):
        (tmp_path / f"{name}.py").write_text("open('pwned', 'w')")
    ran = run_step(tmp_path, model="m", recipe="no-such-recipe")
    assert ran.returncode == 2
    assert "no-such-recipe" in ran.stderr
    assert not (tmp_path / "pwned").exists()


def test_a_trusted_publisher_reaches_the_client_and_its_failure_is_explained(tmp_path: Path) -> None:
    """What the client says of a failed exchange is `test_a_failed_trusted_publisher_exchange_is_explained`."""
    publisher = {"HF_OIDC_RESOURCE": "org/model-hardened", "GITHUB_ACTIONS": "true", "HF_HUB_OFFLINE": "0"}
    ran = run_step(tmp_path, {**publisher, "HF_ENDPOINT": "http://127.0.0.1:9"}, model="org/model", recipe="tiny-ctrap")
    assert ran.returncode == 3
    assert "id-token: write" in ran.stderr


def reader(folder: Path) -> dict[str, str]:
    """A tiny checkpoint with its data, and settings with which everything runs and nothing is learned."""
    tiny.letters(folder / "checkpoint")
    tiny.letter_data(folder)
    small = ["probe.steps=2", "probe.max_steps=2", "probe.benign_steps=2", "probe.evaluation_rows=16"]
    small += ["probe.utility_rows=8"]
    known = {"recipe": "tiny-ctrap", "probe": "quick", "fail_under": "", "set": "\n".join(small)}
    return {"model": "./checkpoint", **known}


def test_a_real_run_hands_over_verdict_report_card_summary_and_exit_code(tmp_path: Path) -> None:
    given = reader(tmp_path)
    given["set"] += "\ntrain.steps=1\ntrain.batch_size=2"
    ran = run_step(tmp_path, **given)
    assert ran.returncode == 4, ran.stderr  # an untrained model that nothing can teach in two steps
    assert ran.stdout.splitlines()[-1] == "::error title=hardener::Verdict: inconclusive"
    written = read_outputs(tmp_path / "output")
    assert written["verdict"] == "inconclusive"
    assert json.loads(Path(written["report"]).read_text("utf-8"))["evidence"]["word"] == "inconclusive"
    assert Path(written["card"]).read_text("utf-8").startswith("---")
    assert Path(written["run"]) in Path(written["report"]).parents
    assert float(written["w-original"]) <= 0.5
    summary = (tmp_path / "summary").read_text("utf-8")
    assert "inconclusive" in summary
    assert len(summary.encode()) < KIBIBYTES_1024
    assert (written["commit"], written["pr-url"], written["sarif"]) == ("", "", "")


def test_a_real_probe_only_informs_and_writes_sarif(tmp_path: Path) -> None:
    given = reader(tmp_path)
    tiny.letters(tmp_path / "original", seed=1)
    options = {"mode": "probe", "against": "./original", "inform_only": "true", "sarif": "true"}
    ran = run_step(tmp_path, **given, **options)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "::warning title=hardener::Verdict: inconclusive"
    written = read_outputs(tmp_path / "output")
    assert written["verdict"] == "inconclusive"
    log = json.loads(Path(written["sarif"]).read_text("utf-8"))
    assert "verdict" in {result["ruleId"] for result in log["runs"][0]["results"]}
    assert not list((Path(written["run"]) / "release").rglob("*.safetensors"))


# --- workflows --------------------------------------------------------------------------------------------


def checked(schema: str, *files: Path) -> None:
    program = shutil.which("check-jsonschema", path=str(Path(sys.executable).parent)) or shutil.which(
        "check-jsonschema"
    )
    if program is None:
        pytest.skip("check-jsonschema is not installed")
    ran = subprocess.run([program, "--builtin-schema", schema, *files], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def test_the_action_is_valid() -> None:
    checked("vendor.github-actions", ROOT / "action.yml")


def test_the_workflows_are_valid() -> None:
    assert len(EXAMPLES) == 3
    checked("vendor.github-workflows", REUSABLE, *EXAMPLES)


def test_actionlint_has_nothing_to_say() -> None:
    program = shutil.which("actionlint")
    if program is None:
        pytest.skip("actionlint is not installed")
    # It does not know yet by which names a reusable workflow finds its own repository.
    known = ["-ignore", 'property "workflow_(repository|sha)" is not defined']
    ran = subprocess.run([program, *known, REUSABLE, *EXAMPLES], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


def workflow(path: Path) -> dict[Any, Any]:
    return dict(yaml.safe_load(path.read_text("utf-8")))


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in workflow(path)["jobs"].values() for step in job.get("steps", [])]


@pytest.mark.parametrize("path", [REUSABLE, *EXAMPLES], ids=lambda path: path.stem)
def test_every_step_of_others_is_pinned_and_no_script_holds_an_expression(path: Path) -> None:
    lines = [line for line in path.read_text("utf-8").splitlines() if re.match(r" +(- )?uses: [\w-]+/", line)]
    assert lines
    assert [line for line in lines if not re.search(r"@[0-9a-f]{40} # ", line)] == []
    assert not any("${{" in step["run"] for step in steps(path) if "run" in step)
    for step in steps(path):
        if "actions/checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_uses_the_action_as_it_is_and_takes_no_rights_to_spare(path: Path) -> None:
    [use] = [step for step in steps(path) if "your-org/hardener" in step.get("uses", "")]
    required = {name for name, known in INPUTS.items() if known.get("required")}
    assert required <= set(use["with"]) <= set(INPUTS)
    text = path.read_text("utf-8")
    assert set(re.findall(r"steps\.hardener\.outputs\.([\w-]+)", text)) <= set(ACTION["outputs"])
    known = workflow(path)
    assert known["permissions"] == {}
    rights = {right: job["permissions"][right] for job in known["jobs"].values() for right in job["permissions"]}
    needed = {"contents": "read"}
    needed |= {"id-token": "write"} if "HF_OIDC_RESOURCE" in text else {}
    needed |= {"security-events": "write"} if "upload-sarif" in text else {}
    assert rights == needed


@pytest.mark.parametrize("path", [REUSABLE, *EXAMPLES], ids=lambda path: path.stem)
def test_an_artifact_holds_evidence_and_no_weights(path: Path) -> None:
    kept = [step["with"]["path"] for step in steps(path) if "upload-artifact" in step.get("uses", "")]
    release = "${{ steps.hardener.outputs.run }}/release"
    assert [text.splitlines() for text in kept] == [[f"{release}/hardener/", f"{release}/README.md"]]


def test_the_reusable_workflow_hands_over_every_input_and_output_of_the_action() -> None:
    called = workflow(REUSABLE)[True]["workflow_call"]  # YAML 1.1 reads the key `on` so
    [use] = [step for step in steps(REUSABLE) if step.get("id") == "hardener"]
    handed = set(INPUTS) - {"version"}  # what is installed is the workflow's own commit
    assert use["with"] == {name: f"${{{{ inputs.{name} }}}}" for name in INPUTS if name in handed}
    assert handed <= set(called["inputs"])
    for name in handed:
        assert called["inputs"][name].get("default", "") == INPUTS[name].get("default", "")
    machine_paths = {"run", "report", "card", "sarif"}
    assert set(called["outputs"]) == set(ACTION["outputs"]) - machine_paths


def test_no_workflow_of_this_repository_starts_a_hardening_by_itself() -> None:
    assert set(workflow(REUSABLE)[True]) == {"workflow_call"}
    assert {path.name for path in (ROOT / ".github" / "workflows").iterdir()} == {"ci.yml", "harden.yml"}
