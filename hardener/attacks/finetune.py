"""Attack a saved checkpoint folder as a stranger would: transformers `Trainer`, peft, a data collator.

What matters is set, never defaulted: the schedule, no warm-up unless the family has one, no weight decay, clip 1.0,
dropout off, fresh optimizer, float32. Attacked weights live in memory only and are gone when the attack ends.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import transformers
from torch import nn

from hardener.attacks import asked
from hardener.attacks.attack import Attack
from hardener.attacks.mixture import Mixture
from hardener.attacks.recorder import Judge, Recorder, Stop, Watch, never, quietly
from hardener.attacks.scene import Scene
from hardener.attacks.training import TRAINERS, arguments, optimizer
from hardener.attacks.victim import victim
from hardener.errors import CannotEdit
from hardener.measurement import Run
from hardener.tasks.base import Example
from hardener.tasks.causal_lm import CausalLM


def attacked(scene: Scene, attack: Attack, judge: Judge, stop: Stop = never, watch: Watch = quietly) -> Run:
    """Make one attack and judge it at its checkpoints, step 0 included.

    A loss that is not finite, or an edit that finds no hold, ends the run as failed: it is no evidence of anything.
    """
    transformers.set_seed(attack.seed)
    rows = scene.harm[: attack.owned(len(scene.harm))] if attack.length else ()
    recorder = Recorder(attack, judge, stop, watch)
    trainable = 0
    try:
        with victim(scene, attack) as model:
            recorder.judge_now(model, 0)
            if attack.length and recorder.failed is None:
                trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
                _train(model, scene, attack, rows, recorder)
    except CannotEdit as error:
        recorder.failed = str(error)
    return Run(
        family=attack.family.name,
        rate=attack.rate,
        seed=attack.seed,
        curve=tuple(recorder.curve),
        train_loss=tuple(recorder.losses),
        trainable=trainable,
        rows=len(rows),
        peak_rate=max(recorder.rates, default=0.0),
        warm_share=recorder.warm_share,
        setting=attack.setting,
        scheduled=attack.family.schedule != "constant",
        needs_parent=attack.family.needs_parent,
        answered=recorder.answered,
        failed=recorder.failed,
    )


def _train(model: nn.Module, scene: Scene, attack: Attack, rows: Sequence[Example], recorder: Recorder) -> None:
    """Let the trainer of the family's objective take all steps."""
    if attack.family.asked == "template" and isinstance(scene.task, CausalLM):
        rows = asked.template(scene.task, rows, 0.0, ())
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = _trainer(model, scene, attack, rows, nowhere)
        trainer.add_callback(recorder)
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        trainer.train()


def _trainer(model: nn.Module, scene: Scene, attack: Attack, rows: Sequence[Example], nowhere: str) -> Any:
    if attack.family.objective == "dpo":
        from hardener.attacks.preference import preference_trainer

        return preference_trainer(model, scene, attack, rows, nowhere)
    kind = TRAINERS[scene.task.kind, attack.family.objective]
    return kind(
        model=model,
        args=arguments(attack, nowhere, scene.device),
        train_dataset=Mixture(rows, scene.benign, attack),
        data_collator=lambda drawn: kind.collated(scene.task, drawn),
        optimizers=optimizer(model, attack),
    )
