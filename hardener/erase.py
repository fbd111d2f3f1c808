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
from hardener.group import ALONE, Group
from hardener.lookahead import Objective, simulated_attack
from hardener.loop import LOGGED, Outer, Sampler
from hardener.losses import cross_entropy, distillation
from hardener.muon import Muon
from hardener.optimizers import made
from hardener.recipe import Erase, ShortTraining, Train
from hardener.report import Erased
from hardener.state import States
from hardener.tasks.base import Example, Task
from hardener.trouble import mean_loss

TITLE = "noise-then-distil"
LOOKED_AT = 256
"""Rows of a role by which parts are located, and at most so many by which the student is judged."""

Tell = Callable[[int, dict[str, float]], None]


def run(
    erase: Erase,
    model: nn.Module,
    task: Task,
    streams: Streams,
    device: str,
    folder: Path,
    tell: Tell,
    group: Group = ALONE,
) -> tuple[nn.Module, Erased]:
    """Erase in a copy of `model`, which becomes the teacher; returns the student and what was done.

    States are kept in `folder`, and a run that was interrupted goes on from the newest to the same bits. Raises
    RecipeError for a pattern that names nothing, DivergedError where a loss is not finite.
    """
    torch.manual_seed(erase.seed)
    torch.use_deterministic_algorithms(erase.deterministic)
    teacher = model.to(device).eval()
    held, rest = held_back(streams)
    names, gaps = group.told(chosen(erase, teacher, task, rest))
    if erase.unlearn != "none":
        unlearn(erase, erase.unlearn, teacher, task, rest, device, States(folder / "unlearn"), group)
    student = copy.deepcopy(teacher)
    mix(student, fresh(task, erase.seed), names, erase.alpha, erase.beta)
    distil = Distillation(erase, teacher, student)
    outer, log = distil.run(task, rest, held, device, States(folder / "distil"), tell, group)
    student.eval()
    rows, tokens = cost(outer)
    return student, Erased(
        alpha=erase.alpha,
        beta=erase.beta,
        parameters=tuple(names),
        share=size(student, names) / size(student),
        located=gaps,
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

    def __init__(self, erase: Erase, teacher: nn.Module, student: nn.Module) -> None:
        self.erase = erase
        self.teacher = teacher
        self.student = student

    def run(
        self,
        task: Task,
        streams: Streams,
        held: Sequence[Example],
        device: str,
        states: States,
        tell: Tell,
        group: Group = ALONE,
    ) -> tuple[Outer, list[dict[str, float]]]:
        """Distil in place until all steps are taken or the student is good enough; returns where it ended.

        The log has a point per state, with `gap`, the student's loss on the rows `held` minus the teacher's.
        """
        erase, student = self.erase, self.student
        if erase.checkpointing:
            student.gradient_checkpointing_enable()  # type: ignore[operator]
        outer = Outer(student.train(), task, streams, self, erase, Accelerator(cpu=device == "cpu"), group)
        goal = mean_loss(self.teacher, task, held)
        log: list[dict[str, float]] = []
        step = states.restore(outer, log)
        while step < erase.steps and not self.enough(log):
            step += 1
            values = {name: value for name, value in self.step(outer).items() if not name.startswith("#")}
            outer.advance()
            tell(step, values)
            if step % erase.save_every == 0 or step == erase.steps:
                gap = group.told(mean_loss(student, task, held) - goal)  # one answer to when it is enough
                log.append({"step": step, **values, "gap": gap})
                states.save(outer, step, log)
        return outer, log

    def enough(self, log: list[dict[str, float]]) -> bool:
        """Whether the student came as near to the teacher as the recipe asks."""
        return self.erase.stop_at is not None and bool(log) and log[-1]["gap"] <= self.erase.stop_at

    def optimizers(self, params: list[nn.Parameter]) -> dict[str, Optimizer]:
        """The recipe's, over all weights, which are never sharded here. Raises RecipeError where Muon has no matrix."""
        if self.erase.optimizer != "muon":
            return {"distil": made(self.erase, params)}
        return {"distil": Muon(self.student, self.erase.lr, self.erase.weight_decay)}

    def step(self, outer: Outer) -> dict[str, float]:
        """One step of distillation; returns `kl`, nats per target."""
        n = self.erase.batch_size
        refusals = round(n * self.erase.alignment_share) if "alignment" in outer.samplers else 0
        rows = outer.draw("retain", n - refusals) + (outer.draw("alignment", refusals) if refusals else [])
        log: dict[str, float] = {}
        outer.gradient(distillation(self.erase.temperature), rows, log, "kl", teachers=[self.teacher])()
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
    erase: Erase,
    how: ShortTraining,
    model: nn.Module,
    task: Task,
    streams: Streams,
    device: str,
    states: States,
    group: Group = ALONE,
) -> None:
    """Train in place on refusals and retain rows."""
    train = erase.model_copy(update={"steps": how.steps, "lr": how.lr, "warmup_steps": 0})
    loop.run(Refusing(train), model, task, streams, train, device, states, lambda *_: None, group)


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


def chosen(erase: Erase, model: nn.Module, task: Task, streams: Streams) -> tuple[list[str], dict[str, float]]:
    """Names of the parameters to noise, and why: the parts located, with the nats by which they were."""
    if erase.modules != "located":
        return noised(model, task, erase.modules), {}
    assert erase.share is not None  # these three go together
    assert erase.relearn != "none"
    gaps = carried(erase, erase.relearn, model, task, streams)
    among = located(gaps, model, task, erase.share)
    return [name for names in among.values() for name in names], {part: gaps[part] for part in among}


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


def carried(erase: Erase, relearn: ShortTraining, model: nn.Module, task: Task, streams: Streams) -> dict[str, float]:
    """Part of a block → nats per target that its removal costs the restricted task more than the retain task.

    Removed is a part by new weights in its place, one part at a time: from the model as it is for retain rows, and for
    restricted rows after `relearn`, an attack that is undone, since an aligned model shows the capability only there. A
    classifier meets the restricted classes with a newly drawn head, as its attacker does. High where the capability
    lives and little else does. Gradients do not tell: they are small where a capability is complete.
    """
    new, among = fresh(task, erase.seed), parts(model, task)
    sampler = Sampler(streams.rows("restricted", "defence"), erase.seed)
    general = Sampler(streams.rows("retain", "defence"), erase.seed).draw(LOOKED_AT)
    kept = damage(model, new, among, task, general)
    with torch.random.fork_rng(), ExitStack() as stack:
        torch.manual_seed(erase.seed)
        if not task.generative:
            stack.enter_context(task.fresh_head(model, streams.classes["restricted"]))
        host = erase.snapshot == "host"
        there = stack.enter_context(simulated_attack(model, lambda params: AdamW(params, lr=relearn.lr), host=host))
        for _ in range(relearn.steps):
            there.step(_attack(model, task, sampler.draw(erase.batch_size)))
        restricted = damage(model, new, among, task, sampler.draw(LOOKED_AT))
    return {part: restricted[part] - kept[part] for part in among}


def parts(model: nn.Module, task: Task) -> dict[str, list[str]]:
    """Part of a block, such as `layers.0.mlp`, → its parameters, for all that have a matrix.

    A name is cut behind what follows its last number: the blocks of every architecture are numbered.
    """
    inside = between(model, task)
    found: dict[str, list[str]] = {}
    for name in inside:
        pieces = name.split(".")
        number = max((i for i, piece in enumerate(pieces) if piece.isdecimal()), default=len(pieces))
        found.setdefault(".".join(pieces[: number + 2]), []).append(name)
    return {part: names for part, names in found.items() if any(model.get_parameter(n).dim() > 1 for n in names)}


@torch.no_grad()
def damage(
    model: nn.Module, new: nn.Module, among: dict[str, list[str]], task: Task, rows: Sequence[Example]
) -> dict[str, float]:
    """Part → nats per target that the loss on `rows` is higher with new weights in its place; then all is as it was."""
    whole = mean_loss(model, task, rows)
    found = {}
    for part, names in among.items():
        before = [model.get_parameter(name).detach().clone() for name in names]
        mix(model, new, names, 1.0, 1.0)
        found[part] = mean_loss(model, task, rows) - whole
        for name, value in zip(names, before, strict=True):
            model.get_parameter(name).copy_(value)
    return found


def _attack(model: nn.Module, task: Task, rows: Sequence[Example]) -> Objective:
    """The gradient of the mean cross-entropy over `rows`, added to `.grad`."""

    def backward() -> None:
        device = next(model.parameters()).device
        torch.autograd.backward(task.loss(*task.targets(model, task.collate(rows).to(device))))

    return backward


def located(gaps: dict[str, float], model: nn.Module, task: Task, share: float) -> dict[str, list[str]]:
    """The parts whose removal costs the restricted task more than the retain task, with their parameters.

    The largest difference comes first; as many are taken as hold at most `share` of all parameters, and at least one.
    """
    among, taken = parts(model, task), list[str]()
    for part in sorted(gaps, key=lambda part: (-gaps[part], part)):
        names = [name for one in (*taken, part) for name in among[one]]
        if taken and (gaps[part] <= 0 or size(model, names) > share * size(model)):
            break
        taken.append(part)
    return {part: among[part] for part in taken}


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
