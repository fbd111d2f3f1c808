"""One source of rows: where it is, which version of it, and its rows with the task's fields.

A Hub dataset is pinned to a commit, a local file or folder to its hash, which is also the only name that is published.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import itertools
import os
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from hardener.errors import DataError, ResourceError, disk_full
from hardener.recipe import ROLES, Probe, Recipe, Source
from hardener.tasks.base import Task

PACKED = (
    *(b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"),
    *(b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\x07", b"\x04\x22\x4d\x18"),
)
"""How files begin that are zip, gzip, bzip2, xz, zstd, 7z, rar or lz4."""
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def is_local(source: Source) -> bool:
    """A source is local if it exists as a path or can only be meant as one."""
    name = source.dataset
    return name.startswith(("local:", "/", ".", "~")) or _suffix(name) in FORMATS or Path(name).exists()


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _path(source: Source) -> Path:
    # Not Path.expanduser, which raises where nobody has the name behind the tilde: the path is then merely missing.
    return Path(os.path.expanduser(source.dataset))  # noqa: PTH111


def pin(recipe: Recipe) -> Recipe:
    """Return the recipe with every Hub dataset at a commit and every local source with its hash.

    Raises DataError for a missing local source or one whose hash is not the recorded one, HubError for a missing
    dataset.
    """
    roles: dict[str, Any] = {}
    for role in ROLES:
        sources: tuple[Source, ...] | None = getattr(recipe.data, role)
        roles[role] = None if sources is None else tuple(_pinned(role, i, s) for i, s in enumerate(sources))
    data = recipe.data.model_copy(update=roles)
    return recipe.model_copy(update={"data": data, "probe": _with_judges(recipe.probe, "pinned")})


def _with_judges(probe: Probe, how: Literal["pinned", "published"]) -> Probe:
    """The probe with its judges pinned to a commit or hash, or named as they may be released."""
    if not probe.judges and probe.refusal_judge is None:
        return probe
    from hardener import judges

    change = {"pinned": judges.pinned, "published": judges.published}[how]
    refusal = probe.refusal_judge and change(probe.refusal_judge)
    return probe.model_copy(update={"judges": tuple(map(change, probe.judges)), "refusal_judge": refusal})


def _pinned(role: str, index: int, source: Source) -> Source:
    if not is_local(source):
        from hardener.hub import dataset_commit

        return source.model_copy(update={"revision": dataset_commit(source.dataset, source.revision)})
    where = f"data.{role}.{index}.dataset"
    path = _path(source)
    if not path.exists():
        raise DataError(f"{where}: {source.dataset} does not exist; give its path with --set data.{role}.dataset=PATH")
    found = sha256_of(path)
    if source.sha256 not in (None, found):
        raise DataError(
            f"{where}: {path.name} has sha256 {found}, but the recipe was made with {source.sha256}; use the same file"
        )
    return source.model_copy(update={"sha256": found})


def sha256_of(path: Path) -> str:
    """Hash of a file, or of all files of a folder with their names."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.relative_to(path).as_posix().encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def published(recipe: Recipe) -> Recipe:
    """The recipe as it may be released: a local source is named by its hash, never by its path."""
    roles: dict[str, Any] = {
        role: None
        if (sources := getattr(recipe.data, role)) is None
        else tuple(
            s.model_copy(update={"dataset": f"local:{s.sha256}"}) if s.sha256 is not None else s for s in sources
        )
        for role in ROLES
    }
    data = recipe.data.model_copy(update=roles)
    return recipe.model_copy(update={"data": data, "probe": _with_judges(recipe.probe, "published")})


def rows_of(role: str, index: int, source: Source, task: Task, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of one source with the task's fields; `seed` draws those of a `limit`.

    Raises DataError naming a missing column, or the first row with a value of the wrong kind or that cannot be read.
    """
    where = f"data.{role}.{index} ({Path(source.dataset).name if is_local(source) else name_of(source)})"
    dataset = load(source, where)
    have = set(dataset.column_names)
    columns = source.columns or _guess(task, have)
    if columns is None:
        wanted = " or ".join("+".join(fields) for fields in task.fields)
        header = " (the first line of a table names them)" if _suffix(source.dataset) in (".csv", ".tsv") else ""
        raise DataError(f"{where}: needs {wanted}, has columns {sorted(have)}{header}; map them with `columns`")
    needed = {name for column in columns.values() for name in placeholders(column)} | set(source.where)
    if missing := sorted(needed - have):
        raise DataError(f"{where}: column {', '.join(missing)} is missing; it has {', '.join(sorted(have))}")
    for number, row in enumerate(_chosen(dataset, source, seed, where), 1):
        try:
            made = {field: fill(column, row) for field, column in columns.items()}
            for field, value in made.items():
                check(field, value)
        except ValueError as error:
            among = " of those that `where` and `limit` leave" if source.where or source.limit else ""
            raise DataError(f"{where}, row {number}{among}: {error}") from error
        yield made


def _chosen(dataset: Any, source: Source, seed: int, where: str) -> Iterator[dict[str, Any]]:
    """Yield the raw rows that `where` and `limit` leave."""
    with readable(where):
        if source.where:
            dataset = dataset.filter(lambda row: all(_matches(row[c], v) for c, v in source.where.items()))
        if source.limit is not None and source.limit < len(dataset):
            dataset = dataset.shuffle(seed=seed).select(range(source.limit))
        yield from dataset


def check(field: str, value: Any) -> None:
    """Raise ValueError if a field of a row holds what no task can take: null, a list, a number instead of text."""
    fits, wanted = KINDS.get(field, (_always, ""))
    if not fits(value):
        shown = reprlib.repr(value) if value is not None else "null"
        advice = (
            f"; `columns: {{{field}: '{{NAME}}'}}` makes text of it" if wanted == TEXT and _is_number(value) else ""
        )
        raise ValueError(f"`{field}` must be {wanted}, not {shown}{advice}")


def _always(value: Any) -> bool:
    return True


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _is_label(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _is_image(value: Any) -> bool:
    from PIL.Image import Image

    return isinstance(value, Image)


def _is_conversation(value: Any) -> bool:
    """Of a conversation, its first question and the answer to it must be text."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) and "content" in turn for turn in value):
        return False
    if not all(isinstance(turn.get("role"), str) for turn in value):
        return False
    first = {turn["role"]: turn["content"] for turn in reversed(value)}
    return all(isinstance(first.get(role, ""), str) for role in ("user", "assistant"))


TEXT = "text"
KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("prompt", "completion", "text", "text_pair"), (_is_text, TEXT)),
    "messages": (_is_conversation, "a list of turns with `role` and `content`"),
    "label": (_is_label, "text or a whole number"),
    "image": (_is_image, "an image"),
}
"""Field → whether a value fits, and what is wanted in words."""


def _guess(task: Task, have: set[str]) -> dict[str, str] | None:
    fields = next((fields for fields in task.fields if have.issuperset(fields)), None)
    return None if fields is None else {field: field for field in fields}


def _matches(value: Any, wanted: Any) -> bool:
    return value in wanted if isinstance(wanted, list | tuple) else bool(value == wanted)


def placeholders(column: str) -> list[str]:
    """Column names in a `columns` value: the value itself, or what stands in braces of a template."""
    if "{" not in column:
        return [column]
    return [name for _, name, _, _ in Formatter().parse(column) if name]


def fill(column: str, row: dict[str, Any]) -> Any:
    """The value of a column, or a template with the row's values in it.

    Raises ValueError for a value in a template that is neither text nor a number: the text "None" teaches nothing.
    """
    if "{" not in column:
        return row[column]
    parts = [(text, name) for text, name, _, _ in Formatter().parse(column)]
    for name in (name for _, name in parts if name):
        if not isinstance(row[name], str | int | float):
            shown = "null" if row[name] is None else reprlib.repr(row[name])
            raise ValueError(f"column {name} must be text or a number, not {shown}")
    return "".join(text + (str(row[name]) if name else "") for text, name in parts)


def load(source: Source, where: str) -> Any:
    """Load one source with the `datasets` library.

    Raises DataError naming what could not be read, HubError, ResourceError for a full disk.
    """
    import datasets

    datasets.disable_progress_bars()
    with readable(where):
        return _from_disk(source, where) if is_local(source) else _from_hub(source)


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Say as a DataError what the `datasets` library cannot read, at once or row by row."""
    import datasets

    try:
        yield
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, RuntimeError) as error:
        if any(one is not None and disk_full(one) for one in (error, error.__cause__)):
            raise ResourceError(f"{where} cannot be prepared: no space left; set HF_HOME to another disk") from error
        raise DataError(f"{where} cannot be read: {error.__cause__ or error}") from error
    except StopIteration:  # how a reader ends that finds no row at all
        raise DataError(f"{where} cannot be read: it is empty") from None


def _from_hub(source: Source) -> Any:
    from datasets import load_dataset

    from hardener.hub import explained

    with explained(f"the dataset {source.dataset}"):
        return load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)


def _from_disk(source: Source, where: str) -> Any:
    from datasets import load_dataset

    path, suffix = _path(source), _suffix(source.dataset)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and is_archive(file):
            raise DataError(
                f"{where}: {file.name} is an archive or compressed, which is never unpacked; unpack it first"
            )
        if FORMATS.get(file.suffix.lower()) == "json" and file.is_file() and (number := null_line(file)):
            raise DataError(f"{where}: line {number} of {file.name} is null; a row is an object")
    literally = glob.escape(str(path))  # `datasets` takes paths for patterns
    if path.is_dir():
        if literally != str(path):
            raise DataError(f"{where}: a folder whose path holds one of * ? [ cannot be read; rename it")
        return load_dataset(str(path), split=source.split)
    if suffix not in FORMATS:
        raise DataError(f"{where}: {path.name} is none of {', '.join(FORMATS)}, and no folder")
    options = {"sep": "\t", "quoting": 3} if suffix == ".tsv" else {}
    return load_dataset(FORMATS[suffix], data_files=literally, split="train", **options)


def is_archive(path: Path) -> bool:
    """Whether the `datasets` library would take a file for one to unpack: by its first bytes, whatever its name is."""
    with path.open("rb") as stream:
        head = stream.read(262)
    return head.startswith(PACKED) or head[257:] == b"ustar"


def null_line(path: Path) -> int | None:
    """The first line of a .jsonl that is a lone `null`, or where the whole of a .json begins with it.

    The reader of JSON ends the process where a block begins so.
    """
    with path.open("rb") as lines:
        filled = ((number, line.removeprefix(codecs.BOM_UTF8).lstrip()) for number, line in enumerate(lines, 1))
        told = ((number, line) for number, line in filled if line)
        looked = told if path.suffix.lower() == ".jsonl" else itertools.islice(told, 1)
        return next((number for number, line in looked if line.startswith(b"null")), None)


def name_of(source: Source) -> str:
    """A source's name as it may be published: no path."""
    if is_local(source):
        return f"local:{source.sha256[:12]}" if source.sha256 else Path(source.dataset).name
    return source.dataset if source.config is None else f"{source.dataset} ({source.config})"
