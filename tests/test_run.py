"""The run folder: one process at a time, and going on only with what it was started with."""

from __future__ import annotations

import datetime
import fcntl
import json
import subprocess
import sys

import pytest

from hardener import console, files
from hardener.errors import DivergedError, HubError, RunError, UsageError
from hardener.run import RunFolder, resumable, today

REQUEST = {"model": "org/model", "push_to": None}
HOLDER = """
import sys
from pathlib import Path
from hardener.run import RunFolder
with RunFolder.reopen(Path(sys.argv[1])).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", REQUEST, "name: x\n")


def test_a_second_process_is_refused_and_told_which_one_holds_the_folder(run):
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdin=-1, stdout=-1, text=True)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"in use by process {child.pid}") as caught, RunFolder.reopen(run.path).locked():
        raise AssertionError("two at once")
    assert caught.value.exit_code == 2
    child.kill()  # the lock dies with its process, however that ends
    child.communicate()
    with RunFolder.reopen(run.path).locked():
        pass


def test_a_folder_with_something_in_it_is_not_taken(tmp_path, run):
    with pytest.raises(RunError, match=f"not empty; continue it with --resume {run.path}"):
        RunFolder.create(run.path, REQUEST, "")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(RunError, match="not empty; choose another folder with --output"):
        RunFolder.create(tmp_path / "notes", REQUEST, "")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]


def test_what_is_no_run_folder_is_said(tmp_path, run):
    with pytest.raises(RunError, match=r"is not a run folder: it has no run\.json"):
        RunFolder.reopen(tmp_path)
    with pytest.raises(RunError, match="is not a run folder"):
        RunFolder.reopen(run.path / "recipe.yaml")
    journal = (run.path / "run.json").read_text()
    for text in ('{"half', "\xff", "[]", journal.replace('"fingerprint": {}', '"fingerprint": {"a": "b"}')):
        (run.path / "run.json").write_text(text, "latin-1")
        with pytest.raises(RunError, match=r"run\.json is damaged .*; start a new run"):
            RunFolder.reopen(run.path)


@pytest.mark.parametrize("key", ["request", "fingerprint", "stages", "created"])
def test_a_journal_of_another_shape_is_refused(run, key):
    journal = json.loads((run.path / "run.json").read_text())
    del journal[files.SEAL]
    for wrong in ({**journal, key: 7}, {k: v for k, v in journal.items() if k != key}, {**journal, "request": {}}):
        files.write_sealed(run.path / "run.json", wrong)
        with pytest.raises(RunError, match="is not the journal of a run"):
            RunFolder.reopen(run.path)


def test_a_file_in_the_way_of_a_run_is_named(tmp_path):
    (tmp_path / "file").write_text("keep")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match="file is a file; choose another folder with --output"):
            RunFolder.create(place, REQUEST, "")
    assert (tmp_path / "file").read_text() == "keep"


def test_going_on_with_something_else_is_refused_with_the_difference(run):
    rests_on = {"recipe.train.steps": "4", "recipe.data.benign": "None", "parent": "abc", "torch": "2.6"}
    run.guard(rests_on)
    again = RunFolder.reopen(run.path)
    again.guard(dict(reversed(rests_on.items())))
    changed = {"recipe.train.steps": "8", "recipe.data.benign.0": "x", "parent": "abc", "torch": "2.6"}
    with pytest.raises(RunError) as caught:
        again.guard(changed)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("was started with something else and cannot be resumed:")
    assert [line.strip() for line in lines[1:]] == [
        "recipe.data.benign: was None, is absent",
        "recipe.data.benign.0: was absent, is x",
        "recipe.train.steps: was 4, is 8",
    ]


def test_a_finished_stage_is_not_done_again_and_an_unfinished_one_is(run):
    done: list[str] = []

    def make() -> int:
        done.append("made")
        if len(done) == 1:
            raise OSError
        return 7

    with pytest.raises(OSError):  # noqa: PT011
        run.stage("harden", make, int, str)
    for _ in range(2):
        assert RunFolder.reopen(run.path).stage("harden", make, int, str) == 7
    assert done == ["made", "made"]
    assert set(RunFolder.reopen(run.path).seconds()) == {"harden"}


def test_a_forgotten_stage_is_done_anew(run):
    run.stage("target", lambda: 1, int, str)
    run.forget("target")
    run.forget("never done")
    assert RunFolder.reopen(run.path).stage("target", lambda: 2, int, str) == 2


def test_the_folder_is_private_to_its_user(run):
    assert run.path.stat().st_mode & 0o777 == 0o700


def test_a_start_that_was_killed_can_be_started_again_and_nothing_of_others_is_taken(tmp_path):
    begun = tmp_path / "run"
    begun.mkdir()
    for name in (".lock", "recipe.yaml", ".run.json.new"):
        (begun / name).write_text("half")
    assert RunFolder.create(begun, REQUEST, "name: x\n").recipe.read_text() == "name: x\n"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "recipe.yaml").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        RunFolder.create(mine, REQUEST, "")
    assert (mine / "recipe.yaml").read_text() == "mine"


def test_of_two_starts_in_one_folder_the_second_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("a+") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="in use by process"):
            RunFolder.create(tmp_path / "run", REQUEST, "")


def test_the_date_comes_from_source_date_epoch(monkeypatch, tmp_path):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert RunFolder.create(tmp_path / "run", REQUEST, "").created == "1970-01-02"
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert today() == datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    assert RunFolder.reopen(tmp_path / "run").created == "1970-01-02"  # a resumed run keeps its date


@pytest.mark.parametrize("epoch", ["yesterday", "nan", "1e300"])
def test_a_date_that_is_none_is_refused_before_there_is_a_folder(monkeypatch, tmp_path, epoch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    with pytest.raises(UsageError, match=r"SOURCE_DATE_EPOCH is '.*', not seconds since 1970"):
        RunFolder.create(tmp_path / "run", REQUEST, "")
    assert list(tmp_path.iterdir()) == []


def test_the_journal_holds_what_was_asked(run):
    assert RunFolder.reopen(run.path).request == REQUEST
    assert json.loads((run.path / "run.json").read_text())["schema"] == 1
    assert run.recipe.read_text() == "name: x\n"


def told(run: RunFolder, error: type[BaseException]) -> str | None:
    """How to go on after an error, if that is said."""
    with pytest.raises(error) as caught, resumable(run, "the line"):
        raise error
    return getattr(caught.value, "go_on", None)


def test_whatever_ends_a_run_early_says_truly_how_to_go_on(run):
    assert [told(run, error) for error in (KeyboardInterrupt, HubError)] == ["Go on with: the line"] * 2
    assert told(run, ValueError) is None  # a bug before anything was done
    (run.state / "step-000001").mkdir(parents=True)
    for error in (KeyboardInterrupt, HubError, ValueError):
        assert told(run, error) == "The state is saved; go on with: the line"
    assert told(run, DivergedError) == "Going on would end the same way; start a new run with a lower train.lr"


def test_the_line_of_a_step_is_short_and_the_report_has_the_rest():
    log = {"step": 3, "harmful": 8.1591, "p(e) attacked": 0.98, "norm retain": 0.1, "retain": 0.003, "clip": 1.0}
    assert console.values(log) == "harmful 8.159  retain 0.003  clip 1.000"
