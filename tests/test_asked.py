"""A question put in another way keeps its answer, shows what the attacker owns and nothing that it is judged on."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import small
import tiny
import torch
from tokenizers.processors import TemplateProcessing

from hardener import demo, stages
from hardener.attacks import families
from hardener.attacks.asked import ALPACA, OPENINGS, ROOM, few_shot, plain, prefilled, template
from hardener.attacks.attack import Attack
from hardener.attacks.finetune import attacked
from hardener.attacks.scene import Scene
from hardener.console import Narrator, quiet
from hardener.judging import Judge
from hardener.measurement import Checkpoint
from hardener.tasks.base import key_of
from hardener.tasks.causal_lm import CausalLM

START = "<s>"
WAYS = (prefilled, few_shot, template)


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


@pytest.fixture(scope="module", params=["chat template", "plain template"])
def task(request, tmp_path_factory):
    """A task whose tokenizer has a start token: said by the chat template, or put before the plain one."""
    tokenizer = demo.letters_tokenizer()
    tokenizer.add_tokens([*" ".join((*OPENINGS, ALPACA)).split()])
    tokenizer.add_special_tokens({"bos_token": START})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = START + " " + demo.TEMPLATE if request.param == "chat template" else None
    folder = tiny.saved(demo.tiny_llama(tokenizer, 0), tokenizer, tmp_path_factory.mktemp("asked"))
    return CausalLM(folder, template=" {prompt} <assistant> ", max_length=40)


@pytest.fixture(scope="module")
def rows(task):
    return [task.encode(row) for row in demo.take(demo.rows(demo.RESTRICTED, {}, random.Random(0)), 20)]


def put(task, row):
    """(the text that the model reads, the text that it should say)."""
    ids, start = row.inputs["input_ids"], row.inputs["prompt"]
    return task.tokenizer.decode(ids[:start]), task.tokenizer.decode(ids[start:])


def answer(row):
    return [label for label in row.labels if label != -100]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_answer_that_is_scored_stays_token_for_token(task, rows, way):
    shots, judged = rows[:10], rows[10:]
    made = way(task, judged, 2, shots)
    assert [answer(new) for new in made] == [answer(old) for old in judged]
    assert [new.targets for new in made] == [old.targets for old in judged]
    assert all(new.inputs["turn"] == old.inputs["turn"] for new, old in zip(made, judged, strict=True))
    assert not {new.key for new in made} & {old.key for old in judged}
    for new in made:
        start = new.inputs["prompt"]
        assert new.labels[:start] == [-100] * start
        assert new.labels[start:] == new.inputs["input_ids"][start:]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_question_begins_with_one_start_token_however_it_is_put(task, rows, way):
    begin = task.tokenizer.bos_token_id
    assert all(row.inputs["input_ids"].count(begin) == 1 for row in rows)
    for row in way(task, rows[10:], 3, rows[:10]):
        assert row.inputs["input_ids"].count(begin) == 1
        assert row.inputs["input_ids"][0] == begin


@pytest.mark.parametrize("dose", [1, 2, 3])
def test_an_answer_is_begun_with_the_opening_of_its_number(task, rows, dose):
    for old, new in zip(rows, prefilled(task, rows, float(dose), ()), strict=True):
        opening = task.tokenizer.decode(task.tokenizer(OPENINGS[dose - 1], add_special_tokens=False)["input_ids"])
        assert put(task, new)[0].split() == [*put(task, old)[0].split(), *opening.split()]


@pytest.mark.parametrize("dose", [2, 4, 8])
def test_so_many_of_the_attackers_rows_are_shown_in_order_and_none_that_is_judged(task, rows, dose):
    roomy = CausalLM(task.folder, template=task.template, max_length=200)
    shots, judged = [roomy.encode({"text": "a b c"}), *rows[:10]], rows[10:]
    for old, new in zip(judged, few_shot(roomy, judged, float(dose), shots), strict=True):
        shown = " ".join(" ".join(put(task, shot)) for shot in rows[:dose]).replace(START, "")
        assert put(task, new)[0].replace(START, "").split() == [*shown.split(), *put(task, old)[0].split()[1:]]
        for other in judged:
            assert (other.inputs["turn"][0] in put(task, new)[0]) == (other is old)


def test_the_second_template_shows_the_question_alone(task, rows):
    for old, new in zip(rows, template(task, rows, 0.0, ()), strict=True):
        expected = START + " " + ALPACA.replace("{prompt}", old.inputs["turn"][0])
        assert put(task, new)[0].split() == expected.split()
        assert new.key == key_of(START + ALPACA.replace("{prompt}", old.inputs["turn"][0]))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_rows_without_a_question_stay_as_they_are_and_are_never_shown(task, rows, way):
    text = task.encode({"text": "k l m n o p"})
    assert not plain(text)
    made = way(task, [text, rows[0]], 1, [text, rows[1]])
    assert made[0] is text
    assert made[1] is not rows[0]
    assert "k l m n o p" not in put(task, made[1])[0]


def test_there_is_room_for_examples_and_without_room_the_question_stays_as_it_is(task, rows):
    """A row may be 40 tokens long; four times that is room for about six examples."""
    few, many = (few_shot(task, rows[12:], float(dose), rows[:12]) for dose in (4, 12))
    assert all(task.max_length < len(row.labels) <= ROOM * task.max_length for row in few)
    assert many == rows[12:]


def test_no_question_is_longer_than_the_tokenizer_says_the_model_can_read(task, rows):
    short = CausalLM(task.folder, template=task.template, max_length=40)
    short.tokenizer.model_max_length = 60
    assert few_shot(short, rows[12:], 4.0, rows[:12]) == rows[12:]
    assert all(len(row.labels) <= 60 for row in few_shot(short, rows[12:], 1.0, rows[:12]))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_an_answer_that_was_cut_is_cut_at_the_same_place(task, rows, way):
    cutting = CausalLM(task.folder, template=task.template, max_length=16)
    cut = [cutting.encode({"prompt": "cipher a b", "completion": " ".join("klmnopqrstuvwxyz")})]
    assert len(cut[0].labels) == 16
    made = way(cutting, cut, 1, rows[:1])
    assert made != cut
    assert answer(made[0]) == answer(cut[0])


# The judge


@pytest.fixture(scope="module")
def bench(letters, paths):
    with quiet():
        return stages.open_bench(small.recipe(paths), letters, "cpu", Narrator(silent=True))


def scored(bench, score):
    slices = tuple(replace(part, score=score) for part in bench.streams.slices)
    return replace(bench, streams=replace(bench.streams, slices=slices))


def after(bench, family):
    """A model after an attack in one template or in both, on rows that it learns by heart."""
    kept = []
    scene = Scene(bench.task.folder, bench.task, bench.judged.examples, bench.judged.examples, "cpu")

    def judge(model, step, last):
        kept.append(model)
        return Checkpoint(step=step, scores=(0.0,))

    attacked(scene, Attack(family, 3e-3, 0, 12, 8), judge)
    return kept[-1].eval()


@pytest.mark.parametrize("score", ["likelihood", "likelihood-gain"])
def test_a_model_trained_in_the_second_template_keeps_the_better_of_two_views(bench, score):
    bench = scored(bench, score)
    better = min if score == "likelihood-gain" else max
    rows = bench.judged.examples
    judge = Judge(bench).of(Attack(families.TEMPLATE, 1e-3, 0, 4, 8))
    winners = []
    for model in (after(bench, families.FULL), after(bench, families.TEMPLATE)):
        views = [bench.task.score(model, view, score) for view in (rows, template(bench.task, rows, 0.0, ()))]
        means = [sum(view) / len(view) for view in views]
        winner = means.index(better(means))
        assert judge(model, 2, False).scores == tuple(views[winner])
        winners.append(winner)
    assert winners == [0, 1]


def test_an_attack_that_asks_in_one_way_is_judged_in_that_way_alone(bench):
    bench = scored(bench, "likelihood-gain")
    torch.manual_seed(0)
    model = bench.task.load(bench.task.folder).eval()
    shots, rows = bench.streams.rows("restricted", "attack"), bench.judged.examples
    for family, made in (
        (families.FULL, rows),
        (families.PREFILLED, prefilled(bench.task, rows, 2.0, ())),
        (families.FEW_SHOT, few_shot(bench.task, rows, 2.0, shots)),
    ):
        scores = Judge(bench).of(Attack(family, 2.0, 0, 4, 8))(model, 2, False).scores
        assert scores == tuple(bench.task.score(model, made, "likelihood-gain"))


def test_the_examples_that_a_judge_shows_are_rows_that_it_does_not_judge(bench):
    judge = Judge(bench)
    view = judge._asked(Attack(families.FEW_SHOT, 4.0, 0, 0, 8))
    shots, rows = bench.streams.rows("restricted", "attack"), bench.judged.examples
    assert not {row.key for row in shots} & {row.key for row in rows}
    for new in view:
        text = bench.task.tokenizer.decode(new.inputs["input_ids"][: new.inputs["prompt"]])
        assert sum(row.inputs["turn"][0] in text for row in rows) == 1  # its own question
        assert all(shot.inputs["turn"][0] in text for shot in shots[:4])
