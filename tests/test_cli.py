"""The command line by running it: exit codes, what goes to stdout, and what a person reads when it ends early."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import small
import tiny
from hub_server import hub_server

import hardener
from hardener import cli, resources
from hardener.errors import HardenerError


def run(*arguments: object, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a fresh process, away from the checkout."""
    env = small.environment(home, **variables)
    return subprocess.run(small.command(*arguments), cwd=home, env=env, capture_output=True, text=True, timeout=120)


def flags(overrides: list[str]) -> list[str]:
    return [word for one in overrides for word in ("--set", one)]


def hardening(model: object, output: Path, overrides: list[str], *more: object) -> list[object]:
    fixed = ["--recipe", "tiny-ctrap", "--output", output, "--device", "cpu"]
    return ["harden", model, *fixed, *flags(overrides), *more]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["harden", "org/model", "--recipe", "tiny-ctrap", "--set", "train.stepz=3"], "did you mean"),
        (["harden", "org/model", "--recipe", "ctrab"], "did you mean"),
        (["harden", "org/model", "--nonsense"], "No such option"),
        (["harden", "./gone", "--recipe", "tiny-ctrap"], "the folder ./gone does not exist"),
        (["harden"], "name a model and a recipe"),
        (["harden", "", "--recipe", "tiny-ctrap"], "name a model and a recipe"),
        (["probe", "", "--recipe", "tiny-ctrap"], "MODEL is empty"),
        (
            ["harden", "org/model", "--recipe", "tiny-ctrap", "--create-pr", "--branch", "x"],
            "leave out --create-pr, --b",
        ),
        (["harden", "--from-report", "org/model-hardened", "--revision", "main"], "leave out --revision"),
        (["harden", "--from-report", "runs/gone/release"], "the folder runs/gone/release does not exist"),
        (["verify", "runs/gone/release"], "the folder runs/gone/release does not exist"),
        (["verify", ".", "--revision", "main"], "has no revision main; leave --revision out"),
        (["verify", "."], "is not a hardener release"),
        (["harden", "--resume", "."], "is not a run folder"),
    ],
)
def test_a_wrong_request_ends_with_2_and_no_traceback(tmp_path, arguments, said):
    ended = run(*arguments, home=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    assert not (tmp_path / "runs").exists()


def test_a_model_that_is_not_in_reach_ends_with_3(tmp_path, paths):
    ended = run(*hardening("org/model", tmp_path / "run", small.overrides(paths)), home=tmp_path)
    assert ended.returncode == 3
    assert "org/model" in ended.stderr
    assert "HF_HUB_OFFLINE" in ended.stderr


def test_debug_shows_the_traceback_and_keeps_the_exit_code(tmp_path):
    ended = run("harden", "./gone", "--recipe", "tiny-ctrap", "--debug", home=tmp_path)
    assert ended.returncode == 2
    assert "Traceback" in ended.stderr
    assert ended.stderr.rstrip().splitlines()[-1].startswith("hardener: the folder ./gone does not exist")


def test_the_hub_decides_before_anything_is_computed(tmp_path, letters, paths):
    """Pickle only: 2, and the weights stay where they are. No right to push: 3, and no training state."""
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copyfile(letters / "config.json", pickled / "config.json")
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    with hub_server(tmp_path / "hub") as server:
        server.add_model("org/pickled", pickled, card={"license": "mit"})
        server.add_model("org/letters", letters, card={"license": "mit"})
        online = {**server.environment, "HF_HUB_OFFLINE": "0"}
        lines = {
            2: hardening("org/pickled", tmp_path / "one", small.overrides(paths)),
            3: hardening("org/letters", tmp_path / "two", small.overrides(paths), "--push-to", "stranger/theirs"),
        }
        ended = {code: run(*line, home=tmp_path, **online) for code, line in lines.items()}
        assert {code: one.returncode for code, one in ended.items()} == {2: 2, 3: 3}, ended
        assert "pickle, which can run code" in ended[2].stderr
        assert "stranger/theirs" in ended[3].stderr
        assert not server.asked(r"\.bin|PUT")
        assert all(server.token not in one.stdout + one.stderr for one in ended.values())
    assert not (tmp_path / "two" / "state").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.benign.columns={prompt: prompt, completion: answer}", "column answer is missing; it has completion"),
        ("OVERLAP", "24 of 24 rows have an input that another source already uses"),
        ("data.benign.dataset=gone.jsonl", "does not exist"),
    ],
)
def test_wrong_data_ends_with_2(tmp_path, letters, paths, override, said):
    if override == "OVERLAP":
        some = [json.loads(line) for line in paths["restricted"].read_text().splitlines()[:24]]
        second = tiny.jsonl(tmp_path / "second.jsonl", some)
        first = f"{{dataset: {paths['restricted']}, uses: [defence, attack]}}"
        override = f"data.restricted=[{first}, {{dataset: {second}, uses: [evaluation]}}]"
    line = hardening(letters, tmp_path / "run", small.overrides(paths, override))
    code, out, err = small.Command(*line, home=tmp_path / "home").end()
    assert code == 2, err
    assert said in err
    assert "Traceback" not in err
    assert out == ""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, letters, paths):
    """A whole run by the command line: (home, run folder, exit code, stdout, stderr)."""
    home = tmp_path_factory.mktemp("finished")
    line = hardening(letters, home / "run", small.overrides(paths), "--format", "json")
    return home, home / "run", *small.Command(*line, home=home).end()


def test_stdout_is_json_and_nothing_else(finished, letters):
    _, folder, code, out, err = finished
    told = json.loads(out)
    assert code == told["exit_code"] == 4
    assert told["run"] == str(folder)
    assert told["plan"]["model"] == "letters"
    assert hardener.Report.model_validate(told["report"]).evidence.word == "inconclusive"
    assert "Attacking the release" in err
    assert "Traceback" not in err


def test_the_screen_says_nothing_of_libraries(finished):
    assert not [line for line in finished[4].splitlines() if "Warning" in line or "it/s" in line]


def test_a_release_can_be_verified_and_tampering_ends_with_1(finished, tmp_path):
    release = shutil.copytree(finished[1] / "release", tmp_path / "release")
    code, out, err = small.Command("verify", release, "--format", "json", home=tmp_path / "home").end()
    assert code == 0, err
    assert json.loads(out)["checks"] == small.VERIFIED
    (release / "README.md").write_text("protected")
    code, out, err = small.Command("verify", release, home=tmp_path / "home").end()
    assert code == 1
    assert "README.md has another hash than SHA256SUMS says" in err
    assert out == ""


def test_the_card_is_printed(finished):
    code, out, err = small.Command("card", finished[1], home=finished[0] / "card").end()
    assert code == 0, err
    assert out.rstrip("\n") == (finished[1] / "release" / "README.md").read_text().rstrip("\n")


def test_a_dry_run_prints_the_plan_and_leaves_nothing(tmp_path, letters, paths):
    line = hardening(letters, tmp_path / "run", small.overrides(paths), "--dry-run", "--format", "json")
    code, out, err = small.Command(*line, home=tmp_path / "home", cwd=tmp_path).end()
    assert code == 0, err
    assert json.loads(out)["plan"]["outer_steps"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_finished_folder_is_not_overwritten(finished, letters, paths):
    home, folder, *_ = finished
    line = hardening(letters, folder, small.overrides(paths))
    code, _, err = small.Command(*line, home=home / "again").end()
    assert code == 2
    assert f"continue it with --resume {folder}" in err


def test_signals_save_the_state_and_name_the_line_to_go_on(finished, letters, paths, tmp_path):
    """SIGTERM while hardening: 143. Resumed by the line that it printed, Ctrl-C in the probe: 130."""
    folder, home = tmp_path / "run", tmp_path / "home"
    shutil.copytree(finished[0] / "cache", home / "cache")
    overrides = small.overrides(paths, "train.steps=200", "train.save_every=5")
    first = small.Command(*hardening(letters, folder, overrides), home=home)
    first.signal_when(lambda: list((folder / "state").glob("step-*")), signal.SIGTERM)
    code, out, err = first.end()
    assert (code, out) == (143, "")
    assert err.endswith(f"hardener: interrupted\nThe state is saved; go on with: hardener harden --resume {folder}\n")
    assert "Traceback" not in err
    line = err.rpartition("go on with: hardener ")[2].split()
    second = small.Command(*line, home=home)
    second.signal_when(lambda: list((folder / "probe" / "runs" / "hardened").glob("*.json")), signal.SIGINT)
    code, _, err = second.end()
    assert code == 130, err
    assert f"go on with: hardener harden --resume {folder}" in err


def test_an_interruption_before_there_is_a_run_names_no_line(tmp_path, letters, paths):
    log = tmp_path / "home" / "stderr"
    line = hardening(letters, tmp_path / "run", small.overrides(paths), "--dry-run")
    command = small.Command(*line, home=tmp_path / "home")
    command.signal_when(lambda: log.exists() and "Resolving" in log.read_text(), signal.SIGINT)
    code, _, err = command.end()
    assert code == 130
    assert err.endswith("hardener: interrupted\n")


def test_a_full_disk_ends_with_5_and_can_be_resumed(finished, letters, paths, tmp_path):
    """No file may be larger than 1.5 MB: all is well until the first state, weights and moments, is saved."""
    folder, home = tmp_path / "run", tmp_path / "home"
    shutil.copytree(finished[0] / "cache", home / "cache")
    line = hardening(letters, folder, small.overrides(paths))
    code, _, err = small.Command(*line, home=home, limit=1_500_000).end()
    assert code == 5, err
    assert f"cannot write {folder}/state/step-000001: File too large; free some space" in err
    assert f"go on with: hardener harden --resume {folder}" in err
    assert "Traceback" not in err
    assert list((folder / "state").iterdir()) == []
    code, _, err = small.Command("harden", "--resume", folder, home=home).end()
    assert code == 4, err
    assert (folder / "release" / "model.safetensors").read_bytes() == (
        finished[1] / "release" / "model.safetensors"
    ).read_bytes()


def ended(monkeypatch, capsys, error: BaseException, *arguments: str) -> tuple[int, str]:
    """How the command line ends if the library raises `error`."""

    def raising() -> dict[str, Path]:
        raise error

    monkeypatch.setattr(resources, "recipes", raising)
    monkeypatch.setattr("sys.argv", ["hardener", "recipes", "list", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr().err


@pytest.fixture(autouse=True)
def _own_signals():
    """`main` sets handlers; pytest wants its own back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_bug_ends_with_70_and_says_how_to_report_it(monkeypatch, capsys):
    error = TypeError("no such thing")
    error.go_on = "The state is saved; go on with: hardener harden --resume runs/x"
    code, said = ended(monkeypatch, capsys, error)
    assert code == 70
    assert said.splitlines() == [
        "hardener: this is a bug in hardener: TypeError: no such thing",
        "Please report it with what the same line shows with --debug",
        "The state is saved; go on with: hardener harden --resume runs/x",
    ]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("8 GB"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    ],
)
def test_too_little_memory_ends_with_5_and_says_what_to_lower(monkeypatch, capsys, error):
    code, said = ended(monkeypatch, capsys, error)
    assert code == 5
    assert "lower train.batch_size" in said


def test_a_disk_full_of_temporary_files_ends_with_5(monkeypatch, capsys):
    code, said = ended(monkeypatch, capsys, OSError(errno.ENOSPC, "No space left on device", "x"))
    assert code == 5
    assert "set TMPDIR or HF_HOME to another disk" in said


def errors() -> list[type[HardenerError]]:
    found = [HardenerError]
    for kind in found:
        found += kind.__subclasses__()
    return found


@pytest.mark.parametrize("kind", errors(), ids=lambda kind: kind.__name__)
def test_every_error_ends_with_its_own_code(monkeypatch, capsys, kind):
    code, said = ended(monkeypatch, capsys, kind("what happened; what to do"))
    assert code == kind.exit_code
    assert said == "hardener: what happened; what to do\n"


def test_every_command_has_help_with_an_example():
    from typer.main import get_command

    def commands(group, prefix):
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from commands(command, f"{prefix} {name}")
            else:
                yield f"{prefix} {name}", command

    for line, command in commands(get_command(cli.app), "hardener"):
        assert line in command.help, line


def test_the_version_is_printed(tmp_path):
    told = run("--version", home=tmp_path)
    assert (told.returncode, told.stdout) == (0, hardener.__version__ + "\n")
