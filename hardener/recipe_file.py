"""Recipe files: name or path → Recipe, and back.

    load("ctrap", ["train.steps=100", "data.retain.0.limit=500"])

A file is read strictly, and all its problems are reported at once, each with file, line, key, what is wrong
and the nearest known key.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hardener.client import MISPLACED, TOKEN
from hardener.contradictions import contradictions, unknown_names
from hardener.defenses.configs import CONFIGS
from hardener.errors import RecipeError
from hardener.problems import Place, Problem, dotted, nearest, of_validation
from hardener.recipe import DefenseChoice, Recipe
from hardener.resources import recipes
from hardener.strict_yaml import Dumper, YamlError, compose, construct

MAX_BYTES = 2**20
LOCAL_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def load(name_or_path: str | Path, overrides: Sequence[str] = (), *, probe: bool = False) -> Recipe:
    """Return the validated recipe of a shipped name or a file, after overrides "key.path=value".

    List items are addressed by index ("data.restricted.1.split=test"), which may be left out where a list has
    one item. A dataset is local if it ends in .jsonl, .json, .csv, .tsv or .parquet, or begins with ., ~ or
    /; a relative one begins in the folder of the recipe file, for overrides and shipped recipes in the
    current folder. With `probe`, defence and training are left out, unchecked. Raises RecipeError with all
    problems, one per line.
    """
    draft = _read(name_or_path)
    for override in overrides:
        _override(draft, override)
    if probe:
        draft.data = {key: value for key, value in draft.data.items() if key not in ("erase", "defense", "train")}
    recipe = _validated(draft)
    if recipe:
        draft.report(contradictions(recipe))
    if draft.problems or recipe is None:
        raise RecipeError("\n".join(text for _, text in sorted(draft.problems)))
    return recipe


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML with every default written out; `load` reads an equal recipe from it."""
    return yaml.dump(_plain(recipe), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, with the settings of each known defence."""
    whole = Recipe.model_json_schema()
    choices = []
    for name, config in CONFIGS.items():
        settings = config.model_json_schema()
        settings["properties"] = {"name": {"const": name}, **settings["properties"]}
        choices.append(settings | {"required": ["name"]})
    other = whole["$defs"]["DefenseChoice"]
    other["properties"]["name"]["not"] = {"enum": list(CONFIGS)}
    whole["$defs"]["DefenseChoice"] = {"anyOf": [*choices, other]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}


def _plain(value: Any) -> Any:
    """Return dicts, lists and scalars; a None that is its field's default says nothing and is left out."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {k: _plain(v) for k, v in value if v is not None or k not in fields or fields[k].default is not None}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass
class _Draft:
    """A recipe as it was written: plain data, line or override of each place, and what is wrong so far."""

    label: str
    data: dict[str, Any]
    lines: dict[Place, int]
    overridden: dict[Place, str] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    """(line, message); overrides come after all lines."""

    def report(self, problems: Sequence[Problem]) -> None:
        """Note problems in the words a user reads."""
        for problem in problems:
            line, where = self._origin(problem)
            path = dotted(problem.place)
            self.problems.append((line, f"{where}: {path}: {problem.text}" if path else f"{where}: {problem.text}"))

    def refuse(self, override: str, text: str) -> None:
        """Note an override that cannot be carried out."""
        self.problems.append((MAX_BYTES, f"--set {override}: {text}"))

    def _origin(self, problem: Problem) -> tuple[int, str]:
        """Return line and wording of what was written nearest at or above the problem's place."""
        if problem.line:
            return problem.line, f"{self.label}:{problem.line}"
        for end in range(len(problem.place), 0, -1):
            place = problem.place[:end]
            # One source may be written without a list, and then its index stands nowhere in the file.
            for written in (place, tuple(part for part in place if part != 0)):
                if written in self.overridden:
                    return MAX_BYTES, f"--set {self.overridden[written]}"
                if written in self.lines:
                    return self.lines[written], f"{self.label}:{self.lines[written]}"
        return self.lines[()], f"{self.label}:{self.lines[()]}"


def _read(name_or_path: str | Path) -> _Draft:
    own = recipes().get(str(name_or_path)) if isinstance(name_or_path, str) else None
    path = own or Path(name_or_path)
    label = f"recipes/{path.name}" if own else str(path)
    text = _text(path, label)
    try:
        data, lines, problems = construct(compose(text))
    except YamlError as error:
        raise RecipeError(f"{label}:{error.line}: {error}") from error
    if not isinstance(data, dict):
        found = "this file is empty" if data is None else f"not a {type(data).__name__}"
        raise RecipeError(f"{label}:{lines.get((), 1)}: a recipe is keys with values; {found}")
    # No data lies beside a shipped recipe: its paths begin where the command is run.
    folder = Path.cwd() if own else path.absolute().parent
    draft = _Draft(label, _resolved(data, (), folder), lines)
    draft.report(problems)
    return draft


def _text(path: Path, label: str) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        hint = nearest(path.stem, recipes())
        raise RecipeError(f"{label}: no such file, and no shipped recipe of this name; {hint}") from None
    except OSError as error:
        raise RecipeError(f"{label}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{label}: {len(raw):,} bytes, where a recipe has {MAX_BYTES:,} at most")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{label}:{line}: not UTF-8; save the file as UTF-8") from error
    if token := TOKEN.search(text):
        line = text.count("\n", 0, token.start()) + 1
        raise RecipeError(f"{label}:{line}: a token stands here; {MISPLACED}")
    return text


def _resolved(value: Any, place: Place, folder: Path) -> Any:
    """Return the value with every local dataset and judge in it made absolute."""
    if isinstance(value, dict):
        return {key: _resolved(item, (*place, key), folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, (*place, index), folder) for index, item in enumerate(value)]
    where = dotted(place)
    dataset = re.fullmatch(r"data\.\w+(\.\d+)?\.dataset", where)
    if not isinstance(value, str) or not (dataset or re.fullmatch(r"probe\.(judges\.\d+|refusal_judge)\.model", where)):
        return value
    is_local = value.startswith((".", "~", "/")) or bool(dataset and value.lower().endswith(LOCAL_SUFFIXES))
    # os.path leaves the ~ of an unknown user as it is, and the file is then missing; pathlib fails with a RuntimeError.
    return str(folder / os.path.expanduser(value)) if is_local else value  # noqa: PTH111


def _override(draft: _Draft, override: str) -> None:
    """Write the value of "key.path=value" into the draft, or note why not."""
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts) or parts[0].isdecimal():
        draft.refuse(override, "must be key.path=value, e.g. train.steps=100")
        return
    try:
        value = _resolved(_override_value(text), tuple(parts), Path.cwd())
        draft.data, place = _assigned(draft.data, parts, value)
    except ValueError as error:
        draft.refuse(override, str(error))
        return
    for origins in (draft.lines, draft.overridden):
        for stale in [old for old in origins if old[: len(place)] == place]:
            del origins[stale]
    draft.overridden[place] = override


def _override_value(text: str) -> Any:
    """Read a value as YAML: a scalar, [a list] or {keys: with values}. Raises ValueError."""
    node = compose(text)
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        return text  # "Question: {prompt}" is a mapping in a file, and here plainly a text
    value, _, problems = construct(node)
    if problems:
        raise ValueError(problems[0].text)
    return value


def _assigned(holder: Any, parts: list[str], value: Any) -> tuple[Any, Place]:
    """Return `holder` with the value at the path, sections made as needed, and the place written to."""
    if not parts:
        return value, ()
    head, *rest = parts
    if head.isdecimal() and not isinstance(holder, list):
        holder = [holder] if isinstance(holder, dict) else []  # one source may be written without a list
    if isinstance(holder, list):
        return _assigned_item(holder, parts, value)
    if not isinstance(holder, dict | None):
        return _assigned(None, parts, value)[0], ()  # such as `adapter: none`: it is replaced as a whole
    section = holder or {}
    inner, place = _assigned(section.get(head), rest, value)
    return {**section, head: inner}, (head, *place)


def _assigned_item(items: list[Any], parts: list[str], value: Any) -> tuple[list[Any], Place]:
    head, *rest = parts
    if not head.isdecimal():
        if len(items) != 1:
            raise ValueError(f"there are {len(items)} items here; put an index before {head!r}")
        head, rest = "0", parts
    index = int(head)
    if index > len(items):
        raise ValueError(f"there is no item {index}; the list has {len(items)}")
    inner, place = _assigned(items[index] if index < len(items) else None, rest, value)
    return [*items[:index], inner, *items[index + 1 :]], (index, *place)


def _validated(draft: _Draft) -> Recipe | None:
    """Return the recipe with its defence's settings complete, or None after noting what is wrong."""
    data = _frozen(draft.data)
    draft.report(list(unknown_names(data)))
    settings = _settings(draft, data.get("defense"))
    try:
        recipe = Recipe.model_validate(data, strict=True)
    except ValidationError as error:
        draft.report(list(of_validation(error, Recipe, data)))
        return None
    return recipe.model_copy(update={"defense": settings}) if settings else recipe


def _settings(draft: _Draft, written: Any) -> DefenseChoice | None:
    """Return a known defence with all its settings; None for others, which check their own."""
    name = written.get("name") if isinstance(written, dict) else None
    if not isinstance(name, str) or name not in CONFIGS:
        return None
    settings = {key: value for key, value in written.items() if key != "name"}
    try:
        complete = CONFIGS[name].model_validate(settings, strict=True)
    except ValidationError as error:
        draft.report(list(of_validation(error, CONFIGS[name], settings, at=("defense",))))
        return None
    return DefenseChoice(name=name, **complete.model_dump())


def _frozen(value: Any) -> Any:
    """Return the value with tuples for lists, as the strict models ask."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
