"""Write what the code says about itself into Markdown: `docs/reference/`, and the marked parts of README.md.

    make docs

Everything comes from the place where it is said once: options from the command line, keys and defaults from the
recipe's models, exit codes from the errors, fields from the report. `tests/test_docs.py` refuses what is out of date.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel

from hardener import (
    card,
    cli,
    contradictions,
    errors,
    pipeline,
    plan,
    push,
    recipe_file,
    registry,
    report,
    resources,
    summary,
    template,
    verdict,
)
from hardener.attacks.families import BENIGN, SCREENS, Family, Kind
from hardener.checks import scientific
from hardener.defenses.configs import CONFIGS
from hardener.recipe import (
    CardChoice,
    Data,
    DefenseChoice,
    Erase,
    JudgeModel,
    Lora,
    Paper,
    Probe,
    Recipe,
    ShortTraining,
    Source,
    Train,
)

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "example"
KINDS: dict[Kind, str] = {
    "language": "language models",
    "classifier": "classifiers",
    "encoder": "encoders",
    "diffusion": "diffusion models",
}
PRINTED = ("Outcome", "Plan", "Pushed")
WRITTEN = "<!-- Written by `make docs`; change the code instead. -->"

SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("The recipe", Recipe),
    ("`paper`", Paper),
    ("`data`", Data),
    ("A source: `data.ROLE.N`", Source),
    ("`adapter`, where it is not `none`", Lora),
    ("`erase`, where it is not `none`", Erase),
    ("`erase.unlearn`, `erase.relearn`, where they are not `none`", ShortTraining),
    ("`defense`", DefenseChoice),
    *((f"`defense` with `name: {name}`", config) for name, config in CONFIGS.items()),
    ("`train`", Train),
    ("`probe`", Probe),
    ("A judge: `probe.judges.N`, `probe.refusal_judge`", JudgeModel),
    ("`card`", CardChoice),
)


def pages() -> dict[Path, str]:
    """Every generated file with its text."""
    return {
        ROOT / "docs/reference/commands.md": commands(),
        ROOT / "docs/reference/recipe.md": recipe(),
        ROOT / "docs/reference/attacks.md": attacks(),
        ROOT / "docs/reference/verdict.md": verdicts(),
        ROOT / "docs/reference/report.md": reports(),
        ROOT / "docs/reference/card.md": cards(),
        EXAMPLE / "README.md": example(),
        ROOT / "README.md": readme(),
    }


def commands() -> str:
    """Every command with its help, arguments and options."""
    parts = [
        "# Commands",
        WRITTEN,
        "Data goes to stdout, everything else to stderr. Exit codes: [verdict](verdict.md).",
    ]
    for name, command in every_command("hardener", typer.main.get_command(cli.app)):
        text, examples = explained(command.help or "")
        hints = get_type_hints(command.callback, include_extras=True) if command.callback else {}
        rows = [option(one, hints[one.name]) for one in command.params if one.name in hints]
        parts += [f"## {name}", text]
        if examples:
            parts.append("```bash test=parse\n" + "\n".join(examples) + "\n```")
        if rows:
            parts.append(table(("Argument or option", "Value", "Default", "Meaning"), rows))
    return page(parts)


def every_command(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """The command and, depth first, those below it, each with its full name."""
    yield name, command
    for child_name, child in getattr(command, "commands", {}).items():
        yield from every_command(f"{name} {child_name}", child)


def explained(text: str) -> tuple[str, list[str]]:
    """What a docstring says, and the command lines it shows."""
    lines = inspect.cleandoc(text).splitlines()
    examples = [line for line in lines if line.startswith("hardener ")]
    said = [line for line in lines if line and line not in examples]
    return "\n".join(said), examples


def option(parameter: Any, hint: Any) -> tuple[str, ...]:
    """One row of the table of a command; `hint` is the parameter's type as the code has it."""
    argument = parameter.param_type_name == "argument"
    name = (parameter.metavar or parameter.name).strip("[]")
    known = "required" if parameter.required else parameter.default
    return (
        f"`{name}`" if argument else ", ".join(f"`{name}`" for name in parameter.opts),
        parameter.metavar or value_of(hint),
        "" if known in (None, False, ()) else str(known),
        parameter.help or "",
    )


def value_of(hint: Any) -> str:
    """What may be given for a type: its choices, or its name."""
    if get_origin(hint) is Annotated:
        return value_of(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return " | ".join(f"`{choice}`" for choice in get_args(hint))
    kinds = {bool: "flag", str: "text", Path: "path"}
    given = [one for one in get_args(hint) if one is not type(None)]
    return value_of(given[0]) if given else kinds[hint]


def recipe() -> str:
    """Every key of a recipe, and the shipped recipes."""
    parts = ["# Recipe", WRITTEN, explained(inspect.getdoc(inspect.getmodule(Recipe)) or "")[0]]
    for title, model in SECTIONS:
        rows = [
            (f"`{name}`", kind(schema), default(schema, name, model), schema.get("description", ""))
            for name, schema in model.model_json_schema()["properties"].items()
        ]
        said = inspect.getdoc(model) or ""
        parts += [f"## {title}", escaped(said), table(("Key", "Value", "Default", "Meaning"), rows)]
    parts += ["## Tasks", tasks_table(), "## Shipped recipes", recipes_table()]
    return page(parts)


def tasks_table() -> str:
    """The tasks, with the forms that a row may have."""
    rows = []
    for name in registry.BUILT_IN["tasks"]:
        task = registry.find("tasks", name)
        forms = " or ".join(" + ".join(f"`{field}`" for field in form) for form in task.fields)
        scores = ", ".join(f"`{score}`" for score in contradictions.SCORES[name])
        rows.append((f"`{name}`", KINDS[task.kind], forms, scores))
    return table(("Task", "For", "A row", "Scores"), rows)


def kind(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[1]
    if "const" in schema or "enum" in schema:
        return " | ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        return " | ".join(dict.fromkeys(kind(one) for one in schema["anyOf"]))
    if schema.get("type") == "array":
        items = schema.get("items") or {"anyOf": schema.get("prefixItems", [{}])}
        return f"list of {kind(items)}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"name → {kind(schema['additionalProperties'])}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return " ".join([schema.get("type", "any"), *bounds])


def default(schema: dict[str, Any], name: str, model: type[BaseModel]) -> str:
    """A default as YAML would have it; sections have their own defaults."""
    if model.model_fields[name].is_required():
        return "required"
    known = schema.get("default")
    if known is None or isinstance(known, dict):
        return ""
    return f"`{str(known).lower() if isinstance(known, bool) else known}`"


def attacks() -> str:
    """The families, one row each."""
    rows = []
    for name in registry.BUILT_IN["attacks"]:
        family: Family = registry.find("attacks", name)
        screens = [preset for preset, short in SCREENS.items() if name in {*chain(*short.values())}]
        rows.append(family_row(family, [name for kind, name in KINDS.items() if family.suits(kind)], screens))
    rows += [family_row(family, [KINDS[kind]], []) for kind, family in BENIGN.items()]
    columns = ("Family", "What it is", "Attacks", "Trains", "Optimizer", "Tried at", "Also in")
    return page(
        [
            "# Attack families",
            WRITTEN,
            escaped(inspect.getdoc(inspect.getmodule(Family)) or ""),
            table(columns, rows),
            "The rows `benign` are what an honest user does; they are no attacks and answer the third question.",
            "## What no preset does yet",
            "\n".join(f"- {line}" for line in not_tried()),
        ]
    )


def family_row(family: Family, attacked: list[str], presets: list[str]) -> tuple[str, ...]:
    """One family in words."""
    trains = {"all": "all weights", "lora": "LoRA", "head": "the head"}[family.scope] if family.trains else "nothing"
    return (
        f"`{family.name}`",
        family.title + (" (stands outside the verdict)" if family.needs_parent else ""),
        " and ".join(attacked),
        trains if family.head == "kept" else f"{trains}, fresh head",
        family.optimizer if family.trains else "–",
        tried_at(family),
        ", ".join(f"`{preset}`" for preset in presets),
    )


def tried_at(family: Family) -> str:
    """The family's ladder, its doses, or the family whose best rate it takes."""
    if family.follows:
        return f"the best rate of `{family.follows}`"
    if family.doses:
        return "doses " + ", ".join(f"{dose:g}" for dose in family.doses)
    return "a ladder from " + ", ".join(scientific(rate) for rate in family.rates)


def not_tried() -> tuple[str, ...]:
    """`stages.NOT_TRIED`, read from the source, because that module needs torch."""
    tree = ast.parse((Path(summary.__file__).parent / "stages.py").read_text("utf-8"))
    assigned = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    lines: tuple[str, ...] = ast.literal_eval(assigned["NOT_TRIED"])
    return lines


def verdicts() -> str:
    """The words, the rule, the exit codes."""
    words = get_args(report.Word)
    gates: tuple[Any, ...] = (None, *verdict.GATES)
    codes = [
        (f"*{word}*", *(str(verdict.exit_code(word, (), gate)) for gate in gates), summary.MEANING[word])
        for word in reversed(words)
    ]
    classes = [
        (f"`{name}`", str(error.exit_code), escaped(inspect.getdoc(error) or "").replace("\n", " "))
        for name, error in vars(errors).items()
        if isinstance(error, type) and issubclass(error, errors.HardenerError)
    ]
    return page(
        [
            "# Verdict and exit codes",
            WRITTEN,
            "```text\n" + (inspect.getdoc(verdict) or "") + "\n```",
            "Exit code of a run by its verdict and its gate (`--fail-under`, `probe.gate`). A release is pushed "
            "exactly where the code is 0, or with `--push-anyway`, which leaves the code as it is. Without a gate, "
            f"the price flag *{verdict.UTILITY_LOST}* makes a 0 a 1.",
            table(("Verdict", "No gate", *(f"`{gate}`" for gate in verdict.GATES), "Meaning"), codes),
            "Exit code of a run that ended early. The message says what happened, names the value and says what to do; "
            "`--debug` shows the traceback.",
            table(("Error", "Exit code", "Meaning"), classes),
            "130: interrupted (Ctrl-C). 143: terminated (SIGTERM). Once there is a run folder, the line that goes on "
            "is printed.",
        ]
    )


def reports() -> str:
    """Every field of `report.json`, and of what `--format json` prints."""
    parts = ["# Report", WRITTEN, escaped(inspect.getdoc(report) or "")]
    parts += [section for node in reversed(classes(report)) for section in fields(node)]
    parts += ["## What `--format json` prints", "`harden` and `probe` print one Outcome; `push` prints one Pushed."]
    printed = [node for module in (pipeline, plan, push) for node in classes(module) if node.name in PRINTED]
    return page([*parts, *(section for node in printed for section in fields(node))])


def cards() -> str:
    """Every name that a card template may print."""
    facts = next(node for node in classes(template) if node.name == "Facts")
    return page(["# Card template", WRITTEN, escaped(inspect.getdoc(template) or ""), *fields(facts)])


def classes(module: ModuleType) -> list[ast.ClassDef]:
    """The classes of a module that have annotated fields."""
    found = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)]
    return [node for node in found if any(isinstance(part, ast.AnnAssign) for part in node.body)]


def fields(node: ast.ClassDef) -> Iterator[str]:
    """A heading, what the class says of itself, and a table of its fields with their docstrings."""
    yield f"### {node.name}"
    yield escaped(ast.get_docstring(node) or "")
    rows = [
        (f"`{ast.unparse(part.target)}`", f"`{ast.unparse(part.annotation)}`", said(after))
        for part, after in zip(node.body, [*node.body[1:], None], strict=True)
        if isinstance(part, ast.AnnAssign)
    ]
    yield table(("Field", "Type", "Meaning"), rows)


def said(node: ast.stmt | None) -> str:
    """The docstring of a field: the string that stands after it."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return escaped(" ".join(inspect.cleandoc(node.value.value).split()))
    return ""


def example() -> str:
    """The card of the demo's run, rendered from its report; plots and the parent's own card are left out."""
    return card.render(the_report())


def readme() -> str:
    """README.md with its marked parts written anew."""
    text = (ROOT / "README.md").read_text("utf-8")
    whole = example()
    first = re.search(r"^# Verdict.*?\n\n.*?\n", whole, re.MULTILINE | re.DOTALL)
    answers = re.search(r"(?<=## Four answers\n\n).*?(?=\n\n>)", whole, re.DOTALL)
    assert first
    assert answers
    heading, reason = first[0].removeprefix("# ").rstrip().split("\n\n")
    excerpt = f"**{heading}**\n\n{reason}\n\n{answers[0]}"
    text = marked(text, "card", "\n".join(f"> {line}".rstrip() for line in excerpt.splitlines()))
    return marked(text, "recipes", recipes_table())


def marked(text: str, name: str, inside: str) -> str:
    """`text` with what stands between the two marks `name` replaced."""
    begin, end = f"<!-- {name}: written by `make docs` -->", f"<!-- {name}: end -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{inside}\n\n{end}{after}"


def the_report() -> report.Report:
    """The report of the demo's run, without its curves."""
    return report.read(EXAMPLE / "report.json")


def recipes_table() -> str:
    """The shipped recipes."""
    rows = []
    for name in resources.recipes():
        one = recipe_file.load(name)
        paper = f"[{one.paper.title.partition(':')[0]}]({one.paper.url})" if one.paper else ""
        rows.append((f"`{name}`", one.title, f"`{one.task}`", paper))
    return table(("Recipe", "What it is", "Task", "Paper"), rows)


def table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table; a cell is Markdown on one line."""
    cells = ((cell.replace("|", "\\|").replace("\n", "\\n") for cell in row) for row in rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ("---",) * len(columns), *cells))


def escaped(text: str) -> str:
    """Text in which Markdown finds no HTML."""
    return text.replace("<", "&lt;")


def page(parts: Iterable[str]) -> str:
    """Parts as one Markdown file."""
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    """Write every page."""
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
