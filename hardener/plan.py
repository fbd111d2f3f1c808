"""What a run will do and need, from metadata alone: `--dry-run` prints it and ends.

The Hub is only asked questions, and no weight moves. How the time is estimated: `duration.py`.
"""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hardener import duration
from hardener.errors import ResourceError
from hardener.metadata import ModelRef
from hardener.recipe import Recipe
from hardener.target import Destination

BYTES = 4
"""Bytes per weight: hardening and attacks run in float32."""
RANGE = math.sqrt(3.0)
"""The time is told as from the estimate / RANGE to the estimate · RANGE: three times as long at most as at least."""
WIDTH = 66
"""Columns of a value in the human form, beside its name in a terminal of 80."""


@dataclass(frozen=True)
class Plan:
    """The plan of one run. Sizes are bytes, times are seconds; None is what is not known."""

    model: str
    """Hub id, or the name of a local folder."""
    commit: str | None
    """Of the model; None for a local folder."""
    license: str | None
    """As the card says; `other` has a name and a link."""
    license_name: str | None
    license_link: str | None
    gated: str | bool
    private: bool
    parameters: int
    """Elements of all tensors, from the headers of the safetensors files."""
    dtype: str
    """In which most of them are stored."""
    files: int
    """Files that the release needs of the model."""
    download: int
    """Their size; 0 for a local folder."""
    recipe: str
    defense: str | None
    outer_steps: int
    passes_per_step: int
    """Forward and backward passes of one outer step; 0 where it is not known."""
    attacks: str
    """Preset and budget, in words."""
    attack_runs: int
    """On all models together; ladders that grow, and families that do not apply to the architecture, not counted."""
    hardening_memory: int
    """Peak of all tensors while weights are hardened, estimated for rows as long as the recipe lets them be; 0 where
    nothing is hardened."""
    probe_memory: int
    """The same for an attacker who trains all weights."""
    activations: bool
    """Whether what a pass holds is in both; not where the architecture needs numbers to take one."""
    disk: int
    """What run folder and cache will take, at most."""
    disk_free: int
    """On the disk of the run folder."""
    device: str
    """Where the time below was estimated."""
    hardening_seconds: float
    """Estimated, erasure included, for a device that does nothing else; the middle of a range whose end is three times
    its beginning."""
    probe_seconds: float
    """The same for all attacks. A measurement of the original that is cached already, and the models that judge answers
    or run public benchmarks, are not considered."""
    push_to: str | None
    """The target by its full name, where the Hub could be asked."""
    push_exists: bool | None
    """False: it will be created. This and the next four are None where the Hub could not be asked."""
    push_private: bool | None
    """Whether it will be private after the push."""
    push_gated: str | bool | None
    """How it will be gated after the push."""
    push_writable: bool | None
    """Whether this token may push as asked."""
    push_transfer: str | None
    """`xet` or `lfs`; in words where it is not known."""
    push_note: str | None
    """Why the target could not be asked for, or why it stays private."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def plan(
    recipe: Recipe,
    ref: ModelRef,
    push_to: str | Destination | None,
    *,
    place: Path = Path(),
    device: str = "auto",
) -> Plan:
    """Put together what is known before anything is fetched.

    `place` is the run folder, which need not exist. The device is measured by a fraction of a second of arithmetic.
    """
    from hardener.memory import needed

    target = push_to if isinstance(push_to, Destination) else Destination(push_to)
    lora = recipe.adapter != "none"
    runs = [steps for planned in duration.attacks(recipe).values() for steps in planned]
    chosen = _device(device)
    trained = recipe.train or (recipe.erase if recipe.erase != "none" else None)
    dtype = trained.dtype if trained else "float32"
    peaks = needed(recipe, ref, chosen)
    tokens = duration.tokens_per_row(recipe, ref)
    reached, probed = duration.speed(chosen, dtype), duration.speed(chosen, "float32")
    return Plan(
        model=ref.id,
        commit=ref.commit,
        license=ref.license.get("license"),
        license_name=ref.license.get("license_name"),
        license_link=ref.license.get("license_link"),
        gated=ref.gated,
        private=ref.private,
        parameters=ref.parameters,
        dtype=ref.dtype,
        files=len(ref.files),
        download=0 if ref.folder else ref.bytes,
        recipe=recipe.name,
        defense=recipe.defense.name if recipe.defense else None,
        outer_steps=recipe.train.steps if recipe.train else 0,
        passes_per_step=duration.passes(recipe),
        attacks=f"{recipe.probe.preset}: {recipe.probe.steps} steps of {recipe.probe.batch_size} rows per attack",
        attack_runs=len(runs),
        hardening_memory=peaks.hardening,
        probe_memory=peaks.probe,
        activations=peaks.activations,
        disk=2 * ref.bytes + (0 if ref.folder else ref.bytes) + 3 * BYTES * ref.parameters * (0 if lora else 2),
        disk_free=_free(place),
        device=chosen,
        hardening_seconds=duration.seconds(duration.hardening(recipe), ref, tokens, reached),
        probe_seconds=duration.seconds(duration.probing(recipe, runs), ref, tokens, probed),
        push_to=target.repo,
        push_exists=target.exists,
        push_private=target.private,
        push_gated=target.gated,
        push_writable=target.writable,
        push_transfer=target.transfer,
        push_note=target.note,
    )


def check_disk(needed: Plan, folder: Path) -> None:
    """Raise ResourceError if the run folder's disk is too small for the plan."""
    if (free := _free(folder)) < needed.disk:
        raise ResourceError(
            f"{_place(folder)} has {_bytes(free)} free, the run needs about {_bytes(needed.disk)}; "
            "free some space or choose another disk with --output"
        )


def _place(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())


def _free(folder: Path) -> int:
    return shutil.disk_usage(_place(folder)).free


def _device(asked: str) -> str:
    import torch

    here = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
    return asked if asked != "auto" else here.type if here else "cpu"


# --- as a person reads it ---------------------------------------------------------------------------------------------


def lines(made: Plan) -> list[tuple[str, str]]:
    """The plan as (name, value) rows for 80 columns; a value that is too long goes on in a row without a name."""
    told = [(name, row) for name, value in _told(made) for row in textwrap.wrap(value, WIDTH)]
    return [(name if i == 0 or told[i - 1][0] != name else "", row) for i, (name, row) in enumerate(told)]


def _told(made: Plan) -> Iterator[tuple[str, str]]:
    yield "model", made.model + (f" at commit {made.commit[:12]}" if made.commit else ", a local folder")
    fetched = f"{_bytes(made.download)} to fetch" if made.download else "nothing to fetch"
    yield "size", f"{made.parameters:,} parameters, {made.dtype}; {made.files} files, {fetched}"
    named = ", ".join(filter(None, (made.license, made.license_name, made.license_link)))
    yield "licence", named or "none named"
    yield "access", _access(made.private, made.gated)
    steps = f", {made.outer_steps:,} outer steps" if made.outer_steps else ""
    each = f" of {made.passes_per_step} passes" if made.passes_per_step else ""
    yield "recipe", made.recipe + steps + each
    yield "attacks", f"{made.attacks}; about {made.attack_runs} attacks"
    hardened = f"{_bytes(made.hardening_memory)} to harden, " if made.hardening_memory else ""
    yield (
        "memory",
        f"about {hardened}{_bytes(made.probe_memory)} to attack"
        + ("" if made.activations else "; activations not counted"),
    )
    yield "disk", f"about {_bytes(made.disk)} needed, {_bytes(made.disk_free)} free"
    yield "time", expected(made)
    if made.push_to is not None:
        yield "push to", f"{made.push_to}: {_target(made)}"


def _access(private: bool | None, gated: str | bool | None) -> str:
    return ("private" if private else "public") + (f", gated ({gated})" if gated else "")


def expected(made: Plan) -> str:
    """The time in words: a range, what it is for, and what makes it shorter or longer."""
    total = made.hardening_seconds + made.probe_seconds
    share = f"{made.hardening_seconds / total:.0%}" if total else "none"
    return (
        f"about {_duration(total / RANGE)} to {_duration(total * RANGE)} on {made.device}, {share} of it to harden; "
        "less where attacks are answered early, more where ladders of rates grow"
    )


def _target(made: Plan) -> str:
    if made.push_exists is None:
        return made.push_note or "not asked"
    begins = "exists" if made.push_exists else "will be created"
    access = _access(made.push_private, made.push_gated)
    right = "this token may write" if made.push_writable else "this token may not write"
    said = f"; {made.push_note}" if made.push_note else ""
    return f"{begins}; {access}; {right}; transfer: {made.push_transfer}{said}"


def _duration(seconds: float) -> str:
    units = ((86400, "days"), (3600, "h"), (60, "min"))
    size, unit = next((one for one in units if seconds >= 1.5 * one[0]), (1, "s"))
    return f"{max(1, round(seconds / size))} {unit}"


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
