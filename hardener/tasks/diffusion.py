"""Unconditional diffusion: DDPM pipelines of the library diffusers, a denoiser and its noise schedule.

What is trained is the denoiser ε̂(x_t, t): steps t are drawn uniformly and noise ε anew whenever a batch is put
together, x_t = √ᾱ_t·x₀ + √(1 − ᾱ_t)·ε, and `targets` gives ε̂ and ε. A row is an image alone: there are no labels, and
what is restricted is what the images show.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardener import samples
from hardener.errors import UnsupportedModelError, UsageError
from hardener.tasks.base import Batch, Example, Task, key_of, loadable, switch_dropout_off

if TYPE_CHECKING:
    from PIL.Image import Image

UNET, SCHEDULER = "unet", "scheduler"
"""Where a pipeline keeps its denoiser and its noise schedule."""
LEVELS = 5
"""Amounts of noise at which a row is scored."""
SHOWN = 12
"""Images in a row of the picture."""


def library() -> Any:
    """The library diffusers. Raises UsageError where it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        raise UsageError(f"diffusion models need {error.name}: pip install 'hardener[diffusion]'") from error


class UnconditionalDiffusion(Task):
    """A row is an `image` (PIL), cut and scaled to the size that the denoiser takes."""

    name = "unconditional-diffusion"
    kind = "diffusion"
    fields: ClassVar = (("image",),)
    default_score = "denoising"
    generative = False

    def __init__(self, folder: Path, *, template: str, max_length: int) -> None:
        super().__init__(folder, template=template, max_length=max_length)
        with loadable(f"the noise schedule of {folder.name}"):
            self.scheduler = library().DDPMScheduler.from_pretrained(folder, subfolder=SCHEDULER, local_files_only=True)
            self.config = self.auto.load_config(folder, subfolder=UNET, local_files_only=True)
        predicted = self.scheduler.config.prediction_type
        if predicted != "epsilon":
            raise UnsupportedModelError(
                f"{folder.name} predicts {predicted!r}, and the losses are defined for the noise, `epsilon`"
            )

    @classmethod
    def supports(cls, config: dict[str, Any]) -> None:
        """Check the config of the denoiser. Raises UnsupportedModelError, UsageError as `library` does."""
        library()
        if config.get("_class_name") != "UNet2DModel":
            named = config.get("_class_name") or config.get("model_type")
            raise UnsupportedModelError(f"a {named!r} model cannot be loaded for the task {cls.name}")
        if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
            raise UnsupportedModelError(f"the denoiser takes classes; {cls.name} is without conditions")
        channels, size = config.get("in_channels"), config.get("sample_size")
        if channels not in (1, 3) or config.get("out_channels") != channels or not isinstance(size, int):
            raise UnsupportedModelError(
                f"the denoiser takes {channels} channels of size {size} and gives {config.get('out_channels')}; "
                f"{cls.name} needs square images, grey or RGB, and as much noise as image"
            )

    @property
    def auto(self) -> Any:
        """UNet2DModel."""
        return library().UNet2DModel

    def load(self, folder: Path, **config: Any) -> nn.Module:
        """Load the denoiser of a pipeline folder in float32 with dropout off: safetensors only, no code of the folder.

        Raises UnsupportedModelError if it cannot be loaded, or config and weights do not fit each other.
        """
        with loadable(f"the denoiser of {folder.name}"):
            model, info = self.auto.from_pretrained(
                folder,
                subfolder=UNET,
                torch_dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **config,
            )
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise UnsupportedModelError(f"{folder.name} has no weights for {missing} of its denoiser")
        switch_dropout_off(model)
        return model  # type: ignore[no-any-return]

    def scratch(self, folder: Path, **config: Any) -> nn.Module:
        """The same architecture with random weights."""
        model: nn.Module = self.auto.from_config(self.auto.load_config(folder, subfolder=UNET, local_files_only=True))
        switch_dropout_off(model)
        return model

    def head(self, model: nn.Module) -> dict[str, torch.Size]:
        """None: no layer depends on a number of labels."""
        return {}

    def head_shapes(self, model: nn.Module, classes: int) -> dict[str, torch.Size]:
        """None."""
        return {}

    def encode(self, row: dict[str, Any]) -> Example:
        """Cut the middle out of an image and scale it, as the training script of diffusers does."""
        from PIL import Image, ImageOps

        side = self.config["sample_size"]
        image = row["image"].convert("L" if self.config["in_channels"] == 1 else "RGB")
        image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
        return Example(key_of(image.tobytes()), {"image": image}, None, 1)

    def pixels(self, examples: Sequence[Example]) -> Tensor:
        """Images in −1…1. (B, C, H, W)"""
        import numpy as np

        stacked = torch.from_numpy(np.stack([np.asarray(e.inputs["image"]) for e in examples])).float() / 127.5 - 1
        return stacked[:, None] if stacked.dim() == 3 else stacked.permute(0, 3, 1, 2)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Draw steps and noise from torch's present random state. sample (B, C, H, W), timestep (B,), noise (B, D)."""
        pixels = self.pixels(examples)
        steps = torch.randint(self.scheduler.config.num_train_timesteps, (len(examples),))
        return self.noised(pixels, torch.randn_like(pixels), steps)

    def noised(self, pixels: Tensor, noise: Tensor, steps: Tensor) -> Batch:
        """The batch in which images carry so much of this noise."""
        sample = self.scheduler.add_noise(pixels, noise, steps)
        return Batch({"sample": sample, "timestep": steps}, noise.flatten(1), len(pixels))

    def targets(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return predicted and true noise, (B, D) each."""
        return model(**batch.inputs).sample.flatten(1), batch.labels

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean ‖ε̂ − ε‖²/D; 1 for a model that predicts no noise."""
        return F.mse_loss(logits, labels)

    @torch.no_grad()
    def score(self, model: nn.Module, examples: Sequence[Example], score: str) -> list[float]:
        """How much of the noise on each image is found, in 0…1: mean over fixed steps of 1 − ‖ε̂ − ε‖/‖ε‖, cut at 0.

        0 is a model that predicts no noise at all (what DoS makes of it), 1 is one that finds every bit. Lengths and
        not squares, as the squared loss of a good denoiser and of one that has just begun are both near 0 beside that
        of a model which knows nothing, and an attacker pays for the difference. Steps are evenly spread over the
        schedule, as those of training are, and the noise of an image follows from the image: the score is the same
        whenever and for whichever model it is taken, so that two models are compared pair by pair. Cost: `LEVELS`
        forward passes over the rows.
        """
        device = next(model.parameters()).device
        scores: list[float] = []
        for start in range(0, len(examples), 64):
            part = examples[start : start + 64]
            pixels, noise = self.pixels(part), torch.stack([self.own_noise(e) for e in part])
            found = torch.zeros(len(part))
            for step in self.levels:
                predicted, true = self.targets(model, self.noised(pixels, noise, step.expand(len(part))).to(device))
                missed = (predicted - true).norm(dim=1) / true.norm(dim=1)
                found += (1 - missed).clamp_min(0).cpu() / LEVELS
            scores += found.tolist()
        return scores

    @property
    def levels(self) -> Tensor:
        """The steps at which rows are scored: the middles of equal parts of the schedule. (LEVELS,)"""
        steps: int = self.scheduler.config.num_train_timesteps
        return ((torch.arange(LEVELS) + 0.5) * steps / LEVELS).long()

    def own_noise(self, example: Example) -> Tensor:
        """The noise that an image is scored with. (C, H, W)"""
        side = self.config["sample_size"]
        generator = torch.Generator().manual_seed(int(example.key[:15], 16))
        return torch.randn(self.config["in_channels"], side, side, generator=generator)

    def beside(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """`likeness` of samples made from noise to these rows."""
        rows = self.pixels(examples[: samples.SAMPLES])
        start = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
        return {"likeness": samples.likeness(samples.sample(model, self.scheduler, start), rows)}

    def picture(self, folders: Sequence[Path], examples: Sequence[Example], device: str) -> Image:
        """Images, and what each model brings back of them from the noise of a quarter of the schedule."""
        shown = self.pixels(examples[:SHOWN])
        step = self.scheduler.config.num_train_timesteps // 4
        noise = torch.stack([self.own_noise(e) for e in examples[:SHOWN]])
        noised = self.noised(shown, noise, torch.full((len(shown),), step)).inputs["sample"]
        models = (self.load(folder).to(device).eval() for folder in folders)
        return samples.picture([shown, *(samples.sample(model, self.scheduler, noised, step) for model in models)])
