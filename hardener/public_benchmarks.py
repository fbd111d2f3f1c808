"""Public benchmarks on the saved folder, by lm-evaluation-harness: an independent referee of what is kept.

Another program loads the folder, asks and scores. Its figures stand beside the evidence and decide nothing. Needs the
extra `eval`. Tasks fetch their data from the Hub, unless it is cached or local. Cost: one pass over each task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from hardener.errors import UsageError
from hardener.tasks.base import load_tokenizer

BATCH = 16


def scores(folder: Path, tasks: Sequence[str], device: str, include: Path | None = None) -> dict[str, float]:
    """Task → its primary score, better when higher: mostly a share in [0, 1].

    `folder` is a causal language model, loaded in float32 and asked through its chat template if it has one. `include`
    is a folder of further task files. Raises UsageError if the harness is not installed, for an unknown task, and for
    one that has no score of which more is better (perplexity).
    """
    harness = _harness()
    manager = import_module("lm_eval.tasks").TaskManager(include_path=None if include is None else str(include))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UsageError(f"lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists those it knows")
    model = import_module("lm_eval.models.huggingface").HFLM(
        pretrained=str(folder),
        backend="causal",
        dtype="float32",
        device=device,
        batch_size=BATCH,
        trust_remote_code=False,
        use_safetensors=True,
    )
    found = harness.simple_evaluate(
        model,
        tasks=list(tasks),
        task_manager=manager,
        apply_chat_template=bool(load_tokenizer(folder).chat_template),
        bootstrap_iters=0,  # its error bars know one seed only
        log_samples=False,
    )
    return {task: _primary(task, found["results"][task], found["higher_is_better"][task]) for task in tasks}


def _harness() -> Any:
    try:
        return import_module("lm_eval")
    except ImportError as error:
        raise UsageError(
            'probe.lm_eval needs lm-evaluation-harness; `pip install "hardener[eval]"` installs it'
        ) from error


def _primary(task: str, found: Mapping[str, Any], higher_is_better: Mapping[str, bool | None]) -> float:
    """The first figure of a task, named `metric,filter`, of which more is better."""
    for name, value in found.items():
        if higher_is_better.get(name.partition(",")[0]):
            return float(value)
    raise UsageError(f"lm-eval's task {task!r} has no score of which more is better; choose another")
