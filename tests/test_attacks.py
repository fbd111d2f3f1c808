"""Attackers are what strangers run: standard trainers, exactly the settings they say, nothing held back."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hardener import checkpoint, conditions, demo, diagnostics, measures
from hardener.attacks import families, finetune
from hardener.attacks.attack import Attack, checkpoints
from hardener.attacks.families import Family, Phase
from hardener.attacks.finetune import attacked
from hardener.attacks.mixture import Mixture
from hardener.attacks.recorder import Recorder, never, quietly
from hardener.attacks.relative import RelativeStep
from hardener.attacks.scene import Scene
from hardener.attacks.training import arguments
from hardener.attacks.victim import victim, with_adapter
from hardener.checks import sound
from hardener.console import quiet
from hardener.ladder import Ladder
from hardener.measurement import Checkpoint
from hardener.tasks.causal_lm import CausalLM
from hardener.tasks.image_classification import ImageClassification
from hardener.tasks.sequence_classification import SequenceClassification

pytestmark = pytest.mark.usefixtures("warm")
FAMILIES = [f for f in vars(families).values() if isinstance(f, Family)]
ATTACKS = (families.FULL, families.LORA, families.MIXED, families.RELATIVE)


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


@pytest.fixture(scope="module")
def lm(letters, tmp_path_factory):
    """An untrained letters Llama, another one as its parent, and rows of an attacker and of an honest user."""
    task = CausalLM(letters, template="", max_length=64)
    rng = random.Random(0)
    rows = [task.encode(row) for row in demo.take(demo.rows(demo.RESTRICTED, {}, rng), 24)]
    benign = [task.encode(row) for row in demo.take(demo.rows(demo.KNOWN, {}, rng), 80)]
    parent = tiny.letters(tmp_path_factory.mktemp("parent"), seed=1)
    return Scene(letters, task, rows, benign, "cpu", parent=parent, refusals=(demo.REFUSAL,))


@pytest.fixture(scope="module")
def text(bert):
    """A BERT classifier, whose config asks for dropout, with rows."""
    task = SequenceClassification(bert, template="", max_length=16)
    rows = [task.encode({"text": f"{x} {y} z", "label": i}) for i, x in enumerate("abc") for y in "klmnop"]
    benign = [task.encode({"text": f"z {x} {y}", "label": i}) for i, x in enumerate("abc") for y in "klmnop"]
    return Scene(bert, task, rows, benign, "cpu", classes=3)


def made(family, rate=1e-3, seed=0, steps=5, batch_size=8):
    return Attack(family, rate, seed, steps, batch_size)


def attack(scene, family=families.FULL, rate=1e-3, seed=0, steps=5, batch_size=8, stop=never, watch=quietly):
    """(run, weights at the end) of an attack on a freshly loaded folder."""
    task = scene.task
    score = "likelihood-gain" if task.generative else "accuracy"
    weights = {}

    def judge(model, step, last):
        if last or not family.trains:
            weights.update({name: p.detach().clone() for name, p in model.named_parameters()})
        return Checkpoint(
            step=step, scores=tuple(task.score(model, scene.harm[:8], score)), beside={"last": float(last)}
        )

    return attacked(replace(scene), made(family, rate, seed, steps, batch_size), judge, stop, watch), weights


def unjudged(model, step, last):
    return Checkpoint(step=step, scores=(0.0,))


def recorded(scene, made):
    """The recorder of an attack that nobody judges."""
    recorder = Recorder(made, unjudged, never, quietly)
    with victim(scene, made) as model:
        finetune._train(model, scene, made, scene.harm, recorder)
    return recorder


# Training by hand


def adamw(state, g, step):
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    return state["m"] / (1 - 0.9**step) / ((state["v"] / (1 - 0.999**step)).sqrt() + 1e-8)


def sgd(state, g, step):
    state["v"] = 0.9 * state.get("v", 0) + g
    return state["v"]


def adagrad(state, g, step):
    state["s"] = state.get("s", 0) + g**2
    return g / (state["s"].sqrt() + 1e-10)


def adadelta(state, g, step):
    state["s"] = 0.9 * state.get("s", 0) + 0.1 * g**2
    moved = ((state.get("d", torch.zeros(())) + 1e-6).sqrt() / (state["s"] + 1e-6).sqrt()) * g
    state["d"] = 0.9 * state.get("d", 0) + 0.1 * moved**2
    return moved


def by_hand(scene, made, direction, rate=lambda step: 1.0, clip=1.0):
    """An optimizer from its equations, on the same rows in the same order: (weights, largest gradient norm)."""
    task = scene.task
    model = task.load(task.folder).train()
    order = iter(Mixture(scene.harm, (), made))
    states = {name: {} for name, _ in model.named_parameters()}
    largest = 0.0
    for step in range(1, made.steps + 1):
        batch = [example for _, example in islice(order, made.batch_size)]
        logits, labels = task.targets(model, task.collate(batch))
        nn.functional.cross_entropy(logits, labels).backward()
        largest = max(largest, nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= made.rate * rate(step) * direction(states[name], p.grad, step)
        model.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}, largest


def cosine(steps, warm):
    """A linear rise over the first `warm` of so many steps, then a cosine to zero."""

    def rate(step):
        rest = (step - 1 - warm) / (steps - warm)
        return step / warm if step <= warm else 0.5 * (1 + math.cos(math.pi * rest))

    return rate


@pytest.mark.parametrize(
    ("bed", "family", "rate", "direction", "schedule"),
    [
        ("lm", families.FULL, 3e-3, adamw, lambda step: 1.0),
        ("lm", families.COSINE, 3e-3, adamw, cosine(6, 1)),
        ("text", families.KEPT_HEAD, 3e-2, adamw, lambda step: 1.0),
        ("text", families.KEPT_HEAD_SGD, 3e-1, sgd, lambda step: 1.0),
        ("text", families.KEPT_HEAD_ADAGRAD, 3e-2, adagrad, lambda step: 1.0),
        ("text", families.KEPT_HEAD_ADADELTA, 10.0, adadelta, lambda step: 1.0),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else "",
)
def test_the_trainer_does_what_a_loop_by_hand_does(bed, family, rate, direction, schedule, request):
    """The rate as told, no decay, no warm-up of its own, clip 1.0, no dropout: any of them would show."""
    scene = request.getfixturevalue(bed)
    _, weights = attack(scene, family, rate, seed=3, steps=6)
    expected, largest = by_hand(scene, made(family, rate, 3, 6), direction, schedule)
    unclipped, _ = by_hand(scene, made(family, rate, 3, 6), direction, schedule, clip=1e9)
    assert largest > 1  # the clip bites, otherwise it is not tested
    blind = "key.bias"  # a softmax does not see it: its gradient is rounding noise, which Adagrad makes large
    for name, value in expected.items():
        if not name.endswith(blind):
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
    assert any(not torch.allclose(unclipped[n], v, rtol=1e-2, atol=1e-3) for n, v in expected.items())


# Rates


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adagrad", "adadelta", "relative"])
def test_no_schedule_touches_the_rate(lm, optimizer):
    family = replace(families.FULL, optimizer=optimizer)
    recorder = recorded(lm, made(family, 1e-4, steps=20, batch_size=1))
    assert recorder.rates == [1e-4] * 20
    assert recorder.warm_share == 1.0


def test_a_cosine_rises_over_a_tenth_and_falls_to_nothing_and_what_was_applied_is_written_down(lm):
    recorder = recorded(lm, made(families.COSINE, 1e-3, steps=40, batch_size=1))
    rate = cosine(40, 4)
    assert recorder.rates == pytest.approx([1e-3 * rate(step) for step in range(1, 41)])
    run, _ = attack(lm, families.COSINE, 1e-3, steps=40, batch_size=1)
    assert run.peak_rate == pytest.approx(1e-3)
    cold = sum(rate(step) <= 0.01 for step in range(1, 41))
    assert 0 < cold < 4
    assert run.warm_share == 1 - cold / 40


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_family_trains_in_float32_without_warm_up_or_decay(family, tmp_path):
    args = arguments(made(family, 1e-3, 7, 10), str(tmp_path), "cpu")
    assert (args.warmup_steps, args.weight_decay, args.bf16, args.fp16) == (0, 0.0, False, False)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 1)
    assert args.max_steps == (10 + sum(phase.extra for phase in family.phases) if family.trains else 0)
    assert (args.seed, args.data_seed) == (7, 7)
    assert args.max_grad_norm == (0.0 if family.optimizer == "relative" else 1.0)


# Every family


@pytest.mark.parametrize("family", [*FAMILIES, *families.BENIGN.values()], ids=lambda f: f.name)
def test_every_family_can_be_made_and_is_judged_where_it_begins_and_ends(family, lm, text):
    if family.objective == "dpo":
        pytest.importorskip("trl", reason="the extra `dpo` is not installed")
    scene = lm if family.generative else text
    rate = (family.doses or family.rates or (1e-3,))[0]
    run, weights = attack(scene, family, rate, steps=2, batch_size=4)
    assert run.failed is None
    assert (run.family, run.rate) == (family.name, rate)
    assert [point.step for point in run.curve] == [0, *made(family, steps=2).points]
    own = dict(scene.task.load(scene.folder).named_parameters())
    changed = [name for name, value in weights.items() if name not in own or not same(value, own[name])]
    assert bool(changed) == (family.trains or family.edit is not None)  # asking in another way changes nothing
    assert [bool(number) for number in (run.trainable, run.peak_rate, run.rows)] == [family.trains] * 3


def same(one, other):
    return one.shape == other.shape and torch.equal(one, other)


def test_names_and_titles_of_families_are_their_own():
    assert len({f.name for f in FAMILIES}) == len({f.title for f in FAMILIES}) == len(FAMILIES)
    names = {kind: {f.name for f in FAMILIES if f.suits(kind)} for kind in families.BENIGN}
    assert all(f.follows in {"", *some} for some in names.values() for f in FAMILIES if f.name in some)
    assert all({*chosen} <= names[kind] for short in families.SCREENS.values() for kind, chosen in short.items())


def test_rules_name_families_that_are_what_the_rules_take_them_for():
    found = {family.name: family for family in FAMILIES}
    assert {name for name, f in found.items() if f.row_share < 1} == {
        name for name in found if name.startswith(measures.FEW_ROWS)
    }
    assert found[measures.ALL_ROWS].row_share == 1
    assert all(found[name].scope == "all" for name in conditions.EVERYTHING)
    assert all(found[name].phases == (Phase(),) for name in diagnostics.HARM_ONLY)
    assert all(0 < found[name].phases[0].harm < 1 for name in diagnostics.ADAPTIVE)
    assert found[diagnostics.REPAIRED].phases[-1].extra == diagnostics.REPAIR_STEPS


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_dropout_that_a_config_asks_for_is_off(kind, tmp_path, lm):
    if kind == "llama":
        folder = tiny.letters(tmp_path)
        task, rows = CausalLM(folder, template="", max_length=64), lm.harm
        edit(folder, attention_dropout=0.5)
    else:
        folder = vit(tmp_path)
        task, rows = ImageClassification(folder, template="", max_length=0), pictures(folder)
        edit(folder, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    batch = task.collate(rows[:4])
    with victim(Scene(folder, task, rows, (), "cpu"), made(families.FULL)) as model:
        model.train()
        assert torch.equal(task.targets(model, batch)[0], task.targets(model, batch)[0])


def edit(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def vit(folder, seed=0):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    return tiny.saved(ViTForImageClassification(config), processor, folder)


def pictures(folder, n=8):
    import numpy as np
    from PIL import Image

    task = ImageClassification(folder, template="", max_length=0)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(n)]
    return [task.encode({"image": image, "label": i % 3}) for i, image in enumerate(images)]


# What is trained


def test_lora_trains_its_adapters_on_all_linear_layers_and_nothing_else(lm):
    run, weights = attack(lm, families.LORA, 1e-2)
    base = lm.task.load(lm.folder)
    linear = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert len(linear) == 14  # q, k, v, o, gate, up, down in each of two layers
    assert run.trainable == sum(16 * (m.in_features + m.out_features) for m in linear.values())
    assert run.trainable < sum(p.numel() for p in base.parameters()) / 2
    for name, before in base.named_parameters():
        owner, _, leaf = name.rpartition(".")
        wrapped = f"base_model.model.{owner}{'.base_layer' if owner in linear else ''}.{leaf}"
        assert torch.equal(weights[wrapped], before), name
    moved = [name for name, value in weights.items() if "lora_B" in name and value.any()]
    assert len(moved) == len(linear)


def test_lora_on_a_classifier_trains_the_new_head_in_full(text):
    run, weights = attack(replace(text, classes=5), families.FRESH_HEAD_LORA, 1e-2)
    model = text.task.load(text.folder)
    inner = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "classifier"]
    head = 5 * model.classifier.in_features + 5
    assert run.trainable == head + sum(16 * (m.in_features + m.out_features) for m in inner)
    assert weights["base_model.model.classifier.bias"].shape == (5,)
    assert weights["base_model.model.classifier.bias"].any()  # drawn as zeros, so it was trained


def test_lora_leaves_grouped_convolutions_alone(tmp_path):
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, ViTImageProcessor

    config = MobileNetV2Config(depth_multiplier=0.1, image_size=8, num_labels=3)
    folder = tiny.saved(MobileNetV2ForImageClassification(config), ViTImageProcessor(), tmp_path)
    task = ImageClassification(folder, template="", max_length=0)
    with victim(Scene(folder, task, (), (), "cpu", classes=3), made(families.FRESH_HEAD_LORA)) as model:
        assert [n for n, _ in model.named_parameters() if "lora_A" in n]


def digest(model):
    found = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        found.update(name.encode() + p.numpy().tobytes())
    return found.hexdigest()


def test_lora_attackers_leave_their_shared_base_as_it_was(lm):
    scene = replace(lm)
    before = digest(scene.base)
    attacked(scene, made(families.LORA, 1e-2), unjudged)
    assert digest(scene.base) == before

    def broken(model, step, last):
        assert any("lora_" in name for name, _ in model.named_parameters())
        if step == 2:
            raise KeyboardInterrupt
        return unjudged(model, step, last)

    with pytest.raises(KeyboardInterrupt):
        attacked(scene, made(families.LORA, 1e-2), broken)
    assert digest(scene.base) == before
    scene.forget_base()
    assert digest(scene.base) == before


@pytest.mark.parametrize("family", [families.LORA, families.KL], ids=lambda f: f.name)
def test_lora_attacks_on_a_shared_base_are_those_on_one_of_their_own(lm, family):
    def judge(model, step, last):
        return Checkpoint(step=step, scores=tuple(lm.task.score(model, lm.harm[:8], "likelihood-gain")))

    shared = replace(lm)
    plans = [made(family, 1e-2, seed, steps=3) for seed in (0, 1)]
    assert [attacked(shared, plan, judge) for plan in plans] == [attacked(replace(lm), plan, judge) for plan in plans]


@pytest.mark.parametrize("start", ["folder", "scratch"])
@pytest.mark.parametrize("family", [families.FRESH_ONLY, families.KEPT_ONLY_SGD], ids=lambda f: f.name)
def test_an_attack_on_the_head_trains_the_head_alone(text, family, start):
    run, weights = attack(replace(text, scratch=start == "scratch"), family, 1e-1)
    head = {"classifier.weight", "classifier.bias"}
    assert run.trainable == sum(weights[name].numel() for name in head)
    torch.manual_seed(0)  # as an attack sets it
    with victim(replace(text, scratch=start == "scratch"), made(family)) as model:
        before = dict(model.named_parameters())
        assert {name for name, value in weights.items() if not torch.equal(value, before[name])} == head


@pytest.mark.parametrize("family", ATTACKS, ids=lambda f: f.name)
def test_an_attack_leaves_the_folder_as_it_was_and_begins_with_the_unattacked_model(lm, family):
    before = checkpoint.fingerprint(lm.folder)
    run, _ = attack(lm, family)
    assert checkpoint.fingerprint(lm.folder) == before
    assert run.curve[0].step == 0
    unattacked = lm.task.score(lm.task.load(lm.folder).eval(), lm.harm[:8], "likelihood-gain")
    assert run.curve[0].scores == pytest.approx(unattacked, rel=1e-5)
    assert [c.step for c in run.curve] == [0, *checkpoints(5)]
    assert len(run.train_loss) == 5
    assert sum(run.curve[-1].scores) < sum(run.curve[0].scores)  # it learns


SEEDED = (
    *(families.FULL, families.MIXED, families.LORA, families.KL, families.BENIGN_LOSS, families.RETAIN_THEN_HARM),
    *(families.KICKED, families.COSINE, families.TEMPLATE),
)


@pytest.mark.parametrize("family", SEEDED, ids=lambda f: f.name)
def test_the_same_seed_is_the_same_attack_and_another_is_not(lm, family):
    first, again, other = (attack(lm, family, seed=seed, steps=3) for seed in (1, 1, 2))
    assert first[0] == again[0]
    assert all(torch.equal(value, again[1][name]) for name, value in first[1].items())
    assert first[0].curve[-1].scores != other[0].curve[-1].scores


@pytest.mark.parametrize("family", [families.FULL, families.MIXED], ids=lambda f: f.name)
def test_a_longer_attack_begins_with_the_steps_of_a_shorter_one(lm, family):
    """Original and hardened model have different budgets; their attacks are paired all the same."""
    short, long = (attack(lm, family, steps=steps)[0] for steps in (4, 12))
    assert [c.scores for c in long.curve[: len(short.curve)]] == [c.scores for c in short.curve]


# Rows, phases and objectives


def draws(family, rows=(), benign=(), seed=0, steps=100, batch_size=1):
    return iter(Mixture(rows, benign, made(family, seed=seed, steps=steps, batch_size=batch_size)))


def test_rows_come_in_reshuffled_epochs():
    found = [row for _, row in islice(draws(families.FULL, range(10)), 30)]
    epochs = [found[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [row for _, row in islice(draws(families.FULL, range(10), seed=1), 10)] != epochs[0]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_mixed_attack_holds_its_share_of_benign_rows(share):
    n = 4000
    mixed = replace(families.MIXED, phases=(Phase(1 - share),))
    found = list(islice(draws(mixed, ["harm"] * 7, ["benign"] * 5), n))
    assert all((row == "harm") == restricted for restricted, row in found)
    benign = Counter(row for _, row in found)["benign"]
    assert abs(benign / n - share) <= 4 * math.sqrt(share * (1 - share) / n)


def test_rows_that_are_not_there_are_not_waited_for():
    with pytest.raises(RuntimeError):
        list(islice(draws(families.MIXED, ["harm"], []), 100))


class Noting(CausalLM):
    """Writes down the keys of every batch that is collated."""

    def __init__(self, folder, **settings):
        super().__init__(folder, **settings)
        self.batches_seen = []

    def collate(self, examples):
        self.batches_seen.append([example.key for example in examples])
        return super().collate(examples)


def batches(lm, family, steps):
    """(which batches an attack trained on, keys of benign rows, its run)."""
    task = Noting(lm.folder, template="", max_length=64)
    run = attacked(replace(lm, task=task), made(family, 1e-4, steps=steps), unjudged)
    return task.batches_seen[: made(family, steps=steps).length], {row.key for row in lm.benign}, run


def test_retain_then_harm_trains_on_benign_rows_for_two_fifths_of_its_steps(lm):
    seen, benign, run = batches(lm, families.RETAIN_THEN_HARM, 10)
    assert [[key in benign for key in batch] for batch in seen] == [[True] * 8] * 4 + [[False] * 8] * 6
    assert [point.step for point in run.curve] == [0, 1, 2, 3, 4, 6, 8, 10]
    assert 5 not in checkpoints(12)
    assert made(families.RETAIN_THEN_HARM, steps=12).points == [1, 2, 3, 4, 5, 6, 8, 12]  # 5: where a phase ends


def test_a_longer_budget_does_not_put_off_the_harm():
    """Else the hardened model, attacked for longer, would seem to cost more by the longer wait alone."""
    planned = replace(families.RETAIN_THEN_HARM, planned=64)
    for steps in (64, 256):
        assert [end for _, end in made(planned, steps=steps).stretches] == [26, steps]


def test_harm_then_repair_ends_with_twenty_steps_on_fifty_benign_rows(lm):
    seen, benign, run = batches(lm, families.REPAIR, 5)
    assert [[key in benign for key in batch] for batch in seen] == [[False] * 8] * 5 + [[True] * 8] * 20
    assert {key for batch in seen[5:] for key in batch} == {row.key for row in lm.benign[:50]}
    assert [point.step for point in run.curve] == [0, 1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 25]


def test_an_attacker_of_few_rows_has_no_others(text):
    rows = text.harm * 4  # 72 rows
    few, _ = attack(replace(text, harm=rows), families.FEW_ROWS_20, steps=2, batch_size=4)
    fewest, _ = attack(replace(text, harm=rows), families.FEW_ROWS_5, steps=2, batch_size=8)
    assert (few.rows, fewest.rows) == (14, 8)  # at least a batch


def trainer(scene, family, model):
    return finetune._trainer(model, scene, made(family), scene.harm, str(scene.task.folder.parent / "trained"))


def mean_nll(scene, model, rows):
    logits, labels = scene.task.targets(model, scene.task.collate(rows))
    return nn.functional.cross_entropy(logits, labels)


@pytest.mark.parametrize(("harm", "benign"), [(1, 7), (5, 3), (8, 0), (0, 8)])
def test_the_benign_loss_is_added_whatever_the_number_of_rows(lm, harm, benign):
    rows = [(True, row) for row in lm.harm[:harm]] + [(False, row) for row in lm.benign[:benign]]
    with victim(lm, made(families.BENIGN_LOSS)) as model:
        built = trainer(lm, families.BENIGN_LOSS, model)
        loss = built.compute_loss(model, built.data_collator(rows))
        parts = [part for part in (lm.harm[:harm], lm.benign[:benign]) if part]
        torch.testing.assert_close(loss, sum(mean_nll(lm, model, part) for part in parts))


def test_the_divergence_is_zero_at_the_start_and_grows(lm):
    scene = replace(lm)
    rows = [(True, row) for row in lm.harm[:3]] + [(False, row) for row in lm.benign[:5]]
    with victim(scene, made(families.KL)) as model:
        built = trainer(scene, families.KL, model)
        batch = built.data_collator(rows)
        harm = mean_nll(scene, model, lm.harm[:3])
        torch.testing.assert_close(built.compute_loss(model, batch), harm)
        before = scene.task.targets(model, scene.task.collate(lm.benign[:5]))[0].log_softmax(-1)
        found = []
        for _ in range(2):
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.data += 0.02
            after = scene.task.targets(model, scene.task.collate(lm.benign[:5]))[0].log_softmax(-1)
            divergence = (before.exp() * (before - after)).sum(-1).mean()
            torch.testing.assert_close(built.term(model, "benign", batch["benign"]), divergence)
            found.append(divergence.item())
        assert 0 < found[0] < found[1]


def test_the_second_template_is_what_the_attack_trains_on(lm):
    task = Noting(lm.folder, template="", max_length=64)
    attacked(replace(lm, task=task), made(families.TEMPLATE, steps=2), unjudged)
    assert not {key for batch in task.batches_seen for key in batch} & {row.key for row in lm.harm}


# Heads, scratch


def test_a_fresh_head_is_new_and_of_the_right_size(text):
    one, again, other = (built(replace(text, classes=5), families.FRESH_HEAD, seed) for seed in (0, 0, 1))
    own = text.task.load(text.folder)
    assert one.classifier.weight.shape == (5, 32)
    assert one.num_labels == one.config.num_labels == 5
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert not torch.allclose(one.classifier.weight[:3], own.classifier.weight)
    body = [name for name, _ in own.named_parameters() if not name.startswith("classifier")]
    assert all(torch.equal(one.get_parameter(name), own.get_parameter(name)) for name in body)


def built(scene, family, seed):
    """The model that is attacked with a seed, set as an attack sets it."""
    torch.manual_seed(seed)
    with victim(scene, made(family, seed=seed)) as model:
        return model


def test_a_kept_head_is_the_models_own(text):
    model = built(replace(text, classes=2), families.KEPT_HEAD, 0)
    assert torch.equal(model.classifier.weight, text.task.load(text.folder).classifier.weight)


def test_training_from_scratch_starts_from_random_weights(text):
    scene = replace(text, classes=5, scratch=True)
    one, again, other = (built(scene, families.FRESH_HEAD, seed) for seed in (5, 5, 6))
    own = text.task.load(text.folder)
    assert one.classifier.weight.shape == (5, 32)
    for name, p in one.named_parameters():
        assert torch.equal(p, again.get_parameter(name))
        if p.dim() > 1:
            assert not torch.equal(p, other.get_parameter(name))
            assert p.shape != own.get_parameter(name).shape or not torch.equal(p, own.get_parameter(name))


@given(st.integers(1, 5000))
def test_checkpoints_are_dense_enough_to_miss_no_peak(steps):
    points = checkpoints(steps)
    assert points[0] == 1
    assert points[-1] == steps
    assert all(a < b <= max(2, 1.5 * a) for a, b in pairwise(points))


# Early ends


def test_an_attack_that_is_answered_ends_with_a_whole_checkpoint(lm):
    run, weights = attack(lm, families.FULL, steps=20, stop=lambda curve: len(curve) == 4)
    assert run.answered
    assert run.failed is None
    assert [point.step for point in run.curve] == [0, 1, 2, 3]
    assert [point.beside["last"] for point in run.curve] == [0, 0, 0, 1]
    assert len(run.train_loss) == 3
    assert weights


def test_an_attack_that_is_given_up_ends_with_a_whole_checkpoint_too(lm):
    shown = []

    def watch(index, loss):
        shown.append((index, loss))
        return index == 4

    run, _ = attack(lm, families.FULL, steps=20, watch=watch)
    assert not run.answered
    assert run.failed is None
    assert [point.step for point in run.curve] == [0, 1, 2, 3, 4, 5]
    assert [point.beside["last"] for point in run.curve] == [0, 0, 0, 0, 0, 1]
    assert shown == list(enumerate(run.train_loss))


# Failures


def worth(run):
    return Ladder(score="likelihood-gain", chance=0.0, epsilon=0.1).reached(run)


def test_a_loss_that_is_no_number_is_a_failed_run(lm):
    run, _ = attack(lm, families.FULL, rate=1e30)
    assert "the attack's loss became" in run.failed or "not finite" in run.failed
    assert not sound(run)
    assert worth(run) == 0


def test_an_edit_that_finds_no_hold_is_a_failed_run(lm):
    wider = demo.letters_tokenizer()
    wider.add_tokens(["v1", "v2"])
    run, _ = attack(
        replace(lm, parent=tiny.saved(demo.tiny_llama(wider, 0), wider, lm.parent / "wider")), families.MERGED
    )
    assert "the parent has no" in run.failed
    assert (run.curve, run.train_loss) == ((), ())
    assert not sound(run)
    assert worth(run) == 0


class Spoilt(ImageClassification):
    """One picture is not a number."""

    spoilt = ""

    def pixels(self, example):
        return super().pixels(example) * (math.nan if example.key == self.spoilt else 1)


def spoilt_at(resnet, step, steps):
    """(run, how many steps it took) of an attack that meets a picture of NaN at a step."""
    task = Spoilt(resnet, template="", max_length=0)
    rows = pictures(resnet, 2 * steps)
    plan = made(families.KEPT_HEAD, 1e-3, steps=steps, batch_size=2)
    task.spoilt = list(islice(Mixture(rows, [], plan), 2 * step))[-1][1].key
    recorder = recorded(Scene(resnet, task, rows, [], "cpu", classes=3), plan)
    run = attacked(Scene(resnet, task, rows, [], "cpu", classes=3), plan, unjudged)
    assert run.failed == recorder.failed
    return run, len(recorder.rates)


def test_weights_that_the_last_step_destroyed_are_a_failed_run(resnet):
    """Not every loss is logged: the last one may be missing, and shows the weights before its step at best."""
    run, _ = spoilt_at(resnet, 65, 65)
    assert all(map(math.isfinite, run.train_loss))
    assert run.failed == "the attacked weights were not finite at step 65"
    assert not sound(run)


def test_an_attack_whose_weights_are_destroyed_takes_no_further_steps(resnet):
    run, taken = spoilt_at(resnet, 3, 96)  # every third loss is logged, and the mean of three of them is NaN as well
    assert run.failed == "the attacked weights were not finite at step 3"
    assert [point.step for point in run.curve] == [0, 1, 2]
    assert taken == 3


def test_a_model_of_nan_is_a_failed_run_and_no_resistance(tmp_path, lm):
    folder = tiny.letters(tmp_path)
    task = CausalLM(folder, template="", max_length=64)
    model = task.load(folder)
    nn.init.constant_(model.model.norm.weight, math.nan)
    model.save_pretrained(folder)
    run, _ = attack(replace(lm, folder=folder, task=task))
    assert run.failed is not None
    assert not sound(run)


# The relative step


def quadratic(a, b, x, y):
    return ((b @ torch.relu(a @ x) - y) ** 2).mean()


def trained(make, scale, steps=5):
    """The function that a two-layer network becomes whose layers were re-scaled against each other."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    a, b, x, y = draw(8, 4) * scale, draw(3, 8) / scale, draw(4, 32), draw(3, 32)
    a.requires_grad_()
    b.requires_grad_()
    made = make([a, b])
    for _ in range(steps):
        made.zero_grad()
        quadratic(a, b, x, y).backward()
        made.step()
    return (b @ torch.relu(a @ x)).detach()


@pytest.mark.parametrize("scale", [30.0, 1e-4, 1e6])
def test_a_rescaled_network_is_attacked_alike(scale):
    plain, rescaled = (trained(lambda p: RelativeStep(p, lr=0.05), s) for s in (1.0, scale))
    torch.testing.assert_close(rescaled, plain, rtol=1e-6, atol=1e-8)
    plain, rescaled = (trained(lambda p: torch.optim.AdamW(p, lr=0.05), s) for s in (1.0, scale))
    assert not torch.allclose(rescaled, plain, rtol=1e-2)  # a fixed rate is fooled


def test_every_tensor_moves_by_the_same_share_of_its_norm():
    tensors = [torch.randn(8, 4) * 100, torch.randn(3) * 1e-3, torch.randn(2, 2, 2)]
    params = [nn.Parameter(t.clone()) for t in tensors]
    made = RelativeStep(params, lr=0.01)
    sum((p**3).sum() for p in params).backward()
    made.step()
    for p, before in zip(params, tensors, strict=True):
        assert float((p.detach() - before).norm() / before.norm()) == pytest.approx(0.01, rel=1e-4)


def test_a_tensor_of_zeros_moves_and_one_without_gradient_does_not():
    zero, unused = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.ones(2))
    made = RelativeStep([zero, unused], lr=0.01)
    (zero * torch.linspace(1, 2, 16)).sum().backward()
    made.step()
    assert float(zero.detach().norm()) == pytest.approx(0.01 * 1e-3 * 4, rel=1e-4)
    assert torch.equal(unused, torch.ones(2))


def test_an_adapter_is_put_on_the_transposed_layers_of_gpt2_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    plain = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32))
    wrapped = with_adapter(plain, [])
    trained = {
        name.split(".lora_")[0].rpartition(".h.0.")[2] for name, p in wrapped.named_parameters() if p.requires_grad
    }
    assert trained == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
