"""Nothing that is secret gets out: no token, no name or path of the user, no restricted row, and no code gets in.

The journey (`journey.py`) is looked at as a whole: what each command printed, what lies in the user's home, and what
arrived on the Hub. What lies in the data folder and the environment is his own.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import small
from hub_server import Hub
from journey import USER, Journey
from PIL import Image

from hardener import action, data, recipe_file, registry, sources
from hardener.errors import DataError, RecipeError
from hardener.hub import resolve
from hardener.report import Report

TOKEN = Hub(Path()).token
ENDS = {"plan": 0, "job": 0, "harden": 4, "card": 0, "push": 0, "verify": 0, "probe": 4}
ENDS |= {"recipes": 0, "recipe": 0, "schema": 0}
"""Step of the journey → its exit code. Nothing is learned in so few steps, so that the verdict is inconclusive."""


def forms(secret: str) -> list[bytes]:
    """How a text may stand in a file: plain, and within base64 at each of the three places where it can begin."""
    shifted = [base64.b64encode(b"\0" * skip + secret.encode())[4:-4] for skip in range(3)]
    return [secret.encode(), *shifted]


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything(journey: Journey) -> Iterator[tuple[str, bytes]]:
    """All that was said and left, with its name."""
    for step, ran in journey.said.items():
        yield f"{step}, stdout", ran.stdout.encode()
        yield f"{step}, stderr", ran.stderr.encode()
    yield from files(journey.home).items()
    yield from pushed(journey)


def pushed(journey: Journey) -> Iterator[tuple[str, bytes]]:
    """Every file of every commit, and each commit's title."""
    for name in ("me/mine", "me/second"):
        for commit in journey.hub.repos[name].commits:
            yield f"{name}, a title", commit.title.encode()
            yield from ((f"{name}/{path}", content) for path, content in commit.files.items())


def published(journey: Journey) -> Iterator[tuple[str, bytes]]:
    """What others will see: the releases, the folder of a probe's evidence, and what the Action makes of a report."""
    yield from files(journey.release).items()
    yield from files(journey.home / "probed" / "release").items()
    yield from pushed(journey)
    report = Report.model_validate(json.loads((journey.release / "hardener" / "report.json").read_bytes()))
    outcome = json.loads(journey.said["harden"].stdout)
    run = str(journey.home / "tmp")
    sarif = Path(action.write_sarif(report, run, {"INPUT_RECIPE": str(journey.home / "recipe.yaml")}))
    yield "SARIF", sarif.read_bytes()
    yield "job summary", action.markdown(outcome, report).encode()


# The journey


@pytest.mark.parametrize("step", ENDS)
def test_every_step_of_the_journey_ends_as_it_should(journey: Journey, step: str) -> None:
    assert journey.said.keys() == ENDS.keys()
    assert journey.said[step].returncode == ENDS[step], journey.said[step].stderr


def test_no_command_says_or_keeps_the_token(journey: Journey) -> None:
    looked = list(everything(journey))
    assert len(looked) > 100
    assert journey.hub.asked("GET /api/whoami-v2")  # it was used
    assert [name for name, content in looked for form in forms(TOKEN) if form in content] == []


def test_nothing_that_is_published_names_the_user_or_a_path(journey: Journey) -> None:
    looked = list(published(journey))
    secrets = [form for text in (USER, str(journey.home.parent), "/private/") for form in forms(text)]
    assert {"SARIF", "job summary", "README.md", "hardener/bom.cdx.json", "me/mine/README.md"} <= {n for n, _ in looked}
    assert USER in (journey.home / "run" / "run.json").read_text()  # what stays here may, and does
    assert [name for name, content in looked for secret in secrets if secret in content] == []


def rows(journey: Journey) -> list[str]:
    """Prompts and answers of the restricted rows, with what the model should say instead, as far as they are texts."""
    made = [
        json.loads(line) for role in ("restricted", "alignment") for line in journey.data[role].read_text().splitlines()
    ]
    return [text for row in made for text in row.values() if len(text) >= 8]


def test_nothing_that_is_published_holds_a_restricted_row(journey: Journey) -> None:
    texts = {form for text in rows(journey) for form in (text.encode(), json.dumps(text)[1:-1].encode())}
    looked = {name: content for name, content in published(journey) if not name.endswith(".safetensors")}
    assert len(texts) > 100
    assert [(name, text) for name, content in looked.items() for text in texts if text in content] == []


def test_a_plot_says_nothing_but_what_it_shows(journey: Journey) -> None:
    plots = list((journey.release / "hardener").glob("*.png"))
    assert plots
    for path in plots:
        with Image.open(path) as plot:
            assert {*getattr(plot, "text", {})} <= {"Software"}


def test_the_search_would_find_a_token_in_any_of_its_forms() -> None:
    for skip in range(3):
        assert any(form in base64.b64encode(b"x" * skip + TOKEN.encode() + b"\n") for form in forms(TOKEN))
    assert forms(TOKEN)[0] in f"Bearer {TOKEN}".encode()


# What fails


SERVED = (401, 403, 404, 412, 429, 500, None, "cut")
ASKED = {
    "plan": ("harden", "org/parent", "--recipe", "tiny-ctrap", "--push-to", "me/new", "--dry-run"),
    "verify": ("verify", "org/parent"),
}


@pytest.mark.parametrize("how", SERVED)
@pytest.mark.parametrize("command", ASKED)
def test_no_failure_of_the_hub_shows_the_token(journey: Journey, command: str, how: int | None) -> None:
    """The server repeats what it was sent, wherever its answer is shown to people."""
    journey.hub.faults.clear()
    journey.hub.fail("GET /api/models/", how, times=1000)
    ran = journey.run(*ASKED[command], *(journey.overrides() if command == "plan" else ()))
    journey.hub.faults.clear()
    assert ran.returncode == 3, ran.stderr
    assert "Traceback" in ran.stderr
    assert TOKEN not in ran.stdout + ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", SERVED)
@pytest.mark.parametrize("request_", ["POST /api/repos/create", "POST .*/preupload/", "PUT /lfs/", "POST .*/commit/"])
def test_no_failure_of_a_push_shows_or_keeps_the_token(journey: Journey, request_: str, how: int | None) -> None:
    journey.hub.faults.clear()
    journey.hub.objects.clear()
    journey.hub.fail(request_, how, times=1000)
    ran = journey.run("push", "run", f"me/new-{len(journey.hub.requests)}", "--push-anyway", "--yes")
    journey.hub.faults.clear()
    assert ran.returncode in (0, 3), ran.stderr
    assert TOKEN not in ran.stdout + ran.stderr
    assert [name for name, content in files(journey.home).items() if TOKEN.encode() in content] == []


MISPLACED = {
    "as the model": ("harden", TOKEN, "--recipe", "tiny-ctrap"),
    "as the target": ("push", "run", f"me/{TOKEN}"),
    "as an override": ("harden", "org/parent", "--recipe", "tiny-ctrap", "--set", f"card.license={TOKEN}"),
    "as an option of its own": ("harden", "org/parent", "--recipe", "tiny-ctrap", f"--token={TOKEN}"),
}


@pytest.mark.parametrize("where", MISPLACED)
def test_a_token_in_the_command_is_refused_before_anything_shows_or_keeps_it(journey: Journey, where: str) -> None:
    ran = journey.run(*MISPLACED[where])
    assert ran.returncode == 2, ran.stderr
    assert "holds a token; tokens come from `hf auth login`" in ran.stderr
    assert TOKEN not in ran.stdout + ran.stderr


@pytest.mark.parametrize("line", [f"title: {TOKEN}", f"{TOKEN}: 1", f"# {TOKEN}", f"card: {{license: '{TOKEN}'}}"])
def test_a_token_in_a_recipe_is_refused_with_its_line_and_not_shown(tmp_path: Path, line: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\n{line}\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml:2: a token stands here") as caught:
        recipe_file.load(path)
    assert TOKEN not in str(caught.value)


def test_a_password_in_the_address_of_the_hub_is_refused_and_not_shown(journey: Journey) -> None:
    for secret in (TOKEN, "a-password-of-mine"):
        address = journey.hub.url.replace("//", f"//me:{secret}@")
        ran = journey.run(*ASKED["plan"], *journey.overrides(), HF_ENDPOINT=address)
        assert ran.returncode == 2, ran.stderr
        assert "HF_ENDPOINT holds a user or password" in ran.stderr
        assert secret not in ran.stdout + ran.stderr


def test_a_bug_shows_no_token(tmp_path: Path) -> None:
    """An error that nobody foresaw, with the token in its text and in that of its cause."""
    code = (
        "import sys; from hardener import cli, schemas\n"
        "def broken(command):\n"
        f"    raise KeyError('sent {TOKEN}') from ValueError('Bearer {TOKEN}')\n"
        "schemas.schema = broken\n"
        "sys.argv = ['hardener', 'schema', 'push', '--debug']\n"
        "cli.main()"
    )
    (tmp_path / "broken.py").write_text(code)
    ran = subprocess.run(
        [sys.executable, tmp_path / "broken.py"], env=small.environment(tmp_path), capture_output=True, text=True
    )
    assert ran.returncode == 70, ran.stderr
    assert "Traceback" in ran.stderr
    assert TOKEN not in ran.stderr.replace(code.splitlines()[2], "")


# The Action


@pytest.mark.slow
def test_the_action_hands_over_no_token_and_no_path_but_its_own(journey: Journey, tmp_path: Path) -> None:
    inputs = {"MODE": "probe", "MODEL": "me/mine", "AGAINST": "org/parent", "RECIPE": "tiny-ctrap", "SARIF": "true"}
    inputs["SET"] = "\n".join(small.overrides(journey.data))
    env = {f"INPUT_{name}": value for name, value in inputs.items()}
    runner = {
        "RUNNER_TEMP": tmp_path,
        "GITHUB_OUTPUT": tmp_path / "output",
        "GITHUB_STEP_SUMMARY": tmp_path / "summary",
    }
    ran = subprocess.run(
        [sys.executable, "-I", "-m", "hardener.action"],
        env=journey.environment | env | {name: str(path) for name, path in runner.items()},
        cwd=journey.home,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 4, ran.stderr
    left = {**files(tmp_path), "stdout": ran.stdout.encode(), "stderr": ran.stderr.encode()}
    assert any(name.endswith("hardener.sarif") for name in left)
    assert [name for name, content in left.items() for form in forms(TOKEN) if form in content] == []
    assert USER.encode() not in left["output"] + left["summary"]


# What a recipe cannot do


PASSWORDS = "root:x:0:0:the-superuser:/root:/bin/bash\nme:x:1000:1000:somebody-else:/home/me:/bin/sh\n"


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch pwned']",
        "!!python/name:os.system",
        "name: !!python/object/new:subprocess.Popen [['touch', 'pwned']]",
        "name: !include /etc/passwd",
        "<<: *all\nname: mine",
    ],
)
def test_no_tag_of_yaml_runs_or_reads_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(text)
    with pytest.raises(RecipeError):
        recipe_file.load("mine.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def opened(letters: Path, *overrides: str) -> data.Streams:
    """The data of a recipe, as a run opens it."""
    chosen = sources.pin(recipe_file.load("tiny-ctrap", overrides))
    task = registry.find("tasks", chosen.task)(
        letters, template=chosen.data.template, max_length=chosen.data.max_length
    )
    return data.open_streams(chosen, task, {})


@pytest.mark.parametrize("name", ["passwd", "passwd.txt", "passwd.jsonl", "passwd.json", "passwd.parquet"])
def test_a_file_that_is_no_data_is_refused_without_a_word_of_it(
    letters: Path, paths: dict[str, Path], tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text(PASSWORDS)
    with pytest.raises(DataError) as caught:
        opened(letters, *small.overrides(paths | {"restricted": tmp_path / name}))
    assert name in str(caught.value)
    assert [word for word in re.split(r"[:\n]", PASSWORDS) if len(word) > 4 and word in str(caught.value)] == []


def test_of_a_table_the_names_of_its_columns_are_told_and_nothing_else(
    letters: Path, paths: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "passwd.csv").write_text(PASSWORDS)
    with pytest.raises(DataError, match=r"has columns .*the-superuser") as caught:
        opened(letters, *small.overrides(paths | {"restricted": tmp_path / "passwd.csv"}))
    assert "somebody-else" not in str(caught.value)


@pytest.mark.parametrize("column", ["{prompt.__class__}", "{prompt[0]}", "{__import__}", "{0}"])
def test_a_column_is_a_column_and_no_expression(letters: Path, paths: dict[str, Path], column: str) -> None:
    mapped = f"data.benign.columns={{prompt: '{column}', completion: completion}}"
    with pytest.raises(DataError, match="is missing"):
        opened(letters, *small.overrides(paths), mapped)


def test_a_folder_of_data_runs_no_code(letters: Path, paths: dict[str, Path], tmp_path: Path) -> None:
    """A script of the folder's name is what the library ran in earlier versions."""
    folder = tmp_path / "rows"
    folder.mkdir()
    script = folder / "rows.py"
    script.write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    shutil.copy(paths["restricted"], folder)
    with pytest.raises(DataError, match="scripts are no longer supported"):
        opened(letters, *small.overrides(paths | {"restricted": folder}))
    script.rename(folder / "other.py")
    assert opened(letters, *small.overrides(paths | {"restricted": folder})).rows("restricted", "attack")
    assert not (tmp_path / "pwned").exists()


def test_the_template_of_a_recipe_is_a_text_and_no_program(letters: Path, paths: dict[str, Path]) -> None:
    text = "{% include '/etc/passwd' %}{{ cycler.__init__.__globals__.os.getcwd() }}{prompt}\n"
    chosen = recipe_file.load("tiny-ctrap", [*small.overrides(paths), f"data.template={json.dumps(text)}"])
    task = registry.find("tasks", chosen.task)(letters, template=chosen.data.template, max_length=64)
    task.tokenizer.chat_template = None
    assert task.render("a b", "c")[0].endswith(text.replace("{prompt}", "a b"))


# What a checkpoint cannot do


def with_code(letters: Path, folder: Path, marker: Path, **config: object) -> Path:
    """A checkpoint that brings a module which, once imported, leaves a file."""
    shutil.copytree(letters, folder)
    (folder / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


OWN = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}


@pytest.mark.parametrize("config", [{"model_type": "own", "auto_map": OWN}, {"model_type": None, "auto_map": OWN}])
def test_a_checkpoint_that_needs_its_own_code_is_refused_and_nobody_is_asked(
    letters: Path, paths: dict[str, Path], tmp_path: Path, config: dict[str, object]
) -> None:
    marker = tmp_path / "pwned"
    folder = with_code(letters, tmp_path / "own", marker, **config)
    home = tmp_path / "home"
    home.mkdir()
    words = [word for one in small.overrides(paths) for word in ("--set", one)]
    ran = subprocess.run(
        small.command("harden", folder, "--recipe", "tiny-ctrap", *words, "--output", tmp_path / "run"),
        env=small.environment(home),
        input="y\n" * 10,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2, ran.stderr
    assert not (tmp_path / "run").exists()
    assert not marker.exists()
    assert "[y/N]" not in ran.stdout + ran.stderr


def test_code_beside_a_known_architecture_is_neither_run_nor_released(letters: Path, tmp_path: Path) -> None:
    marker = tmp_path / "pwned"
    folder = with_code(letters, tmp_path / "own", marker, auto_map=OWN)
    tokenizer = folder / "tokenizer_config.json"
    mapped = {"auto_map": {"AutoTokenizer": ["modeling_own.Own", None]}}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | mapped))
    ref = resolve(str(folder))
    task = registry.find("tasks", "causal-lm")
    task.supports(ref.config)
    loaded = task(folder, template="{prompt}", max_length=64).load(folder)
    assert type(loaded).__module__.startswith("transformers.models.llama")
    assert "config.json" in ref.files
    assert "modeling_own.py" not in ref.files
    assert not marker.exists()
