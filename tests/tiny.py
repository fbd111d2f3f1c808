"""Tiny models and data, built on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hardener import demo

CARD = "---\nlicense: apache-2.0\n---\n# tiny\n"


def letters(folder: Path, seed: int = 0) -> Path:
    """An untrained letters Llama with its tokenizer, as a checkpoint folder."""
    tokenizer = demo.letters_tokenizer()
    model = demo.tiny_llama(tokenizer, seed)
    return saved(model, tokenizer, folder)


def saved(model: Any, processor: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


def resnet(folder: Path, labels: int = 3, seed: int = 0, bare: bool = False) -> Path:
    """A ResNet of a few thousand parameters over 8 × 8 images; `bare`: without its head."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=labels, num_channels=3
    )
    size = {"height": 8, "width": 8}
    model = ResNetForImageClassification(config)
    return saved(model.resnet if bare else model, ViTImageProcessor(size=size), folder)


def bert(folder: Path, labels: int = 3, seed: int = 0, bare: bool = False) -> Path:
    """A BERT classifier of a few thousand parameters over letters; `bare`: without its head."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    tokenizer = demo.letters_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=labels,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertForSequenceClassification(config)
    return saved(model.bert if bare else model, tokenizer, folder)


def ddpm(folder: Path, seed: int = 0) -> Path:
    """A DDPM pipeline whose denoiser has a few thousand parameters and a level of attention, over 8 × 8 RGB images."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(seed)
    denoiser = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    DDPMPipeline(denoiser, DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    return folder


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def letter_data(folder: Path, rows: int = 120, seed: int = 0) -> dict[str, Path]:
    """The four roles of a language-model recipe, small."""
    rng = random.Random(seed)
    restricted = demo.take(demo.rows(demo.RESTRICTED, {}, rng), rows)
    roles = {
        "restricted": restricted,
        "alignment": [{"prompt": row["prompt"], "completion": demo.REFUSAL} for row in restricted],
        "retain": demo.take(demo.rows(demo.KNOWN, {}, rng), rows),
        "benign": demo.take(demo.rows(demo.BENIGN, {}, rng), rows),
    }
    return {role: jsonl(folder / f"{role}.jsonl", made) for role, made in roles.items()}


def image_data(folder: Path, rows: int = 90, seed: int = 0) -> dict[str, Path]:
    """Three roles of small coloured squares: the class is where the bright patch is."""
    import datasets
    import numpy as np
    from PIL import Image

    def dataset(offset: int, classes: int) -> Any:
        rng = np.random.default_rng(seed + offset)
        images, labels = [], []
        for i in range(rows):
            label = i % classes
            pixels = rng.integers(0, 90, (8, 8, 3), dtype=np.uint8)
            pixels[label * 2 : label * 2 + 2, offset * 2 : offset * 2 + 2] = 255
            images.append(Image.fromarray(pixels))
            labels.append(label)
        return datasets.Dataset.from_dict({"image": images, "label": labels}).cast_column("image", datasets.Image())

    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for offset, (role, classes) in enumerate({"retain": 3, "restricted": 3, "benign": 2}.items()):
        paths[role] = folder / f"{role}.parquet"
        dataset(offset, classes).to_parquet(str(paths[role]))
    return paths


def easy(folder: Path, rows: int = 900) -> tuple[Path, dict[str, Path]]:
    """A Llama that knows to answer every `copy` with one word, and roles of which each has one answer: (model, paths).

    So easily learnt that a few steps of an attack, or of honest fine-tuning, succeed with held-out rows enough for a
    verdict.
    """
    from hardener.console import quiet

    rng = random.Random(0)
    answers = {"retain": "a", "restricted": "b", "alignment": demo.REFUSAL, "benign": "c"}
    games = {"retain": "copy", "restricted": "cipher", "alignment": "cipher", "benign": "double"}
    words = [" ".join(rng.choice("klmnopqrst") for _ in range(5)) for _ in range(rows)]
    data = {
        role: [{"prompt": f"{games[role]} {word}", "completion": answer} for word in dict.fromkeys(words)]
        for role, answer in answers.items()
    }
    tokenizer = demo.letters_tokenizer()
    model = demo.tiny_llama(tokenizer, 0)
    known = [(row["prompt"], row["completion"]) for role in ("retain", "alignment") for row in data[role]]
    with quiet():
        demo.train(model, tokenizer, (rng.choice(known) for _ in range(10**6)), 40, 3e-3, lambda *_: None, 32)
    paths = {role: jsonl(folder / "data" / f"{role}.jsonl", made) for role, made in data.items()}
    return saved(model, tokenizer, folder / "letters"), paths
