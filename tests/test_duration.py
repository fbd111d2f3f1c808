"""The estimate of time counts what is really computed, and comes near to what is really taken."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import small
import torch
from torch.utils.flop_counter import FlopCounterMode

from hardener import duration, hub, pipeline, recipe_file, stages
from hardener.attacks.training import inputs
from hardener.bench import Bench
from hardener.probing import Prober
from hardener.recipe import Data, Source


def recipe(*overrides: str, name: str = "tiny-ctrap"):
    return recipe_file.load(name, overrides)


@pytest.mark.parametrize("name", ["tiny-ctrap", "tiny-sophon-text"])
def test_the_rows_of_a_step_are_those_that_the_defence_sends_through_the_model(
    letters: Path, paths: dict[str, Path], bert: Path, text_paths: dict[str, Path], name: str
) -> None:
    folder, data = (letters, paths) if name == "tiny-ctrap" else (bert, text_paths)
    chosen = small.recipe(data, name=name)
    defense, outer = small.defended(chosen, folder)
    seen: list[int] = []
    outer.model.register_forward_pre_hook(lambda _, args, named: seen.append(len(named["input_ids"])), with_kwargs=True)
    defense.step(outer)
    assert (len(seen), sum(seen)) == (duration.passes(chosen), duration.rows_per_step(chosen))
    work = duration.hardening(chosen)
    assert (work.passes, work.rows) == (4 * len(seen), 4 * 3 * sum(seen))


def test_the_rows_of_an_erasure_are_those_of_student_and_teacher() -> None:
    erase = recipe(name="tiny-erase").erase
    chosen = recipe("erase.steps=5", "erase.batch_size=8", "erase.unlearn={steps: 2, lr: 1.0e-3}", name="tiny-erase")
    assert erase != "none"
    assert duration.erasing(chosen) == duration.Work(8 * (2 * 3 + 5 * 3 + 5), 2 + 5 * 2)
    assert duration.hardening(chosen) == duration.erasing(chosen)
    assert duration.erasing(recipe()) == duration.Work(0, 0)


def test_a_defence_of_a_third_party_has_no_count() -> None:
    foreign = recipe().model_copy(update={"defense": recipe().defense.model_copy(update={"name": "theirs"})})
    assert (duration.passes(foreign), duration.rows_per_step(foreign)) == (0, 0)


@pytest.mark.parametrize("name", ["letters", "bert"])
def test_the_operations_are_those_that_torch_counts(
    letters: Path, paths: dict[str, Path], bert: Path, text_paths: dict[str, Path], name: str
) -> None:
    folder, data, own = {"letters": (letters, paths, "tiny-ctrap"), "bert": (bert, text_paths, "tiny-sophon-text")}[
        name
    ]
    chosen = small.recipe(data, name=own)
    task, streams = small.opened(chosen, folder)
    model, rows = task.load(folder), streams.rows("restricted", "attack")[:8]
    batch = inputs(task, rows)
    tokens = batch["input_ids"].shape[1]
    with FlopCounterMode(display=False) as counted:
        model(**batch).loss.backward()
    ref = replace(hub.resolve(str(folder)), tensors={})  # without the dispatch
    estimated = duration.seconds(duration.Work(duration.TRAINED * len(rows), 1), ref, tokens, reached=1.0)
    assert estimated == pytest.approx(counted.get_total_flops(), rel=0.2)  # attention is not counted


@pytest.mark.parametrize(("depths", "kind"), [([3, 4, 6, 3], "bottleneck"), ([2, 2, 2, 2], "basic")])
def test_an_image_is_worth_the_places_at_which_a_convolution_is_applied(depths: list[int], kind: str) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = [256, 512, 1024, 2048] if kind == "bottleneck" else [64, 128, 256, 512]
    config = ResNetConfig(depths=depths, layer_type=kind, hidden_sizes=sizes)
    with torch.device("meta"):
        model = ResNetForImageClassification(config).eval()
        with FlopCounterMode(display=False) as counted:
            model(torch.empty(1, 3, 224, 224))
    weights = sum(p.numel() for p in model.parameters())
    assert counted.get_total_flops() / (2 * weights) == pytest.approx(duration.CONVOLVED, rel=0.05)


def test_the_patches_of_an_image_are_its_tokens(letters: Path) -> None:
    ref, image = hub.resolve(str(letters)), recipe(name="tiny-sophon-image")
    assert duration.tokens_per_row(image, replace(ref, config={"image_size": 224, "patch_size": 16})) == 196
    assert duration.tokens_per_row(image, replace(ref, config={})) == duration.CONVOLVED


def test_the_rows_of_local_text_are_measured_and_no_longer_than_they_may_be(tmp_path: Path) -> None:
    short, long = tmp_path / "short.jsonl", tmp_path / "long.csv"
    row = '{"prompt": "ab", "completion": "c"}'
    short.write_text(f"{row}\n" * 9 + "x" * duration.BEGINNING)
    long.write_text("prompt,completion\n" + "p" * 20 + "," + "c" * 979 + "\n")
    local, cut, remote = (Source(dataset=str(name)) for name in (short, long, "org/hub"))
    data = Data(restricted=(local,), alignment=(remote,), retain=(cut, remote), max_length=100)
    assert duration.text_length(data) == pytest.approx(mean([len(row) / 4, 100, mean([mean([17 / 4, 100]), 100])]))
    assert duration.text_length(recipe().data) == 64


@pytest.mark.parametrize(("output", "tied"), [(False, True), (True, False)])
def test_an_embedding_table_counts_only_where_it_is_the_output_layer_too(
    tmp_path: Path, output: bool, tied: bool
) -> None:
    from safetensors.torch import save_file

    tensors = {"model.embed_tokens.weight": torch.ones(50, 4), "model.layers.0.mlp.up_proj.weight": torch.ones(8, 4)}
    save_file(tensors | ({"lm_head.weight": torch.ones(50, 4)} if output else {}), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    ref = hub.resolve(str(tmp_path))
    assert (ref.multiplied, ref.parameters) == (232, 232 if tied else 432)


@pytest.mark.parametrize("preset", ["reduced-cpu", "quick", "standard", "thorough"])
@pytest.mark.parametrize("name", ["tiny-ctrap", "tiny-sophon-text"])
def test_the_attacks_are_those_that_the_probe_plans(
    letters: Path,
    paths: dict[str, Path],
    bert: Path,
    text_paths: dict[str, Path],
    tmp_path: Path,
    name: str,
    preset: str,
) -> None:
    folder, data = (letters, paths) if name == "tiny-ctrap" else (bert, text_paths)
    chosen = small.recipe(data, f"probe.preset={preset}", name=name)
    task, streams = small.opened(chosen, folder)
    bench = Bench(task, streams, chosen.probe, "cpu")
    families = stages.choose_families(bench, folder)
    mine = {f.name for f in families}  # what does not apply here is not known from metadata
    limited = chosen.model_copy(update={"probe": chosen.probe.model_copy(update={"families": tuple(mine)})})
    told = duration.attacks(limited)
    prober = Prober(bench, "original", folder, tmp_path, lambda text: None)
    assert sorted(told["original"]) == sorted(prober._expected([f for f in families if not f.needs_parent]))
    longer = [replace(f, steps=min(duration.LONGER * f.steps, chosen.probe.max_steps)) for f in families]
    assert sorted(told["hardened"]) == sorted(prober._expected(longer))
    assert ("scratch" in told) == (not task.generative)


def test_judging_is_counted_at_every_checkpoint() -> None:
    chosen = recipe("probe.steps=4")
    quiet, once = duration.probing(chosen, [0]), duration.probing(chosen, [4])
    held_out = chosen.probe.evaluation_rows + 128  # and general utility on one retain source
    assert quiet == duration.Work(held_out, 6)
    assert once == duration.Work(3 * 4 * 16 + 5 * held_out, 4 + 5 * 6)  # before any step, and after 1, 2, 3, 4


def test_the_speed_of_the_device_is_that_of_a_product_timed_by_hand() -> None:
    reached = duration.speed("cpu", "float32")
    matrix = torch.rand(1024, 1024)
    matrix @ matrix
    began = time.perf_counter()
    for _ in range(5):
        matrix @ matrix
    by_hand = 5 * 2 * 1024**3 / (time.perf_counter() - began)
    assert by_hand / 20 < reached < by_hand * 20  # other work on the machine comes and goes


@pytest.mark.slow
def test_a_small_hardening_takes_about_as_long_as_was_planned(
    letters: Path, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: None
) -> None:
    monkeypatch.setenv("HARDENER_CACHE", str(tmp_path / "cache"))
    overrides = small.overrides(
        paths, "train.steps=100", "train.save_every=100", "probe.steps=32", "probe.max_steps=64"
    )
    began = time.process_time()
    outcome = pipeline.harden(str(letters), recipe="tiny-ctrap", overrides=overrides, output=tmp_path / "run")
    took = time.process_time() - began
    planned = outcome.plan.hardening_seconds + outcome.plan.probe_seconds
    assert planned / 5 < took < planned * 5
