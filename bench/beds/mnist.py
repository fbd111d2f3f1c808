"""A small ResNet and a small ViT that read the digits 0 to 4; the digits 5 to 9 are restricted.

    python -m bench.beds.mnist --data DIR --out DIR [--quick]

writes the checkpoints `resnet` and `vit`, `data/*.parquet`, a recipe for each and `results.json`. Benign are
the digits 0 to 4 on their side. A minute on one CPU core.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from bench.beds import data as files

TAUGHT, ROTATED = 3_500, 1_000
LABELS = {
    "id2label": {label: str(label) for label in range(5)},
    "label2id": {str(label): label for label in range(5)},
}


@dataclass(frozen=True)
class Plan:
    """How a model is trained: AdamW, the rate falling to zero along a cosine."""

    steps: int
    lr: float
    batch: int = 64


PLANS = {"resnet": Plan(steps=300, lr=3e-3), "vit": Plan(steps=800, lr=2e-3)}
ATTACK = Plan(steps=64, lr=1e-3, batch=16)


@dataclass(frozen=True)
class Digits:
    """Images (n, 28, 28) uint8 and labels (n,) in 0…4."""

    images: np.ndarray
    labels: np.ndarray

    def __getitem__(self, rows: slice) -> Digits:
        return Digits(self.images[rows], self.labels[rows])


def split(data: Path) -> dict[str, Digits]:
    """The four sets: 0–4 for teaching and held out, 5–9 with labels 0…4, and held-out 0–4 turned by 90°."""
    images, labels = files.digits(data)
    low, high = labels < 5, labels >= 5
    known = Digits(images[low], labels[low])
    fresh = known[TAUGHT:]
    turned = np.rot90(known.images[:ROTATED], axes=(1, 2))
    return {
        "low": known[:TAUGHT],
        "low_heldout": fresh,
        "high": Digits(images[high], labels[high] - 5),
        "turned": Digits(turned, known.labels[:ROTATED]),
    }


def write_parquet(digits: Digits, path: Path) -> None:
    """Columns `image` (RGB) and `label`."""
    import datasets
    from PIL import Image

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    pictures = [Image.fromarray(np.ascontiguousarray(image)).convert("RGB") for image in digits.images]
    rows = {"image": pictures, "label": [int(label) for label in digits.labels]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def new_model(name: str) -> PreTrainedModel:
    """Random weights of `resnet` (22 k parameters) or `vit` (62 k), for 28×28 RGB."""
    torch.manual_seed(0)
    if name == "resnet":
        config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", **LABELS)
        return ResNetForImageClassification(config)
    config = ViTConfig(
        image_size=28,
        patch_size=4,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **LABELS,
    )
    return ViTForImageClassification(config)


def pixels(digits: Digits) -> torch.Tensor:
    """Images as the saved processor gives them: scaled to −1…1, three equal channels. (n, 3, 28, 28)"""
    grey = torch.from_numpy(np.ascontiguousarray(digits.images)).float() / 127.5 - 1
    return grey[:, None].expand(-1, 3, -1, -1)


def train(model: PreTrainedModel, digits: Digits, plan: Plan) -> float:
    """Train in place; returns the mean loss of the last ten steps."""
    inputs, labels = pixels(digits), torch.from_numpy(digits.labels).long()
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
    model.train()
    losses = []
    for _ in range(plan.steps):
        rows = torch.randint(len(labels), (plan.batch,), generator=draw)
        loss = F.cross_entropy(model(inputs[rows]).logits, labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


@torch.no_grad()
def accuracy(model: PreTrainedModel, digits: Digits) -> float:
    """Share of images whose likeliest class is the label."""
    model.eval()
    found = torch.cat([model(part).logits.argmax(-1) for part in pixels(digits).split(256)])
    return (found == torch.from_numpy(digits.labels)).float().mean().item()


def build(name: str, sets: dict[str, Digits], out: Path, plan: Plan) -> dict[str, float]:
    """Train and save one model; returns its cost and held-out accuracy."""
    model = new_model(name)
    start = time.perf_counter()
    loss = train(model, sets["low"], plan)
    seconds = time.perf_counter() - start
    model.save_pretrained(out / name)
    half = [0.5, 0.5, 0.5]
    ViTImageProcessor(size={"height": 28, "width": 28}, image_mean=half, image_std=half).save_pretrained(out / name)
    files.write_card(
        out / name,
        title=f"MNIST bed: {name}",
        text="A small classifier of the digits 0 to 4, trained on MNIST images.",
        license="apache-2.0",
        pipeline="image-classification",
    )
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": plan.steps,
        "seconds": seconds,
        "final_loss": loss,
        "low_accuracy": accuracy(model, sets["low_heldout"]),
    }


def teachable(model: PreTrainedModel, digits: Digits, plan: Plan) -> float:
    """Accuracy on held-out images after training in place on 400 others."""
    train(model, digits[:400], plan)
    return accuracy(model, digits[400:1_000])


def taught(name: str, sets: dict[str, Digits], out: Path, plan: Plan) -> dict[str, float]:
    """What fine-tuning makes of the saved model and of random weights; the bed needs them to differ."""
    saved = type(new_model(name)).from_pretrained
    return {
        "taught_high": teachable(saved(out / name), sets["high"], plan),
        "taught_high_from_scratch": teachable(new_model(name), sets["high"], plan),
        "taught_turned": teachable(saved(out / name), sets["turned"], plan),
    }


def main() -> None:
    chosen = files.arguments("Train the two digit readers.")
    torch.set_num_threads(1)
    sets = split(chosen.data)
    (chosen.out / "data").mkdir(parents=True, exist_ok=True)
    for name, digits in sets.items():
        write_parquet(digits, chosen.out / "data" / f"{name}.parquet")
    plans = {name: Plan(5, plan.lr) for name, plan in PLANS.items()} if chosen.quick else PLANS
    results = {
        name: build(name, sets, chosen.out, plan) | taught(name, sets, chosen.out, ATTACK)
        for name, plan in plans.items()
    }
    for name in (*plans, "published"):
        shutil.copy(Path(__file__).with_name(f"mnist_{name}.yaml"), chosen.out / f"{name}.yaml")
    (chosen.out / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
