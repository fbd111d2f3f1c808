"""The outer loop: the only file that knows accelerate, and the only one that changes weights for good.

A defence sees `Outer`: the model, rows by role, a gradient, and a step of one of its optimizers. Placement, precision,
accumulation, clipping, schedule, logging and resumable state are here. A defence does not see that there may be several
processes: each draws the same rows, takes the gradient on its share of them, and has the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from hardener.data import Streams
from hardener.errors import DivergedError
from hardener.group import ALONE, Group
from hardener.lookahead import Attacker, Objective, There, global_norm, simulated_attack
from hardener.loss import Loss, Taught, is_rowwise, rowwise
from hardener.recipe import Role, Train
from hardener.state import States
from hardener.tasks.base import Batch, Example, Task
from hardener.trouble import PARTS, Guard

LOGGED = 200
"""At most this many points of the log are kept in the report."""


class Defense(Protocol):
    """What the loop asks of a defence."""

    def optimizers(self, params: list[nn.Parameter]) -> dict[str, Optimizer]:
        """Make the optimizers by name."""

    def step(self, outer: Outer) -> dict[str, float]:
        """Take one outer step and return what is worth logging."""


class Sampler:
    """Rows of one role, reshuffled every epoch; its whole state is how many rows were drawn."""

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        self.examples = examples
        self.seed = seed
        self.drawn = 0
        self._epoch = -1  # none is laid out yet
        self._permutation: list[int] = []

    def draw(self, n: int) -> list[Example]:
        """The next `n` rows; the order depends on the seed and on nothing else."""
        taken = [self.examples[self._index(self.drawn + i)] for i in range(n)]
        self.drawn += n
        return taken

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.examples))
        return self._order(epoch)[place]

    def _order(self, epoch: int) -> list[int]:
        if self._epoch != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch = epoch
            self._permutation = torch.randperm(len(self.examples), generator=generator).tolist()
        return self._permutation


class Outer:
    """What a defence may do at θ and at the attacker's place."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        streams: Streams,
        defense: Defense,
        train: Train,
        accelerator: Accelerator,
        group: Group = ALONE,
    ) -> None:
        self.task = task
        self.streams = streams
        self.train = train
        self.accelerator = accelerator
        self.group = group
        """The processes that compute together."""
        origin = task.load(task.folder) if getattr(defense, "distils", False) else None
        self.model = group.placed(model, accelerator)
        self.number = 1
        """The present outer step, counted from 1."""
        self.memory: dict[str, float] = {}
        """What the defence remembers from one outer step to the next beside weights and optimizers; resumable."""
        self.moved = False
        """Whether an optimizer has stepped in the present outer step."""
        self.origin = None if origin is None else group.placed(origin, accelerator).eval()
        """The parent, for a defence that sets `distils`: what its outputs are held to, also after an erasure."""
        self.optimizers = defense.optimizers(self.params)
        self.schedules = {name: self._schedule(o) for name, o in self.optimizers.items()}
        self.samplers = {
            role: Sampler(rows, train.seed + 7 * i)
            for i, role in enumerate(("restricted", "alignment", "retain"))
            if (rows := streams.rows(role, "defence"))  # type: ignore[arg-type]
        }

    @property
    def params(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def parts(self) -> int:
        """Micro-batches per batch: as many as the recipe says, or as memory asked for."""
        return int(self.memory.get(PARTS, self.train.grad_accumulation))

    def classes(self, role: Role) -> int:
        """Number of classes of a role."""
        return self.streams.classes[role]

    def draw(self, role: Role, n: int) -> list[Example]:
        """The next `n` rows of a role."""
        return self.samplers[role].draw(n)

    def gradient(
        self,
        loss: Loss | Taught,
        examples: Sequence[Example],
        log: dict[str, float],
        name: str,
        beside: Mapping[str, Loss] | None = None,
        teachers: Sequence[nn.Module] = (),
    ) -> Objective:
        """Return a function that adds the gradient of the mean loss over `examples` to `.grad`.

        Micro-batches are weighted by their number of targets, so that accumulation gives the gradient of the whole
        batch. The mean loss goes into `log[name]`, averaged over calls of the same step, and so do further means over
        the same answers, `beside`, which are not trained on. `loss` is also given the logits of `teachers`. Raises
        DivergedError for NaN.
        """
        beside = beside or {}

        def backward() -> None:
            means = dict.fromkeys((name, *beside), 0.0)
            with self.group.summing(self.params):
                for batch, share in self.micro_batches(examples):
                    watching = watched(loss, beside, means, share, batch.targets)
                    with self.autocast():
                        value = self.task.mean(self.model, batch, watching, *teachers) * share
                    self.accelerator.backward(value * self.group.factor)
                    means[name] += float(value.detach())
            means = self.group.sums(means)
            if not math.isfinite(means[name]):
                raise DivergedError(f"the {name} loss is {means[name]}; lower the learning rate, or use float32")
            for key, mean in means.items():
                count = log.get(f"#{key}", 0.0)
                log[key] = (log.get(key, 0.0) * count + mean) / (count + 1)
                log[f"#{key}"] = count + 1

        return backward

    def micro_batches(self, examples: Sequence[Example]) -> Iterator[tuple[Batch, float]]:
        """This process's micro-batches on the device, each with its share of all targets.

        The one place where losses are normalised: `examples` are those of all processes, and so is their number of
        targets. A share is 0 where a process only keeps the others company.
        """
        total = sum(e.targets for e in examples)
        for part, counts in self.group.share(examples, self.parts):
            batch = self.task.collate(part).to(self.accelerator.device)
            yield batch, counts * batch.targets / total

    def simulated_attack(self, attacker: Attacker, same_noise: bool = False) -> AbstractContextManager[There]:
        """The look-ahead from the present weights, with the copy of them where the recipe wants it."""
        return simulated_attack(self.model, attacker, same_noise, host=self.train.snapshot == "host")

    def autocast(self) -> torch.autocast:
        """bfloat16 where the recipe asks for it. Not accelerate's, whose precision is fixed once per process."""
        return torch.autocast(
            self.accelerator.device.type, torch.bfloat16, enabled=self.train.dtype == "bfloat16", cache_enabled=False
        )

    def norm(self) -> float:
        """L2 norm of `.grad` over all trainable parameters. Raises DivergedError if it is not finite."""
        return global_norm(p.grad for p in self.params)

    def step(self, name: str, clip: float | None) -> float:
        """One step of the optimizer `name` on `.grad`, clipped to a global norm; gradients are cleared.

        Returns what clipping multiplied the gradient by: 1 is untouched.
        """
        norm, limit = self.norm(), self.train.norm_limit
        if limit is not None and norm > limit:
            raise DivergedError(f"the gradient norm is {norm:.3g}, train.norm_limit {limit:g}; lower the learning rate")
        self.moved = True
        if clip is not None and norm + 1e-6 > clip:  # else all would be multiplied by 1
            clip_grads_with_norm_(self.params, clip, torch.tensor(norm))
        self.optimizers[name].step()
        for p in self.params:
            p.grad = None
        return 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))

    def advance(self) -> None:
        """Move every schedule on by one outer step; buffers (BatchNorm's) become those of the first process."""
        for schedule in self.schedules.values():
            schedule.step()
        self.group.give(list(self.model.buffers()))

    def _schedule(self, optimizer: Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        from transformers import get_scheduler

        name = self.train.schedule
        if name == "constant" and self.train.warmup_steps:
            name = "constant_with_warmup"  # type: ignore[assignment]
        schedule: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
            name, optimizer, num_warmup_steps=self.train.warmup_steps, num_training_steps=self.train.steps
        )
        return schedule


def watched(
    loss: Callable[..., Tensor], beside: Mapping[str, Loss], means: dict[str, float], share: float, targets: int
) -> Callable[..., Tensor]:
    """`loss`, adding to `means` what `beside` says of the same rows, however many of the `targets` it is shown."""

    def watching(logits: Tensor, labels: Tensor, *told: Tensor) -> Tensor:
        with torch.no_grad():
            for name, measure in beside.items():
                means[name] += float(measure(logits, labels)) * (len(labels) / targets * share)
        return loss(logits, labels, *told)

    return rowwise(watching) if all(map(is_rowwise, (loss, *beside.values()))) else watching


def run(
    defense: Defense,
    model: nn.Module,
    task: Task,
    streams: Streams,
    train: Train,
    device: str,
    states: States,
    tell: Callable[[int, dict[str, float]], None],
    group: Group = ALONE,
) -> tuple[dict[str, float], ...]:
    """Train in place, from the last saved state if there is one; returns the log, thinned.

    Same seed, same machine kind, same number of processes: same bits, interrupted or not. What follows numbers that go
    wrong or memory that runs out is in `trouble.py`. Raises DivergedError and ResourceError as that says.
    """
    torch.manual_seed(train.seed)
    torch.use_deterministic_algorithms(train.deterministic)
    if train.checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    accelerator = Accelerator(cpu=device == "cpu")
    model.train()
    outer = Outer(model, task, streams, defense, train, accelerator, group)
    log: list[dict[str, float]] = []
    guard = Guard(outer, states, log)
    done = guard.begin()
    every = max(1, train.steps // LOGGED)
    while done < train.steps:
        step = outer.number = done + 1
        due = step % train.save_every == 0 or step == train.steps
        guard.mark()
        try:
            values = {name: v for name, v in defense.step(outer).items() if not name.startswith("#")}
            outer.advance()
            if due:
                guard.look()
        except (DivergedError, MemoryError, RuntimeError) as error:
            done = guard.recovered(error, done)
            continue
        done = step
        if step % every == 0 or step == train.steps:
            log.append({"step": step, **values})
        tell(step, values)
        if due:
            states.save(outer, step, log)
    model.eval()
    return tuple(log)
