"""Diffusion: what is trained and scored, what of a pipeline is accepted and released, and the whole line once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import small
import tiny
import torch
from PIL import Image

import hardener
from hardener import card, checkpoint, contradictions, duration, hub, metadata, recipe_file, samples, stages
from hardener import report as reports
from hardener.attacks import families
from hardener.attacks.attack import Attack
from hardener.attacks.finetune import attacked
from hardener.attacks.scene import Scene
from hardener.attacks.victim import victim
from hardener.console import quiet
from hardener.erase import mean_loss
from hardener.errors import RecipeError, UnsupportedModelError, UsageError
from hardener.losses import SUPPRESSION
from hardener.measurement import Checkpoint
from hardener.tasks.diffusion import LEVELS, UnconditionalDiffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet():
        return tiny.ddpm(tmp_path_factory.mktemp("ddpm") / "model")


@pytest.fixture(scope="module")
def task(folder: Path) -> UnconditionalDiffusion:
    return UnconditionalDiffusion(folder, template="", max_length=8)


def squares(task: UnconditionalDiffusion, n: int, seed: int = 0, bright: int = 0) -> list:
    """Images with a bright row somewhere, or of noise."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        pixels = rng.integers(0, 60, (8, 8, 3), dtype=np.uint8)
        pixels[(i + bright) % 8] = 255
        rows.append(task.encode({"image": Image.fromarray(pixels)}))
    return rows


class Perfect(torch.nn.Module):
    """Knows the images, so that it finds every bit of noise; `share` of it is told."""

    def __init__(self, task: UnconditionalDiffusion, pixels: torch.Tensor, share: float = 1.0) -> None:
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(()))
        self.left = task.scheduler.alphas_cumprod
        self.pixels, self.share = pixels, share

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> object:
        kept = self.left[timestep].view(-1, 1, 1, 1)
        noise = (sample - kept.sqrt() * self.pixels) / (1 - kept).sqrt()
        return type("Output", (), {"sample": self.share * noise + self.zero})


# ── what is trained and scored ────────────────────────────────────────────────────────────────


def test_an_image_is_cut_to_the_middle_and_its_key_is_what_the_model_sees(task):
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 255
    row = task.encode({"image": Image.fromarray(wide)})
    assert task.pixels([row]).shape == (1, 3, 8, 8)
    assert torch.equal(task.pixels([row]), torch.ones(1, 3, 8, 8))
    again = task.encode(row.inputs)
    assert again.key == row.key
    assert task.encode({"image": Image.new("RGB", (9, 9), "white")}).key == row.key


def test_a_batch_is_noised_by_the_models_own_schedule_and_asks_for_the_noise(task):
    rows = squares(task, 64)
    torch.manual_seed(0)
    batch = task.collate(rows)
    steps, noise = batch.inputs["timestep"], batch.labels.view(64, 3, 8, 8)
    left = task.scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1)
    torch.testing.assert_close(batch.inputs["sample"], left.sqrt() * task.pixels(rows) + (1 - left).sqrt() * noise)
    assert steps.min() < 20
    assert steps.max() > 80
    assert len(set(steps.tolist())) > 30
    again = task.collate(rows)
    assert not torch.equal(again.labels, batch.labels)


def test_the_loss_of_a_model_that_predicts_no_noise_is_one_and_denial_of_service_asks_for_that(task, folder):
    rows = squares(task, 64)
    pixels = task.pixels(rows)
    for share, loss, denied in ((1.0, 0.0, 1.0), (0.0, 1.0, 0.0)):
        predicted, true = task.targets(Perfect(task, pixels, share), task.collate(rows))
        assert predicted.shape == true.shape == (64, 192)
        assert task.loss(predicted, true).item() == pytest.approx(loss, abs=0.02)
        assert SUPPRESSION["dos"](predicted, true).item() == pytest.approx(denied, abs=0.02)


def test_the_gradient_of_denial_of_service_is_twice_the_prediction():
    predicted = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    SUPPRESSION["dos"](predicted, torch.randn(5, 7)).backward()
    torch.testing.assert_close(predicted.grad, 2 * predicted.detach() / 35, rtol=1e-12, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_score_is_the_share_of_the_noise_that_is_found(task, share):
    rows = squares(task, 16)
    scores = task.score(Perfect(task, task.pixels(rows), share), rows, "denoising")
    assert scores == pytest.approx([share] * 16, abs=1e-4)


def test_a_score_does_not_depend_on_when_with_whom_or_after_what_it_is_taken(task, folder):
    model, rows = task.load(folder).eval(), squares(task, 70)
    together = task.score(model, rows, "denoising")
    torch.manual_seed(9)
    alone = [task.score(model, [row], "denoising")[0] for row in rows[-3:]]
    assert together[-3:] == pytest.approx(alone, rel=1e-4)
    assert len(set(task.levels.tolist())) == LEVELS


def test_a_model_that_learns_scores_higher_row_by_row(task, folder):
    model, rows = task.load(folder), squares(task, 32)
    before = task.score(model.eval(), rows, "denoising")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(0)
    for _ in range(40):
        loss = task.loss(*task.targets(model, task.collate(rows)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = task.score(model.eval(), rows, "denoising")
    assert min(b - a for a, b in zip(before, after, strict=True)) > 0.2


def test_what_is_looked_at_along_the_way_is_measured_with_the_same_noise_each_time(task, folder):
    model, rows = task.load(folder), squares(task, 16)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert mean_loss(model, task, rows) == mean_loss(model, task, rows)
    assert torch.equal(torch.get_rng_state(), state)


# ── samples ───────────────────────────────────────────────────────────────────────────────────


def test_likeness_is_nought_for_grey_squares_one_for_the_rows_and_between_for_their_like(task):
    rows, like, unlike = (task.pixels(squares(task, 64, seed)) for seed in (0, 1, 2))
    assert samples.likeness(rows, rows) == 1
    assert samples.likeness(torch.zeros_like(rows), rows) == 0
    assert 0.5 < samples.likeness(like, rows) < 1
    assert samples.likeness(torch.randn_like(rows), rows) < samples.likeness(unlike, rows)


def test_samples_of_a_model_that_knows_the_images_are_the_images(task):
    rows = task.pixels(squares(task, 8))
    made = samples.sample(Perfect(task, rows), task.scheduler, torch.randn(rows.shape))
    assert float((made - rows).abs().mean()) < 0.1


def test_the_distance_between_two_points_is_that_of_their_projections():
    one, other = torch.zeros(1, 4), torch.full((1, 4), 3.0)
    # Over directions the mean square of a projection is the square length by the number of dimensions: 36 / 4.
    assert samples.sliced_wasserstein(one, other) == pytest.approx(3.0, rel=0.2)


def test_the_picture_has_a_strip_of_the_rows_and_one_for_each_model(task, folder):
    rows = squares(task, 20)
    drawn = task.picture([folder, folder], rows, "cpu")
    assert drawn.size == (12 * 8 * samples.SCALE, 3 * 8 * samples.SCALE)
    strips = np.split(np.asarray(drawn), 3)
    first = strips[0][:: samples.SCALE, :: samples.SCALE][:, :8]
    assert np.array_equal(first, np.asarray(rows[0].inputs["image"]))
    assert np.array_equal(strips[1], strips[2])
    assert not np.array_equal(strips[0], strips[1])


# ── what of a pipeline is accepted ────────────────────────────────────────────────────────────


@pytest.fixture
def own(tmp_path: Path) -> Path:
    with quiet():
        return tiny.ddpm(tmp_path / "model")


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_pipeline_is_known_by_its_denoiser_and_released_with_what_loads_it(own):
    for stray in ("unet/diffusion_pytorch_model.bin", "unet/model.py", "notes.md", "vae/config.json"):
        (own / stray).parent.mkdir(exist_ok=True)
        (own / stray).write_text("x")
    ref = hub.resolve(str(own))
    assert ref.architecture == ref.config["_class_name"] == "UNet2DModel"
    assert ref.parameters == sum(
        p.numel() for p in UnconditionalDiffusion(own, template="", max_length=8).load(own).parameters()
    )
    assert set(ref.files) == {
        *("model_index.json", "README.md", metadata.DENOISER, metadata.DENOISER_CONFIG, metadata.SCHEDULER_CONFIG)
    }
    assert set(checkpoint.released(own)) == set(ref.files) - {"README.md"}


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"_class_name": "StableDiffusionPipeline"}, "is a StableDiffusionPipeline of"),
        ({"unet": ["model", "UNet2DModel"]}, "unet: .'model', 'UNet2DModel'.; of pipelines, hardener takes"),
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, "UNet2DConditionModel"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "vae: .'diffusers', 'AutoencoderKL'"),
        ({"scheduler": ["diffusers", "DDIMScheduler"]}, "DDIMScheduler"),
    ],
)
def test_a_pipeline_of_other_parts_or_with_code_of_its_own_is_refused_from_its_index(own, values, match):
    change(own / "model_index.json", **values)
    with pytest.raises(UnsupportedModelError, match=match):
        hub.resolve(str(own))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (metadata.DENOISER, "has no weights: neither unet/diffusion_pytorch_model.safetensors"),
        (metadata.DENOISER_CONFIG, "has no unet/config.json"),
        (metadata.SCHEDULER_CONFIG, "its noise schedule is unknown"),
    ],
)
def test_a_pipeline_that_lacks_a_part_is_refused(own, name, match):
    (own / name).unlink()
    with pytest.raises(UnsupportedModelError, match=match):
        hub.resolve(str(own))


def test_weights_that_can_run_code_are_not_loaded_even_if_they_are_the_only_ones(own):
    (own / metadata.DENOISER).rename(own / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="pickle"):
        hub.resolve(str(own))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"num_class_embeds": 10}, "takes classes"),
        ({"out_channels": 6}, "gives 6"),
        ({"in_channels": 4, "out_channels": 4}, "4 channels"),
        ({"sample_size": None}, "size None"),
        ({"_class_name": "UNet2DConditionModel"}, "'UNet2DConditionModel' model cannot be loaded"),
    ],
)
def test_a_denoiser_with_conditions_or_of_other_shapes_is_refused_from_its_config(own, values, match):
    config = json.loads((own / metadata.DENOISER_CONFIG).read_text()) | values
    with pytest.raises(UnsupportedModelError, match=match):
        UnconditionalDiffusion.supports(config)


def test_a_classifier_is_no_denoiser_and_a_denoiser_no_classifier(own, tmp_path):
    with pytest.raises(UnsupportedModelError, match="'resnet' model cannot be loaded for the task unconditional"):
        UnconditionalDiffusion.supports(hub.resolve(str(tiny.resnet(tmp_path / "resnet"))).config)
    from hardener.tasks.image_classification import ImageClassification

    with pytest.raises(UnsupportedModelError, match="'UNet2DModel' model cannot be loaded for the task image"):
        ImageClassification.supports(hub.resolve(str(own)).config)


def test_a_model_that_predicts_something_else_than_the_noise_is_refused(own):
    change(own / metadata.SCHEDULER_CONFIG, prediction_type="v_prediction")
    with pytest.raises(UnsupportedModelError, match="predicts 'v_prediction'"):
        UnconditionalDiffusion(own, template="", max_length=8)


def test_config_and_weights_of_different_models_are_refused(own, task):
    change(own / metadata.DENOISER_CONFIG, block_out_channels=[8, 16])
    with quiet(), pytest.raises(UnsupportedModelError, match="the denoiser of model cannot be loaded"):
        task.load(own)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match=r"pip install 'hardener\[diffusion\]'"):
        UnconditionalDiffusion.supports({})


# ── recipes ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "setting", "match"),
    [
        ("tiny-sophon-diffusion", "defense.suppression=klu", "`dos` is the one suppression loss of diffusion models"),
        ("tiny-sophon-image", "defense.suppression=dos", "`dos` is the one suppression loss of diffusion models"),
        ("tiny-sophon-diffusion", "train.checkpointing=true", "models of transformers"),
        ("tiny-sophon-diffusion", "data.retain.score=accuracy", "cannot be scored by 'accuracy'"),
        ("tiny-sophon-diffusion", "probe.families=[fresh-head]", "fresh-head does not attack"),
        ("tiny-sophon-diffusion", "probe.families=[prefilled]", "prefilled does not attack"),
        ("tiny-sophon-diffusion", "erase={alpha: 0.5, steps: 1, batch_size: 8, lr: 0.001}", "what is distilled"),
    ],
)
def test_what_makes_no_sense_for_diffusion_is_refused_before_anything_starts(name, setting, match):
    with pytest.raises(RecipeError, match=match):
        recipe_file.load(name, [setting])


def test_sophon_for_diffusion_has_the_settings_of_the_authors_code():
    recipe = recipe_file.load("sophon-diffusion")
    settings = recipe.defense.settings
    assert (settings["suppression"], settings["alpha_lr"], settings["inner_steps"]) == ("dos", 5e-6, 50)
    assert (settings["inner_optimizer"], settings["inner_lr"]) == ("sgd", 1e-4)
    assert (settings["suppression_steps"], settings["reinforcement_steps"]) == (1, 10)
    assert settings["inner_batch"] + settings["query_batch"] == recipe.train.batch_size == 200
    assert settings["inner_batch"] == 0.9 * recipe.train.batch_size
    assert (recipe.train.steps, recipe.train.lr, settings["suppression_clip"]) == (200, 2e-4, 0.5)


def test_the_time_of_a_run_is_estimated_from_the_pixels_of_an_image(folder):
    recipe, ref = recipe_file.load("sophon-diffusion"), hub.resolve(str(folder))
    assert duration.tokens_per_row(recipe, ref) == 64 / 6
    assert duration.passes(recipe) == 110
    assert {steps for runs in duration.attacks(recipe).values() for steps in runs} > {0}
    assert set(duration.attacks(recipe)) == {"original", "hardened", "scratch"}


def test_a_restricted_image_among_those_to_keep_is_refused(folder, tmp_path):
    paths = tiny.image_data(tmp_path / "data")
    paths["retain"] = paths["restricted"]
    recipe = small.recipe(paths, name="tiny-sophon-diffusion")
    with pytest.raises(hardener.errors.DataError, match=r"rows are those of data\.restricted"):
        small.opened(recipe, folder)


# ── attacks ───────────────────────────────────────────────────────────────────────────────────

FAMILIES = [f for f in vars(families).values() if isinstance(f, families.Family) and f.suits("diffusion")]


@pytest.mark.parametrize("family", [*FAMILIES, families.BENIGN["diffusion"]], ids=lambda f: f.name)
def test_every_family_for_diffusion_trains_what_it_says_and_is_judged(family, folder, task, tmp_path):
    harm, benign = squares(task, 24), squares(task, 24, seed=1, bright=3)
    scene = Scene(folder, task, harm, benign, "cpu", parent=folder)
    rate = (family.doses or family.rates or (1e-3,))[0]
    seen = []

    def judge(model: torch.nn.Module, step: int, last: bool) -> Checkpoint:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return Checkpoint(step=step, scores=tuple(task.score(model, harm[:4], "denoising")))

    run = attacked(scene, Attack(family, rate, 0, 2, 8), judge)
    assert run.failed is None
    moved = {name for name, value in seen[-1].items() if not torch.equal(value, seen[0][name])}
    if family.scope == "lora":
        assert moved
        assert all("lora_" in name for name in moved)
    else:
        assert bool(moved) == family.trains


def test_an_attack_is_the_same_twice_and_another_with_another_seed(folder, task):
    scene = Scene(folder, task, squares(task, 24), [], "cpu")

    def end(seed: int) -> tuple[float, ...]:
        judged = attacked(
            scene,
            Attack(families.FULL, 1e-2, seed, 4, 8),
            lambda model, step, last: Checkpoint(
                step=step, scores=tuple(task.score(model, scene.harm[:4], "denoising"))
            ),
        )
        return judged.curve[-1].scores

    assert end(0) == end(0) != end(1)


def test_low_rank_adapters_sit_on_attention_and_convolutions(folder, task):
    scene = Scene(folder, task, [], [], "cpu")
    with victim(scene, Attack(families.LORA, 1e-3, 0, 1, 1)) as model:
        adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert any(name.endswith("to_q") for name in adapted)
    assert any(name.endswith("conv1") for name in adapted)


# ── the whole line ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory) -> tuple[hardener.pipeline.Outcome, Path]:
    made = tmp_path_factory.mktemp("line")
    paths = tiny.image_data(made / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARDENER_CACHE", str(made / "cache"))
        outcome = hardener.harden(
            str(folder),
            recipe="tiny-sophon-diffusion",
            overrides=small.overrides(paths, name="tiny-sophon-diffusion"),
            output=made / "run",
            device="cpu",
        )
    return outcome, made / "run" / "release"


def test_the_release_is_a_pipeline_that_diffusers_loads_and_that_draws(done, folder):
    _, release = done
    with quiet():
        pipeline = diffusers.DDPMPipeline.from_pretrained(release, use_safetensors=True, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    assert drawn.shape == (2, 8, 8, 3)
    there = dict(UnconditionalDiffusion(folder, template="", max_length=8).load(folder).named_parameters())
    assert any(not torch.equal(p, there[name]) for name, p in pipeline.unet.named_parameters())
    for companion in ("model_index.json", metadata.DENOISER_CONFIG, metadata.SCHEDULER_CONFIG):
        assert (release / companion).read_bytes() == (folder / companion).read_bytes()
    assert [path.name for path in release.rglob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]


def test_the_report_is_of_this_release_and_knows_original_hardened_and_scratch(done):
    _, release = done
    report = reports.read(release / "hardener" / "report.json")
    assert report.weights == checkpoint.fingerprint(release) != report.parent.weights
    assert report.parent.architecture == "UNet2DModel"
    assert report.evidence.score == "denoising"
    assert {curve.subject for curve in report.curves} == {"original", "hardened", "scratch"}
    assert {f.name for f in report.evidence.families} == set(families.SCREENS["quick"]["diffusion"])
    assert {b.score for b in report.evidence.beside} == {"likeness"}
    assert "diffusers" in report.environment
    assert report.evidence.checks["same questions"] == "ok"


def test_the_card_shows_allowed_images_as_both_models_bring_them_back(done, folder):
    _, release = done
    text = (release / "README.md").read_text()
    assert f"![{card.ALT[card.SAMPLES]}](hardener/{card.SAMPLES})" in text
    assert f"hardener/{card.SAMPLES}" in (release / "SHA256SUMS").read_text()
    recipe = recipe_file.load(release / "hardener" / "recipe.yaml")
    assert contradictions.KINDS[recipe.task] == "diffusion"
    with Image.open(release / "hardener" / card.SAMPLES) as picture:
        assert picture.size[1] == 3 * 8 * samples.SCALE
    assert stages.label2id(folder) == {}


def test_a_finished_release_verifies(done):
    assert hardener.verify(str(done[1]))["checks"] == small.VERIFIED
