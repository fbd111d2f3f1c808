"""The card's template: which names it may print, and a sandbox in which it is filled.

A template of one's own is Jinja, as `cards/model_card.md.j2` is. It sees the names of `Facts` and the filters below and
nothing else: it cannot read files, reach the program, or print a name that does not exist. Whatever it prints is made
inert for Markdown and HTML, unless it is Markdown that was made here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import quote

from hardener import tables
from hardener.errors import UsageError
from hardener.recipe import Recipe
from hardener.report import Erased, Report

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment


class Markdown(str):
    """Text that is Markdown already and is printed as it stands."""


class Facts(TypedDict):
    """Everything that a template may print."""

    report: Report
    recipe: Recipe
    title: str
    parent: Markdown
    license: str | None
    gate_missed: str | None
    absolute: bool
    verdict: str
    why: str
    caveats: list[tuple[str, str]]
    """What qualifies the verdict, each with its kind."""
    answers: list[tuple[str, str]]
    """The four questions with their answers."""
    headline: str
    power: str | None
    families: Markdown
    further: Markdown
    trap: Markdown
    plots: list[Markdown]
    access: str
    holds_for: str
    outside: Markdown
    needs_parent: str
    not_tried: tuple[str, ...]
    notes: tuple[str, ...]
    limit: str
    scoring: list[tuple[str, str]]
    beside: Markdown
    data: Markdown
    erased: Erased | None
    """What noise-then-distil did, where it was part of the hardening."""
    command: Markdown
    versions: dict[str, str]
    parent_text: Markdown


def fill(path: Path, facts: Facts) -> str:
    """The template's text with the facts in it. Raises UsageError naming what the template does wrong, and where."""
    from jinja2 import TemplateError

    try:
        return _environment().from_string(_read(path)).render(facts)
    except (TemplateError, TypeError, ValueError, ArithmeticError, AttributeError) as error:  # a stranger's program
        raise _wrong(path, error) from None


def check(path: Path) -> None:
    """Raise UsageError, before any work, for a template that is not there, no Jinja, or names what no card has."""
    from jinja2 import TemplateError, meta

    try:
        unknown = meta.find_undeclared_variables(_environment().parse(_read(path))) - {*Facts.__annotations__}
    except TemplateError as error:
        raise _wrong(path, error) from None
    if unknown:
        known = ", ".join(sorted(Facts.__annotations__))
        raise UsageError(f"the card template {path} prints {', '.join(sorted(unknown))}; a card has {known}")


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the card template {path} cannot be read: {error}") from None


def _wrong(path: Path, error: Exception) -> UsageError:
    line = getattr(error, "lineno", None)
    return UsageError(f"the card template {path}{f', line {line}' if line else ''}: {error}")


def _environment() -> SandboxedEnvironment:
    from jinja2 import DictLoader, StrictUndefined
    from jinja2.sandbox import SandboxedEnvironment

    environment = SandboxedEnvironment(
        loader=DictLoader({}),
        undefined=StrictUndefined,
        finalize=_inert,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(FILTERS)
    return environment


def short(digest: str) -> str:
    """A hash or commit, short enough to read; in full it is in the report."""
    return digest if len(digest) <= 20 else f"{digest[:18]}…"


def code(text: str) -> Markdown:
    """Inline code; what could end it or a table cell is left out."""
    return Markdown("`" + re.sub(r"[`|<>]", "", " ".join(str(text).split())) + "`")


def link(title: str, url: str) -> Markdown:
    """A link if the address is one of the web, else the title alone."""
    if not url.startswith(("https://", "http://")):
        return Markdown(tables.escape(title))
    return Markdown(f"[{tables.escape(title)}]({quote(url, safe=':/?&=#%+~.,-_')})")


def _inert(value: Any) -> str:
    """What `{{ … }}` prints: Markdown as it stands, all else escaped."""
    return value if isinstance(value, Markdown) else tables.escape(str(value))


FILTERS: dict[str, Callable[..., str]] = {
    "code": code,
    "link": link,
    "short": short,
    "grouped": lambda number: f"{number:,}",
    "compact": lambda number: f"{number:.2g}",
}
