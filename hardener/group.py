"""Processes that compute one gradient together.

Each has all weights, or its shard of them (`fully_shard`, FSDP2), and computes on its share of every batch. The loss of
a share is divided by the targets of the whole batch, so gradients are *summed*, not averaged, and equal those of one
process up to rounding, whatever is accumulated where.

Weights are not wrapped in DDP. Its hooks average, they fire in every backward pass of an accumulation, and they belong
to the weights that were there when it was made; a look-ahead moves weights, exchanges heads, and has gradients of its
own set aside. Here `.grad` is summed once per objective, in a few flat messages, when the last micro-batch is done. The
price is that the sum does not overlap with the backward pass.

Under `fully_shard` a gradient is scattered as it is made. All else, the copy that a look-ahead restores from, its
steps, what it keeps, works on local shards as on any tensor; norms and products are over all shards.
"""

from __future__ import annotations

import math
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hardener.errors import LostError, UsageError
from hardener.files import explained_disk
from hardener.processes import PATIENCE, World

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)
"""How long one process waits for another within a step or a state; then the run ends."""
BUCKET = 2**26
"""Elements of one message, at most, unless one tensor has more; bytes, of a file."""
LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timeout", "NCCL", "gloo", "Store")
"""What torch says where another process is gone; it has no class of its own for that."""


@dataclass(frozen=True)
class Group:
    """This process among those that compute together; alone by default."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """Over which weights are sharded, if they are."""

    @property
    def first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    @property
    def factor(self) -> int:
        """By what a loss is multiplied: `fully_shard` averages where a sum is wanted."""
        return 1 if self.mesh is None else self.size

    def placed(self, model: nn.Module, accelerator: Accelerator) -> nn.Module:
        """The model where it computes: whole, or this process's shards of it."""
        if self.mesh is None:
            return accelerator.prepare(model)  # type: ignore[no-any-return]
        return sharded(model, self.mesh)

    def share(self, rows: Sequence[T], parts: int) -> list[tuple[Sequence[T], float]]:
        """This process's rows, dealt like cards, cut into at most `parts` pieces of nearly equal size.

        All processes have the same number of pieces, as they meet in each; where rows do not suffice, a piece is one
        row that counts 0 instead of 1.
        """
        most = math.ceil(len(rows) / self.size)
        size = math.ceil(most / parts)
        mine = rows[self.rank :: self.size]
        return [(mine[i : i + size], 1.0) if i < len(mine) else (rows[:1], 0.0) for i in range(0, most, size)]

    @contextmanager
    def summing(self, params: Sequence[nn.Parameter]) -> Iterator[None]:
        """What is added to `.grad` inside is summed over the processes.

        Raises UsageError for a parameter that was put into sharded weights without being sharded.
        """
        if self.size == 1:
            yield
            return
        if self.mesh is not None and not all(hasattr(p, "full_tensor") for p in params):
            raise UsageError("a fresh head cannot be put into sharded weights; leave --shard out, or use head: kept")
        before = [p.grad for p in params]
        for p in params:
            p.grad = None
        with _own_noise(self.rank, params[0].device):
            yield
        if self.mesh is None:
            add_up([p.grad for p in params if p.grad is not None])
        for p, gradient in zip(params, before, strict=True):
            if gradient is not None:
                p.grad = gradient if p.grad is None else gradient.add_(p.grad)

    def sums(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value, summed over the processes."""
        if self.size == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def told(self, value: T) -> T:
        """The first process's value, in all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gathered(self, value: T) -> list[T]:
        """Each process's value, in all."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def copy(self, folder: Path, place: Path | None) -> None:
        """Copy the first process's folder to each that names a place for it."""
        found = [path for path in sorted(folder.rglob("*")) if path.is_file()] if self.first else []
        for name, size in self.told([(str(path.relative_to(folder)), path.stat().st_size) for path in found]):
            self._copy_file(folder / name, place and place / name, size)

    def _copy_file(self, source: Path, target: Path | None, size: int) -> None:
        with (
            source.open("rb") if self.first else nullcontext() as reading,
            nullcontext() if target is None else _written(target) as writing,
        ):
            for start in range(0, size, BUCKET):
                block = torch.empty(min(BUCKET, size - start), dtype=torch.uint8)
                if reading is not None:
                    block = torch.frombuffer(bytearray(reading.read(len(block))), dtype=torch.uint8)
                dist.broadcast(block, 0)
                if writing is not None:
                    writing.write(block.numpy())

    def give(self, tensors: Sequence[Tensor]) -> None:
        """Put the first process's values into all, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def whole(self, model: nn.Module) -> dict[str, Tensor] | None:
        """All weights in the memory of the first process, gathered tensor by tensor; None in the others."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        gathered: dict[str, Any] = get_model_state_dict(
            model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )
        return gathered if self.first else None


ALONE = Group()


@contextmanager
def joined(world: World, device: str, *, shard: bool = True) -> Iterator[Group]:
    """The processes as one group, for as long as one order takes; all of them join.

    `shard` False: each has all weights, whatever was asked for. Raises LostError where one of them is gone.
    """
    if world.size == 1:
        yield ALONE
        return
    if device == "mps":
        raise UsageError("several processes compute on CUDA GPUs or on CPUs, not on mps; leave --num-processes out")
    assert world.store is not None
    store = PrefixStore(f"group {world.orders_given}", world.store)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=TIMEOUT,
        )
        mesh = init_device_mesh(device, (world.size,)) if world.shard and shard else None
        yield Group(world.rank, world.size, mesh)
    except RuntimeError as error:
        told = next((words for words in LOST if words in str(error)), None)
        if told is None:
            raise
        if world.rank:
            time.sleep(PATIENCE)
        raise LostError(f"one of {world.size} processes is gone, or hangs ({told})") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _written(path: Path) -> Iterator[Any]:
    """A new file. Raises ResourceError where the disk is full."""
    with explained_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            yield stream


@contextmanager
def mirrored(world: World, device: str, folder: Path) -> Iterator[Path]:
    """The first process's folder where this one sees it; else a copy, one per machine, which goes afterwards."""
    with joined(world, device, shard=False) as group:
        place = Path(tempfile.gettempdir()) / group.told(f"hardener-{token_hex(8)}")
        sights = group.gathered((socket.gethostname(), folder.is_dir()))
        host, sees = sights[group.rank]
        copies = not sees and sights.index((host, False)) == group.rank
        if not all(sees for _, sees in sights):
            group.copy(folder, place if copies else None)
            group.gathered(None)  # the copies are whole
    try:
        yield folder if sees else place
    finally:
        if copies:
            shutil.rmtree(place)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over the processes, in place, in few messages."""
    for bucket in buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        pieces = torch.split(flat, [tensor.numel() for tensor in bucket])
        for tensor, piece in zip(bucket, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in order, those together that fit into one message: of one type, and not too many elements."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(other.numel() for other in bucket) + tensor.numel()
        if bucket and (size > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Spread all weights over the mesh, gathered block by block while they are used; `model` is changed in place.

    Between passes there are shards alone, also after one without a backward pass.
    """
    from torch.distributed.fsdp import fully_shard

    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in [module for module in model.modules() if type(module).__name__ in names]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def full(tensor: Tensor) -> Tensor:
    """A tensor over all its shards; every process has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(whole: Tensor, other: Any) -> Tensor:
    """This process's part of a whole tensor, sharded as `other` is, if that is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(other, DTensor) or whole.shape != other.shape:
        return whole
    whole = whole.to(other.device)
    return distribute_tensor(whole, other.device_mesh, other.placements, src_data_rank=None)


@contextmanager
def _own_noise(rank: int, device: torch.device) -> Iterator[None]:
    """Dropout of its own in each process; all leave with one random state, so that what is drawn next is one.

    It is the state of before if there was no dropout: what is drawn next is then what one process draws.
    """
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)
        fresh = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
        yield
        left = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    if not all(map(torch.equal, fresh, left)):
        torch.manual_seed(int(torch.randint(2**62, ())))
