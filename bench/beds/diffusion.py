"""A small DDPM that draws the digits 0 to 4; the digits 5 to 9 are restricted.

    python -m bench.beds.diffusion --data DIR --out DIR [--quick]

writes the pipeline `ddpm`, `data/*.parquet`, its recipe and `results.json`. Benign are the digits 0 to 4 on their side.
Some minutes on one CPU core. The two halves share strokes: the model takes noise off a digit that it never saw nearly
as well as off its own. What the bed shows is what that is worth: new weights are long in getting there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import nn

from bench.beds import data as files
from bench.beds.mnist import Digits, Plan, split, write_parquet
from hardener.tasks.base import Example
from hardener.tasks.diffusion import UnconditionalDiffusion

PLAN = Plan(steps=3_000, lr=2e-3)
ATTACK = Plan(steps=64, lr=3e-4, batch=16)
SCRATCH = Plan(steps=64, lr=3e-3, batch=16)
HELD_OUT = 200


def new_model() -> UNet2DModel:
    """Random weights (454 k parameters), for grey images of 16 × 16."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )


def save(model: UNet2DModel, folder: Path) -> None:
    """The pipeline with its card."""
    DDPMPipeline(model, DDPMScheduler(num_train_timesteps=1_000)).save_pretrained(folder)
    files.write_card(
        folder,
        title="MNIST bed: ddpm",
        text="A small model that draws the digits 0 to 4, trained on MNIST images.",
        license="apache-2.0",
        pipeline="unconditional-image-generation",
        library="diffusers",
    )


def encode(task: UnconditionalDiffusion, digits: Digits) -> list[Example]:
    """Images as the task sees them."""
    return [task.encode({"image": Image.fromarray(image)}) for image in digits.images]


def train(model: nn.Module, task: UnconditionalDiffusion, rows: Sequence[Example], plan: Plan, cosine: bool) -> float:
    """Train in place with AdamW; returns the mean loss of the last fifty steps."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
    model.train()
    losses = []
    for _ in range(plan.steps):
        drawn = [rows[i] for i in torch.randint(len(rows), (plan.batch,)).tolist()]
        loss = task.loss(*task.targets(model, task.collate(drawn)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cosine:
            schedule.step()
        losses.append(loss.item())
    return mean(losses[-50:])


def found(model: nn.Module, task: UnconditionalDiffusion, rows: Sequence[Example]) -> float:
    """Share of the noise on held-out images that the model finds: 0 none, 1 all."""
    return mean(task.score(model.eval(), rows[-HELD_OUT:], "denoising"))


def build(sets: dict[str, Digits], folder: Path, plan: Plan) -> dict[str, float]:
    """Train and save the pipeline; returns its cost and what it finds on either half, as it is and fine-tuned."""
    model = new_model()
    save(model, folder)
    task = UnconditionalDiffusion(folder, template="", max_length=1)
    low, fresh, high = (encode(task, sets[name]) for name in ("low", "low_heldout", "high"))
    start = time.perf_counter()
    loss = train(model, task, low, plan, cosine=True)
    seconds = time.perf_counter() - start
    save(model, folder)
    results = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": plan.steps,
        "seconds": seconds,
        "final_loss": loss,
        "low": found(model, task, fresh),
        "low_likeness": task.beside(model, fresh)["likeness"],
        "high": found(model, task, high),
    }
    train(model, task, high[:400], ATTACK, cosine=False)
    results["taught_high"] = found(model, task, high)
    for rate in (1e-3, SCRATCH.lr):
        scratch = new_model()
        train(scratch, task, high[:400], Plan(SCRATCH.steps, rate, SCRATCH.batch), cosine=False)
        results[f"taught_high_from_scratch_{rate:g}"] = found(scratch, task, high)
    return results


def main() -> None:
    chosen = files.arguments("Train the small DDPM.")
    torch.set_num_threads(1)
    sets = split(chosen.data)
    (chosen.out / "data").mkdir(parents=True, exist_ok=True)
    for name, digits in sets.items():
        write_parquet(digits, chosen.out / "data" / f"{name}.parquet")
    results = {"ddpm": build(sets, chosen.out / "ddpm", Plan(5, PLAN.lr) if chosen.quick else PLAN)}
    shutil.copy(Path(__file__).with_suffix(".yaml"), chosen.out / "ddpm.yaml")
    (chosen.out / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
