"""What the plan says of memory is what steps take, though no weight is loaded for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import memory as bench
from bench.step_cost import Bed, Size
from hardener import hub, memory, optimizers, recipe_file
from hardener.metadata import ModelRef

SIZE = Size(hidden=64, layers=2, vocabulary=2048, rows=4, length=160, walks=(), repeats=1)
CTRAP = bench.DEFENSES["ctrap"]


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    folder = tmp_path_factory.mktemp("bed")
    made = Bed(SIZE, "cpu", folder)
    made.model(lora=False).save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def ref(bed: Bed) -> ModelRef:
    return hub.resolve(str(bed.task.folder))


@pytest.mark.parametrize("name", ["ctrap", "ctrap, second order", "ctrap-rollout", "sophon, K = 4", "ctrap-adaptive"])
def test_predicted_is_within_15_percent_of_measured_with_all_weights(bed: Bed, ref: ModelRef, name: str) -> None:
    chosen = bench.recipe(SIZE, bench.DEFENSES[name])
    assert memory.needed(chosen, ref, "cpu").hardening == pytest.approx(bench.taken(bed, chosen), rel=bench.GOAL)


@pytest.mark.parametrize("name", ["ctrap", "sophon-wide"])
def test_predicted_is_within_15_percent_of_measured_through_an_adapter(bed: Bed, ref: ModelRef, name: str) -> None:
    chosen = bench.recipe(SIZE, bench.DEFENSES[name], bench.ADAPTER)
    assert memory.needed(chosen, ref, "cpu").hardening == pytest.approx(bench.taken(bed, chosen), rel=bench.GOAL)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_what_saves_memory_saves_it_in_the_plan_too(ref: ModelRef) -> None:
    def told(*more: str) -> int:
        return memory.needed(bench.recipe(SIZE, CTRAP, *more), ref, "cpu").hardening

    weights = 4 * ref.parameters
    assert told() - told("train.snapshot=host") == weights
    assert told() - told("train.optimizer=adafactor") > 1.9 * weights
    assert told() - told(bench.ADAPTER) > 3 * weights
    assert told("train.checkpointing=true") < told()
    assert told("train.grad_accumulation=2") < told()


def test_erasing_holds_two_models_and_the_students_moments(ref: ModelRef) -> None:
    erased = "erase={alpha: 0.5, steps: 1, batch_size: 4, lr: 1.0e-3}"
    both, alone = (bench.recipe(SIZE, CTRAP, *more) for more in ((erased,), ()))
    weights = 4 * ref.parameters
    assert memory.needed(both, ref, "cpu").hardening > 5 * weights
    only = both.model_copy(update={"defense": None, "train": None})
    assert memory.needed(only, ref, "cpu").hardening == memory.needed(both, ref, "cpu").hardening
    assert memory.needed(alone.model_copy(update={"defense": None, "train": None}), ref, "cpu").hardening == 0


def test_where_a_pass_needs_numbers_activations_are_not_told(ref: ModelRef, monkeypatch: pytest.MonkeyPatch) -> None:
    def routed(self: memory.Stage, rows: int, length: int) -> None:
        with self.mode:
            torch.ones(3).nonzero()

    monkeypatch.setattr(memory.Stage, "attacked", routed)
    made = memory.needed(bench.recipe(SIZE, CTRAP), ref, "cpu")
    assert made == memory.Memory(6 * 4 * ref.parameters - 4 * ref.parameters, 4 * 4 * ref.parameters, False)


def test_classifiers_are_rehearsed(resnet: Path, bert: Path) -> None:
    for name, folder in (("tiny-sophon-image", resnet), ("tiny-sophon-text", bert)):
        made = memory.needed(recipe_file.load(name, ()), hub.resolve(str(folder)), "cpu")
        assert made.activations
        assert made.hardening > 8 * 4 * hub.resolve(str(folder)).parameters  # two Adams alone are four copies


def test_an_attacker_needs_room_for_all_logits(ref: ModelRef) -> None:
    chosen = bench.recipe(SIZE, CTRAP)
    probe = chosen.probe
    twice = chosen.model_copy(update={"probe": probe.model_copy(update={"batch_size": 2 * probe.batch_size})})
    more = memory.needed(twice, ref, "cpu").probe - memory.needed(chosen, ref, "cpu").probe
    assert more > 2 * 4 * probe.batch_size * SIZE.length * SIZE.vocabulary


def test_what_lives_is_counted_and_what_was_there_before_is_not() -> None:
    there = torch.zeros(1000)
    with memory.Live() as live:
        view = there[:10].t()
        assert live.now == 0
        made = view + torch.ones(10)
        assert live.peak == 80
        del view
        assert live.now == 40
    assert made.shape == (10,)


def test_states_of_optimizers_are_those_they_make() -> None:
    for name in ("adamw", "adafactor"):
        weights = [torch.nn.Parameter(torch.ones(30, 20)), torch.nn.Parameter(torch.ones(7))]
        train = bench.recipe(SIZE, CTRAP, f"train.optimizer={name}").train
        assert train is not None
        optimizer = optimizers.made(train, weights)
        for p in weights:
            p.grad = torch.ones_like(p)
        optimizer.step()
        held = [
            v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.dim()
        ]
        assert sum(v.numel() * v.itemsize for v in held) == optimizers.kept(name, [p.shape for p in weights])


def test_a_gpu_steps_with_room_for_a_root_of_all_second_moments() -> None:
    shapes = [torch.Size([100, 10])] * 9
    assert memory.stepped(shapes, "adamw", "cuda") == 9 * 4000
    assert memory.stepped(shapes, "adamw", "cpu") == 3 * 4000
    assert memory.size(shapes) == 9 * 4000
