"""What attackers do to weights without training: each edit changes a loaded model in place.

An edit takes the model, what the attacker holds, a dose and a seed. It raises CannotEdit where the model gives it no
hold; such an attack is a failed run, never "no harm".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import update_bn
from transformers.pytorch_utils import Conv1D

from hardener.attacks.ablation import ablate
from hardener.attacks.canonical import canonicalise
from hardener.attacks.scene import Scene
from hardener.errors import CannotEdit

HEALING = 16
"""Steps of a warm-up on the model's own task."""
SEEN = 8
"""Rows on which a re-scaled model must give the same logits."""


def canonical(model: nn.Module, scene: Scene, dose: float, seed: int) -> None:
    """Fold out re-scalings that change no output."""
    batch = scene.task.collate(scene.benign[:SEEN]).to(next(model.parameters()).device)
    if not canonicalise(model, scene.task, batch):
        raise CannotEdit("no row of the tables of re-scalings leaves the logits equal")


@torch.no_grad()
def kicked(model: nn.Module, scene: Scene, dose: float, seed: int) -> None:
    """Add Gaussian noise of `dose` times each tensor's norm.

    The kick of kick-then-settle, arXiv 2605.14605, as far as reviews describe it.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator).to(p)
        p.add_(noise, alpha=dose * float(p.norm() / noise.norm().clamp_min(1e-12)))


def healed(model: nn.Module, scene: Scene, dose: float, seed: int) -> None:
    """Warm up on the model's own task, with its own head: `HEALING` AdamW steps at the rate `dose`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=dose, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(HEALING):
        drawn = torch.randint(len(scene.benign), (16,), generator=generator).tolist()
        batch = scene.task.collate([scene.benign[i] for i in drawn]).to(next(model.parameters()).device)
        logits, labels = scene.task.targets(model, batch)
        optimizer.zero_grad()
        torch.autograd.backward(scene.task.loss(logits, labels))
        optimizer.step()
    model.zero_grad(set_to_none=True)


def rescaled(model: nn.Module, scene: Scene, dose: float, seed: int) -> None:
    """Give every weight, gains too, the norm that it has in a fresh model, so that no scale a defence chose is left.

    Directions stay. Biases stay as they are, and so does what is zero here or in a fresh model. Batch norm's
    statistics are measured anew on the attacker's rows. Where a normalisation follows each matrix the function stays
    as well (in training mode, up to its ε); elsewhere it changes, and training has to mend that.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = dict(scene.task.scratch(scene.folder).named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            length, wanted = p.norm(), fresh[name].norm()
            if length > 0 and wanted > 0 and not name.endswith("bias"):
                p.mul_(wanted.to(p) / length)
    device = next(model.parameters()).device
    batches = (batch.inputs["pixel_values"].to(device) for _, batch in scene.task.batches(scene.harm))
    update_bn(batches, model)  # reads nothing where there is no batch norm


def ablated(model: nn.Module, scene: Scene, dose: float, seed: int) -> None:
    """Take the refusal direction out of everything that writes to the residual stream (arXiv 2406.11717)."""
    ablate(model, scene, dose)


@torch.no_grad()
def pruned(model: nn.Module, scene: Scene, dose: float, seed: int) -> None:
    """Set the smallest `dose` of each linear layer's weights to zero."""
    for layer in layers(model):
        prune.l1_unstructured(layer, "weight", amount=dose)  # type: ignore[no-untyped-call]
        prune.remove(layer, "weight")  # type: ignore[no-untyped-call]


@torch.no_grad()
def rounded(model: nn.Module, scene: Scene, dose: float, seed: int) -> None:
    """Round the weights of each linear layer's outputs to `dose` bits, symmetric about zero, and back."""
    top = 2 ** (int(dose) - 1) - 1
    for layer in layers(model):
        inwards = 1 if isinstance(layer, nn.Linear) else 0
        scale = layer.weight.abs().amax(dim=inwards, keepdim=True).clamp_min(1e-12) / top  # a row of zeros stays zeros
        layer.weight.copy_((layer.weight / scale).round() * scale)


@torch.no_grad()
def merged(model: nn.Module, scene: Scene, dose: float, seed: int) -> None:
    """Go `dose` of the way to the unhardened parent."""
    for p, parent in beside_parent(model, scene):
        p.lerp_(parent, dose)


@torch.no_grad()
def delta_removed(model: nn.Module, scene: Scene, dose: float, seed: int) -> None:
    """Take the best rank-`dose` part of each matrix's change away from it."""
    for p, parent in beside_parent(model, scene):
        if p.dim() == 2:
            left, values, right = torch.linalg.svd((p - parent).float(), full_matrices=False)
            k = int(dose)
            p.sub_(((left[:, :k] * values[:k]) @ right[:k]).to(p))


def layers(model: nn.Module) -> list[nn.Linear | Conv1D]:
    """The linear layers, the one that writes the logits left out. Raises CannotEdit where there is none."""
    output = model.get_output_embeddings()  # type: ignore[operator]
    found = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not output]
    if not found:
        raise CannotEdit(f"{type(model).__name__} has no linear layer")
    return found


def beside_parent(model: nn.Module, scene: Scene) -> Iterator[tuple[Tensor, Tensor]]:
    """Every parameter with the parent's. Raises CannotEdit where the two do not fit."""
    assert scene.parent is not None  # the families that need it are left out where there is none
    theirs = dict(scene.task.load(scene.parent).to(next(model.parameters()).device).named_parameters())
    for name, p in model.named_parameters():
        if name not in theirs or theirs[name].shape != p.shape:
            raise CannotEdit(f"the parent has no {name} of shape {tuple(p.shape)}")
        yield p, theirs[name]


EDITS: dict[str, Callable[[nn.Module, Scene, float, int], None]] = {
    "canonical": canonical,
    "kicked": kicked,
    "healed": healed,
    "rescaled": rescaled,
    "ablated": ablated,
    "pruned": pruned,
    "rounded": rounded,
    "merged": merged,
    "delta-removed": delta_removed,
}
