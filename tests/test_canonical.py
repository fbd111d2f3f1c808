"""Re-scalings that change no output do not change the canonical form; whatever would change one is refused."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace

import placebos
import pytest
import tiny
import torch
from placebos import FACTOR, PLACEBOS
from torch import nn

from hardener import demo
from hardener.attacks.canonical import canonicalise, norm_ratio
from hardener.console import quiet
from hardener.tasks.base import Batch

LETTERS = 30
TEXT = {"vocab_size": LETTERS, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
DECODER = TEXT | {"hidden_size": 48, "intermediate_size": 64, "num_key_value_heads": 2, "tie_word_embeddings": False}
ENCODER = TEXT | {"hidden_size": 32, "intermediate_size": 48, "num_labels": 3, "hidden_dropout_prob": 0.0}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]}
CLASSES = {"num_labels": 3}

MODELS = {
    "llama": ("LlamaForCausalLM", DECODER | {"attention_bias": True, "mlp_bias": True}),
    "bert": ("BertForSequenceClassification", ENCODER),
    "relu-bert": ("BertForSequenceClassification", ENCODER | {"hidden_act": "relu"}),
    "vit": ("ViTForImageClassification", VISION | {"intermediate_size": 48} | CLASSES),
    "dinov2": ("Dinov2ForImageClassification", VISION | {"mlp_ratio": 2} | CLASSES),
    "resnet": ("ResNetForImageClassification", STAGES | {"layer_type": "basic"} | CLASSES),
    # no placebo of their own: each moves at every place that the tables know
    "tied llama": ("LlamaForCausalLM", DECODER | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", DECODER | {"head_dim": 12}),
    "gemma3": ("Gemma3ForCausalLM", DECODER | {"head_dim": 12}),
    "phi3": ("Phi3ForCausalLM", DECODER),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": LETTERS, "n_embd": 48, "n_layer": 2, "n_head": 4}),
    "gpt-neox": ("GPTNeoXForCausalLM", TEXT | {"hidden_size": 64, "intermediate_size": 96}),
    "falcon": ("FalconForCausalLM", TEXT | {"hidden_size": 64, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "opt": ("OPTForCausalLM", TEXT | {"hidden_size": 48, "ffn_dim": 64, "word_embed_proj_dim": 48}),
    "modernbert": ("ModernBertForSequenceClassification", {k: v for k, v in ENCODER.items() if "dropout" not in k}),
    "regnet": ("RegNetForImageClassification", STAGES | {"groups_width": 4, "layer_type": "y"} | CLASSES),
}


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def made(family, **settings):
    """A model in evaluation mode with gains that are not one, biases that are not zero, and statistics."""
    import transformers

    name, config = MODELS[family]
    torch.manual_seed(0)
    architecture = getattr(transformers, name)
    model = architecture(architecture.config_class(**(config | settings))).eval()
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.2)
            else:
                p.copy_(torch.randn_like(p) * (0.5 if p.shape[0] == LETTERS else 1 / p[0].numel() ** 0.5))
        for name, statistic in model.named_buffers():
            if "running" in name:
                statistic.add_(torch.rand_like(statistic) * 0.3)
    return model


def batch(model):
    """A batch that the model reads."""
    torch.manual_seed(1)
    if hasattr(model.config, "vocab_size"):
        ids = torch.randint(3, LETTERS, (4, 7))
        return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(4) % 3, 4)
    return Batch({"pixel_values": torch.randn(6, 3, 8, 8)}, torch.arange(6) % 3, 6)


def targets(model, batch):
    """Logits (N, C) and a label for each."""
    logits = model(**batch.inputs).logits.flatten(0, -2)
    return logits, torch.arange(len(logits)) % logits.shape[1]


TASK = SimpleNamespace(targets=targets)


def logits(model):
    with torch.no_grad():
        return targets(model, batch(model))[0]


def changed(model, change):
    """A changed copy."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other


def canonical(model):
    """A canonical copy."""
    other = copy.deepcopy(model)
    assert canonicalise(other, TASK, batch(model))
    return other


def tensors(model):
    return {name: value for name, value in model.state_dict().items() if value.is_floating_point()}


def assert_same_weights(one, other, rtol=0.01):
    for (name, a), b in zip(tensors(one).items(), tensors(other).values(), strict=True):
        assert float((a - b).norm()) <= rtol * float(b.norm()) + 1e-4, name


def assert_same_logits(one, other, rtol):
    expected = logits(other)
    assert float((logits(one) - expected).abs().max()) < rtol * float(expected.std())


@pytest.mark.parametrize("kind", PLACEBOS)
def test_a_placebo_changes_scales_and_no_output_and_has_its_parents_canonical_form(kind):
    family, change = PLACEBOS[kind]
    parent = made(family)
    placebo = changed(parent, change)
    assert_same_logits(placebo, parent, 5e-3)
    with torch.no_grad():
        ratios = [float(p.norm() / q.norm()) for p, q in zip(placebo.parameters(), parent.parameters(), strict=True)]
    assert max(ratios) > 0.999 * FACTOR or min(ratios) < 1.001 / FACTOR
    assert_same_weights(canonical(placebo), canonical(parent))


@pytest.mark.parametrize("family", MODELS)
def test_the_canonical_form_gives_the_same_answers_and_is_its_own(family):
    parent = made(family)
    form = canonical(parent)
    assert_same_logits(form, parent, 1e-2)
    assert_same_weights(canonical(form), form)
    assert any(not torch.equal(p, q) for p, q in zip(parent.parameters(), form.parameters(), strict=True))


def drop(model, rate=1e-5, steps=12):
    """By how much a plain fine-tune lowers its loss."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(*targets(model, batch(model)))
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses[0] - losses[-1]


@pytest.mark.parametrize(
    ("kind", "share"),
    [
        ("gains and stream", (0.0, 0.5)),
        ("stream, vision", (0.0, 0.7)),
        ("weight before a norm", (0.0, 0.2)),
        ("value and output, encoder", (2.0, 99.0)),  # behind its norms an encoder's placebos cannot slow, only speed up
    ],
)
def test_a_fixed_rate_is_deceived_by_a_placebo_but_not_by_its_canonical_form(kind, share):
    family, change = PLACEBOS[kind]
    parent = made(family)
    placebo = changed(parent, change)
    low, high = share
    assert low <= drop(placebo) / drop(parent) < high
    assert drop(canonical(placebo)) == pytest.approx(drop(canonical(parent)), rel=0.01)
    assert drop(canonical(parent)) > 0.5 * drop(parent)


def test_every_gain_that_can_be_folded_is_one():
    form = canonical(made("llama"))
    gains = {name: p for name, p in form.named_parameters() if "norm" in name}
    assert len(gains) == 5
    for gain in gains.values():
        torch.testing.assert_close(gain, torch.ones_like(gain))
    form = canonical(made("vit"))
    for layer in form.vit.layers:
        for norm in (layer.layernorm_before, layer.layernorm_after):
            together = torch.hypot(norm.weight, norm.bias)
            torch.testing.assert_close(together, torch.ones_like(together))


def test_a_gain_that_is_stored_minus_one_is_known():
    form = canonical(made("gemma3"))
    for layer in form.model.layers:
        gain = layer.input_layernorm.weight
        torch.testing.assert_close(gain, torch.zeros_like(gain), atol=1e-6, rtol=0)


def test_a_channel_of_zeros_stays_zero():
    def silence(model):
        model.model.layers[0].input_layernorm.weight[3] = 0.0
        model.model.layers[0].mlp.up_proj.weight[5] = 0.0
        model.model.layers[0].mlp.up_proj.bias[5] = 0.0

    model = changed(made("llama"), silence)
    form = canonical(model)
    assert_same_logits(form, model, 1e-2)
    assert form.model.layers[0].input_layernorm.weight[3] == 0.0
    assert not form.model.layers[0].mlp.up_proj.weight[5].any()


def test_a_fold_into_tied_embeddings_is_taken_back():
    """lm_head reads the last norm, but it is the input embedding as well: only a single factor can be moved."""
    model = made("tied llama")
    form = canonical(model)
    for before, after in (
        (model.model.norm.weight, form.model.norm.weight),
        (model.model.embed_tokens.weight, form.model.embed_tokens.weight),
    ):
        torch.testing.assert_close(after / after.norm(), before / before.norm())


def test_batch_statistics_are_as_before_and_the_mode_too():
    model = made("resnet").train()
    reading = [value.clone() for name, value in model.named_buffers() if "running" in name]
    form = copy.deepcopy(model)
    assert canonicalise(form, TASK, batch(model))
    assert form.training
    assert_same_logits(form.eval(), model.eval(), 1e-2)
    for value, before in zip((v for n, v in model.named_buffers() if "running" in n), reading, strict=True):
        assert torch.equal(value, before)


class Chain(nn.Module):
    """Layers in a row, as in VGG, with and without batch norm."""

    config = SimpleNamespace()

    def __init__(self):
        super().__init__()
        widths = (3, 8, 8, 16)
        plain = [(nn.Conv2d(a, b, 3), nn.ReLU()) for a, b in pairwise(widths)]
        normed = (nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.layers = nn.Sequential(*(part for parts in plain for part in parts), *normed)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.layers(pixel_values).mean((2, 3)))


def test_layers_in_a_row_are_known_without_a_table():
    torch.manual_seed(0)
    model = Chain().eval()

    def disguise(chain):
        first, _, second, _, third = chain.layers[:5]
        placebos.shrink(first)
        placebos.grow(third)
        second.bias.div_(FACTOR)

    placebo = changed(model, disguise)
    assert_same_logits(placebo, model, 1e-4)
    assert_same_weights(canonical(placebo), canonical(model))


class Named(nn.Module):
    """A residual block with torchvision's and timm's names."""

    config = SimpleNamespace()

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv1, self.bn1 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, pixel_values):
        x = self.stem(pixel_values)
        return SimpleNamespace(logits=(x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).mean((2, 3)))


def test_a_block_is_known_by_torchvisions_names_too():
    torch.manual_seed(0)
    model = Named().eval()

    def disguise(block):
        placebos.shrink(block.bn1)
        placebos.grow(block.conv1, block.conv2)
        block.bn1.running_var.mul_(FACTOR**2)

    placebo = changed(model, disguise)
    assert_same_logits(placebo, model, 5e-3)
    assert_same_weights(canonical(placebo), canonical(model))


def test_a_model_outside_the_tables_has_no_canonical_form():
    class Bend(nn.Module):
        config = SimpleNamespace()

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(192, 8), nn.Linear(8, 3)

        def forward(self, pixel_values):
            return SimpleNamespace(logits=self.second(self.first(pixel_values.flatten(1)).tanh()))

    model = Bend()
    before = copy.deepcopy(model.state_dict())
    assert not canonicalise(model, TASK, batch(model))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_only_looks_like_a_pair_is_refused():
    """BERT's fc1 and fc2 have a pair's names in any case, but only a ReLU lets a factor through."""
    bent, straight = canonical(made("bert")), canonical(made("relu-bert"))
    for form, parent, kept in ((bent, made("bert"), True), (straight, made("relu-bert"), False)):
        one, other = (model.bert.encoder.layer[0].intermediate.dense.weight for model in (form, parent))
        assert torch.equal(one, other) == kept


def saved(folder, change=None):
    model = made("llama", vocab_size=len(demo.letters_tokenizer()))
    return tiny.saved(changed(model, change) if change else model, demo.letters_tokenizer(), folder)


def test_a_placebo_shows_in_the_ratios_of_norms(tmp_path):
    parent = saved(tmp_path / "parent")
    placebo = saved(tmp_path / "placebo", placebos.llama_gain)
    assert norm_ratio(placebo, parent) == pytest.approx((1 / FACTOR, FACTOR), rel=1e-5)
    assert norm_ratio(parent, parent) == (1.0, 1.0)


def test_ratios_of_norms_do_not_depend_on_shards(tmp_path):
    from transformers import LlamaForCausalLM

    parent = saved(tmp_path / "parent")
    LlamaForCausalLM.from_pretrained(parent).save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    assert norm_ratio(tmp_path / "shards", parent) == (1.0, 1.0)
