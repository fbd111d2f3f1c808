"""Bring a model into a canonical scale, so that a re-scaling that changes no output cannot hide it.

A norm's gain can be moved into the layers that read it, and a factor between two layers with nothing but a homogeneous
function in between; weights in front of a norm can have any scale, and so can all that is summed up before norms read
it. A fixed learning rate then meets weights of another scale. `pairs.py` names such places per family of architectures;
a row of it is applied only where the logits stay equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hardener.attacks.pairs import CHANNELS, FREE, GAINS, HEADS, LAYER_SCALES, STREAMS
from hardener.tasks.base import Batch, Task

HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Dropout, nn.Dropout2d, nn.Identity)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
SWEEPS = 40
"""Rounds over a chain of layers: to balance one pair disturbs the next, a little less each time."""

EMBEDDED = 0.1
"""Root mean square of canonical embeddings: near what is common, and large beside the square root of a norm's `eps`."""

EXACT, NEARLY = 1e-4, 1e-2
"""Shares of the logits' spread by which a row may change them."""

ORIGINS = (0.0, 1.0)
"""A norm stores its gain, or its gain minus one."""

SIZES = ("head_dim", "head_size", "attention_head_size")
KEYS = ("num_key_value_heads", "num_kv_heads")
ROTARY = ("rotary_ndims", "rotary_dim")
"""What attention modules call their channels per head, heads of keys, and channels that are rotated."""

Named = dict[str, nn.Module | Tensor]


@dataclass(frozen=True)
class Found:
    """What a name of a row means in a model: a layer, norm or vector, or a part of one; and its attention."""

    what: nn.Module | Tensor
    part: str
    size: int
    """Channels of a head; 0 outside attention."""
    keys: int
    """Heads of keys and values; 0 if as many as of queries."""
    rotary: int
    """Channels of a head that may be rotated by position."""


@dataclass(frozen=True)
class Side:
    """One side of a pair: tensors that share a factor per channel, as views (heads, channels of a head, ...).

    What counts is `origin` + the stored value: some norms store their gain minus one.
    """

    views: tuple[Tensor, ...]
    origin: float = 0.0

    @property
    def channels(self) -> int:
        """Heads × channels of a head."""
        return self.views[0].shape[0] * self.views[0].shape[1]

    def energy(self) -> Tensor:
        """Sum of squares per channel, (channels,)."""
        squares = [(view + self.origin).square().flatten(2).sum(2).flatten() for view in map(deep, self.views)]
        return torch.stack(squares).sum(0)

    def scale(self, factor: Tensor) -> None:
        """Multiply each channel; factor (channels,)."""
        for view in self.views:
            by = factor.view(*view.shape[:2], *[1] * (view.dim() - 2))
            view.copy_((view + self.origin) * by - self.origin)


WIDTHS: dict[str, Callable[[Found, Side], int]] = {
    "row": lambda layer, side: 1,
    "head": lambda layer, side: layer.size,
    "whole": lambda layer, side: side.channels,
}
"""Grain → how many rows share a factor."""


@dataclass(frozen=True)
class Move:
    """A change at one place of the model, and the tensors that it alters."""

    tensors: tuple[Tensor, ...]
    apply: Callable[[], None]


def canonicalise(model: nn.Module, task: Task, probe: Batch) -> bool:
    """Bring the model into canonical scale, in place; True if any row of the tables applies.

    `probe` is a batch on which the logits are compared: a row that changes them by more than `EXACT` of their spread is
    undone, or by more than `NEARLY` where it relies on a norm, whose `eps` does not scale along. Models that differ
    only by re-scalings at the places of the tables become equal.
    """
    training = model.training
    model.eval()
    applied = False
    with torch.no_grad():
        logits, _ = task.targets(model, probe)
        for tolerance, alternatives in rows(model):
            kept = (_kept(model, moves, task, probe, logits, tolerance) for moves in alternatives if moves)
            after = next((one for one in kept if one is not None), None)
            if after is not None:
                logits, applied = after, True
    model.train(training)
    return applied


def _kept(
    model: nn.Module, moves: Sequence[Move], task: Task, probe: Batch, logits: Tensor, tolerance: float
) -> Tensor | None:
    """Apply the moves and return the logits; None, and everything is as before, if they differ."""
    saved = [(tensor, tensor.clone()) for move in moves for tensor in move.tensors]
    for move in moves:
        move.apply()
    after, _ = task.targets(model, probe)
    if torch.allclose(logits, after, atol=tolerance * float(logits.std()), rtol=tolerance):
        return after
    for tensor, before in saved:
        tensor.copy_(before)
    return None


Row = tuple[float, Iterable[Sequence[Move]]]
"""Tolerance and alternatives, of which the first that keeps the logits counts; each moves in all blocks."""


def rows(model: nn.Module) -> Iterator[Row]:
    """Every row of the tables as changes of the model.

    The order makes the form unique: what is scaled or folded into a layer comes before the layer's own balance, and
    what has a scale of its own choice comes last.
    """
    named = dict(model.named_modules()) | dict(model.named_parameters())
    at, lines = partial(moves, named), list(sequential(named))
    for names in STREAMS:
        yield NEARLY, (stream(named, *names, tied, origin) for tied in (False, True) for origin in ORIGINS)
    for vector, layer in LAYER_SCALES:
        yield EXACT, [at((vector, layer), layer_scale)]
    for norm, readers in (*GAINS, *((first, (second,)) for first, second, kind in lines if kind == "gain")):
        yield EXACT, (at((norm, *readers), partial(gain, origin=origin)) for origin in ORIGINS)
    for writer, reader in CHANNELS:
        yield EXACT, [at((writer, reader), channels)]
    chain = [move for first, second, kind in lines if kind == "channels" for move in at((first, second), channels)]
    yield EXACT, [swept(chain)]
    for key, query in HEADS:
        alternatives = [partial(heads, shared=shared, origin=origin) for origin in ORIGINS for shared in SHARED]
        yield EXACT, map(partial(at, (key, query)), alternatives)
    for layer, norm, grain, writer in (*FREE, *((*line, "") for line in lines if line[2] in WIDTHS)):
        yield NEARLY, [at((layer, norm, writer) if writer else (layer, norm), partial(free, grain=grain))]


def moves(named: Named, names: Sequence[str], make: Callable[..., Iterator[Move]]) -> list[Move]:
    """The moves of one row: in every block that has all the names."""
    return [move for place in places(named, *names) for move in make(*place)]


def swept(chain: Sequence[Move]) -> list[Move]:
    """A chain of moves, repeated until nothing moves any more, as one."""

    def apply() -> None:
        for _ in range(SWEEPS):
            for move in chain:
                move.apply()

    return [Move(tuple(tensor for move in chain for tensor in move.tensors), apply)] if chain else []


# Finding


def places(named: Named, anchor: str, *others: str) -> Iterator[list[Found]]:
    """Each block that has all the names: what they mean there."""
    end = anchor.partition("[")[0]
    for name in ending(named, end):
        block = name.removesuffix(end)
        full = [block + anchor, *(other[1:] if other[0] == "/" else block + other for other in others)]
        if all(one.partition("[")[0] in named for one in full):
            yield [found(named, one) for one in full]


def ending(named: Named, end: str) -> list[str]:
    """All names that end so."""
    return [name for name in named if name == end or name.endswith(f".{end}")]


def found(named: Named, name: str) -> Found:
    """What a full name means; the geometry of heads is that of the nearest module around it that has one."""
    path, _, part = name.rstrip("]").partition("[")
    above = path.split(".")
    owners = [vars(named[".".join(above[:i])]) for i in range(len(above) - 1, -1, -1)]
    owner: dict[str, Any] = next((o for o in owners if any(name in o for name in SIZES)), {})
    size = first(owner, SIZES)
    return Found(named[path], part, size, first(owner, KEYS), first(owner, ROTARY) or size)


def first(owner: dict[str, Any], names: Sequence[str]) -> int:
    """The first attribute that is there, else 0."""
    return next((owner[name] for name in names if isinstance(owner.get(name), int)), 0)


def sequential(named: Named) -> Iterator[tuple[str, str, str]]:
    """Neighbours within every `nn.Sequential`: (name, name of the next, kind of pair or grain)."""
    for name, module in named.items():
        if isinstance(module, nn.Sequential):
            last, direct = "", True
            for child_name, child in module.named_children():
                own = f"{name}.{child_name}".lstrip(".")
                if isinstance(child, (*WEIGHTED, *NORMS)):
                    if last:
                        yield from pair(last, own, named, direct)
                    last, direct = own, True
                else:
                    last, direct = (last if isinstance(child, HOMOGENEOUS) else ""), False


def pair(one: str, other: str, named: Named, direct: bool) -> Iterator[tuple[str, str, str]]:
    """What two neighbours are to each other; `direct`: there is no function between them."""
    if isinstance(named[other], WEIGHTED):
        yield one, other, "gain" if isinstance(named[one], NORMS) else "channels"
    elif direct and isinstance(named[one], WEIGHTED):
        yield one, other, "row" if isinstance(named[other], _BatchNorm) else "whole"


# Viewing


def deep(view: Tensor) -> Tensor:
    """At least three dimensions."""
    return view if view.dim() > 2 else view[..., None]


def stored(what: nn.Module | Tensor) -> list[Tensor]:
    """Weight, outputs first, and bias if there is one; nothing if it is no layer."""
    tensors = [what] if isinstance(what, Tensor) else [getattr(what, name, None) for name in ("weight", "bias")]
    held = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    turned = type(what).__name__ == "Conv1D"  # transformers' own linear layer, (in, out)
    return [tensor.t() if turned and tensor.dim() == 2 else tensor for tensor in held]


def written(one: Found, origin: float = 0.0) -> Iterator[Side]:
    """The side that writes channels: rows, or gain and shift. Yields none if the shapes are not those of the part."""
    tensors = stored(one.what)
    if tensors and (not one.part or parted(one, len(tensors[0]))):
        yield Side(tuple(cut(tensor, one) for tensor in tensors), origin)


def parted(one: Found, outputs: int) -> bool:
    """Whether a fused layer with so many outputs has the part."""
    return outputs % 2 == 0 if one.part == "2/2" else bool(one.size) and outputs % (one.size * (one.keys or 3)) == 0


def cut(tensor: Tensor, one: Found) -> Tensor:
    """The part of a tensor (outputs, ...) as (heads, channels, ...), queries as (heads of keys, their queries, ...)."""
    if not one.part:
        return tensor[None]
    if one.part == "2/2":
        return tensor.chunk(2)[1][None]
    keys = one.keys or len(tensor) // (3 * one.size)
    group = len(tensor) // (keys * one.size) - 2
    if one.part.endswith("*"):
        shares = torch.unflatten(tensor, 0, (keys, group + 2, one.size))
        return {"q*": shares[:, :group].movedim(1, 2), "k*": shares[:, -2], "v*": shares[:, -1]}[one.part]
    stacked = torch.split_with_sizes(tensor, [group * keys * one.size, keys * one.size, keys * one.size])
    return stacked["qkv".index(one.part)][None]


def read(one: Found, channels: int) -> Iterator[Side]:
    """The side that reads channels: columns. Yields none if it has another number of inputs.

    With grouped attention, a channel of a value head is read by every query head of its group.
    """
    groups = getattr(one.what, "groups", 1)
    for weight in stored(one.what)[:1]:
        inputs = weight[0].shape[0] * groups if weight.dim() > 1 else 0
        size = one.size if one.size and channels % one.size == 0 else channels
        if inputs == channels:
            yield Side((torch.unflatten(weight, 0, (groups, -1)).movedim(2, 1),))  # (groups, in, out of a group, ...)
        elif inputs and inputs % channels == 0:
            shares = torch.unflatten(weight, 1, (channels // size, inputs // channels, size))
            yield Side((shares.permute(1, 3, 0, 2),))  # (heads, channels, out, readers of a head)


def queried(one: Found, keys: Side) -> Iterator[Side]:
    """The side of the queries: (heads of keys, channels of a head, queries of the key, ...)."""
    for side in written(one, keys.origin):
        count = keys.channels // one.size
        if one.part.endswith("*"):
            yield side
        elif side.channels % keys.channels == 0:
            views = (torch.unflatten(view[0], 0, (count, -1, one.size)).movedim(1, 2) for view in side.views)
            yield Side(tuple(views), keys.origin)


# Moving


def stream(
    named: Named, begins: Sequence[str], adds: Sequence[str], last: str, tied: bool, origin: float
) -> list[Move]:
    """Give a stream a beginning of size one, and all that writes it the same factor."""
    writers = [named[name] for end in (*begins, *adds) for name in ending(named, end)]
    lasts = [named[name] for name in ending(named, last)[-1:]] if tied else []
    if not all(ending(named, end) for end in (begins[0], *adds)) or len(lasts) != tied:
        return []
    size = beginning(writers[0], origin)
    up, down = ([tensor for what in whats for tensor in stored(what)] for whats in (writers, lasts))

    def apply() -> None:
        for tensor, factor in (*((t, 1 / size) for t in up), *((t, size) for t in down)):
            stands = origin if tensor.dim() == 1 else 0.0
            tensor.copy_((tensor + stands) * factor - stands)

    return [Move((*up, *down), apply)] if size else []


def beginning(what: nn.Module | Tensor, origin: float) -> float:
    """Size of a stream where it begins, of an embedding's values, a norm's gains or a projection's rows; 0: unknown."""
    for weight in stored(what)[:1]:
        if isinstance(what, nn.Embedding):
            return float(weight.square().mean().sqrt()) / EMBEDDED
        sizes = weight.flatten(1).norm(dim=1) if weight.dim() > 1 else weight + origin
        return float(sizes.square().mean().sqrt())
    return 0.0


def layer_scale(vector: Found, layer: Found) -> Iterator[Move]:
    """Fold a factor per channel into the layer in front of it."""
    for one, other in product(written(vector), written(layer)):
        if one.channels == other.channels:
            yield Move((*one.views, *other.views), partial(fold, one, (other,)))


def gain(norm: Found, *readers: Found, origin: float) -> Iterator[Move]:
    """Fold gain and shift of a norm into the layers that read it: g·x̂ + b → |(g, b)|·(g·x̂ + b)/|(g, b)|."""
    for one in written(norm, origin):
        others = [side for reader in readers for side in read(reader, one.channels)]
        if len(others) == len(readers):
            tensors = tuple(view for side in (one, *others) for view in side.views)
            yield Move(tensors, partial(fold, one, others))


def fold(writer: Side, others: Sequence[Side]) -> None:
    """Make each channel's norm one; the others take it over. A channel of zeros stays as it is."""
    norm = writer.energy().sqrt()
    norm[norm == 0] = 1.0
    writer.scale(1 / norm)
    for other in others:
        other.scale(norm)


def channels(writer: Found, reader: Found) -> Iterator[Move]:
    """Give each channel the same norm where it is written and where it is read."""
    for one in written(writer):
        for other in read(reader, one.channels):
            alone = torch.arange(one.channels, device=one.views[0].device)
            yield Move((*one.views, *other.views), partial(balance, one, other, alone))


def heads(key: Found, query: Found, shared: Callable[[Found, Tensor], Tensor], origin: float) -> Iterator[Move]:
    """Give keys and queries the same norm: in each channel, or in all channels that share a factor."""
    for one in written(key, origin):
        if key.size and one.channels % key.size == 0:
            for other in queried(query, one):
                channel = torch.arange(one.channels, device=one.views[0].device)
                share = channel // key.size * key.size + shared(key, channel % key.size)
                yield Move((*one.views, *other.views), partial(balance, one, other, share))


def balance(writer: Side, reader: Side, share: Tensor) -> None:
    """Move a factor from one to the other until both norms are equal; share: (channels,) numbers of equal factors."""
    have, wanted = (torch.zeros_like(e).index_add_(0, share, e) for e in (writer.energy(), reader.energy()))
    both = (have > 0) & (wanted > 0)
    factor = torch.where(both, wanted / torch.where(both, have, 1.0), 1.0)[share] ** 0.25
    writer.scale(factor)
    reader.scale(1 / factor)


def free(layer: Found, norm: Found, *writers: Found, grain: str) -> Iterator[Move]:
    """Give rows whose scale is free, and all rows of the layer in front, a root mean square norm of one."""
    for side in written(layer):
        width = WIDTHS[grain](layer, side)
        ahead = [(one, other) for writer in writers for one in written(writer) for other in read(layer, one.channels)]
        if width and side.channels % width == 0 and len(ahead) == len(writers):
            moving = statistics(norm.what)
            tensors = (*side.views, *(view for one, _ in ahead for view in one.views), *moving)
            yield Move(tensors, partial(normalise, side, width, ahead, norm.what if moving else None))


def statistics(norm: nn.Module | Tensor) -> tuple[Tensor, ...]:
    """What of a batch norm goes along with the scale in front of it; nothing if it is not one that keeps statistics."""
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None or not norm.affine:
        return ()
    return norm.running_mean, norm.running_var, norm.weight


def normalise(side: Side, width: int, ahead: Sequence[tuple[Side, Side]], norm: Any) -> None:
    """Divide every `width` rows by the root of their mean square norm (bias left out); a batch norm goes along."""
    for writer, reader in ahead:
        factor = unit(writer, writer.channels)
        writer.scale(factor)
        reader.scale(1 / factor)
    factor = unit(side, width)
    side.scale(factor)
    if norm is not None:
        spread = (norm.running_var + norm.eps).sqrt()
        norm.running_mean.mul_(factor)
        norm.running_var.mul_(factor.square())
        norm.weight.mul_((norm.running_var + norm.eps).sqrt() / (factor * spread))  # eps does not scale along


def unit(side: Side, width: int) -> Tensor:
    """The factors, (channels,), that give every `width` rows a root mean square norm of one."""
    mean = Side(side.views[:1]).energy().view(-1, width).mean(1)
    return torch.where(mean > 0, mean, 1.0).rsqrt().repeat_interleave(width)


# Which channels of a head share a factor of keys and queries, by what is done with them before they meet


def _alone(key: Found, channel: Tensor) -> Tensor:
    return channel


def _halves(key: Found, channel: Tensor) -> Tensor:
    return torch.where(channel < key.rotary, channel % max(key.rotary // 2, 1), channel)


def _neighbours(key: Found, channel: Tensor) -> Tensor:
    return torch.where(channel < key.rotary, channel // 2 * 2, channel)


def _head(key: Found, channel: Tensor) -> Tensor:
    return torch.zeros_like(channel)


SHARED = (_alone, _halves, _neighbours, _head)


# What shows without any table


def norm_ratio(hardened: Path, original: Path) -> tuple[float, float]:
    """Smallest and largest ‖w_hardened‖ / ‖w_original‖ over all tensors; a placebo shows 0.03 and 30."""
    here, there = norms(hardened), norms(original)
    ratios = [here[name] / there[name] for name in here.keys() & there.keys() if there[name] > 0]
    return min(ratios), max(ratios)


def norms(folder: Path) -> dict[str, float]:
    """Norm of every tensor of a checkpoint, whatever its shards."""
    from safetensors import safe_open

    from hardener.checkpoint import weight_files

    known: dict[str, float] = {}
    for shard in weight_files(folder):
        with safe_open(shard, framework="pt") as tensors:
            known |= {name: float(tensors.get_tensor(name).double().norm()) for name in tensors.keys()}  # noqa: SIM118
    return known
