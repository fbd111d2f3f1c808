"""The plan: from metadata alone, nothing changed on the Hub, and an estimate that counts what is really computed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import hub_server
import pytest
import small
import torch
from torch.utils.flop_counter import FlopCounterMode

from hardener import hub, judging, ladder, pipeline, plan, recipe_file, stages
from hardener.attacks.training import inputs
from hardener.bench import Bench
from hardener.errors import HubError, ResourceError
from hardener.probing import Prober
from hardener.target import destination

pytestmark = hub_server.PLAIN_HTTP
Hub = hub_server.Hub
CARD = {"license": "other", "license_name": "house", "license_link": "LICENSE"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server.hub_server(tmp_path / "home") as running:
        running.connect(monkeypatch)
        yield running


def recipe(*overrides: str, name: str = "tiny-ctrap"):
    return recipe_file.load(name, overrides)


# --- the plan ------------------------------------------------------------------------------


def test_the_plan_is_made_without_a_byte_of_weights(server: Hub, letters: Path, tmp_path: Path) -> None:
    repo = server.add_model("org/model", letters, card=CARD, gated="manual")
    repo.granted = True
    ref = hub.resolve("org/model")
    made = plan.plan(recipe(), ref, destination("me/new", ref), place=tmp_path / "runs" / "new", device="cpu")
    assert (made.model, made.commit, made.gated, made.private) == ("org/model", repo.head.oid, "manual", False)
    assert (made.license, made.license_name, made.license_link) == ("other", "house", "LICENSE")
    assert (made.download, made.files) == (ref.bytes, len(ref.files))
    assert made.disk_free > made.disk > 2 * made.download
    assert (made.push_to, made.push_exists, made.push_gated) == ("me/new", False, "manual")
    assert made.hardening_seconds > 0 < made.probe_seconds
    read = server.asked(r"GET .*\.safetensors")
    assert [one.range for one in read] == ["bytes=0-100000"]  # the header, within the client's first look
    assert server.writes() == []


def test_a_dry_run_asks_the_hub_fails_as_the_run_would_and_leaves_nothing(
    server: Hub, letters: Path, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_model("org/model", letters, card=CARD)
    monkeypatch.chdir(tmp_path)
    asked = {"recipe": "tiny-ctrap", "overrides": small.overrides(paths), "dry_run": True}
    made = pipeline.harden("org/model", push_to="new", **asked).plan
    assert (made.push_to, made.push_exists, made.push_writable) == ("me/new", False, True)
    with pytest.raises(HubError, match="lacks the right") as caught:
        pipeline.harden("org/model", push_to="other/new", **asked)
    assert caught.value.exit_code == 3
    assert server.writes() == []
    assert all(one.range for one in server.asked(r"GET .*\.safetensors"))
    assert not (tmp_path / "runs").exists()


def test_the_json_form_has_the_names_that_pipelines_read(letters: Path) -> None:
    told = json.loads(json.dumps(plan.plan(recipe(), hub.resolve(str(letters)), None, device="cpu").to_dict()))
    assert list(told) == [field.name for field in fields(plan.Plan)]
    assert {name: told[name] for name in ("model", "commit", "download", "push_to", "push_exists")} == {
        **{"model": letters.name, "commit": None, "download": 0, "push_to": None, "push_exists": None}
    }


def test_a_disk_that_is_too_small_is_refused(letters: Path, tmp_path: Path) -> None:
    made = plan.plan(recipe(), hub.resolve(str(letters)), None, device="cpu")
    plan.check_disk(made, tmp_path / "not" / "yet" / "there")
    with pytest.raises(ResourceError, match=r"free, the run needs about 1,000,000,000\.00 GB"):
        plan.check_disk(replace(made, disk=10**18), tmp_path / "not" / "yet" / "there")


MADE = plan.Plan(
    **{"model": "org/" + "m" * 90, "commit": "c" * 40, "license": "other", "license_name": "house"},
    **{"license_link": "https://example.org/" + "terms/" * 12, "gated": "manual", "private": False},
    **{"parameters": 1_235_814_400, "dtype": "bfloat16", "files": 9, "download": 2_480_000_000, "recipe": "ctrap"},
    **{"defense": "ctrap", "outer_steps": 20000, "passes_per_step": 3, "attacks": "standard: 64 steps of 16 rows"},
    **{"attack_runs": 100, "memory": 20_000_000_000, "disk": 30_000_000_000, "disk_free": 10**12, "device": "cuda"},
    **{"hardening_seconds": 1800.0, "probe_seconds": 600.0, "push_to": "me/new", "push_exists": False},
    **{"push_private": False, "push_gated": "manual", "push_writable": True, "push_note": None},
    push_transfer="unknown until it exists",
)


def test_the_human_form_fits_into_eighty_columns_and_tells_everything() -> None:
    rows = plan.lines(MADE)
    assert all(len(f"  {name:<10} {value}") <= 80 for name, value in rows)
    told: dict[str, str] = {}
    for name, value in rows:
        told |= {name or next(reversed(told)): f"{told[next(reversed(told))]} {value}" if not name else value}
    assert told["time"] == "about 23 min to 69 min on cuda, 75% of it to harden"
    assert told["size"] == "1,235,814,400 parameters, bfloat16; 9 files, 2.48 GB to fetch"
    assert told["access"] == "public, gated (manual)"
    assert told["push to"] == (
        "me/new: will be created; public, gated (manual); this token may write; transfer: unknown until it exists"
    )
    assert "house" in told["licence"]
    assert dict(plan.lines(replace(MADE, push_exists=None, push_note="nobody asked")))["push to"] == (
        "me/new: nobody asked"
    )
    assert "push to" not in dict(plan.lines(replace(MADE, push_to=None)))


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.1, "1 s"), (80, "80 s"), (3599, "60 min"), (5400, "2 h"), (200_000, "2 days")]
)
def test_times_are_told_in_the_unit_that_suits_them(seconds: float, said: str) -> None:
    assert plan._duration(seconds) == said


# --- how long it takes ------------------------------------------------------------------------------


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
    assert (len(seen), sum(seen)) == (plan.passes(chosen), plan.rows_per_step(chosen))
    work = plan.hardening(chosen)
    assert (work.passes, work.rows) == (4 * len(seen), 4 * 3 * sum(seen))


def test_the_rows_of_an_erasure_are_those_of_student_and_teacher() -> None:
    erase = recipe(name="tiny-erase").erase
    chosen = recipe("erase.steps=5", "erase.batch_size=8", "erase.unlearn={steps: 2, lr: 1.0e-3}", name="tiny-erase")
    assert erase != "none"
    assert plan.erasing(chosen) == plan.Work(8 * (2 * 3 + 5 * 3 + 5), 2 + 5 * 2)
    assert plan.hardening(chosen) == plan.erasing(chosen)
    assert plan.erasing(recipe()) == plan.Work(0, 0)


def test_a_defence_of_a_third_party_has_no_count() -> None:
    foreign = recipe().model_copy(update={"defense": recipe().defense.model_copy(update={"name": "theirs"})})
    assert (plan.passes(foreign), plan.rows_per_step(foreign)) == (0, 0)


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
    cut = chosen.model_copy(update={"data": chosen.data.model_copy(update={"max_length": tokens})})
    ref = replace(hub.resolve(str(folder)), tensors={})  # without the dispatch
    estimated = plan.seconds(plan.Work(plan.TRAINED * len(rows), 1), cut, ref, reached=1.0)
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
    assert counted.get_total_flops() / (2 * weights) == pytest.approx(plan.CONVOLVED, rel=0.05)


def test_the_patches_of_an_image_are_its_tokens(letters: Path) -> None:
    ref, image = hub.resolve(str(letters)), recipe(name="tiny-sophon-image")
    assert plan.tokens_per_row(image, replace(ref, config={"image_size": 224, "patch_size": 16})) == 196
    assert plan.tokens_per_row(image, replace(ref, config={})) == plan.CONVOLVED
    assert plan.tokens_per_row(recipe(), ref) == 64


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
    told = plan.attacks(limited)
    prober = Prober(bench, "original", folder, tmp_path, lambda text: None)
    assert sorted(told["original"]) == sorted(prober._expected([f for f in families if not f.needs_parent]))
    longer = [replace(f, steps=min(plan.LONGER * f.steps, chosen.probe.max_steps)) for f in families]
    assert sorted(told["hardened"]) == sorted(prober._expected(longer))
    assert ("scratch" in told) == (not task.generative)


def test_what_the_plan_takes_from_heavy_modules_is_what_they_say() -> None:
    assert (plan.REPEATED, plan.GATE_ROWS) == (ladder.WORST, judging.GATE_ROWS)


def test_judging_is_counted_at_every_checkpoint() -> None:
    chosen = recipe("probe.steps=4")
    quiet, once = plan.probing(chosen, [0]), plan.probing(chosen, [4])
    held_out = chosen.probe.evaluation_rows + 128  # and general utility on one retain source
    assert quiet == plan.Work(held_out, 6)
    assert once == plan.Work(3 * 4 * 16 + 5 * held_out, 4 + 5 * 6)  # before any step, and after 1, 2, 3, 4


def test_the_speed_of_the_device_is_that_of_a_product_timed_by_hand() -> None:
    reached = plan.speed("cpu", "float32")
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
    began = time.monotonic()
    outcome = pipeline.harden(str(letters), recipe="tiny-ctrap", overrides=overrides, output=tmp_path / "run")
    took = time.monotonic() - began
    planned = outcome.plan.hardening_seconds + outcome.plan.probe_seconds
    assert planned / 5 < took < planned * 5
