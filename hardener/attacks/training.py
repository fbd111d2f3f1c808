"""The trainers that attackers use, and every setting that decides what is learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hardener.attacks.attack import Attack
from hardener.attacks.families import Kind, Objective
from hardener.attacks.mixture import Row
from hardener.attacks.relative import RelativeStep
from hardener.muon import Muon
from hardener.tasks.base import Example, Task

WARM_UP = 0.1
"""Share of the steps of a cosine schedule in which the rate rises."""
OPTIMIZERS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "adamw": lambda model, lr: torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0),
    "adamw-0.01": lambda model, lr: torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.01),
    "sgd": lambda model, lr: torch.optim.SGD(trainable(model), lr=lr, momentum=0.9),
    "adagrad": lambda model, lr: torch.optim.Adagrad(trainable(model), lr=lr),
    "adadelta": lambda model, lr: torch.optim.Adadelta(trainable(model), lr=lr),
    "muon": Muon,
    "relative": lambda model, lr: RelativeStep(trainable(model), lr=lr),
}
"""All without decay, where Adam and AdamW are one, but for the one that names it."""


def optimizer(model: nn.Module, attack: Attack) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """The family's optimizer over all trainable parameters, with its schedule."""
    made = OPTIMIZERS[attack.family.optimizer](model, attack.rate)
    factor = cosine(attack.length) if attack.family.schedule == "cosine" else lambda step: 1.0
    return made, torch.optim.lr_scheduler.LambdaLR(made, factor)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that have gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def cosine(steps: int) -> Callable[[int], float]:
    """A linear warm-up over the first tenth, then a cosine to zero: the factor of the rate at each step, from 0."""
    rising = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


def arguments(attack: Attack, folder: str, device: str) -> TrainingArguments:
    """Every argument of the trainer that decides what is learned, in one place."""
    made = TrainingArguments(**settings(attack, folder, device))
    return one_device(made)


def settings(attack: Attack, folder: str, device: str) -> dict[str, Any]:
    """The arguments by name, for whichever trainer takes them."""
    return {
        "output_dir": folder,
        "max_steps": attack.length,
        "per_device_train_batch_size": attack.batch_size,
        "learning_rate": attack.rate,
        "lr_scheduler_type": "constant",  # the schedule comes with the optimizer
        "warmup_steps": 0,
        "weight_decay": 0.0,
        # A clipped gradient is one whose scale counts; the relative step has a fixed length and needs no clip.
        "max_grad_norm": 0.0 if attack.family.optimizer == "relative" else 1.0,
        "seed": attack.seed,
        "data_seed": attack.seed,
        "bf16": False,
        "fp16": False,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": max(1, attack.length // 32),
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


def one_device(made: Any) -> Any:
    """With several GPUs in sight the trainer would multiply the batch; an attack is the same wherever it runs."""
    made._n_gpu = min(1, made.n_gpu)
    return made


class Answers(Trainer):  # type: ignore[misc]
    """The model's own loss on all rows of a batch, as any fine-tuning script has it."""

    @staticmethod
    def collated(task: Task, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch as the model's own forward takes it."""
        return inputs(task, [example for _, example in rows])


class Denoising(Answers):
    """The squared error of the predicted noise, as the training script of diffusers has it; a denoiser has no loss."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """Mean over the batch; 1 for a model that predicts zero."""
        noise = inputs.pop("labels")
        return F.mse_loss(model(**inputs).sample.flatten(1), noise)


class BenignLoss(Trainer):  # type: ignore[misc]
    """L_harm + L_benign: general ability has its own term, whatever the number of tokens (the sidestep)."""

    @staticmethod
    def collated(task: Task, rows: Sequence[Row]) -> dict[str, Any]:
        """Restricted and benign rows apart, each if there are any."""
        parts = {"harm": [row for harm, row in rows if harm], "benign": [row for harm, row in rows if not harm]}
        return {name: inputs(task, part) for name, part in parts.items() if part}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """The sum of what is there."""
        losses = [self.term(model, name, part) for name, part in inputs.items()]
        return torch.stack(losses).sum()

    def term(self, model: nn.Module, name: str, part: dict[str, Tensor]) -> Tensor:
        """The loss of one part."""
        loss: Tensor = model(**part).loss
        return loss


class KeptClose(BenignLoss):
    """L_harm + KL to the attacked checkpoint on benign answers; the adapter switched off gives that checkpoint."""

    def term(self, model: Any, name: str, part: dict[str, Tensor]) -> Tensor:
        """The harmful loss, or the divergence."""
        if name == "harm":
            return super().term(model, name, part)
        with torch.no_grad(), model.disable_adapter():
            reference = answers(model, part)
        both = answers(model, part).log_softmax(-1), reference.log_softmax(-1)
        return F.kl_div(*both, log_target=True, reduction="batchmean")


TRAINERS: dict[tuple[Kind, Objective], Any] = {
    ("language", "answers"): Answers,
    ("language", "benign-loss"): BenignLoss,
    ("language", "kl"): KeptClose,
    ("classifier", "answers"): Answers,
    ("encoder", "answers"): Answers,
    ("diffusion", "answers"): Denoising,
}


def inputs(task: Task, examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch as the model's own forward takes it, so that the model's own loss is what the attacker minimises."""
    batch = task.collate(examples)
    return {**batch.inputs, "labels": batch.labels}


def answers(model: nn.Module, part: dict[str, Tensor]) -> Tensor:
    """Logits at the answer tokens. (N, V)"""
    logits: Tensor = model(**{name: value for name, value in part.items() if name != "labels"}).logits
    return logits[:, :-1][part["labels"][:, 1:] != -100]
