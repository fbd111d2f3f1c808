"""What a checkpoint's own tokenizer, chat template or image processor makes of the judged rows.

Rows are encoded once, so that all subjects see the same numbers. Whoever uses a checkpoint uses what lies beside it,
though: where that was changed, the numbers that were judged are not the questions that its users ask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hardener.tasks.base import Batch, Example, Task


def put(task: Task, folder: Path, rows: Sequence[Example]) -> tuple[str, ...]:
    """Each row as `folder` itself would put it, hashed; `task` has encoded it. (rows,)"""
    own = type(task)(folder, template=task.template, max_length=task.max_length)
    encoded = [own.encode(_row(task, row)) for row in rows]
    with torch.random.fork_rng():  # a task may draw noise: the same for each folder
        torch.manual_seed(0)
        return tuple("left out" if one is None else _digest(own.collate([one])) for one in encoded)


def _row(task: Task, example: Example) -> dict[str, Any]:
    """What was encoded: question and answer, a text as far as it was read, or an image."""
    if "turn" in example.inputs:
        prompt, completion = example.inputs["turn"]
        return {"prompt": prompt, "completion": completion}
    tokenizer: Any = getattr(task, "tokenizer", None)
    if tokenizer is None:
        return {**example.inputs, "label": example.labels}
    text = tokenizer.decode(example.inputs["input_ids"], skip_special_tokens=True)
    return {"text": text, "label": example.labels}


def _digest(batch: Batch) -> str:
    """Hash of all that a model is given, and of what it is to answer."""
    digest = hashlib.sha256()
    for name, value in sorted({**batch.inputs, "labels": batch.labels}.items()):
        digest.update(f"{name} {tuple(value.shape)} ".encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
