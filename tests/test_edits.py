"""What is done to weights without training is what it says, checked along a second, simpler road."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from types import SimpleNamespace

import placebos
import pytest
import small
import tiny
import torch
from torch import nn

from hardener import demo
from hardener.attacks import ablation, edits, families
from hardener.attacks.ablation import GUARD, ablate
from hardener.attacks.attack import Attack
from hardener.attacks.edits import EDITS
from hardener.attacks.finetune import attacked
from hardener.attacks.scene import Scene
from hardener.checks import sound
from hardener.console import quiet
from hardener.errors import CannotEdit
from hardener.measurement import Checkpoint
from hardener.tasks.causal_lm import CausalLM
from hardener.tasks.encoder import TextEncoder
from hardener.tasks.sequence_classification import SequenceClassification


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def lm_scene(folder, parent=None):
    task = CausalLM(folder, template="", max_length=64)
    rng = random.Random(0)
    harm = [task.encode(row) for row in demo.take(demo.rows(demo.RESTRICTED, {}, rng), 24)]
    benign = [task.encode(row) for row in demo.take(demo.rows({"copy": list}, {}, rng), 24)]
    return Scene(folder, task, harm, benign, "cpu", parent=parent, refusals=(demo.REFUSAL,))


@pytest.fixture(scope="module")
def scene(letters, tmp_path_factory):
    """An untrained letters Llama, and another one as its parent."""
    return lm_scene(letters, tiny.letters(tmp_path_factory.mktemp("parent"), seed=1))


@pytest.fixture(scope="module")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = len(demo.letters_tokenizer())
    return GPT2LMHeadModel(GPT2Config(vocab_size=size, n_embd=48, n_layer=2, n_head=4, n_positions=64)).eval()


def loaded(scene):
    return scene.task.load(scene.folder).eval()


def edited(name, scene, dose, model=None, seed=0):
    """(parameters before, parameters after)."""
    model = model or loaded(scene)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    EDITS[name](model, scene, dose, seed)
    return before, dict(model.named_parameters())


def linear(parameters):
    """Names of the weights of linear layers, the output layer left out."""
    return [name for name in parameters if name.endswith(("proj.weight", "c_attn.weight", "c_fc.weight"))]


def test_every_edit_of_the_table_of_families_is_known():
    named = {f.edit for f in vars(families).values() if isinstance(f, families.Family)} - {None}
    assert named == set(EDITS)


# Pruned, rounded, kicked


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dose", [0.2, 0.5])
def test_the_smallest_weights_of_every_linear_layer_are_pruned(scene, gpt2, kind, dose):
    before, after = edited("pruned", scene, dose, copy.deepcopy(gpt2) if kind == "gpt2" else None)
    assert len(linear(before)) == (14 if kind == "llama" else 8)
    for name, old in before.items():
        if name not in linear(before):
            assert torch.equal(after[name], old), name
            continue
        gone = after[name] == 0
        assert int(gone.sum()) == round(dose * old.numel())
        assert old[gone].abs().max() <= old[~gone].abs().min()
        assert torch.equal(after[name][~gone], old[~gone])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_rounded_by_half_a_step_at_most(scene, gpt2, kind, bits):
    model = copy.deepcopy(gpt2) if kind == "gpt2" else loaded(scene)
    zero = "transformer.h.0.mlp.c_fc.weight" if kind == "gpt2" else "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(zero)[(slice(None), 3) if kind == "gpt2" else 3] = 0.0  # what one output reads
    before, after = edited("rounded", scene, bits, model)
    for name, old in before.items():
        if name not in linear(before):
            assert torch.equal(after[name], old), name
            continue
        old, new = (old.T, after[name].T) if kind == "gpt2" else (old, after[name])
        for row, rounded in zip(old, new, strict=True):
            step = row.abs().max() / (2 ** (bits - 1) - 1)
            assert (row - rounded).abs().max() <= 0.5001 * step
            assert len(rounded.unique()) <= 2**bits - 1
            assert torch.isfinite(rounded).all()
    gone = after[zero].T[3] if kind == "gpt2" else after[zero][3]
    assert not gone.any()


def test_eight_bits_hardly_change_what_a_model_says_and_four_do(scene):
    logits = []
    for bits in (None, 8, 4):
        model = loaded(scene)
        if bits:
            EDITS["rounded"](model, scene, bits, 0)
        logits.append(ablation.log_probabilities(model, scene, scene.benign).detach())
    eight, four = ((made - logits[0]).norm() / logits[0].std() / logits[0].numel() ** 0.5 for made in logits[1:])
    assert eight < 0.02
    assert 4 * eight < four


@pytest.mark.parametrize("dose", [0.05, 0.5])
def test_a_kick_is_a_share_of_every_tensors_norm(scene, dose):
    before, after = edited("kicked", scene, dose)
    for name, old in before.items():
        assert (after[name] - old).norm().item() == pytest.approx(dose * old.norm().item(), rel=1e-3)
    again, other = edited("kicked", scene, dose)[1], edited("kicked", scene, dose, seed=1)[1]
    assert all(torch.equal(after[name], again[name]) for name in before)
    assert not any(torch.equal(after[name], other[name]) for name in before)


def test_a_kick_leaves_zeros_and_whatever_it_does_is_finite(scene):
    model = loaded(scene)
    nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    _, after = edited("kicked", scene, 0.5, model)
    assert not after["model.layers.0.mlp.up_proj.weight"].any()
    assert all(p.isfinite().all() for p in after.values())


# The parent


def test_merging_goes_to_the_parent_and_half_way_to_the_mean(scene):
    parent = dict(scene.task.load(scene.parent).named_parameters())
    for dose in (1.0, 0.5, 0.1):
        before, after = edited("merged", scene, dose)
        for name, old in before.items():
            torch.testing.assert_close(after[name], (1 - dose) * old + dose * parent[name], rtol=1e-5, atol=1e-7)


def test_a_change_that_is_removed_in_full_gives_the_parents_matrices(scene):
    parent = dict(scene.task.load(scene.parent).named_parameters())
    before, after = edited("delta-removed", scene, 1000)
    for name, old in before.items():
        torch.testing.assert_close(after[name], parent[name] if old.dim() == 2 else old, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_what_is_left_of_a_change_is_its_best_residual(scene, rank):
    """Eckart and Young: the tail of the singular values, and no rank-k change leaves less."""
    parent = dict(scene.task.load(scene.parent).named_parameters())
    before, after = edited("delta-removed", scene, rank)
    for name in linear(before):
        values = torch.linalg.svdvals(before[name] - parent[name])
        left = torch.linalg.svdvals(after[name] - parent[name])
        torch.testing.assert_close(left[: len(values) - rank], values[rank:], rtol=1e-3, atol=1e-5)
        assert left[len(values) - rank :].max() < 1e-4


def test_a_parent_of_another_shape_gives_no_hold(scene, tmp_path):
    tokenizer = demo.letters_tokenizer()
    tokenizer.add_tokens(["v1"])
    wider = tiny.saved(demo.tiny_llama(tokenizer, 0), tokenizer, tmp_path / "wider")
    for name in ("merged", "delta-removed"):
        with pytest.raises(CannotEdit, match="the parent has no"):
            EDITS[name](loaded(scene), replace(scene, parent=wider), 1.0, 0)


# Healed, canonical


def test_healing_lowers_the_loss_on_the_models_own_task_and_keeps_every_shape(bert):
    task = SequenceClassification(bert, template="", max_length=16)
    own = [task.encode({"text": f"{x} {y} z", "label": i}) for i, x in enumerate("abc") for y in "klmnop"]
    scene = Scene(bert, task, (), own, "cpu", classes=3)
    model = task.load(bert)
    losses = []
    for dose in (0.0, 1e-3):
        before, after = edited("healed", scene, dose, model)
        assert {name: p.shape for name, p in after.items()} == {name: p.shape for name, p in before.items()}
        assert all(p.grad is None for p in after.values())
        with torch.no_grad():
            losses.append(nn.functional.cross_entropy(*task.targets(model, task.collate(own))).item())
        assert bool(dose) != all(torch.equal(after[name], before[name]) for name in before)
    assert losses[1] < losses[0] - 0.05


# Re-scaled


@pytest.fixture(scope="module")
def pictures(resnet, image_paths):
    """A ResNet and rows of its attacker."""
    recipe = small.recipe(image_paths, name="tiny-sophon-image")
    task, streams = small.opened(recipe, resnet)
    rows = streams.rows("restricted", "attack")
    return Scene(resnet, task, rows, streams.rows("retain", "attack"), "cpu", classes=3)


def test_rescaling_gives_every_weight_the_norm_of_a_fresh_one_and_keeps_its_direction(pictures):
    torch.manual_seed(5)
    fresh = dict(pictures.task.scratch(pictures.folder).named_parameters())
    before, after = edited("rescaled", pictures, 0.0, seed=5)
    for name, p in after.items():
        if name.endswith("bias"):
            assert torch.equal(p, before[name])
        else:
            assert p.norm().item() == pytest.approx(fresh[name].norm().item(), rel=1e-5)
            assert torch.cosine_similarity(p.flatten(), before[name].flatten(), dim=0).item() == pytest.approx(1)


def test_rescaling_undoes_any_scale_that_a_defence_gave_to_a_weight(pictures):
    plain, scaled = loaded(pictures), loaded(pictures)
    with torch.no_grad():
        for i, (name, p) in enumerate(scaled.named_parameters()):
            p.mul_(1.0 if name.endswith("bias") else 10.0 ** (i % 5 - 2))
    for model in (plain, scaled):
        edited("rescaled", pictures, 0.0, model)
    there = scaled.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.allclose(value.double(), there[name].double(), rtol=1e-3, atol=1e-5), name


def test_rescaling_keeps_the_function_where_a_normalisation_follows_each_matrix(pictures):
    batch = pictures.task.collate(pictures.harm[:16]).inputs["pixel_values"]
    model = loaded(pictures)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(3.0)

    def features():  # those that the head sees: no normalisation follows the head
        return model.train().base_model(batch).pooler_output.detach()

    before = features()
    edited("rescaled", pictures, 0.0, model)
    assert torch.allclose(features(), before, atol=2e-3)
    assert before.std() > 0.1


def test_after_rescaling_batch_norm_has_the_statistics_of_the_attackers_rows(pictures):
    pixels = pictures.task.collate(pictures.harm).inputs["pixel_values"]
    model = loaded(pictures)
    edited("rescaled", pictures, 0.0, model)
    with torch.no_grad():
        known, measured = (model.base_model.train(mode)(pixels).pooler_output for mode in (False, True))
    assert (known - measured).abs().mean() < 0.1 * measured.std()  # the variances differ by n / (n − 1)


@pytest.mark.parametrize("bare", [False, True])
def test_a_reader_of_texts_with_a_head_or_without_is_rescaled_as_well(tmp_path, bare):
    folder = tiny.bert(tmp_path, bare=bare)
    task = (TextEncoder if bare else SequenceClassification)(folder, template="", max_length=16)
    rows = [task.encode({"text": f"{x} {y}", "label": i}) for i, x in enumerate("abc") for y in "klm"]
    family = families.FRESH_RESCALED
    run = attacked(
        Scene(folder, task, rows, rows, "cpu", classes=3),
        Attack(replace(family, steps=2, planned=2), 1e-3, 0, 2, 8),
        lambda model, step, last: Checkpoint(step=step, scores=tuple(task.score(model, rows, "accuracy"))),
    )
    assert sound(run)


def test_a_rescaled_model_and_the_one_it_was_made_from_have_one_canonical_form(scene):
    placebo = loaded(scene)
    with torch.no_grad():
        placebos.llama_whole(placebo)
    _, one = edited("canonical", scene, 0.0)
    _, other = edited("canonical", scene, 0.0, placebo)
    for name, p in one.items():
        torch.testing.assert_close(other[name], p, rtol=1e-3, atol=1e-5)


# Ablated


def planted(folder, layers=2, guarded=False):
    """A Llama that refuses whatever has the word `cipher` in it, by one direction of its stream: (folder, direction).

    The first layer's attention finds the word and writes the direction, which the output layer reads as a refusal.
    The other writers hold noise that nothing calls forth. With `guarded`, that direction is what every answer leans
    on as well, and the second layer writes another one beside it.
    """
    tokenizer = demo.letters_tokenizer()
    model = demo.tiny_llama(tokenizer, 0)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    model = type(model)(config)
    directions = torch.linalg.qr(torch.randn(96, 3))[0].T  # what `cipher` is; the refusal; another one
    word, refusal, another = directions
    with torch.no_grad():
        embedding, output = model.model.embed_tokens.weight, model.lm_head.weight
        for weight in (embedding, output):
            weight.normal_()
            weight -= weight @ directions.T @ directions
        embedding += (3.0 if guarded else 0.05) * refusal
        embedding[tokenizer.convert_tokens_to_ids("cipher")] += 20 * word
        output[tokenizer.convert_tokens_to_ids("i")] += 6 * refusal
        if guarded:
            output[:] += torch.randn(len(output), 1) * refusal
        for layer, wrote in zip(model.model.layers, (refusal, another), strict=False):
            attention = layer.self_attn
            for weight in (attention.q_proj, attention.k_proj, attention.v_proj, layer.mlp.gate_proj):
                weight.weight.zero_()
            if layer is model.model.layers[0] or guarded:
                attention.v_proj.weight[0] = word
                attention.o_proj.weight[:, 0] = wrote * (8 if wrote is refusal else 40)
    return tiny.saved(model, tokenizer, folder), refusal


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    with quiet():
        folder, direction = planted(tmp_path_factory.mktemp("planted"))
        return lm_scene(folder), direction


def first_words(scene, model, rows):
    return {answer.text.split(" ")[0] for answer in scene.task.answers(model, rows, 1)}


def test_ablation_finds_the_planted_direction_and_takes_it_out_of_all_that_writes(refusing):
    scene, direction = refusing
    model = loaded(scene)
    written = [name for name in dict(model.named_parameters()) if "o_proj" in name or "down" in name or "embed" in name]
    before, after = edited("ablated", scene, 1.0, model)
    assert [name for name in before if not torch.equal(after[name], before[name])] == written
    assert len(written) == 5  # the embeddings, and two in each of two layers
    for name in written:
        stream = (lambda weight: weight.T) if "embed" in name else (lambda weight: weight)
        old, new = stream(before[name]), stream(after[name])
        assert (direction @ old).norm() > 0.1  # there was something to take out
        assert (direction @ new).norm() < 1e-3 * old.norm()
        torch.testing.assert_close(new, old - torch.outer(direction, direction @ old), rtol=1e-3, atol=1e-3)


def test_a_model_without_its_refusal_direction_refuses_no_more_and_is_otherwise_as_it_was(refusing):
    scene, _ = refusing
    model, own = loaded(scene), loaded(scene)
    assert first_words(scene, own, scene.harm) == {"i"}
    assert "i" not in first_words(scene, own, scene.benign)
    ablate(model, scene, 1.0)
    assert "i" not in first_words(scene, model, scene.harm)
    assert mean(scene.task.score(model, scene.harm, "likelihood-gain")) < mean(
        scene.task.score(own, scene.harm, "likelihood-gain")
    )
    assert first_words(scene, model, scene.benign) == first_words(scene, own, scene.benign)


def mean(values):
    return sum(values) / len(values)


def test_half_an_ablation_takes_out_half(refusing):
    scene, direction = refusing
    before, after = edited("ablated", scene, 0.5)
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        torch.testing.assert_close(direction @ after[name], 0.5 * (direction @ before[name]), rtol=1e-2, atol=1e-2)


def candidates(scene):
    """By a second road, each layer's direction with (NLL of restricted answers, KL on benign ones) once it is out."""

    def at_prompt_end(model, row):
        ids = torch.tensor([row.inputs["input_ids"][: row.inputs["prompt"]]])
        return torch.stack([h[0, -1] for h in model(input_ids=ids, output_hidden_states=True).hidden_states])

    def benign(model):
        rows = [torch.tensor([row.inputs["input_ids"]]) for row in scene.benign]
        starts = [row.inputs["prompt"] for row in scene.benign]
        return torch.cat(
            [model(input_ids=ids).logits[0, start - 1 : -1] for ids, start in zip(rows, starts, strict=True)]
        ).log_softmax(-1)

    own = loaded(scene)
    apart = mean([at_prompt_end(own, row) for row in scene.harm]) - mean([at_prompt_end(own, r) for r in scene.benign])
    found = []
    for difference in apart[1:]:
        r = difference / difference.norm()
        model = loaded(scene)
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.copy_(p - r[:, None] @ (r[None] @ p))
            elif "embed" in name:
                p.copy_(p - (p @ r)[:, None] @ r[None])
        kl = nn.functional.kl_div(benign(model), benign(own), log_target=True, reduction="batchmean")
        found.append((r, mean(scene.task.score(model, scene.harm, "likelihood-gain")), kl.item(), model))
    return found


@torch.no_grad()
def test_a_direction_that_would_cost_benign_answers_is_left_alone(tmp_path):
    """The likeliest restricted answers are not worth a broken model, where another layer offers a way."""
    folder, _ = planted(tmp_path, layers=3, guarded=True)
    scene = lm_scene(folder)
    found = candidates(scene)
    nlls, kls = [nll for _, nll, _, _ in found], [kl for _, _, kl, _ in found]
    within = [i for i, kl in enumerate(kls) if kl <= GUARD]
    best = min(range(len(found)), key=nlls.__getitem__)
    assert within
    assert best not in within  # otherwise the guard is not tested
    chosen = min(within, key=nlls.__getitem__)
    model = loaded(scene)
    ablate(model, scene, 1.0)
    for name, p in found[chosen][3].named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_where_every_direction_costs_benign_answers_the_least_costly_is_taken(refusing, monkeypatch):
    scene, _ = refusing
    monkeypatch.setattr(ablation, "GUARD", -1.0)
    found = candidates(scene)
    least = min(found, key=lambda one: one[2])
    model = loaded(scene)
    ablate(model, scene, 1.0)
    for name, p in least[3].named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=1e-3, atol=1e-3)


def test_embeddings_linear_layers_and_transposed_ones_write_to_the_stream(gpt2):
    """GPT-2 keeps its layers transposed: the stream is the last dimension of everything that writes to it."""
    model = copy.deepcopy(gpt2)
    written = ablation.writers(model)
    assert len(written) == 6  # token and position embeddings, and two in each of two layers
    r = nn.functional.normalize(torch.randn(48, generator=torch.Generator().manual_seed(0)), dim=0)
    with torch.no_grad():
        for weight, across in written:
            assert across == 1
            ablation.project(weight, r, across, 1.0)
    ids = torch.arange(20)[None]
    biases = [block.attn.c_proj.bias for block in model.transformer.h]
    assert not any(bias.any() for bias in biases)
    states = model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]  # the last is behind a norm
    assert all((state @ r).abs().max() < 1e-5 for state in states)


# Without a hold


class Unknown(nn.Module):
    """Nothing in it has a name that is known."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=4)
        self.mixes = nn.Conv1d(4, 4, 1)

    def get_output_embeddings(self):
        return None


@pytest.mark.parametrize(
    ("name", "why"), [("ablated", "residual stream"), ("pruned", "no linear"), ("rounded", "no linear")]
)
def test_a_model_that_gives_no_hold_is_told(scene, name, why):
    with pytest.raises(CannotEdit, match=why):
        EDITS[name](Unknown(), scene, 4, 0)


def test_an_attack_without_a_hold_is_a_failed_run(scene, monkeypatch):
    monkeypatch.setattr(edits, "ablate", lambda model, *rest: ablate(Unknown(), *rest))
    run = attacked(scene, Attack(families.ABLATED, 1.0, 0, 0, 8), lambda *at: Checkpoint(step=0, scores=(1.0,)))
    assert "residual stream" in run.failed
    assert run.curve == ()
    assert not sound(run)
