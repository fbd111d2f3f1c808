"""The documentation tells the truth: its commands work, its reference is what the code says, its links lead somewhere.

Every fenced block says how it is tested, after its language:

    bash test=run          run as it stands, by bash, in a folder with a tiny checkpoint and its data
    bash test=parse        each line is taken by the real command line; nothing is started
    python test=run        run
    python test=compile    compiled, and its calls of hardener bound to the real signatures
    yaml test=recipe       a recipe that loads
    yaml test=workflow     steps whose use of the action agrees with action.yml
    text                   shown, not tested
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import typer
import yaml
from typer.testing import CliRunner

import hardener
from hardener import cli, recipe_file, resources

ROOT = Path(__file__).resolve().parent.parent
OWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
SKILL = ROOT / "skills" / "SKILL.md"
PAGES = [*OWN, SKILL, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "reference").glob("*.md"))]
LOGS = ("docs/results.md", "docs/experiments.md")
"""What was measured, and by which commands; those take hours."""
BLOCK = re.compile(r"^```(\w+)?[ ]?(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
Block = tuple[str, str, str, str]
"""Page, language, mark, text."""


def blocks() -> list[Block]:
    return [
        (name, language, mark, text)
        for path in PAGES
        if (name := path.relative_to(ROOT).as_posix()) not in LOGS
        for language, mark, text in BLOCK.findall(path.read_text("utf-8"))
    ]


def marked(language: str, mark: str) -> list[Any]:
    chosen = [b for b in blocks() if b[1] == language and b[2] == f"test={mark}"]
    return [pytest.param(b[3], id=f"{b[0]}-{i}") for i, b in enumerate(chosen)]


def lines(language: str, mark: str) -> list[Any]:
    """The lines of all such blocks, each once."""
    chosen = [b for b in blocks() if b[1] == language and b[2] == f"test={mark}"]
    return list(dict.fromkeys(line for b in chosen for line in b[3].replace("\\\n", " ").splitlines() if line))


def test_every_block_says_how_it_is_tested() -> None:
    known = {("bash", "run"), ("bash", "parse"), ("python", "run"), ("python", "compile")}
    known |= {("yaml", "recipe"), ("yaml", "workflow")}
    untested = [b[:3] for b in blocks() if b[1] != "text" and (b[1], b[2].removeprefix("test=")) not in known]
    assert untested == []
    assert len(blocks()) > 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the reader of the documentation has it: a checkpoint and its data."""
    made = tmp_path_factory.mktemp("reader")
    tiny.letters(made / "checkpoint")
    tiny.letter_data(made)
    return made


def environment() -> dict[str, str]:
    """This interpreter's commands first, and no network."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


@pytest.mark.parametrize("text", marked("bash", "run"))
def test_commands_run_as_they_stand(text: str, folder: Path) -> None:
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("text", marked("python", "run"))
def test_python_runs_as_it_stands(text: str) -> None:
    exec(compile(text, "documentation", "exec"), {})


@pytest.mark.parametrize("text", marked("python", "compile"))
def test_python_calls_what_there_is(text: str) -> None:
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    ours = [call for call in calls if ast.unparse(call.func).startswith("hardener.")]
    assert ours
    for call in ours:
        function = getattr(hardener, ast.unparse(call.func).removeprefix("hardener."))
        keywords = {str(keyword.arg): None for keyword in call.keywords}
        inspect.signature(function).bind(*call.args, **keywords)


def inert(app: typer.Typer) -> typer.Typer:
    """The same command line, every argument and option of it, with commands that do nothing."""
    twin = typer.Typer()
    for command in app.registered_commands:
        assert command.callback
        nothing = functools.wraps(command.callback)(lambda **_: None)
        twin.command(command.name)(nothing)
    for group in app.registered_groups:
        assert group.typer_instance
        twin.add_typer(inert(group.typer_instance), name=group.name)
    return twin


def refusal(line: str) -> str | None:
    """Why this line of a shell would not work, or None."""
    words = shlex.split(line.partition(" > ")[0], comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, *arguments = words
    if program == "hardener":
        result = CliRunner().invoke(inert(cli.app), arguments)
        return None if result.exit_code == 0 else result.output
    if program == "make":
        found = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True)
        return None if found.returncode == 0 else found.stderr
    return None if words == ["pip", "install", "."] and (ROOT / "pyproject.toml").is_file() else f"unknown: {line}"


@pytest.mark.parametrize("line", lines("bash", "parse"))
def test_commands_are_taken_by_the_real_command_line(line: str) -> None:
    assert refusal(line) is None


@pytest.mark.parametrize(
    "line",
    ["hardener hardn x", "hardener harden x --recip y", "hardener harden x --probe hard", "make nothing", "curl x"],
)
def test_a_wrong_command_would_be_found(line: str) -> None:
    assert refusal(line)


@pytest.mark.parametrize("line", [line for line in lines("bash", "parse") if "--recipe" in line])
def test_recipes_and_overrides_of_commands_exist(line: str) -> None:
    words = shlex.split(line)
    name = words[words.index("--recipe") + 1]
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    if name.endswith(".yaml"):
        name = "tiny-ctrap"
    recipe_file.load(name, overrides)


@pytest.mark.parametrize("text", marked("yaml", "recipe"))
def test_recipes_load(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert recipe_file.load(tmp_path / "mine.yaml").name


@pytest.mark.parametrize("text", marked("yaml", "workflow"))
def test_workflows_use_the_action_as_it_is(text: str) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
    steps = [step for step in yaml.safe_load(text) if "hardener" in step.get("uses", "")]
    required = {name for name, known in action["inputs"].items() if known.get("required")}
    assert steps
    for step in steps:
        assert required <= set(step["with"]) <= set(action["inputs"])
        assert re.search(r"@[0-9a-f]{40}$", step["uses"])
    assert set(re.findall(r"steps\.hardener\.outputs\.([\w-]+)", text)) <= set(action["outputs"])


def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES_WRITTEN = reference().pages()


@pytest.mark.parametrize("path", PAGES_WRITTEN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_the_code_says_is_up_to_date(path: Path) -> None:
    assert path.read_text("utf-8") == PAGES_WRITTEN[path], "run `make docs`"


def test_every_command_option_recipe_and_family_is_in_the_reference() -> None:
    from hardener.registry import BUILT_IN

    text = "".join(path.read_text("utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    source = inspect.getsource(cli)
    options = set(re.findall(r'"(--[a-z-]+)"', source)) - {"--help"}
    assert {f"`{option}`" for option in options} <= set(re.findall(r"`--[a-z-]+`", text))
    names = [*resources.recipes(), *BUILT_IN["attacks"], *BUILT_IN["defenses"], *BUILT_IN["tasks"]]
    assert [name for name in names if f"`{name}`" not in text and f"name: {name}`" not in text] == []


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def links() -> list[Any]:
    found = [(path, link) for path in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8"))]
    local = [(path, link) for path, link in found if "://" not in link]
    return [pytest.param(path, link, id=f"{path.relative_to(ROOT).as_posix()}→{link}") for path, link in local]


@pytest.mark.parametrize(("page", "link"), links())
def test_links_lead_somewhere(page: Path, link: str) -> None:
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    assert target.exists()
    assert ROOT in target.parents
    if anchor:
        headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
        assert anchor in {slug(heading) for heading in headings}


def test_tests_that_the_decisions_name_are_there() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "decisions.md").read_text("utf-8"))
    there = "".join(path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in there] == []
