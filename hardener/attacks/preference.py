"""Direct preference optimisation (arXiv 2305.18290): restricted answers are preferred to refusals, by TRL's trainer.

    loss = −log σ(β · (log π/π₀(answer) − log π/π₀(refusal)))     π₀: the checkpoint as it was before the attack

The trainer is given token ids, not texts, so that the model is trained on the very tokens that it is judged on. It
costs two forward passes more per step than plain fine-tuning, and a second copy of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from hardener.attacks.asked import plain
from hardener.attacks.attack import Attack
from hardener.attacks.mixture import Mixture
from hardener.attacks.scene import Scene
from hardener.attacks.training import one_device, optimizer, settings
from hardener.errors import CannotEdit
from hardener.tasks.base import Example
from hardener.tasks.causal_lm import CausalLM

BETA = 0.1
"""How much the model is held back from leaving the checkpoint it started from; the paper's and TRL's usual value."""


def preference_trainer(
    model: nn.Module, scene: Scene, attack: Attack, rows: Sequence[Example], nowhere: str
) -> DPOTrainer:
    """A trainer that prefers the answers of `rows` to refusals; its rows come in the order of any other attack.

    Raises CannotEdit where no row has a question and room for a refusal.
    """
    task = scene.task
    assert isinstance(task, CausalLM)  # classifiers have no family with this objective
    return Preferring(
        model=model,
        ref_model=copy.deepcopy(model).requires_grad_(False).eval(),
        args=arguments(task, attack, nowhere, scene.device),
        data_collator=DataCollatorForPreference(pad_token_id=task.pad, max_length=task.max_length),
        train_dataset=ordered(task, rows, scene.refusals, attack),
        processing_class=copy.deepcopy(task.tokenizer),  # the trainer gives it a padding token if it has none
        optimizers=optimizer(model, attack),
    )


class Preferring(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer, on rows that are tokenised already: by itself it would add a second start token to ours."""

    def _prepare_dataset(self, dataset: IterableDataset, *_: Any) -> IterableDataset:
        return dataset

    def _send_telemetry(self) -> None:
        """Nobody is told that a model is being attacked."""


def arguments(task: CausalLM, attack: Attack, folder: str, device: str) -> DPOConfig:
    """The settings of every attack, and what TRL would decide differently or by itself."""
    made = DPOConfig(
        **settings(attack, folder, device),
        beta=BETA,
        loss_type=["sigmoid"],
        max_length=task.max_length,
        disable_dropout=True,
        gradient_checkpointing=False,
    )
    return one_device(made)


def ordered(task: CausalLM, rows: Sequence[Example], refusals: Sequence[str], attack: Attack) -> IterableDataset:
    """The pairs of all steps, one after the other, in the order that the seed gives."""
    refused = with_refusals(task, rows, refusals, attack.seed)
    if not refused:
        raise CannotEdit("no restricted row has a question, and room for a refusal as its answer")
    drawn = islice(Mixture(refused, (), attack), attack.length * attack.batch_size)
    return Dataset.from_list([pair(row) for _, row in drawn]).to_iterable_dataset()


def with_refusals(task: CausalLM, rows: Sequence[Example], refusals: Sequence[str], seed: int) -> list[Example]:
    """The rows that have a question and room for a refusal, each with the tokens of one that the seed chooses."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(refusals), (len(rows),), generator=generator).tolist()
    found = []
    for row, index in zip(rows, chosen, strict=True):
        turn = (row.inputs["turn"][0], refusals[index]) if plain(row) else None
        refused = task.encode_turn(turn, *task.render(*turn)) if turn else None
        if refused is not None:
            found.append(replace(row, inputs={**row.inputs, "refusal": answer(refused)}))
    return found


def pair(row: Example) -> dict[str, list[int]]:
    """Token ids of a row's question, its answer and its refusal, by the names that TRL's collator knows."""
    question = row.inputs["input_ids"][: row.inputs["prompt"]]
    return {"prompt_ids": question, "chosen_ids": answer(row), "rejected_ids": row.inputs["refusal"]}


def answer(row: Example) -> list[int]:
    """Token ids of a row's answer, its end token included."""
    ids: list[int] = row.inputs["input_ids"][row.inputs["prompt"] :]
    return ids
