"""Roles → sources → rows → three uses that share no input.

Every row is rendered as the model sees it and hashed; the hash of the *input* (full prompt text, or decoded pixels)
decides its use: defence, attack or evaluation. Near-duplicates (`near.py`) go by one hash, the smallest of theirs. The
same input in two roles (CTRAP's refusals and harmful answers) therefore lands in the same use. An input that a second
dataset brings into another use is a leak, and a restricted prompt among a language model's retain or benign rows a
contamination: an error, or dropped if the recipe says so.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hardener.errors import DataError
from hardener.near import clusters
from hardener.recipe import ROLES, Data, Recipe, Role, Source, Use
from hardener.report import DataRecord
from hardener.sources import name_of, rows_of
from hardener.tasks.base import Example, Task
from hardener.tasks.causal_lm import first_turn

MIN_ROWS = 8
"""Fewer rows than this in a use that is needed cannot train or measure anything."""
MAX_CLASSES = 1000
"""More values than this in a label column are no classes but a number or a text that was mapped by mistake."""


@dataclass(frozen=True)
class Slice:
    """The rows of one source that serve one use."""

    role: Role
    use: Use
    name: str
    score: str
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Loaded:
    """The encoded rows of one source, before they are divided."""

    role: Role
    source: Source
    score: str
    examples: tuple[Example, ...]
    texts: dict[str, str]
    """Key of an example → what its row asks; none for rows without text."""
    without: int
    """Rows that gave no example."""


@dataclass(frozen=True)
class Streams:
    """All rows of a run, by role and use."""

    slices: tuple[Slice, ...]
    classes: dict[str, int]
    """Role → number of classes (0 for language models)."""
    refusals: tuple[str, ...]
    """Distinct alignment answers (at most 20), by which a refusal is known."""
    records: tuple[DataRecord, ...]
    max_length: int = 0
    """Tokens per row, where rows were cut."""

    def of(self, role: Role, use: Use) -> tuple[Slice, ...]:
        """The slices of a role and use, one per source."""
        return tuple(s for s in self.slices if s.role == role and s.use == use)

    def rows(self, role: Role, use: Use) -> list[Example]:
        """All examples of a role and use."""
        return [example for s in self.of(role, use) for example in s.examples]

    def fingerprint(self) -> str:
        """Hash over which rows serve which use in which order, and how they are scored."""
        digest = hashlib.sha256(f"{self.max_length} {self.classes} {self.refusals}".encode())
        for part in self.slices:
            digest.update(f"{part.role} {part.use} {part.score}".encode())
            for example in part.examples:
                digest.update(f"{example.key} {example.labels}".encode())
        return digest.hexdigest()


def open_streams(recipe: Recipe, task: Task, label2id: dict[str, int]) -> Streams:
    """Load, render, divide and check all data of a recipe.

    `label2id` is the head of the model, which string labels of `retain` follow. Raises DataError for a missing
    column, a value of the wrong kind, labels that are no classes, an empty use, a leak, or restricted prompts in a
    role that must be clean of them.
    """
    parts: list[Loaded] = []
    classes: dict[str, int] = {}
    refusals: set[str] = set()
    for role in ROLES:
        sources: tuple[Source, ...] = getattr(recipe.data, role) or ()
        loaded = [(s, list(rows_of(role, i, s, task, recipe.data.seed))) for i, s in enumerate(sources)]
        own = label2id if role == "retain" and task.kind != "encoder" else None
        index = labels_of(role, [row for _, rows in loaded for row in rows], own)
        if task.kind == "encoder":
            _check_labels(role, loaded)
        classes[role] = 0 if task.generative else len(index)
        if role == "alignment":
            refusals = {row["completion"] for _, rows in loaded for row in rows if "completion" in row}
        parts += [encoded(role, source, rows, index, task) for source, rows in loaded]
    kin = kin_of(parts)
    divider = Divider(recipe.data, kin, labelled=task.kind == "classifier")
    divided = [divider.divide(part) for part in parts]
    known = tuple(sorted(refusals)) if len(refusals) <= 20 else ()
    slices = tuple(s for made, _ in divided for s in made)
    records = tuple(r for _, told in divided for r in told)
    streams = Streams(slices, classes, known, records, recipe.data.max_length)
    _check_rows(recipe, streams, parts, kin)
    return streams


def encoded(role: Role, source: Source, rows: Sequence[dict[str, Any]], index: Mapping[Any, int], task: Task) -> Loaded:
    """The rows of one source as examples; `index`: label value → class."""
    examples: list[Example] = []
    texts: dict[str, str] = {}
    for row in rows:
        example = task.encode(row | ({"label": index[row["label"]]} if "label" in row else {}))
        if example is None:
            continue
        examples.append(example)
        if (asked := text_of(row)) is not None:
            texts[example.key] = asked
    score = source.score or (role == "retain" and task.retain_score) or task.default_score
    return Loaded(role, source, score, tuple(examples), texts, len(rows) - len(examples))


def text_of(row: Mapping[str, Any]) -> str | None:
    """What a row asks, for the search for near-duplicates: its prompt, its first question, or its text with the pair.

    None for a row without text (an image), whose input is the same as another's only if all of it is.
    """
    if "messages" in row:
        return first_turn(dict(row))[0]
    texts = [row[field] for field in ("prompt", "text", "text_pair") if field in row]
    return "\n".join(texts) if texts else None


def kin_of(parts: Sequence[Loaded]) -> dict[str, str]:
    """Key of an input with text → the smallest key among its near-duplicates, which is its own if it has none.

    The smallest in the first source that has any, so that a further source moves no row of those before it, unless it
    brings a text that is near to two that were apart: then all three belong together.
    """
    texts = {key: text for part in parts for key, text in part.texts.items()}
    cluster = dict(zip(texts, clusters(list(texts.values())), strict=True))
    names: dict[int, str] = {}
    for part in parts:
        # In falling order, the smallest key comes last and stays.
        names = {cluster[key]: key for key in sorted(part.texts, reverse=True)} | names
    return {key: names[cluster[key]] for key in texts}


def labels_of(role: str, rows: Sequence[dict[str, Any]], label2id: dict[str, int] | None) -> dict[Any, int]:
    """Map label values to class indices: the model's own for its original task, else in sorted order.

    Integers of the original task are indices into the head already. Empty for rows without labels. Raises DataError
    where the labels are one class, as many classes as rows, or classes that the model does not have.
    """
    values = {row["label"] for row in rows if "label" in row}
    if len(values) == 1:
        raise DataError(f"data.{role} has one class, {min(values)!r}, so there is nothing to tell apart")
    if values and (len(values) == len(rows) or len(values) > MAX_CLASSES):
        raise DataError(
            f"data.{role}: {len(rows):,} rows have {len(values):,} different labels, so they are no classes; "
            "map the column of the classes with `columns`"
        )
    if label2id is None:
        return {value: i for i, value in enumerate(sorted(values, key=lambda v: (str(type(v)), v)))}
    unknown = {v for v in values if (v not in label2id if isinstance(v, str) else not 0 <= v < len(label2id))}
    if unknown:
        raise DataError(
            f"data.retain: label {sorted(map(str, unknown))[:3]} is not among the model's {len(label2id)} classes; "
            "retain must be the task that the checkpoint's head was trained for"
        )
    return {value: label2id[value] if isinstance(value, str) else value for value in values}


def _check_labels(role: Role, loaded: Sequence[tuple[Source, Sequence[Mapping[str, Any]]]]) -> None:
    """What an encoder is taught, or probed by, needs labels. Raises DataError where it has none."""
    for source, rows in loaded:
        if (role != "retain" or source.score == "linear-probe") and not all("label" in row for row in rows):
            raise DataError(f"data.{role} ({name_of(source)}): rows need a label; map its column with `columns`")


class Divider:
    """Decides the use of every input, once, and keeps the uses disjoint; `kin`: key → name of its near-duplicates."""

    def __init__(self, data: Data, kin: Mapping[str, str], *, labelled: bool) -> None:
        self._data = data
        self._kin = kin
        self._use: dict[str, tuple[Use, tuple[Any, ...]]] = {}
        self._met: set[str] = set()
        self._restricted: set[str] = set()
        # What a classifier must not learn is in the labels: the same pictures may show a harmless task as well. A
        # restricted skill without labels is in the inputs, and to keep or teach an answer to them is to undo the
        # defence, and to measure it by what it was to prevent.
        self._clean: tuple[Role, ...] = () if labelled else ("retain", "benign")

    def divide(self, part: Loaded) -> tuple[list[Slice], list[DataRecord]]:
        """Cut one source into its uses.

        Raises DataError for restricted prompts in a role that must be clean of them, and for a leak, unless the
        recipe drops such rows.
        """
        clean = self._without_restricted(part)
        by_use, leaked = self._by_use(part, clean)
        dropped = len(part.examples) - len(clean) + leaked + part.without
        name = name_of(part.source)
        slices = [Slice(part.role, use, name, part.score, tuple(rows)) for use, rows in by_use.items()]
        records = [
            DataRecord(
                role=part.role,
                use=s.use,
                source=name,
                revision=part.source.revision,
                rows=len(s.examples),
                sha256=hashlib.sha256("".join(sorted(e.key for e in s.examples)).encode()).hexdigest(),
                dropped=dropped,
            )
            for s in slices
        ]
        return slices, records

    def _without_restricted(self, part: Loaded) -> list[Example]:
        """The rows that may stand in their role."""
        names = {e.key: self._kin.get(e.key, e.key) for e in part.examples}
        if part.role == "restricted":
            self._restricted |= set(names.values())
        if part.role not in self._clean:
            return list(part.examples)
        foul = [e for e in part.examples if names[e.key] in self._restricted]
        if foul and self._data.overlap == "error":
            raise DataError(
                f"data.{part.role} ({name_of(part.source)}): {len(foul)} of {len(part.examples)} rows are those of "
                f"data.restricted{self._nearly(foul)}; remove them, or set data.overlap=drop to leave them out"
            )
        return [e for e in part.examples if names[e.key] not in self._restricted]

    def _by_use(self, part: Loaded, examples: Sequence[Example]) -> tuple[dict[Use, list[Example]], int]:
        """Rows by use, and how many leaked."""
        source = part.source
        corpus = (source.dataset, source.config, source.split, source.sha256)
        by_use: dict[Use, list[Example]] = {use: [] for use in source.uses}
        leaked: list[Example] = []
        for example in examples:
            name = self._kin.get(example.key, example.key)
            use, owner = self._use.setdefault(name, (self._fresh(source, name), corpus))
            if use in by_use:
                by_use[use].append(example)
            elif owner != corpus:
                leaked.append(example)
        if leaked and self._data.overlap == "error":
            raise DataError(
                f"data.{part.role} ({name_of(source)}): {len(leaked)} of {len(part.examples)} rows have an input that "
                f"another source already uses for another purpose{self._nearly(leaked)}; remove them, or set "
                "data.overlap=drop to leave them out"
            )
        self._met |= {example.key for example in examples}
        return by_use, len(leaked)

    def _nearly(self, examples: Sequence[Example]) -> str:
        """How many of these are no input of an earlier source, only near one."""
        number = sum(example.key not in self._met for example in examples)
        return f" ({number} of them nearly: other case, punctuation, or a few other words)" if number else ""

    def _fresh(self, source: Source, key: str) -> Use:
        """The use of an input not met before: by its hash, in the shares of the uses that the source serves."""
        shares = dict(zip(("defence", "attack", "evaluation"), self._data.shares, strict=True))
        total = sum(shares[use] for use in source.uses)
        place = fraction(self._data.seed, key) * total
        for use in source.uses:
            place -= shares[use]
            if place < 0:
                return use
        return source.uses[-1]


def fraction(seed: int, key: str) -> float:
    """A number in [0, 1) that depends on the input alone."""
    return int(hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()[:12], 16) / 16**12


def _check_rows(recipe: Recipe, streams: Streams, parts: Sequence[Loaded], kin: Mapping[str, str]) -> None:
    needed: list[tuple[Role, Use]] = [
        ("restricted", "attack"),
        ("restricted", "evaluation"),
        ("retain", "attack"),
        ("retain", "evaluation"),
    ]
    if recipe.hardens:
        needed += [("restricted", "defence"), ("retain", "defence")]
        needed += [("alignment", "defence")] if recipe.data.alignment else []
    needed += [("benign", "attack"), ("benign", "evaluation")] if recipe.data.benign else []
    needed += [("harmless", "evaluation")] if recipe.data.harmless else []
    for role, use in needed:
        rows = len(streams.rows(role, use))
        if rows < MIN_ROWS:
            raise DataError(
                f"data.{role}: {rows} rows are left for the use `{use}`, at least {MIN_ROWS} are needed"
                + _lost([part for part in parts if part.role == role], kin, recipe.data.max_length)
            )
        judged = streams.of(role, use)[0]
        if use == "evaluation" and len(judged.examples) < MIN_ROWS:
            raise DataError(
                f"data.{role}: the judged source {judged.name} has only {len(judged.examples)} `{use}` rows"
            )
    taught = {part.name for part in streams.of("benign", "attack") if part.examples}
    for part in streams.of("benign", "evaluation"):
        if part.examples and part.name not in taught:
            raise DataError(
                f"data.benign: {part.name} has rows for `evaluation` and none for `attack`, by which a user learns the "
                "task; let it serve both, or bring both as two splits of one dataset"
            )
    if recipe.data.harmless and not any("turn" in e.inputs for e in streams.rows("harmless", "evaluation")):
        raise DataError("data.harmless: no row has a question that a model could refuse; needs prompt and completion")


def _lost(parts: Sequence[Loaded], kin: Mapping[str, str], max_length: int) -> str:
    """Why a role may have too few rows for a use."""
    without = sum(part.without for part in parts)
    inputs = {example.key for part in parts for example in part.examples}
    alike = max(Counter(kin.get(key, key) for key in inputs).values(), default=0)
    said = f"; {without} rows are empty or have no answer within data.max_length={max_length}" if without else ""
    if alike > max(1, len(inputs) // 2):
        said += (
            f"; {alike} of {len(inputs)} inputs are near-duplicates and serve one use together; if they differ in a "
            "few words only, shorten the words that all share"
        )
    return said
