"""What only a GPU can show; and that the benchmark for it runs, at a size for a CPU."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import gpu, memory, rows
from bench.step_cost import LORA, Bed, Plain, Size, ctrap, whole_peak
from hardener import hub
from hardener.lookahead import simulated_attack
from hardener.memory import needed

SIZE = Size(hidden=1024, layers=4, vocabulary=8192, rows=8, length=512, walks=(), repeats=1)
TINY = gpu.Model(
    "tiny",
    {
        **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64},
        **{"num_attention_heads": 2, "num_key_value_heads": 1},
    },
    lora=True,
    rows=4,
    length=32,
)


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(SIZE, "cuda", tmp_path)


def test_the_benchmark_measures_steps_and_the_whole_line(tmp_path: Path) -> None:
    found = {row["what"]: row for row in gpu.steps(TINY, "cpu", tmp_path)}
    assert list(found) == ["tiny: tokens per second", "tiny: peak", "tiny: step / 3 bare passes and steps"]
    assert all(row["value"] > 0 for row in found.values())
    (whole,) = gpu.line(gpu.Line(TINY, steps=2, attack_steps=2, examples=80), "cpu", tmp_path)
    assert whole["what"] == "tiny: 2 steps of CTRAP and probe"
    assert 0 < whole["value"] < whole["goal"] == 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--quick"])
    with pytest.raises(SystemExit, match="no CUDA GPU here, so nothing is measured"):
        rows.main(gpu.__doc__, gpu.measured)


@pytest.mark.gpu
def test_lora_ctrap_takes_three_adapters_more_than_lora_training(bed: Bed) -> None:
    peaks = {}
    for name, defense in (("sft", Plain(bed.train())), ("ctrap", ctrap(bed))):
        step, outer = bed.step(defense, bed.train(), True)
        peaks[name] = whole_peak(step, outer, "cuda")
        adapter = sum(p.numel() * p.itemsize for p in outer.params)
    assert peaks["ctrap"] - peaks["sft"] <= 3 * adapter + 0.01 * peaks["sft"]


@pytest.mark.gpu
def test_a_snapshot_in_the_hosts_memory_saves_a_copy_of_the_weights_and_changes_no_bit(bed: Bed) -> None:
    peaks, weights = {}, {}
    for place in ("device", "host"):
        train = bed.train().model_copy(update={"snapshot": place})
        torch.manual_seed(0)
        step, outer = bed.step(ctrap(bed), train, False)
        peaks[place] = whole_peak(step, outer, "cuda")
        weights[place] = [p.detach().clone() for p in outer.params]
        copied = sum(p.numel() * p.itemsize for p in outer.params)
        del step, outer
    assert peaks["device"] - peaks["host"] > 0.9 * copied
    assert all(map(torch.equal, *weights.values()))


@pytest.mark.gpu
@pytest.mark.parametrize("host", [False, True])
def test_everything_is_restored_bit_for_bit_under_bfloat16(bed: Bed, host: bool) -> None:
    model = bed.model(lora=False)
    before, noise = copy.deepcopy(model.state_dict()), torch.cuda.get_rng_state()

    def objective() -> None:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = bed.loss(model)
        nn.functional.dropout(torch.ones(9, device="cuda"))  # draws
        loss.backward()

    with simulated_attack(model, lambda params: torch.optim.AdamW(params, lr=1e-2), host=host) as there:
        for _ in range(3):
            there.step(objective)
            there.keep(objective)
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.cuda.get_rng_state(), noise)


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", [(), (memory.ADAPTER,)])
def test_the_plans_peak_is_within_15_percent_of_the_allocators(bed: Bed, adapter: tuple[str, ...]) -> None:
    folder = bed.task.folder
    bed.model(lora=False).save_pretrained(folder)
    told = needed(memory.recipe(SIZE, memory.DEFENSES["ctrap"], *adapter), hub.resolve(str(folder)), "cuda")
    step, outer = bed.step(ctrap(bed), bed.train(), bool(adapter))
    assert LORA.r == 8  # as in the recipe
    assert told.hardening == pytest.approx(whole_peak(step, outer, "cuda"), rel=0.15)
