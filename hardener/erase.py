"""Noise-then-distil: take a capability out of the weights, before any defence. UNDO, arXiv 2506.06278.

Fine-tuning hides a capability and leaves it in the weights, whatever the loss. Three moves take it out:

    unlearn    T ← θ, trained for a while on refusals and retain rows (cross-entropy), or θ itself
    noise      S ← (1 − α)·T + α·β·N in the chosen parameters, N a random initialisation of the same architecture
    distil     S ← argmin mean KL(T‖S) over answers of retain and alignment rows

α is the dial between cost and robustness; at 1 the chosen parameters start anew. What the teacher still knows of the
restricted task and lets show on alignment rows is distilled with the rest: `unlearn` is there to close that way.

Cost: one forward pass of the teacher, one forward and one backward of the student per step; two models in memory, and
a gradient and two moments of one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW, Optimizer

from hardener import loop
from hardener.data import Streams
from hardener.errors import RecipeError
from hardener.lookahead import Objective, simulated_attack
from hardener.loop import LOGGED, Outer, Sampler
from hardener.losses import cross_entropy, divergence
from hardener.recipe import Erase, ShortTraining, Train
from hardener.report import Erased
from hardener.state import States
from hardener.tasks.base import Example, Task

TITLE = "noise-then-distil"
LOOKED_AT = 256
"""Rows of a role by which weight matrices are located, and at most so many by which the student is judged."""

Tell = Callable[[int, dict[str, float]], None]


def run(
    erase: Erase, model: nn.Module, task: Task, streams: Streams, device: str, folder: Path, tell: Tell
) -> tuple[nn.Module, Erased]:
    """Erase in a copy of `model`, which becomes the teacher; returns the student and what was done.

    States are kept in `folder`, and a run that was interrupted goes on from the newest to the same bits. Raises
    RecipeError for a pattern that names nothing, DivergedError where a loss is not finite.
    """
    torch.manual_seed(erase.seed)
    torch.use_deterministic_algorithms(erase.deterministic)
    teacher = model.to(device).eval()
    held, rest = held_back(streams)
    ratios = carried(erase, teacher, task, rest) if erase.modules == "located" else {}
    names = located(ratios, teacher, erase.share) if erase.share else noised(teacher, task, erase.modules)
    if erase.unlearn != "none":
        unlearn(erase, erase.unlearn, teacher, task, rest, device, States(folder / "unlearn"))
    student = copy.deepcopy(teacher)
    mix(student, fresh(task, erase.seed), names, erase.alpha, erase.beta)
    distil = Distillation(erase, teacher)
    outer, log = distil.run(student, task, rest, held, device, States(folder / "distil"), tell)
    student.eval()
    rows, tokens = cost(outer)
    return student, Erased(
        alpha=erase.alpha,
        beta=erase.beta,
        parameters=tuple(names),
        share=size(student, names) / size(student),
        located={name: ratios[name] for name in names if name in ratios},
        unlearned=0 if erase.unlearn == "none" else erase.unlearn.steps,
        steps=int(log[-1]["step"]) if log else 0,
        planned=erase.steps,
        rows=rows,
        tokens=tokens,
        tokens_share=tokens / erase.parent_tokens if tokens is not None and erase.parent_tokens else None,
        loss_teacher=mean_loss(teacher, task, held),
        loss_student=mean_loss(student, task, held),
        distance=distance(student, teacher),
        log=tuple(log[:: 1 + len(log) // LOGGED]),
    )


class Distillation:
    """The student learns what the teacher answers; to the loop, a defence."""

    def __init__(self, erase: Erase, teacher: nn.Module) -> None:
        self.erase = erase
        self.teacher = teacher

    def run(
        self,
        student: nn.Module,
        task: Task,
        streams: Streams,
        held: Sequence[Example],
        device: str,
        states: States,
        tell: Tell,
    ) -> tuple[Outer, list[dict[str, float]]]:
        """Distil in place until all steps are taken or the student is good enough; returns where it ended.

        The log has a point per state, with `gap`, the student's loss on the rows `held` minus the teacher's.
        """
        erase = self.erase
        if erase.checkpointing:
            student.gradient_checkpointing_enable()  # type: ignore[operator]
        outer = Outer(student.train(), task, streams, self, erase, Accelerator(cpu=device == "cpu"))
        goal = mean_loss(self.teacher, task, held)
        log: list[dict[str, float]] = []
        step = states.restore(outer, log)
        while step < erase.steps and not self.enough(log):
            step += 1
            values = {name: value for name, value in self.step(outer).items() if not name.startswith("#")}
            outer.advance()
            tell(step, values)
            if step % erase.save_every == 0 or step == erase.steps:
                log.append({"step": step, **values, "gap": mean_loss(student, task, held) - goal})
                states.save(outer, step, log)
        return outer, log

    def enough(self, log: list[dict[str, float]]) -> bool:
        """Whether the student came as near to the teacher as the recipe asks."""
        return self.erase.stop_at is not None and bool(log) and log[-1]["gap"] <= self.erase.stop_at

    def optimizers(self, params: list[nn.Parameter]) -> dict[str, Optimizer]:
        """One AdamW over all weights."""
        return {"distil": AdamW(params, lr=self.erase.lr, weight_decay=self.erase.weight_decay)}

    def step(self, outer: Outer) -> dict[str, float]:
        """One step of distillation; returns `kl`, nats per target."""
        n = self.erase.batch_size
        refusals = round(n * self.erase.alignment_share) if "alignment" in outer.samplers else 0
        rows = outer.draw("retain", n - refusals) + (outer.draw("alignment", refusals) if refusals else [])
        told = outer.told(self.teacher, rows)
        log: dict[str, float] = {}
        outer.gradient(lambda logits, _: divergence(next(told), logits, self.erase.temperature), rows, log, "kl")()
        outer.step("distil", clip=self.erase.clip)
        return log


class Refusing:
    """Cross-entropy on refusals and retain rows, half and half; to the loop, a defence."""

    def __init__(self, train: Train) -> None:
        self.train = train

    def optimizers(self, params: list[nn.Parameter]) -> dict[str, Optimizer]:
        """One AdamW over all weights."""
        return {"unlearn": AdamW(params, lr=self.train.lr, weight_decay=self.train.weight_decay)}

    def step(self, outer: Outer) -> dict[str, float]:
        """One step; returns the loss in nats per target."""
        half = self.train.batch_size // 2
        rows = outer.draw("alignment", half) + outer.draw("retain", self.train.batch_size - half)
        log: dict[str, float] = {}
        outer.gradient(cross_entropy, rows, log, "refusal")()
        outer.step("unlearn", clip=self.train.clip)
        return log


def unlearn(
    erase: Erase, how: ShortTraining, model: nn.Module, task: Task, streams: Streams, device: str, states: States
) -> None:
    """Train in place on refusals and retain rows."""
    train = erase.model_copy(update={"steps": how.steps, "lr": how.lr, "warmup_steps": 0})
    loop.run(Refusing(train), model, task, streams, train, device, states, lambda *_: None)


@torch.no_grad()
def mix(model: nn.Module, new: nn.Module, names: Sequence[str], alpha: float, beta: float) -> None:
    """θ ← (1 − α)·θ + α·β·N for the parameters `names`, in place; every other one keeps its bits."""
    for name in names:
        p = model.get_parameter(name)
        p.mul_(1 - alpha).add_(new.get_parameter(name).to(p.device), alpha=alpha * beta)


def fresh(task: Task, seed: int) -> nn.Module:
    """The architecture with new weights, by the seed; the random state is left as it was."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return task.scratch(task.folder)


def noised(model: nn.Module, task: Task, modules: str | Sequence[str]) -> list[str]:
    """Names of the parameters that `erase.modules` chooses by name; a pattern also takes what is inside a module.

    Raises RecipeError for a pattern that names nothing.
    """
    if isinstance(modules, str):
        return between(model, task)
    names = [name for name, _ in model.named_parameters()]
    for pattern in modules:
        if not any(_within(name, pattern) for name in names):
            raise RecipeError(f"erase.modules: {pattern!r} names no part of this model; it has such as {names[0]!r}")
    return [name for name in names if any(_within(name, pattern) for pattern in modules)]


def _within(name: str, pattern: str) -> bool:
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def between(model: nn.Module, task: Task) -> list[str]:
    """Names of the parameters that neither embed the input nor are the head."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    ends = [m for m in model.modules() if isinstance(m, nn.Embedding)] + ([output] if output is not None else [])
    outside = {id(p) for module in ends for p in module.parameters()}
    heads = task.head(model)
    return [
        name
        for name, p in model.named_parameters()
        if id(p) not in outside and name not in heads and "embed" not in name
    ]


def carried(erase: Erase, model: nn.Module, task: Task, streams: Streams) -> dict[str, float]:
    """Weight matrix between embeddings and head → mean |θ·∂L/∂θ| on restricted rows over the same on retain rows.

    L is the cross-entropy of the rows' own answers. A classifier meets the restricted classes with a newly drawn head,
    as its attacker does; with `erase.relearn` the attacker's steps are taken before the restricted gradient, and
    undone. High where the matrix matters more to the restricted task.
    """
    names = [name for name in between(model, task) if model.get_parameter(name).dim() > 1]
    sampler = Sampler(streams.rows("restricted", "defence"), erase.seed)
    kept = saliency(model, task, Sampler(streams.rows("retain", "defence"), erase.seed).draw(LOOKED_AT), names)
    with torch.random.fork_rng(), ExitStack() as stack:
        torch.manual_seed(erase.seed)
        if not task.generative:
            stack.enter_context(task.fresh_head(model, streams.classes["restricted"]))
        if erase.relearn != "none":
            lr = erase.relearn.lr
            there = stack.enter_context(simulated_attack(model, lambda params: AdamW(params, lr=lr)))
            for _ in range(erase.relearn.steps):
                there.step(_attack(model, task, sampler.draw(erase.batch_size)))
        restricted = saliency(model, task, sampler.draw(LOOKED_AT), names)
    return {name: restricted[name] / kept[name] if kept[name] else math.inf for name in names}


def _attack(model: nn.Module, task: Task, rows: Sequence[Example]) -> Objective:
    """The gradient of the mean cross-entropy over `rows`, added to `.grad`."""

    def backward() -> None:
        device = next(model.parameters()).device
        torch.autograd.backward(task.loss(*task.targets(model, task.collate(rows).to(device))))

    return backward


def saliency(model: nn.Module, task: Task, rows: Sequence[Example], names: Sequence[str]) -> dict[str, float]:
    """Parameter → mean |θ·∂L/∂θ| over its weights, averaged over small batches of `rows`."""
    params = [model.get_parameter(name) for name in names]
    totals = [0.0] * len(names)
    for _, batch in task.batches(rows, 16):
        logits, labels = task.targets(model, batch.to(params[0].device))
        gradients = torch.autograd.grad(cross_entropy(logits, labels), params)
        for i, (p, gradient) in enumerate(zip(params, gradients, strict=True)):
            totals[i] += float((p.detach() * gradient).abs().mean())
    return dict(zip(names, totals, strict=True))


def located(ratios: dict[str, float], model: nn.Module, share: float) -> list[str]:
    """The matrices of the highest ratio, as many as hold `share` of all parameters."""
    wanted = share * size(model)
    names: list[str] = []
    for name in sorted(ratios, key=lambda name: (-ratios[name], name)):
        if size(model, names) >= wanted:
            break
        names.append(name)
    return names


def held_back(streams: Streams) -> tuple[list[Example], Streams]:
    """Every tenth retain row or fewer, by which the student is judged, and the streams without those rows."""
    rows = streams.rows("retain", "defence")
    held = rows[:: max(10, len(rows) // LOOKED_AT)]
    keys = {example.key for example in held}
    slices = tuple(
        replace(part, examples=tuple(e for e in part.examples if e.key not in keys))
        if (part.role, part.use) == ("retain", "defence")
        else part
        for part in streams.slices
    )
    return held, replace(streams, slices=slices)


@torch.no_grad()
def mean_loss(model: nn.Module, task: Task, rows: Sequence[Example]) -> float:
    """The task's own loss per target (nats, or squared error of noise); the model stays in the mode it was in.

    What a task draws at random is drawn alike each time.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    total = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _, batch in task.batches(rows):
            logits, labels = task.targets(model, batch.to(device))
            total += float(task.loss(logits, labels)) * batch.targets
    model.train(training)
    return total / sum(example.targets for example in rows)


def cost(outer: Outer) -> tuple[int, int | None]:
    """Rows and tokens that were drawn, told by how many were: samplers draw the same rows again."""
    drawn = [row for s in outer.samplers.values() for row in Sampler(s.examples, s.seed).draw(s.drawn)]
    if any("input_ids" not in row.inputs for row in drawn):
        return len(drawn), None
    return len(drawn), sum(len(row.inputs["input_ids"]) for row in drawn)


def size(model: nn.Module, names: Sequence[str] | None = None) -> int:
    """Number of weights, of all parameters or of those named."""
    chosen = model.parameters() if names is None else map(model.get_parameter, names)
    return sum(p.numel() for p in chosen)


@torch.no_grad()
def distance(student: nn.Module, teacher: nn.Module) -> float:
    """‖S − T‖ / ‖T‖ over all parameters."""
    pairs = list(zip(student.parameters(), teacher.parameters(), strict=True))
    apart = sum(float((s - t).double().square().sum()) for s, t in pairs)
    return math.sqrt(apart / sum(float(t.double().square().sum()) for _, t in pairs))
