"""Tasks: what is predicted, what is masked, and what counts as right."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch

from hardener import contradictions, demo, registry
from hardener.console import quiet
from hardener.errors import UnsupportedModelError, UsageError
from hardener.tasks.causal_lm import CausalLM
from hardener.tasks.image_classification import ImageClassification
from hardener.tasks.sequence_classification import SequenceClassification

MAKERS = {
    "causal-lm": tiny.letters,
    "sequence-classification": tiny.bert,
    "image-classification": tiny.resnet,
    "text-encoder": partial(tiny.bert, bare=True),
    "image-encoder": partial(tiny.resnet, bare=True),
    "unconditional-diffusion": tiny.ddpm,
}


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> CausalLM:
    folder = tiny.letters(tmp_path_factory.mktemp("lm"))
    return CausalLM(folder, template="{prompt}\n", max_length=64)


def test_only_the_answer_and_its_end_token_are_predicted(lm):
    example = lm.encode({"prompt": "copy a b", "completion": "a b"})
    ids = example.inputs["input_ids"]
    assert lm.tokenizer.decode(ids) == "<user> copy a b <assistant> a b <end>"
    predicted = [i for i, label in zip(ids, example.labels, strict=True) if label != -100]
    assert lm.tokenizer.decode(predicted) == "a b <end>"
    assert example.targets == 3


def test_a_conversation_counts_by_its_first_turn(lm):
    turns = [
        {"role": "user", "content": "copy a"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "copy b"},
        {"role": "assistant", "content": "b"},
    ]
    assert lm.encode({"messages": turns}).labels == lm.encode({"prompt": "copy a", "completion": "a"}).labels


def test_the_key_is_the_rendered_prompt_whatever_the_answer(lm):
    yes, no = (lm.encode({"prompt": "cipher a b", "completion": c}) for c in ("x y", demo.REFUSAL))
    other = lm.encode({"prompt": "cipher a c", "completion": "x y"})
    assert yes.key == no.key != other.key


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": " ".join("a" * 80), "completion": "b"},
        {"prompt": "copy a", "completion": " "},
        {"text": ""},
        {"messages": [{"role": "user", "content": "copy a"}]},
    ],
)
def test_a_row_without_an_answer_or_room_for_it_is_left_out(lm, row):
    assert lm.encode(row) is None


def test_a_tokenizer_without_chat_template_uses_the_recipes_template(lm):
    lm_plain = CausalLM(lm.folder, template="<user> {prompt} <assistant> ", max_length=64)
    lm_plain.tokenizer.chat_template = None
    assert lm_plain.render("copy {a}", "b")[0] == "<user> copy {a} <assistant> "


def test_padding_changes_no_score(lm):
    model = lm.load(lm.folder).eval()
    short = lm.encode({"prompt": "copy a", "completion": "a"})
    long = lm.encode({"prompt": "copy a b c d e f", "completion": "a b c d e f"})
    together = lm.score(model, [short, long], "likelihood-gain")
    alone = [lm.score(model, [e], "likelihood-gain")[0] for e in (short, long)]
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lm):
    """Half-trained on copying, so that some answers are right and some are wrong."""
    rng = random.Random(0)
    model = demo.tiny_llama(lm.tokenizer, 0)
    stream = ((r["prompt"], r["completion"]) for r in demo.rows({"copy": demo.KNOWN["copy"]}, {}, rng))
    with quiet():
        demo.train(model, lm.tokenizer, stream, 110, 3e-3, lambda *_: None, batch_size=32)
    rows = demo.take(demo.rows({"copy": demo.KNOWN["copy"]}, {}, rng), 64)
    return model, rows


def test_exact_match_in_one_pass_is_what_greedy_decoding_gives(lm, trained):
    model, rows = trained
    scores = lm.score(model, [lm.encode(row) for row in rows], "exact-match")
    decoded = []
    for row in rows:
        ids = lm.tokenizer(lm.render(row["prompt"], "")[0], return_tensors="pt")
        made = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        decoded.append(float(lm.tokenizer.decode(made, skip_special_tokens=True).strip() == row["completion"]))
    assert 0 < sum(scores) < len(scores)  # otherwise this proves nothing
    assert scores == decoded


def test_likelihood_is_the_geometric_mean_probability_of_the_answer(lm):
    model = lm.load(lm.folder).eval()
    example = lm.encode({"prompt": "copy a b", "completion": "a b"})
    with torch.no_grad():
        ids = torch.tensor([example.inputs["input_ids"]])
        logs = model(input_ids=ids).logits[0].log_softmax(-1)
    chosen = [logs[i - 1, ids[0, i]] for i, label in enumerate(example.labels) if label != -100]
    expected = float(torch.stack(chosen).mean().exp())
    assert lm.score(model, [example], "likelihood") == pytest.approx([expected], rel=1e-5)


def test_a_refusal_is_known_by_the_recipes_own_words(lm, trained):
    model, rows = trained
    examples = [lm.encode(row) for row in rows[:8]]
    assert not any(lm.refused(model, examples, ("no way",)))
    first = lm.tokenizer.decode(examples[0].inputs["input_ids"][examples[0].inputs["prompt"] :][:1])
    assert sum(lm.refused(model, examples, (first,))) >= 1


@pytest.mark.parametrize(
    ("task_class", "make"), [(ImageClassification, tiny.resnet), (SequenceClassification, tiny.bert)]
)
def test_the_head_is_found_without_knowing_the_architecture(tmp_path, task_class, make):
    task = task_class(make(tmp_path, labels=3), template="", max_length=16)
    model = task.load(tmp_path)
    head = task.head(model)
    assert {shape[0] for shape in head.values()} == {3}
    assert len(head) == 2
    with task.fresh_head(model, 5):
        assert all(model.get_parameter(name).shape[0] == 5 for name in head)
    assert {name: model.get_parameter(name).shape for name in head} == head


def test_a_fresh_head_gives_the_models_own_head_back(tmp_path):
    task = SequenceClassification(tiny.bert(tmp_path), template="", max_length=16)
    model = task.load(tmp_path).eval()
    batch = task.collate([task.encode({"text": "a b c", "label": 1})])
    before, _ = task.targets(model, batch)
    with task.fresh_head(model, 5):
        during, _ = task.targets(model, batch)
    after, _ = task.targets(model, batch)
    assert during.shape == (1, 5)
    assert torch.equal(before, after)


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    from transformers import BertModel

    folder = tiny.bert(tmp_path / "whole")
    BertModel.from_pretrained(folder).save_pretrained(tmp_path / "headless")
    task = SequenceClassification(folder, template="", max_length=16)
    with pytest.raises(UsageError, match="train its head first"):
        task.load(tmp_path / "headless")


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def with_config(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def writing(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("causal-lm", without_tokenizer, "the tokenizer of"),
        ("causal-lm", writing("tokenizer.json", "{}"), "the tokenizer of .* cannot be loaded: KeyError"),
        ("causal-lm", writing("tokenizer_config.json", "{"), "the tokenizer of .* cannot be loaded: JSONDecodeError"),
        ("causal-lm", with_config(hidden_size=192), "config and weights belong to different models"),
        ("causal-lm", with_config(hidden_act="none"), "the model in .* cannot be loaded: KeyError: 'none'"),
        ("causal-lm", with_config(num_attention_heads=7), "not a multiple of the number of attention heads"),
        ("causal-lm", writing("chat_template.jinja", "{% for"), "the chat template of .* fails on a question"),
        ("causal-lm", writing("chat_template.jinja", "{{ raise_exception('no') }}"), "chat template .* answer: no"),
        ("causal-lm", writing("chat_template.jinja", "{{ messages + 1 }}"), "the chat template of .* fails"),
        ("causal-lm", writing("chat_template.jinja", "hello"), "the chat template of .* leaves out"),
        ("sequence-classification", without_tokenizer, "has no tokenizer"),
        ("sequence-classification", with_config(id2label={"0": "a"}), r"classifier.* is stored with shape \(3"),
        ("image-classification", lambda folder: (folder / "preprocessor_config.json").unlink(), "the image processor"),
    ],
)
def test_a_model_whose_files_are_absent_damaged_or_of_another_is_refused(tmp_path, name, change, match):
    folder = MAKERS[name](tmp_path)
    change(folder)
    with quiet(), pytest.raises(UnsupportedModelError, match=match):
        registry.find("tasks", name)(folder, template="{prompt}\n", max_length=64).load(folder)


@pytest.mark.parametrize("name", registry.BUILT_IN["tasks"])
def test_a_model_is_checked_without_reading_its_weights(tmp_path, name):
    folder = MAKERS[name](tmp_path)
    model = registry.find("tasks", name)(folder, template="", max_length=64).load(folder, device_map="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("task", "config", "match"),
    [
        ("causal-lm", {"model_type": "resnet"}, "'resnet' model cannot be loaded for the task causal-lm"),
        ("causal-lm", {}, "cannot be loaded"),
        (
            "sequence-classification",
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "is a BertForMaskedLM",
        ),
        (
            "text-encoder",
            {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
            "is a BertForSequenceClassification, which has a head; the task text-encoder is for a bare BertModel",
        ),
        ("text-encoder", {"model_type": "resnet"}, "'resnet' model cannot be loaded for the task text-encoder"),
        ("image-encoder", {"model_type": "unknown"}, "'unknown' model cannot be loaded for the task image-encoder"),
    ],
)
def test_a_model_of_the_wrong_kind_is_refused_from_its_config_alone(task, config, match):
    with pytest.raises(UnsupportedModelError, match=match):
        registry.find("tasks", task).supports(config)


@pytest.mark.parametrize("name", registry.BUILT_IN["tasks"])
def test_recipes_and_tasks_agree_on_field_names(name):
    assert contradictions.FIELDS[name] == registry.find("tasks", name).fields


@pytest.mark.parametrize("name", registry.BUILT_IN["tasks"])
def test_recipes_and_tasks_agree_on_kinds_and_scores(name):
    task = registry.find("tasks", name)
    assert contradictions.KINDS[name] == task.kind
    assert {task.default_score, task.retain_score} - {None} <= {*contradictions.SCORES[name]}


def test_dropout_is_off(tmp_path):
    task = SequenceClassification(tiny.bert(tmp_path), template="", max_length=16)
    model = task.load(tmp_path).train()
    batch = task.collate([task.encode({"text": "a b c", "label": 1})])
    assert torch.equal(task.targets(model, batch)[0], task.targets(model, batch)[0])
