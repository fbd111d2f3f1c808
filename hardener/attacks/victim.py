"""The model that is attacked: loaded, changed as the family does, with the head, adapter and scope it trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers.pytorch_utils import Conv1D

from hardener.attacks.attack import Attack
from hardener.attacks.edits import EDITS
from hardener.attacks.scene import Scene
from hardener.errors import UnsupportedModelError
from hardener.tasks.base import Task, drawn, set_parameter, switch_dropout_off


@contextmanager
def victim(scene: Scene, attack: Attack) -> Iterator[nn.Module]:
    """The model to attack. LoRA attackers of language models share one loaded base, which is as it was on leaving.

    Raises CannotEdit where the family's edit finds no hold.
    """
    family, task = attack.family, scene.task
    if family.scope == "lora" and task.generative and family.edit is None:
        adapted = with_adapter(scene.base, [])
        try:
            yield adapted
        finally:
            adapted.unload()  # type: ignore[operator]
    else:
        yield loaded(scene, attack)


def loaded(scene: Scene, attack: Attack) -> nn.Module:
    """The checkpoint by itself, or the control that starts from new weights."""
    family, task = attack.family, scene.task
    fresh = family.head == "fresh" and not task.generative
    if scene.scratch:
        model = task.scratch(scene.folder, **({"num_labels": scene.classes} if fresh else {})).to(scene.device)
    else:
        model = task.load(scene.folder).to(scene.device)
    if family.edit is not None:
        EDITS[family.edit](model, scene, attack.dose or attack.rate, attack.seed)
    head = list(task.head(model)) if not task.generative else []
    if fresh and not scene.scratch:
        model = with_new_head(model, task, head, scene.classes)
    if family.scope == "lora":
        model = with_adapter(model, head)
    elif family.scope == "head":
        for name, p in model.named_parameters():
            p.requires_grad_(name in head)
    return model


def with_new_head(model: nn.Module, task: Task, head: Sequence[str], classes: int) -> nn.Module:
    """Replace the head by a new one with `classes` outputs."""
    shapes = task.head_shapes(model, classes)
    for name in head:
        set_parameter(model, name, nn.Parameter(drawn(shapes[name], model.get_parameter(name))))
    model.config.num_labels = classes  # type: ignore[union-attr]
    for module in model.modules():  # some heads reshape their logits by their own copy of the number
        if isinstance(getattr(module, "num_labels", None), int):
            module.num_labels = classes  # type: ignore[assignment]
    return model


def with_adapter(model: nn.Module, head: Sequence[str]) -> nn.Module:
    """LoRA r 16, alpha 32 on every linear and convolution layer but the head; a classifier's head trains in full."""
    from peft import LoraConfig, get_peft_model

    heads = {name.rpartition(".")[0] for name in head}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    layers = {
        name: module
        for name, module in model.named_modules()
        if adaptable(module) and name not in heads and module is not output
    }
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no linear or convolution layer for LoRA")
    transposed = all(isinstance(layer, Conv1D) for layer in layers.values())  # GPT-2 keeps its weights so
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=list(layers), fan_in_fan_out=transposed)
    wrapped = get_peft_model(model, config)
    for name in head:
        wrapped.base_model.model.get_parameter(name).requires_grad_(True)
    switch_dropout_off(wrapped)
    return wrapped  # type: ignore[no-any-return]


def adaptable(module: nn.Module) -> bool:
    """Whether peft can put an adapter of any rank on the layer: not on grouped convolutions."""
    return isinstance(module, nn.Linear | Conv1D) or (isinstance(module, nn.Conv2d) and module.groups == 1)
