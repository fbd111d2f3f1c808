"""`--on hf-jobs`: what is asked of the Hub, what never leaves this machine, and how a Job's end becomes an exit code.

The real client meets a small server on the loopback address here; the Hub's own service was never asked.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hardener import jobs, pipeline, recipe_file
from hardener.console import Narrator
from hardener.errors import HubError, RecipeError, ResourceError, UsageError

TOKEN = "hf_" + "notarealone" * 3
SPECIAL = ["--set=data.x=$(touch pwned)", 'it\'s "quoted"', "*", "two words", "a\nb"]
ASKED: dict[str, Any] = {"flavor": "a10g-small", "timeout": "12h", "push_to": "org/x"}


@dataclass
class Service:
    """What the loopback server answers, and what it was asked."""

    address: str = ""
    log: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=lambda: ["COMPLETED"])
    """Of one look at the Job after the other; the last one stays."""
    message: str | None = None
    status: int = 200
    """Of the answer to the request itself."""
    broken_logs: int = 0
    """So many times the log ends in the middle."""
    posted: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)
    """Path, body, authorization."""
    end: str = ""
    """The word before the exit code, as the request chose it."""

    def job(self) -> dict[str, Any]:
        stage = self.stages.pop(0) if len(self.stages) > 1 else self.stages[0]
        owner = {"id": "1", "name": "me", "type": "user"}
        return {"id": "job1", "owner": owner, "status": {"stage": stage, "message": self.message}}


class Handler(BaseHTTPRequestHandler):
    service: Service

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            self._json({"name": "me", "type": "user", "auth": {}})
        elif path == "/api/jobs/me/job1":
            self._json(self.service.job())
        elif path == "/api/jobs/me/job1/logs":
            self._log()
        else:
            self._json({"error": f"unexpected {path}"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.service.posted.append((self.path, body, self.headers["Authorization"]))
        self.service.end = body["environment"]["HARDENER_END"]
        refused = self.service.status != 200
        self._json({"error": "no credits"} if refused else self.service.job(), self.service.status)

    def _log(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        lines = [line.format(end=self.service.end) for line in self.service.log]
        if self.service.broken_logs:
            self.service.broken_logs -= 1
            lines = lines[:1]
        for line in lines:
            event = json.dumps({"data": line, "timestamp": "2026-01-01T00:00:00.000Z"})
            self.wfile.write(f"data: {event}\n\n".encode())

    def _json(self, value: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served() -> Iterator[Service]:
    service = Service()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"service": service}))
    service.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with served() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield made


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return jobs.request("org/model", recipe="ctrap", **ASKED)


def recipe_of(asked: dict[str, Any], folder: Path) -> Any:
    """The recipe that travels with a request, as the Job will load it."""
    (folder / "travelled.yaml").write_bytes(base64.b64decode(asked["env"]["HARDENER_RECIPE"]))
    return recipe_file.load(folder / "travelled.yaml")


# --- what is asked ----------------------------------------------------------------------------------------


def test_the_job_runs_the_same_command_with_the_recipe_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more: dict[str, Any] = {"revision": "main", "tag": "v1", "device": "cuda", "push_anyway": True}
    asked = jobs.request("org/model", recipe="ctrap", overrides=["train.steps=7"], **more, **ASKED)
    assert asked["command"] == [
        *("sh", "-c", jobs.SCRIPT, "hardener", "harden", "--recipe=recipe.yaml", "--revision=main", "--push-to=org/x"),
        *("--tag=v1", "--device=cuda", "--push-anyway", "--yes", "--", "org/model"),
    ]
    assert recipe_of(asked, tmp_path) == recipe_file.load("ctrap", ["train.steps=7"])
    assert (asked["flavor"], asked["timeout"], asked["secrets"]) == ("a10g-small", "12h", ["HF_TOKEN"])
    assert asked["env"]["HARDENER_PACKAGE"].startswith("hardener[")


def test_its_words_are_taken_by_the_real_command_line(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from hardener import cli

    seen: dict[str, Any] = {}

    def library(model: str, **known: Any) -> pipeline.Outcome:
        seen.update(known, model=model)
        raise UsageError("seen")

    monkeypatch.setattr(pipeline, "harden", library)
    CliRunner().invoke(cli.app, asked["command"][4:])
    assert (seen["model"], seen["recipe"], seen["push_to"]) == ("org/model", "recipe.yaml", "org/x")


def test_several_processes_compute_over_there_where_they_were_asked_for(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    many = jobs.request("org/model", recipe="ctrap", num_processes=8, shard=True, **ASKED)["command"]
    assert [word for word in many if word not in asked["command"]] == ["--num-processes=8", "--shard"]
    assert many[-2:] == ["--", "org/model"]


def test_the_command_line_hands_the_number_of_processes_to_the_job(service: Service, tmp_path: Path) -> None:
    asked = ("--on", "hf-jobs", "--push-to", "org/x", "--flavor", "a10g-largex4", "--dry-run")
    ran = hardener(service, tmp_path, *asked, "--num-processes", "4", "--shard")
    assert ran.returncode == 0, ran.stderr
    command = json.loads(ran.stdout)["command"]
    assert "--num-processes=4" in command
    assert "--shard" in command
    alone = hardener(service, tmp_path, *asked, "--shard")
    assert alone.returncode == 2
    assert "add --num-processes" in alone.stderr


def test_every_argument_of_a_hardening_is_known_to_a_job() -> None:
    import inspect

    there = set(inspect.signature(pipeline.harden).parameters) - {"narrator", "dry_run", "world"}
    assert there <= set(inspect.signature(jobs.request).parameters)


def test_a_recipe_file_whose_data_are_on_the_hub_travels(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(recipe_file.dump(recipe_file.load("ctrap", ["train.steps=9"])))
    asked = jobs.request("org/model", recipe=own, **ASKED)
    assert recipe_of(asked, tmp_path) == recipe_file.load(own)
    assert str(tmp_path) not in json.dumps(asked)


def test_a_repetition_names_the_release_and_its_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = jobs.request(None, from_report="org/release", overrides=["train.steps=7"], **ASKED)
    words = ["harden", "--from-report=org/release", "--push-to=org/x", "--set=train.steps=7", "--yes"]
    assert asked["command"][4:] == words
    assert "HARDENER_RECIPE" not in asked["env"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "./checkpoint"}, "./checkpoint is on this machine"),
        ({"model": "here"}, "here is on this machine"),
        ({"model": "not an id"}, "not a Hub repository id"),
        ({"model": None}, "name a model and a recipe"),
        ({"recipe": None}, "name a model and a recipe"),
        ({"push_to": None}, "--push-to"),
        ({"output": "runs/x"}, "leave out --output"),
        ({"resume": "runs/x"}, "leave out --resume"),
        ({"sign": "key.pem", "card_template": "card.j2"}, "leave out --sign, --card-template"),
        ({"timeout": "tomorrow"}, "--timeout tomorrow"),
        ({"timeout": "90"}, "--timeout 90"),
        ({"model": None, "recipe": None, "from_report": "./release"}, "./release is on this machine"),
        ({"overrides": ["data.restricted.0.dataset=./mine.jsonl"]}, "data.restricted.0 = .*mine.jsonl"),
        ({"overrides": ["data.benign.0.dataset=here"]}, "data.benign.0 = here"),
        (
            {"model": None, "recipe": None, "from_report": "org/release", "overrides": ["data.benign.dataset=a.csv"]},
            "a.csv: a Job cannot read",
        ),
    ],
)
def test_what_cannot_go_with_a_job_is_named_before_anything_is_sent(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    known = {"model": "org/model", "recipe": "ctrap", **ASKED, **changes}
    with pytest.raises(UsageError, match=said):
        jobs.request(**known)


def test_a_judge_of_this_machine_is_named(tmp_path: Path) -> None:
    judges = '[{"model": "./guard", "kind": "guard"}, {"model": "org/other", "kind": "guard"}]'
    overrides = [f"probe.judges={judges}", "data.restricted.0.score=judged"]
    with pytest.raises(UsageError, match=r"judge = .*guard"):
        jobs.request("org/model", recipe="ctrap", overrides=overrides, **ASKED)


def test_a_wrong_recipe_is_refused_here_and_not_over_there() -> None:
    with pytest.raises(RecipeError, match="stps"):
        jobs.request("org/model", recipe="ctrap", overrides=["train.stps=1"], **ASKED)


def test_a_recipe_too_large_for_a_variable_is_refused(tmp_path: Path) -> None:
    text = "x" * jobs.MOST_BYTES
    with pytest.raises(UsageError, match=r"bytes when resolved"):
        jobs.request("org/model", recipe="ctrap", overrides=[f"title={text}"], **ASKED)


# --- what the Job runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 4])
def test_the_script_hands_over_recipe_arguments_and_exit_code(code: int, asked: dict[str, Any], tmp_path: Path) -> None:
    uvx = tmp_path / "bin" / "uvx"
    uvx.parent.mkdir()
    uvx.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > words\necho working\nexit {code}\n")
    uvx.chmod(0o755)
    env = {**asked["env"], "PATH": f"{uvx.parent}:{os.environ['PATH']}"}
    command = [*asked["command"], *SPECIAL]
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == code
    assert ran.stdout == f"working\n{asked['env']['HARDENER_END']} {code}\n"
    words = (tmp_path / "words").read_bytes().decode().split("\0")[:-1]
    assert words == ["--from", asked["env"]["HARDENER_PACKAGE"], "hardener", *asked["command"][4:], *SPECIAL]
    assert recipe_file.load(tmp_path / jobs.RECIPE) == recipe_file.load("ctrap")
    assert not (tmp_path / "pwned").exists()


# --- sending and following --------------------------------------------------------------------------------


def test_what_is_sent_is_what_a_dry_run_shows_with_the_token_as_a_secret(
    service: Service, asked: dict[str, Any]
) -> None:
    jobs.submit(asked)
    [(path, body, authorization)] = service.posted
    assert path == "/api/jobs/me"
    assert authorization == f"Bearer {TOKEN}"
    assert body.pop("secrets") == {"HF_TOKEN": TOKEN}
    assert TOKEN not in json.dumps(body)
    assert TOKEN not in json.dumps(asked)
    assert body["dockerImage"] == asked["image"]
    assert (body["command"], body["environment"]) == (asked["command"], asked["env"])
    assert (body["flavor"], body["timeoutSeconds"]) == ("a10g-small", 12 * 3600)


def test_the_log_is_told_to_its_end_without_tokens(
    service: Service, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    service.stages = ["SCHEDULING", "RUNNING", "COMPLETED"]
    service.log = ["Attacking the original", f"Bearer {TOKEN}", "done", "{end} 0"]
    ended = jobs.submit(asked, Narrator())
    told = capsys.readouterr().err
    assert (ended.id, ended.exit_code) == ("job1", 0)
    assert re.findall("Attacking the original|done", told) == ["Attacking the original", "done"]
    assert ended.url in told
    assert TOKEN not in told
    assert service.end not in told


@pytest.mark.parametrize("code", [1, 2, 4, 5, 70])
def test_the_exit_code_of_the_command_is_that_of_the_job(service: Service, asked: dict[str, Any], code: int) -> None:
    service.stages, service.log = ["ERROR"], ["work", f"{{end}} {code}"]
    assert jobs.submit(asked).exit_code == code


def test_a_line_that_only_looks_like_the_end_is_not_believed(service: Service, asked: dict[str, Any]) -> None:
    service.stages = ["ERROR"]
    service.log = ["{end} 4", "end-0123456789abcdef 0", "exit code 0", "work {end} 0"]
    assert jobs.submit(asked).exit_code == 4


def test_a_log_that_breaks_off_is_taken_up_again(
    service: Service, asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    service.stages, service.broken_logs = ["RUNNING", "RUNNING", "RUNNING", "ERROR"], 1
    service.log = ["first", "second", "{end} 1"]
    assert jobs.submit(asked, Narrator()).exit_code == 1
    assert re.findall("first|second", capsys.readouterr().err) == ["first", "second"]


def test_the_exit_code_is_found_also_where_the_log_broke_off_before_it(service: Service, asked: dict[str, Any]) -> None:
    service.stages, service.broken_logs = ["RUNNING", "ERROR"], 1
    service.log = ["first", "{end} 4"]
    assert jobs.submit(asked).exit_code == 4


@pytest.mark.parametrize("stage", ["ERROR", "CANCELED", "DELETED"])
def test_a_job_that_ends_without_an_exit_code_is_a_run_that_failed(
    service: Service, asked: dict[str, Any], stage: str
) -> None:
    service.stages, service.message = [stage], "Job timeout"
    with pytest.raises(ResourceError, match=f"{stage}: Job timeout.*--timeout") as caught:
        jobs.submit(asked)
    assert not hasattr(caught.value, "go_on")


@pytest.mark.parametrize("status", [401, 402, 403, 429, 500])
def test_a_job_that_is_not_taken_is_an_error_of_the_hub(service: Service, asked: dict[str, Any], status: int) -> None:
    service.status = status
    with pytest.raises(HubError, match="the Job") as caught:
        jobs.submit(asked)
    assert caught.value.exit_code == 3
    assert TOKEN not in str(caught.value)


def test_without_a_token_nothing_is_asked(
    service: Service, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(HubError, match="hf auth login"):
        jobs.submit(asked)
    assert service.posted == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), HubError("gone")])
def test_an_end_of_the_following_says_that_the_job_goes_on(error: BaseException) -> None:
    from huggingface_hub import JobInfo

    job = JobInfo(**Service().job(), endpoint="https://hub.example.org")
    with pytest.raises(type(error)), jobs._goes_on(job):
        raise error
    assert "goes on at https://hub.example.org/jobs/me/job1" in vars(error)["go_on"]
    assert "hf jobs cancel job1" in vars(error)["go_on"]


def test_nothing_heavy_is_needed_to_build_a_request() -> None:
    script = "import sys; from hardener import jobs; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


# --- the command line -------------------------------------------------------------------------------------


def hardener(service: Service, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_ENDPOINT": service.address, "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "hardener", "harden", "org/model", "--recipe", "ctrap", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(("code", "stage"), [(0, "COMPLETED"), (4, "ERROR")])
def test_the_command_line_ends_with_the_exit_code_of_the_job(
    service: Service, tmp_path: Path, code: int, stage: str
) -> None:
    service.stages, service.log = [stage], ["Attacking the original", f"{{end}} {code}"]
    asked = ("--on", "hf-jobs", "--push-to", "org/x", "--flavor", "l4x1", "--format", "json")
    ran = hardener(service, tmp_path, *asked)
    assert ran.returncode == code, ran.stderr
    assert json.loads(ran.stdout)["exit_code"] == code
    assert "Attacking the original" in ran.stderr
    assert service.posted[0][1]["flavor"] == "l4x1"
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prints_the_request_and_sends_nothing(service: Service, tmp_path: Path) -> None:
    ran = hardener(service, tmp_path, "--on", "hf-jobs", "--push-to", "org/x", "--dry-run")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["command"][-2:] == ["--", "org/model"]
    assert TOKEN not in ran.stdout + ran.stderr
    assert service.posted == []


def test_a_job_that_cannot_be_submitted_ends_with_3(service: Service, tmp_path: Path) -> None:
    service.status = 402
    ran = hardener(service, tmp_path, "--on", "hf-jobs", "--push-to", "org/x")
    assert ran.returncode == 3
    assert "no credits" in ran.stderr


@pytest.mark.parametrize("words", [["--flavor", "l4x1"], ["--timeout", "1h"]])
def test_what_belongs_to_a_job_is_refused_without_one(service: Service, tmp_path: Path, words: list[str]) -> None:
    ran = hardener(service, tmp_path, *words)
    assert ran.returncode == 2
    assert "--on hf-jobs" in ran.stderr
