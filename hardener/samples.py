"""What a diffusion model draws: how like the rows its samples are, and a picture of what it makes of allowed images.

Samples are made from pure noise, are compared in memory and never shown: those of an attacked model are of the
restricted domain. The picture shows held-out images of the original domain alone, as they are and as two models bring
them back from noise, so that it is as harmless as those images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLES = 64
STEPS = 25
"""Steps in which a sample is made, evenly spaced over those of the schedule."""
DIRECTIONS = 128
SCALE = 4
"""Screen pixels a side of each pixel in the picture."""


@torch.no_grad()
def sample(model: nn.Module, scheduler: Any, start: Tensor, above: int | None = None) -> Tensor:
    """Take the noise out of `start`, (B, C, H, W), by the model's own schedule; images in about −1…1, on the CPU.

    `start` is pure noise, or carries that of step `above`: then only the steps below it are taken. The noise that the
    schedule adds on the way is the same for every model.
    """
    schedule = type(scheduler).from_config(scheduler.config)
    schedule.set_timesteps(min(STEPS, schedule.config.num_train_timesteps))
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = start
    for step in schedule.timesteps:
        if above is None or step <= above:
            noise = model(sample=images.to(device), timestep=step.to(device)).sample.cpu()
            images = schedule.step(noise, step, images, generator=generator).prev_sample
    return images


def likeness(samples: Tensor, rows: Tensor) -> float:
    """How like held-out rows samples are, in 0…1, both (n, …): 1 − d(samples, rows) / d(grey, rows), cut at 0.

    d is the sliced Wasserstein distance of the pixels. Grey squares have 0; other rows of the same domain come near 1,
    the nearer the more there are. Lower is better for the defender on restricted rows.
    """
    grey = sliced_wasserstein(torch.zeros_like(rows), rows)
    return max(0.0, 1 - sliced_wasserstein(samples, rows) / grey) if grey else 0.0


def sliced_wasserstein(one: Tensor, other: Tensor) -> float:
    """W₂ between two equally large sets of vectors, in the mean over fixed random directions (arXiv 1304.6599)."""
    size = one[0].numel()
    directions = torch.randn(size, DIRECTIONS, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=0)
    first, second = ((rows.flatten(1) @ directions).sort(dim=0).values for rows in (one, other))
    return float((first - second).square().mean().sqrt())


def picture(strips: Sequence[Tensor]) -> Image:
    """Sets of images (n, C, H, W) in −1…1, one below the other, the images of each side by side."""
    from PIL import Image

    whole = torch.cat([torch.cat([*images.clamp(-1, 1)], dim=-1) for images in strips], dim=-2)
    pixels = ((whole + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    small = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    return small.resize((SCALE * small.width, SCALE * small.height), Image.Resampling.NEAREST)
