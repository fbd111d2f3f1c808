"""How much memory a run takes at most, told beforehand from the model's config and the recipe.

    weights + what stays between steps + the largest of ( copies beside a pass + that pass ),  ( an optimizer's step )

What a pass takes is found by taking it, on tensors that have shapes and no memory (torch's fake tensors): through the
architecture's own code, with adapters, checkpointing and autocast. What a defence holds beside its passes is written
down below, in copies of the weights that train. Of an architecture that takes no pass without numbers (one that routes
tokens to experts by what they say), activations are not known.

Everything is in bytes of tensors that live at once. On a GPU come its context and what its allocator rounds up.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hardener import checkpoint, optimizers, registry
from hardener.attacks.families import Kind
from hardener.defenses.configs import CONFIGS
from hardener.defenses.settings import Settings
from hardener.defenses.sophon_configs import SophonConfig, SophonWideConfig
from hardener.defenses.trap_configs import CtrapAdaptiveConfig, CtrapConfig, CtrapRolloutConfig
from hardener.loss import Loss, Taught
from hardener.losses import SUPPRESSION, cross_entropy, distillation, kl_from_uniform
from hardener.metadata import ModelRef
from hardener.recipe import Erase, Lora, Recipe, Train
from hardener.tasks.base import Batch, Task
from hardener.tasks.causal_lm import CausalLM
from hardener.tasks.image_classification import ImageClassification

WORD = 4
"""Bytes per weight: hardening and attacks run in float32."""
MOMENTS = {"adamw": 2, "adadelta": 2, "adagrad": 1, "sgd-momentum": 1, "nesterov": 1, "sgd": 0}
"""Copies of what a simulated attacker trains that its optimizer holds."""


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of tensor storages that were made inside and live: now, and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, made=False)  # what comes from outside, of which there will be views
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            self._meet(tensor, made=True)
        return made

    def _meet(self, tensor: Any, made: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if made else 0
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


# --- what a defence holds -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """What is there beside weights, states, a pass and its gradient, in copies of the weights that train."""

    walk: float
    """While a simulated attacker's pass is taken, the worst one."""
    after: float
    """While the passes after it are taken, and the outer step."""
    rows: int
    """Of the largest batch."""
    loss: Loss = cross_entropy
    """Of the walk's costliest pass."""
    optimizers: int = 1
    """Outer ones, each with its state."""
    steady: float = 0.0
    """From one outer step to the next."""
    joined: bool = False
    """Whether a pass begins with the gradients of another one."""
    parent: bool = False
    """Whether the parent's weights are there too, and answer after the walk."""


@singledispatch
def held(config: Settings, train: Train) -> Held:
    """What a defence holds; of one that is not known, as if its attackers were AdamW with all weights."""
    here = _here(train)
    return Held(walk=here + 3, after=here, rows=train.batch_size)


@held.register
def _(config: CtrapConfig, train: Train) -> Held:
    """In second order what is kept and a direction stand beside the copy."""
    here = _here(train)
    return Held(walk=here + 2 * (config.order == "second"), after=here, rows=train.batch_size)


@held.register
def _(config: CtrapRolloutConfig, train: Train) -> Held:
    here, benign, warm = _here(train), config.benign_weight > 0, config.inner_state == "warm"
    moments = MOMENTS[config.inner_optimizer] * (config.inner_adapter == "none")
    walk = here + moments * (not warm) + max(config.stops > 1, here * benign)
    steady = moments * warm * (1 + benign)
    return Held(walk=walk, after=here * (1 + benign), rows=train.batch_size, steady=steady)


@held.register
def _(config: CtrapAdaptiveConfig, train: Train) -> Held:
    here, benign = _here(train), config.benign_weight > 0
    scope = {"all": 1.0, "half": 0.5, "lora": 0.0}
    moments = max(MOMENTS[name] for name in config.rates) * max(scope[name] for name in config.subspaces)
    walk, after = here + moments + 1, here * (1 + benign)
    return Held(walk=walk, after=after, rows=train.batch_size, loss=kl_from_uniform, joined=True, parent=True)


@held.register
def _(config: SophonConfig, train: Train) -> Held:
    here = _here(train)
    moments = MOMENTS[config.inner_optimizer] + (config.inner_momentum > 0)
    walk = here + moments + (config.inner_steps > 1)
    rows = max(config.inner_batch, config.query_batch, train.batch_size)
    loss = SUPPRESSION[config.suppression]
    return Held(walk=walk, after=here, rows=rows, loss=loss, optimizers=2, steady=config.floor is not None)


@held.register
def _(config: SophonWideConfig, train: Train) -> Held:
    """A warm-up is a walk around the walk."""
    here = _here(train)
    one = here + max(MOMENTS[name] for name in config.rates)
    walk = one * (1 + (config.warm_up[1] > 0)) + (config.inner_steps[1] > config.query_every)
    rows, kept = max(*config.inner_batches, config.query_batch, train.batch_size), config.floor is not None
    loss, parent = SUPPRESSION[config.suppression], config.distil > 0
    return Held(walk=walk, after=here, rows=rows, loss=loss, optimizers=2, steady=kept, parent=parent)


def _here(train: Train) -> int:
    """Copies, of the weights and then of what was kept, that are not in the host's memory."""
    return int(train.snapshot == "device")


# --- what a pass takes --------------------------------------------------------------------------------------


class Answers(CausalLM):
    """Language models without a tokenizer: every token but the first is an answer."""

    def __init__(self) -> None:
        pass

    def answered(self, values: Tensor, batch: Batch) -> Tensor:
        """All of them."""
        return values.flatten(0, 1)

    def headed(self, model: nn.Module, batch: Batch) -> bool:
        """As nearly all are; one that caps its logits behind the head needs more."""
        return True


class Labels(ImageClassification):
    """Classifiers, of images or texts, without what prepares their rows."""

    def __init__(self) -> None:
        pass


TASKS: dict[Kind, Callable[[], Task]] = {"language": Answers, "classifier": Labels}


class Stage:
    """A model without memory, as it is trained."""

    def __init__(self, ref: ModelRef, adapter: Literal["none"] | Lora, task: Task, mode: FakeTensorMode) -> None:
        import transformers

        self.task, self.mode = task, mode
        self.config = transformers.AutoConfig.for_model(**ref.config)
        with torch.device("meta"):
            made = getattr(transformers, ref.architecture)(self.config).train()
            self.model: nn.Module = made if adapter == "none" else checkpoint.attach(made, adapter, task)
        appear(self.model, self.mode)
        self.trained = [p.shape for p in self.model.parameters() if p.requires_grad]
        """Shapes of what trains."""
        self.weights: int = sum(t.numel() * t.itemsize for t in (*self.model.parameters(), *self.model.buffers()))
        """Bytes of all weights and buffers."""

    def passed(
        self, rows: int, length: int, train: Train, loss: Loss | Taught, joined: bool, *teachers: nn.Module
    ) -> int:
        """Most bytes that a forward and backward pass makes, gradients included; `joined`: once more on top of them."""
        if train.checkpointing:
            self.model.gradient_checkpointing_enable()  # type: ignore[operator]
        with self.mode, torch.autocast("cpu", torch.bfloat16, enabled=train.dtype == "bfloat16", cache_enabled=False):
            batch = self.batch(rows, length)
            with Live() as live:
                for _ in range(1 + joined):
                    torch.autograd.backward(self.task.mean(self.model, batch, loss, *teachers))
        self.model.zero_grad()
        return int(live.peak)

    def attacked(self, rows: int, length: int) -> int:
        """The same of a step of `Trainer`, whose models make their loss of all logits at once."""
        with self.mode:
            batch = self.batch(rows, length)
            with Live() as live:
                torch.autograd.backward(self.model(**batch.inputs, labels=batch.labels).loss)
        self.model.zero_grad()
        return int(live.peak)

    def batch(self, rows: int, length: int) -> Batch:
        """Texts of one length, or images."""
        if self.model.main_input_name == "pixel_values":
            side, channels = getattr(self.config, "image_size", 224), getattr(self.config, "num_channels", 3)
            return Batch({"pixel_values": torch.zeros(rows, channels, side, side)}, torch.zeros(rows).long(), rows)
        ids = torch.zeros(rows, min(length, getattr(self.config, "max_position_embeddings", length))).long()
        if isinstance(self.task, Answers):
            return Batch({"input_ids": ids}, ids, rows * (ids.shape[1] - 1))
        return Batch({"input_ids": ids}, ids[:, 0], rows)


def appear(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put tensors that say that they are on the CPU in the place of those on no device; tied ones stay tied."""
    found: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in found:
                    fake = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
                    trains = tensor.requires_grad
                    found[tensor] = nn.Parameter(fake, trains) if isinstance(tensor, nn.Parameter) else fake
                tensors[name] = found[tensor]  # type: ignore[assignment]


# --- a run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """The peaks of a run, in bytes."""

    hardening: int
    """Erasure included; 0 where nothing is hardened."""
    probe: int
    """Of an attacker who trains all weights with AdamW."""
    activations: bool
    """Whether they are counted."""


def needed(recipe: Recipe, ref: ModelRef, device: str) -> Memory:
    """What a run needs at most, with rows as long as the recipe lets them be."""
    task = TASKS.get(registry.find("tasks", recipe.task).kind)
    if task is not None:
        try:
            return rehearsed(recipe, ref, task(), device)
        except RuntimeError:  # torch: a pass that depends on numbers, and there are none
            pass
    return counted(recipe, ref)


def rehearsed(recipe: Recipe, ref: ModelRef, task: Task, device: str) -> Memory:
    """By passes without numbers."""
    plain, length, hardening = Stage(ref, "none", task, mode := FakeTensorMode()), recipe.data.max_length, [0]
    if recipe.erase != "none":
        hardening.append(trained(plain, recipe.erase, erasing(recipe.erase), plain, length, device))
    if recipe.defense and recipe.train:
        stage = plain if recipe.adapter == "none" else Stage(ref, recipe.adapter, task, mode)
        hardening.append(trained(stage, recipe.train, defending(recipe), plain, length, device))
    whole = plain.trained
    step = max(plain.attacked(recipe.probe.batch_size, length), size(whole) + stepped(whole, "adamw", device))
    return Memory(max(hardening), plain.weights + optimizers.kept("adamw", whole) + step, activations=True)


def trained(stage: Stage, train: Train, there: Held, parent: Stage, length: int, device: str) -> int:
    """Peak of an outer loop."""
    copied, parts = size(stage.trained), train.grad_accumulation
    walked = stage.passed(math.ceil(there.rows / parts), length, train, there.loss, there.joined or parts > 1)
    moments = [
        max(there.walk, there.after) * copied + walked,
        (1 + there.after) * copied + stepped(stage.trained, train.optimizer, device),
    ]
    if there.parent:
        rows = math.ceil(train.batch_size / parts)
        told = stage.passed(rows, length, train, distillation(1.0), parts > 1, parent.model)
        moments.append(there.after * copied + told)
    states = there.optimizers * optimizers.kept(train.optimizer, stage.trained)
    weights = stage.weights + there.parent * parent.weights
    return round(weights + states + there.steady * copied + max(moments))


def defending(recipe: Recipe) -> Held:
    """What the recipe's defence holds."""
    assert recipe.defense is not None
    assert recipe.train is not None
    known = CONFIGS.get(recipe.defense.name)
    if known is None:
        return Held(walk=4, after=1, rows=recipe.train.batch_size)
    return held(known(**recipe.defense.settings), recipe.train)


def erasing(erase: Erase) -> Held:
    """The teacher, or where parts are located the new weights; a simulated attacker's moments as the student's own."""
    return Held(walk=_here(erase) * (erase.relearn != "none"), after=0, rows=erase.batch_size, parent=True)


def counted(recipe: Recipe, ref: ModelRef) -> Memory:
    """Without any pass: weights, gradients, states and copies alone, and of an adapter nothing."""
    whole = [torch.Size([ref.parameters])]
    weights, hardening = size(whole), [0]
    if recipe.erase != "none":
        hardening.append(_peak(recipe.erase, erasing(recipe.erase), weights, whole))
    if recipe.defense and recipe.train:
        copied = whole if recipe.adapter == "none" else []
        hardening.append(_peak(recipe.train, defending(recipe), weights, copied))
    return Memory(max(hardening), 2 * weights + optimizers.kept("adamw", whole), activations=False)


def _peak(train: Train, there: Held, weights: int, shapes: list[torch.Size]) -> int:
    states = there.optimizers * optimizers.kept(train.optimizer, shapes)
    copies = 1 + there.steady + max(there.walk, there.after)
    return round(weights * (1 + there.parent) + states + copies * size(shapes))


def size(shapes: list[torch.Size]) -> int:
    """Bytes of weights of these shapes."""
    return WORD * sum(int(shape.numel()) for shape in shapes)


def stepped(shapes: list[torch.Size], name: str, device: str) -> int:
    """What an optimizer makes while it steps: on a GPU a root of all second moments at once, else tensor by tensor."""
    largest = 3 * size([max(shapes, key=math.prod)])
    return max(size(shapes), largest) if device == "cuda" and name == "adamw" else largest
