"""`hf harden`: installed by the Hub client's own code, started by its own dispatch, and out of the way from then on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hardener import __version__, cli

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "hf-harden"
HF = Path(sys.executable).with_name("hf")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INSTALL = """
import sys
from pathlib import Path
import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.cli.hf import main

root, commit, *sys.argv = sys.argv[1:]
raw = "https://raw.githubusercontent.com/acme/hf-harden/HEAD/"

def github(request):
    url = str(request.url)
    if url.startswith(raw) and (Path(root) / url.removeprefix(raw)).is_file():
        return httpx2.Response(200, content=(Path(root) / url.removeprefix(raw)).read_bytes())
    if url.startswith("https://github.com/acme/hf-harden.git/info/refs"):
        return httpx2.Response(200, text=f"001e# service=git-upload-pack\\n0000015a{commit} HEAD\\0multi_ack")
    return httpx2.Response(200 if url == "https://github.com/acme/hf-harden" else 404)

set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(github)))
main()
"""
"""The real `hf` with GitHub's answers given from this repository."""
RECORD = """#!/bin/sh
for word; do printf '%s\\0' "$word"; done > "$RECORD/arguments"
cat > "$RECORD/stdin"
exit "${EXIT:-0}"
"""
WAIT = """#!/bin/sh
trap 'echo told > "$RECORD/signal"; exit 143' TERM
trap 'echo told > "$RECORD/signal"; exit 130' INT
touch "$RECORD/started"
while :; do sleep 0.02; done
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder into which `hf extensions install acme/hf-harden` has put the extension."""
    made = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-c", INSTALL, str(ROOT), COMMIT, "hf", "extensions", "install", "acme/hf-harden"]
    ran = subprocess.run(command, env=environment(made), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return made


def environment(home: Path, *first: Path, **more: str) -> dict[str, str]:
    """Of a user whose home is `home`: folders first on PATH, no network, and no variable of the Hub client."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    path = os.pathsep.join([*map(str, first), "/usr/bin", "/bin"])
    return {**own, "HOME": str(home), "PATH": path, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", **more}


def stand_in(folder: Path, text: str = RECORD) -> Path:
    """A folder with a `hardener` that notes what it was given."""
    folder.mkdir(exist_ok=True)
    (folder / "hardener").write_text(text)
    (folder / "hardener").chmod(0o755)
    return folder


def given(folder: Path) -> list[str]:
    return (folder / "arguments").read_bytes().decode().split("\0")[:-1]


def harden(home: Path, folder: Path, *words: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    """`hf harden WORDS`, in a folder, with the stand-in."""
    env = environment(home, stand_in(folder / "bin"), RECORD=str(folder), **more)
    return subprocess.run([HF, "harden", *words], cwd=folder, env=env, input=stdin, capture_output=True, text=True)


def test_the_real_install_takes_the_file_at_the_root_and_says_what_it_is(home: Path) -> None:
    folder = home / ".local/share/hf/extensions/hf-harden"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (folder / "hf-harden").read_bytes() == SCRIPT.read_bytes()
    assert os.access(folder / "hf-harden", os.X_OK)
    assert (manifest["type"], manifest["short_name"], manifest["commit_sha"]) == ("binary", "harden", COMMIT)
    assert manifest["description"].startswith("Harden open weights")
    assert not (folder / "venv").exists()  # nothing heavy is installed within the client's 300 seconds


def test_the_hub_clients_help_lists_the_extension(home: Path) -> None:
    shown = subprocess.run([HF, "--help"], env=environment(home), capture_output=True, text=True).stdout
    assert "harden Harden open weights" in (line := " ".join(shown.split()))
    assert "evidence. [extension acme/hf-harden]" in line


def test_the_commands_it_knows_are_those_of_the_command_line() -> None:
    known, options = re.findall(r"^ +(.+)\) ;;$", SCRIPT.read_text(), re.MULTILINE)
    registered = [command.name or command.callback.__name__ for command in cli.app.registered_commands]  # type: ignore[union-attr]
    assert sorted(known.split(" | ")) == sorted([*registered, *(str(g.name) for g in cli.app.registered_groups)])
    assert set(options.split(" | ")) == {"--version", "--help", "-h"}


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["org/model", "--recipe", "ctrap"], ["harden", "org/model", "--recipe", "ctrap"]),
        (["org/model", "--help"], ["harden", "org/model", "--help"]),
        (["--resume", "runs/x"], ["harden", "--resume", "runs/x"]),
        (["harden", "org/model"], ["harden", "org/model"]),
        (["probe", "org/model", "--against", "org/parent"], ["probe", "org/model", "--against", "org/parent"]),
        (["recipes", "list"], ["recipes", "list"]),
        (["./probe"], ["harden", "./probe"]),
        (["--version"], ["--version"]),
        ([], []),
        ([""], ["harden", ""]),
        (["two words", "it's", '"', "*", "$(touch pwned)", "a\nb", "--", "-n"], None),
    ],
)
def test_what_follows_hf_harden_reaches_hardener_untouched(
    home: Path, tmp_path: Path, words: list[str], arguments: list[str] | None
) -> None:
    ran = harden(home, tmp_path, *words)
    assert ran.returncode == 0, ran.stderr
    assert given(tmp_path) == (["harden", *words] if arguments is None else arguments)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("code", [0, 1, 4, 130])
def test_the_exit_code_of_hardener_is_that_of_hf(home: Path, tmp_path: Path, code: int) -> None:
    assert harden(home, tmp_path, "org/model", EXIT=str(code)).returncode == code


def test_stdin_reaches_hardener(home: Path, tmp_path: Path) -> None:
    harden(home, tmp_path, "push", "runs/x", "org/x", stdin="y\n")
    assert (tmp_path / "stdin").read_text() == "y\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_hardener_as_no_shell_is_left_between(tmp_path: Path, number: int, code: int) -> None:
    env = environment(tmp_path, stand_in(tmp_path / "bin", WAIT), RECORD=str(tmp_path))
    started = subprocess.Popen([SCRIPT, "org/model"], env=env, preexec_fn=listening)
    until(tmp_path / "started")
    started.send_signal(number)
    assert started.wait(10) == code
    assert (tmp_path / "signal").read_text() == "told\n"


def test_ctrl_c_reaches_hardener_through_hf(home: Path, tmp_path: Path) -> None:
    env = environment(home, stand_in(tmp_path / "bin", WAIT), RECORD=str(tmp_path))
    started = subprocess.Popen([HF, "harden", "org/model"], env=env, preexec_fn=listening, stderr=subprocess.PIPE)
    until(tmp_path / "started")
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does
    started.communicate(timeout=10)
    until(tmp_path / "signal")


def listening() -> None:
    """As under a terminal: a session of its own, and SIGINT heard, which jobs in the background are made deaf to."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def until(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.02)


def test_without_hardener_it_names_the_line_that_installs_it(home: Path, tmp_path: Path) -> None:
    env = environment(home)
    ran = subprocess.run([HF, "harden", "org/model"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ran.returncode == 127
    assert "pip install hardener" in ran.stderr
    assert ran.stdout == ""


def test_it_starts_the_real_hardener(home: Path) -> None:
    env = environment(home, HF.parent)
    ran = subprocess.run([HF, "harden", "--version"], env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, __version__)
    refused = subprocess.run([HF, "harden", "./nowhere", "--recipe", "none"], env=env, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "none" in refused.stderr
