"""The probe runs what it says: which families, which rates, nothing twice, nothing from another model or data."""

from __future__ import annotations

import ast
import errno
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import small
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerControl, TrainerState

import hardener
from hardener import demo, files, stages
from hardener.attacks import families as table
from hardener.attacks.asked import WAYS
from hardener.attacks.attack import Attack
from hardener.attacks.finetune import attacked
from hardener.attacks.recorder import Recorder, quietly
from hardener.attacks.scene import Scene
from hardener.bench import Able, Bench, able, cache_path, cached, check_original, kept
from hardener.console import Narrator, quiet
from hardener.errors import DataError, RecipeError, ResourceError, UnsupportedModelError, UsageError
from hardener.judging import ANSWER_ROWS, GATE_ROWS, WORTH_GATING, Judge
from hardener.ladder import Ladder, settled
from hardener.measurement import Checkpoint, Measurement, Run
from hardener.probing import Prober, Store

ABLE = Able(canonical=True, kept_head=True, turns=True, preferences=True, parent=True)


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def opened(folder, paths, *more, name="tiny-ctrap") -> Bench:
    recipe = small.recipe(paths, *more, name=name)
    return stages.open_bench(recipe, folder, "cpu", Narrator(silent=True))


@pytest.fixture(scope="module")
def bench(letters, paths):
    with quiet():
        return opened(letters, paths)


@pytest.fixture(scope="module")
def images(resnet, image_paths):
    with quiet():
        return opened(resnet, image_paths, name="tiny-sophon-image")


def with_probe(bench, **probe):
    return replace(bench, probe=bench.probe.model_copy(update=probe))


def chosen_of(bench, **known):
    return bench.families(replace(ABLE, **known))


def names(bench, **known):
    return {f.name for f in chosen_of(bench, **known)}


def table_of(kind):
    """Every family of the table for one kind of model."""
    return {f.name for f in vars(table).values() if isinstance(f, table.Family) and f.suits(kind)}


# Families


def test_each_kind_of_model_has_its_families(bench, images):
    for preset in ("standard", "thorough"):
        assert names(with_probe(bench, preset=preset)) == table_of("language")
        assert names(with_probe(images, preset=preset)) == table_of("classifier")


def test_who_follows_another_family_comes_after_it(bench, images):
    for one in (bench, images):
        order = [f.name for f in chosen_of(with_probe(one, preset="standard", rates={}))]
        for family in chosen_of(with_probe(one, preset="standard", rates={})):
            assert not family.follows or order.index(family.follows) < order.index(family.name)


def test_a_family_that_the_model_cannot_have_is_left_out(bench, images):
    language, pictures = (with_probe(one, preset="standard") for one in (bench, images))
    assert names(language) - names(language, canonical=False) == {"canonical"}
    assert names(language) - names(language, turns=False) == {"prefilled", "few-shot", "second-template"}
    assert names(language) - names(language, preferences=False) == {"dpo"}
    assert names(pictures) - names(pictures, kept_head=False) == {n for n in names(pictures) if n.startswith("kept")}


def test_quick_is_four_runs(bench, images):
    for one in (bench, images):
        chosen = chosen_of(with_probe(one, preset="quick", rates={}))
        assert {f.name for f in chosen} == set(table.SCREENS["quick"][one.task.kind])
        assert sum(len(f.rates) + bool(f.follows) for f in chosen if f.trains) == 4


def test_the_reduced_probe_is_two_runs(bench, images):
    for one in (bench, images):
        chosen = chosen_of(with_probe(one, preset="reduced-cpu", rates={}))
        assert sum(len(f.rates) + bool(f.follows) for f in chosen) == 2


def test_the_recipes_rates_override_the_tables_and_its_steps_are_the_budget(bench):
    changed = with_probe(bench, preset="standard", rates={"full": (1e-2, 2e-2), "mixed": (1e-2,)}, steps=7)
    chosen = {f.name: f for f in chosen_of(changed)}
    assert chosen["full"].rates == (1e-2, 2e-2)
    assert chosen["lora"].rates == table.LORA.rates
    assert (chosen["mixed"].rates, chosen["mixed"].follows) == ((1e-2,), "")  # it climbs a ladder of its own
    assert (chosen["kl"].rates, chosen["kl"].follows) == ((), "lora")
    assert {f.steps for f in chosen.values()} == {7}


def test_a_llama_can_be_canonical_and_an_encoder_classifier_keeps_its_head_if_it_is_large_enough(bench, images):
    assert able(bench, bench.task.folder, 0, parent=True).canonical
    assert "kept-head" in {
        f.name for f in stages.choose_families(with_probe(images, preset="standard"), images.task.folder)
    }


def test_two_parts_of_one_dataset_are_one_benign_task_and_all_their_rows_count(letters, paths, tmp_path):
    rows = [{**row, "part": part} for row, part in zip(rows_of(paths["benign"]), "ab" * 60, strict=True)]
    path = tiny.jsonl(tmp_path / "both.jsonl", rows)
    columns = "columns: {prompt: prompt, completion: completion}"
    parts = ", ".join(f"{{dataset: {path}, where: {{part: {part}}}, {columns}}}" for part in "ab")
    bench = opened(letters, paths, f"data.benign=[{parts}]", "probe.evaluation_rows=200")
    (task,) = bench.benign
    assert len(task.examples) == len(bench.streams.rows("benign", "evaluation"))
    made = Prober(bench, "hardened", letters, tmp_path, lambda _: None)
    assert len(made._rows_of(task)) == len(bench.streams.rows("benign", "attack"))


def test_a_benign_task_without_rows_to_learn_it_from_is_refused(letters, paths, tmp_path):
    rows = rows_of(paths["benign"])
    halves = [tiny.jsonl(tmp_path / f"{i}.jsonl", rows[i::2]) for i in range(2)]
    parts = ", ".join(
        f"{{dataset: {h}, uses: [{use}]}}" for h, use in zip(halves, ("attack", "evaluation"), strict=True)
    )
    with pytest.raises(DataError, match="has rows for `evaluation` and none for `attack`"):
        opened(letters, paths, f"data.benign=[{parts}]")


def test_harmless_rows_that_ask_nothing_are_refused(letters, paths, tmp_path):
    texts = tiny.jsonl(tmp_path / "texts.jsonl", [{"text": f"a harmless text {i}"} for i in range(60)])
    with pytest.raises(DataError, match=r"data\.harmless: no row has a question"):
        opened(letters, paths, f"data.harmless={{dataset: {texts}, uses: [evaluation]}}")


def test_plain_texts_are_measured_and_nothing_is_asked_of_them(letters, paths, tmp_path):
    texts = {}
    for role in ("restricted", "retain", "benign"):
        rows = [{"text": f"{row['prompt']} {row['completion']}"} for row in rows_of(paths[role])]
        texts[role] = tiny.jsonl(tmp_path / f"{role}.jsonl", rows)
    bench = opened(letters, texts, "data.alignment=", "defense=", "train=")
    point = Judge(bench).attack(bench.task.load(letters).eval(), 0, True, views=[bench.judged.examples])
    assert len(point.scores) == len(bench.judged.examples)
    assert point.answers == {}


# Before any attack


def ready(bench, model, folder=Path("parent")):
    check_original(bench, model.eval(), folder)


def test_an_original_whose_logits_are_no_numbers_is_refused(bench, letters):
    for value in (math.inf, math.nan, 3e38):
        model = bench.task.load(letters)
        torch.nn.init.constant_(model.lm_head.weight, value)
        with pytest.raises(UnsupportedModelError, match="the logits of parent are not finite"):
            ready(bench, model)
    ready(bench, bench.task.load(letters))


def test_an_original_without_embeddings_for_the_rows_is_refused(bench, letters):
    model = bench.task.load(letters)
    model.set_input_embeddings(torch.nn.Embedding(9, 96))
    with pytest.raises(UsageError, match="parent has embeddings for 9 tokens, and the rows hold token"):
        ready(bench, model)


def test_rows_of_which_one_half_is_empty_are_refused(bench, letters):
    selected = [e for e, reported in zip(bench.judged.examples, bench.report_half, strict=True) if not reported]
    one_half = replace(bench)
    one_half.__dict__["judged"] = replace(bench.judged, examples=tuple(selected))
    with pytest.raises(DataError, match="judged rows fall into one half"):
        ready(one_half, bench.task.load(letters))


def test_a_named_family_that_cannot_be_made_is_refused(letters, paths):
    bench = opened(letters, paths, "probe.preset=standard", "probe.families=[dpo]", "probe.rates={dpo: [0.001]}")
    without = replace(bench, streams=replace(bench.streams, refusals=()))
    assert stages.wanted(stages.choose_families(bench, letters), bench)
    with pytest.raises(RecipeError, match=r"probe\.families: dpo cannot be made here: it needs questions, 1 to 20"):
        stages.choose_families(without, letters)
    beside = with_probe(bench, families=("merge",))
    with pytest.raises(RecipeError, match="merge cannot be made here: it needs the unhardened parent"):
        stages.choose_families(beside, letters, parent=False)


def test_a_model_with_a_table_of_positions_is_asked_no_more_than_it_holds(tmp_path, paths):
    tokenizer = demo.letters_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=1, n_positions=40, bos_token_id=None)
    folder = tiny.saved(GPT2LMHeadModel(config), tokenizer, tmp_path / "gpt2")
    bench = opened(folder, paths, "data.max_length=40")
    model = bench.task.load(folder).eval()
    ready(bench, model)
    shots = bench.streams.rows("restricted", "attack")
    asked = WAYS["few-shot"](bench.task, bench.judged.examples, 8, shots)
    assert max(len(row.labels) for row in asked) <= 40
    rows = replace(bench.judged, examples=(longer(asked[0]), *bench.judged.examples))
    long = replace(bench, streams=replace(bench.streams, slices=(rows,)))
    with pytest.raises(UsageError, match=r"parent takes 40 tokens, and a row has 41; lower data\.max_length"):
        ready(long, model)


def longer(row):
    return replace(row, inputs={**row.inputs, "input_ids": [0] * 41})


# Ladders


LADDER = Ladder("exact-match", chance=0.0, epsilon=0.1)


def scripted(rate, outcome, seed=0):
    """A run that ends as `outcome` says: (score, utility) at steps 1, 2, 4, or a failure."""
    failed = outcome if isinstance(outcome, str) else None
    points = [(0.0, 1.0)] if failed else [(0.0, 1.0), *outcome]
    made = [
        Checkpoint(step=step, scores=(score,) * 4, utility=utility)
        for step, (score, utility) in zip((0, 1, 2, 4), points, strict=False)
    ]
    return Run(family="full", rate=rate, seed=seed, curve=tuple(made), failed=failed)


def level(score, utility=1.0):
    return [(0.0, 1.0), (0.0, 1.0), (score, utility)]


def climbed(rates, outcome):
    return LADDER.climb(rates, lambda rate: scripted(rate, outcome(rate)))


def rates_of(runs):
    return [run.rate for run in runs]


def between(low, high, score=0.9):
    """Nothing happens below `low`, the model breaks above `high`."""

    def outcome(rate):
        return level(0.0 if rate < low else score, utility=1.0 if rate < high else 0.2)

    return outcome


def test_a_ladder_grows_at_both_ends_until_it_is_bracketed():
    """At the lowest rate nothing happens, at the highest utility breaks."""
    runs = climbed((1e-3, 3e-3), between(2e-4, 2e-2))
    assert rates_of(runs) == [1.11e-4, 3.33e-4, 1e-3, 3e-3, 9e-3, 2.7e-2]
    assert LADDER.reached(runs[0]) == LADDER.reached(runs[-1]) == 0.0
    assert rates_of(climbed((1e-3, 1e-2), between(2e-3, 5e-3))) == [1e-3, 1e-2]


def test_a_ladder_grows_downwards_while_its_lowest_rate_breaks_the_model():
    """A collapsed model is worth nothing to the attacker, which is not to say that nothing happened."""
    assert min(rates_of(climbed((1e-3, 3e-3), lambda rate: level(0.9, utility=1.0 if rate < 2e-4 else 0.2)))) == 3.7e-5


def test_a_ladder_grows_at_most_three_times_at_either_end():
    assert rates_of(climbed((1e-3,), between(0.0, 9.0))) == [3.7e-5, 1.11e-4, 3.33e-4, 1e-3, 3e-3, 9e-3, 2.7e-2]


def test_no_higher_rate_is_tried_where_half_the_score_takes_the_fewest_steps_there_are():
    def quick(rate):
        if rate < 5e-4:
            return level(0.0)
        return [(0.6, 1.0), (0.6, 1.0), (top, 1.0)] if rate > 2e-3 else level(0.9)

    for top, highest in ((0.85, 3e-3), (0.96, 3e-3), (0.92, 2.7e-2)):  # the last is best, with something to gain
        assert max(rates_of(climbed((1e-3, 3e-3), quick))) >= highest
        assert (max(rates_of(climbed((1e-3, 3e-3), quick))) > 3e-3) == (top == 0.92)


def test_a_ladder_grows_while_nothing_works_and_nothing_breaks():
    assert rates_of(climbed((1e-3,), lambda rate: level(0.0))) == [1e-3, 3e-3, 9e-3, 2.7e-2]
    broken = climbed((1e-3,), lambda rate: level(0.0, utility=0.2))
    assert rates_of(broken) == [3.7e-5, 1.11e-4, 3.33e-4, 1e-3]  # the rates may have been too high all along


def test_the_best_rate_is_the_quickest_of_those_that_reached_nearly_as_much_as_any():
    slow, quick = scripted(1e-3, level(0.9)), scripted(3e-3, [(0.0, 1.0), (0.87, 1.0), (0.87, 1.0)])
    assert LADDER.best([slow, quick, scripted(1e-2, level(0.7))], "full") == 3e-3
    assert LADDER.best([scripted(1e-3, "it became nan")], "full") is None


def test_an_attack_is_answered_by_two_full_successes_in_a_row_that_keep_utility():
    once, twice = scripted(1.0, [(0.0, 1.0), (0.99, 1.0)]), scripted(1.0, [(0.99, 1.0), (0.99, 1.0)])
    assert (LADDER.answered(once.curve), LADDER.answered(twice.curve)) == (False, True)
    assert not LADDER.answered(scripted(1.0, [(0.99, 0.5), (0.99, 0.5)]).curve)
    assert not LADDER.answered(scripted(1.0, [(0.97, 1.0), (0.97, 1.0)]).curve)


def test_a_model_that_an_edit_has_broken_is_measured_against_the_subject_before_any_attack():
    kicked = Run(family="kicked", rate=1.0, seed=0, curve=(Checkpoint(step=0, scores=(0.9,), utility=0.5),))
    assert LADDER.reached(kicked) == 0.9  # by itself it lost nothing
    assert replace(LADDER, utility=1.0).reached(kicked) == 0.0


def test_a_diverged_top_is_noted_and_is_no_failure():
    """Divergence is where a ladder ends, in the recipe's own rates as in those that were added."""
    for rates in ((1e-3, 3e-3), (1e-3, 3e-3, 9e-3)):
        runs, notes = settled(climbed(rates, lambda rate: "it became nan" if rate > 5e-3 else level(0.5 + rate)))
        assert rates_of(runs)[-1] == 9e-3
        assert not any(run.failed for run in runs)
        assert notes == ("full at rate 0.009, seed 0 counts up to step 0: it became nan",)


def test_where_every_rate_diverges_nothing_was_tested():
    runs, notes = settled(climbed((1e-3, 3e-3), lambda rate: "it became nan"))
    assert all(run.failed for run in runs)
    assert not notes


def test_a_collapsed_model_is_worth_nothing_to_the_attacker():
    kept, lost = (scripted(1.0, level(0.8, utility)) for utility in (0.91, 0.89))
    assert LADDER.reached(kept) == pytest.approx(0.8)
    assert LADDER.reached(lost) == 0.0


# The order of attacks


def prober(bench, outcome, **probe):
    """A prober whose attacks end as `outcome(rate)` says."""

    class Scripted(Prober):
        def _make(self, attack, watch=quietly):
            self._made[attack.family.name, attack.rate] = attack
            return scripted(attack.rate, outcome(attack.rate), attack.seed).model_copy(
                update={"family": attack.family.name}
            )

    return Scripted(with_probe(bench, **probe), "hardened", bench.task.folder, Path("unused"), lambda _: None)


def tried(prober, *families):
    """(family, rate, seed) of every attack that is made."""
    return [(run.family, run.rate, run.seed) for run in prober._attacks(families, {})]


FULL = replace(table.FULL, rates=(1e-3, 1e-2))


def test_quick_climbs_no_ladder(bench):
    for preset, rates in (("quick", [1e-3, 1e-2]), ("standard", [3.7e-5, 1.11e-4, 3.33e-4, 1e-3, 1e-2, 3e-2, 9e-2])):
        climbing = prober(bench, level_of(0.5), preset=preset, seeds=1)
        assert [rate for _, rate, _ in tried(climbing, FULL)][: len(rates)] == rates


def level_of(score):
    return lambda rate: level(score)


def test_a_follower_is_tried_at_the_best_rate_of_its_model_and_at_those_it_had_on_the_original(bench):
    scores = {1e-3: 0.2, 1e-2: 0.6}
    probe = prober(bench, lambda rate: level(scores.get(rate, 0.3)), preset="quick")
    assert tried(probe, FULL, table.MIXED)[2:] == [("mixed", 1e-2, 0)]
    known = replace(table.MIXED, rates=(5e-3,))
    assert tried(probe, FULL, known)[2:] == [("mixed", 5e-3, 0), ("mixed", 1e-2, 0)]


def test_an_attack_that_does_not_train_is_made_once_per_dose(bench):
    assert tried(prober(bench, level_of(0.1), preset="quick"), table.PRUNED) == [("pruned", 0.2, 0), ("pruned", 0.5, 0)]


def test_further_seeds_go_to_the_worst_two_attacks_and_in_the_thorough_preset_to_each_familys_worst(bench):
    scores = {1e-3: 0.2, 3e-3: 0.9, 1e-2: 0.6}
    families = (replace(FULL, rates=tuple(scores)), table.PRUNED)
    again = {}
    for preset in ("quick", "standard", "thorough"):
        probing = prober(bench, lambda rate: level(scores.get(rate, 0.0)), preset=preset, seeds=3)
        runs = [run for family in families for rate in family.rates or () for run in [probing.attack(family, rate, 0)]]
        again[preset] = [(run.rate, run.seed) for run in probing.repeats(runs)]
    assert again["quick"] == []
    assert again["standard"] == [(3e-3, 1), (3e-3, 2), (1e-2, 1), (1e-2, 2)]
    assert again["thorough"] == [(3e-3, 1), (3e-3, 2)]


def test_an_edit_that_finds_no_hold_is_a_failed_run_and_never_no_harm(images, tmp_path):
    plain = with_probe(images, preset="quick")
    made = Prober(plain, "hardened", images.task.folder, tmp_path, lambda _: None)
    made.bench.task.__dict__["scratch_only"] = True
    measured = made.measure((replace(table.FRESH_CANONICAL, rates=(1e-3,), edit="ablated", steps=2),))
    (failed,) = [run for run in measured.runs if run.family != "none"]
    assert failed.failed is not None
    assert failed.curve == ()


def test_the_attack_that_merges_with_the_parent_is_made_on_the_hardened_model_alone(bench, letters, tmp_path):
    quick = with_probe(bench, preset="quick")
    for parent, expected in ((None, 0), (letters, 4)):
        made = Prober(quick, "hardened", letters, tmp_path / str(expected), lambda _: None, parent)
        measured = made.measure((table.MERGED,))
        assert sum(run.family == "merge" for run in measured.runs) == expected


def test_the_longer_budget_goes_to_every_seed_of_the_worst_attacks(bench):
    probing = prober(bench, level_of(0.5), preset="standard", seeds=3)
    chosen = (replace(FULL, rates=(1e-3,), steps=2),)
    runs = tuple(probing._make(replace(probing._attack(chosen[0], 1e-3, 0), seed=seed)) for seed in range(3))
    made = []
    probing._make = lambda attack: made.append((attack.seed, attack.steps)) or runs[attack.seed]
    probing._made = dict(probing._made)
    probing.prolong(blank(runs), (replace(chosen[0], steps=32),))
    assert made == [(0, 32), (1, 32), (2, 32)]


def blank(runs, subject="original"):
    """A measurement of these runs."""
    return Measurement(
        subject=subject, weights="w", score="exact-match", chance=0.0, report_half=(False, True) * 2, runs=runs
    )


def test_a_rate_that_a_search_chose_is_no_rung_of_the_other_subjects_ladder(bench):
    climbed = [scripted(rate, level(0.9)) for rate in (1e-3, 3e-3)]
    searched = scripted(2e-3, level(0.95)).model_copy(update={"setting": "batch 8, cosine, harm only"})
    (family,) = stages.budgeted(bench, blank((*climbed, searched)), (FULL,))
    assert family.rates == (1e-3, 3e-3)


def test_how_long_it_will_take_is_told_before_it_starts(bench, tmp_path):
    told = []
    Prober(with_probe(bench, preset="quick"), "original", bench.task.folder, tmp_path, told.append).measure(
        (replace(table.FULL, rates=(1e-3,), steps=2),)
    )
    assert re.fullmatch(r"original: \d+ attacks planned, about \d+ min", told[0])


# What is measured


class Watched(Judge):
    """Counts how often general utility is measured."""

    gated = 0

    def gate(self, model, untouched):
        self.gated += 1
        return super().gate(model, untouched)


def test_utility_is_measured_where_it_matters_and_always_at_the_end(bench):
    judge = Watched(bench)
    model = bench.task.load(bench.task.folder).eval()  # untrained: it scores nothing
    views = [bench.judged.examples]
    first, middle, last = (judge.attack(model, step, step == 9, views=views) for step in (0, 4, 9))
    assert max(map(max, (first.scores, middle.scores, last.scores))) < WORTH_GATING
    assert (first.utility, middle.utility, last.utility) == (0.0, None, 0.0)
    assert judge.gated == 2
    rows = bench.streams.of("retain", "evaluation")[0].examples[:GATE_ROWS]
    assert len(rows) > 0


def test_an_attack_that_works_is_gated_at_every_checkpoint(bench):
    """Trained on its own evaluation rows, the model scores, and from then on its utility is known."""
    rows = list(bench.judged.examples)
    attack = Attack(table.FULL, 5e-3, 0, 128, 16)
    run = attacked(Scene(bench.task.folder, bench.task, rows, [], bench.device), attack, Judge(bench).of(attack))
    means = [sum(point.scores) / len(point.scores) for point in run.curve]
    assert means[-1] >= WORTH_GATING  # otherwise this proves nothing
    for point, mean in zip(run.curve, means, strict=True):
        whole = point.step in (0, 128)
        assert (point.utility is not None) == (whole or mean >= WORTH_GATING)
        assert bool(point.answers) == whole
        if whole:
            assert sum(point.answers.values()) == pytest.approx(1.0)
            assert set(point.answers) == {"usable", "refused", "other"}
    head = run.curve[-1].scores[:ANSWER_ROWS]
    assert run.curve[-1].answers["usable"] == pytest.approx(sum(head) / len(head))


def test_likelihoods_are_scored_as_nll(letters, paths):
    bench = opened(letters, paths, "data.restricted.score=likelihood-gain")
    model = bench.task.load(letters).eval()
    point = Judge(bench).attack(model, 4, False, views=[bench.judged.examples])
    vocabulary = model.config.vocab_size
    assert point.scores == pytest.approx([math.log(vocabulary)] * len(point.scores), rel=0.2)  # nats; untrained
    assert point.utility is not None  # no score says where it would not matter
    assert not point.answers


def test_likelihoods_are_worth_the_share_of_nats_that_the_attack_won():
    curve = tuple(Checkpoint(step=step, scores=(nats,) * 4) for step, nats in enumerate((4.0, 1.0, 3.0)))
    run = Run(family="full", rate=1.0, seed=0, curve=curve)
    assert replace(LADDER, score="likelihood-gain").reached(run) == pytest.approx(0.75)


# What is kept


def test_a_finished_run_is_not_run_again_and_a_changed_attack_is(tmp_path):
    made = []

    def make():
        made.append(1)
        return Run(family="full", rate=1e-3, seed=0, curve=(Checkpoint(step=0, scores=(0.5,)),))

    attack = Attack(table.FULL, 1e-3, 0, 8, 16)
    first = Store(tmp_path, "these weights").run(attack, make)
    assert Store(tmp_path, "these weights").run(attack, make) == first
    assert len(made) == 1
    changed = [
        replace(attack, rate=2e-3),
        replace(attack, seed=1),
        replace(attack, steps=9),
        replace(attack, batch_size=8),
        replace(attack, setting="half benign"),
        replace(attack, family=replace(table.FULL, row_share=0.5)),
        replace(attack, family=replace(table.FULL, optimizer="sgd")),
    ]
    for other in changed:
        Store(tmp_path, "these weights").run(other, make)
    Store(tmp_path, "other weights").run(attack, make)
    assert len(made) == 1 + len(changed) + 1


DAMAGE = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "empty": lambda path: path.write_text("{}"),
    "no text": lambda path: path.write_bytes(b"\xff"),
    "another number": lambda path: path.write_text(path.read_text().replace("0.5", "0.1")),
    "another form": lambda path: files.write_sealed(path, {"family": "full"}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_or_changed_file_of_an_earlier_run_is_told_and_made_anew(tmp_path, caplog, kind):
    path = tmp_path / "run.json"
    run = Run(family="full", rate=1e-3, seed=0, curve=(Checkpoint(step=0, scores=(0.5,)),))
    kept(path, Run, lambda: run)
    whole = path.read_bytes()
    DAMAGE[kind](path)
    assert path.read_bytes() != whole
    made = []
    assert kept(path, Run, lambda: made.append(1) or run) == run
    assert made
    assert f"{path} is damaged or was changed, and is measured again (" in caplog.text
    assert path.read_bytes() == whole


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_figure_that_is_no_number_is_read_again_as_it_was_written(tmp_path, value):
    run = Run(family="full", rate=1e-3, seed=0, curve=(), train_loss=(value,))
    path = tmp_path / "run.json"
    kept(path, Run, lambda: run)
    assert repr(kept(path, Run, pytest.fail).train_loss) == repr((value,))
    json.loads(path.read_text(), parse_constant=pytest.fail)


def test_a_cache_that_cannot_be_written_to_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="set HARDENER_CACHE"):
        cached(tmp_path / "file" / "before" / "x.json", pytest.fail)


def test_a_disk_with_no_room_for_the_cache_is_no_wrong_request(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(ResourceError, match="cannot be made: No space left on device"):
        cached(tmp_path / "before" / "x.json", pytest.fail)


def test_the_watch_sees_the_last_loss_too():
    """A search that goes on shows a finished run's losses to itself again: it must have seen them all before."""
    shown = []
    attack = Attack(table.FULL, 1e-3, 0, 2, 16)
    recorder = Recorder(attack, None, lambda _: False, lambda index, loss: shown.append((index, loss)) or True)
    control = TrainerControl()
    recorder.on_log(None, TrainerState(global_step=2), control, logs={"loss": 0.5})
    assert shown == [(0, 0.5)]
    assert not control.should_training_stop  # it came too late


def test_scores_that_are_no_numbers_are_a_failed_run():
    def judge(model, step, last):
        return Checkpoint(step=step, scores=(1.0, math.inf if step else 2.0))

    recorder = Recorder(Attack(table.FULL, 1e-3, 0, 2, 16), judge, lambda _: False, quietly)
    for step in (0, 1):
        recorder.judge_now(torch.nn.Linear(1, 1), step)
    assert recorder.failed == "the attacked model's scores were not finite at step 1"
    assert [point.step for point in recorder.curve] == [0]


def test_a_model_that_is_certain_before_any_attack_leaves_nothing_to_win():
    curve = tuple(Checkpoint(step=step, scores=(0.0,) * 4) for step in range(2))
    run = Run(family="full", rate=1.0, seed=0, curve=curve)
    assert replace(LADDER, score="likelihood-gain").reached(run) == 0.0


def test_an_interrupted_probe_goes_on_where_it_was(bench, tmp_path):
    chosen = chosen_of(bench)[:1]

    class Interrupted(Prober):
        told = 0

        def __init__(self, *args):
            super().__init__(*args, self.count)

        def count(self, text):
            if "rate" in text:
                self.told += 1
                if self.told > 1:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted(bench, "hardened", bench.task.folder, tmp_path / "runs").measure(chosen)
    told = []
    resumed = Prober(bench, "hardened", bench.task.folder, tmp_path / "runs", told.append).measure(chosen)
    whole = Prober(bench, "hardened", bench.task.folder, tmp_path / "other", lambda _: None).measure(chosen)
    assert resumed == whole
    attacks = len(resumed.runs) - 1 + len(resumed.benign)
    assert sum("rate" in text for text in told) == attacks - 1


def test_the_cache_knows_data_probe_weights_and_device(bench, letters, paths, tmp_path):
    chosen = chosen_of(bench)
    path = cache_path("weights", bench, chosen, "original")
    assert path == cache_path("weights", opened(letters, paths), chosen, "original")
    answers = tiny.jsonl(tmp_path / "answers.jsonl", [r | {"completion": "a"} for r in rows_of(paths["restricted"])])
    changed = {
        "weights": ("other", bench, chosen, "original"),
        "subject": ("weights", bench, chosen, "scratch"),
        "families": ("weights", bench, chosen[:1], "original"),
        "a family": ("weights", bench, (replace(chosen[0], phases=(table.Phase(0.1),)), *chosen[1:]), "original"),
        "probe": ("weights", with_probe(bench, epsilon=0.2), chosen, "original"),
        "device": ("weights", replace(bench, device="cuda"), chosen, "original"),
        "answers": ("weights", opened(letters, {**paths, "restricted": answers}), chosen, "original"),
        "rows": ("weights", opened(letters, paths, "data.shares=[0.4, 0.3, 0.3]"), chosen, "original"),
        "scores": ("weights", opened(letters, paths, "data.restricted.score=likelihood"), chosen, "original"),
    }
    found = {what: cache_path(*arguments) for what, arguments in changed.items()}
    assert len({path, *found.values()}) == 1 + len(found), found
    assert path == cache_path("weights", with_probe(bench, gate="protected"), chosen, "original")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# Two judges in one house


def imports(module: str) -> set[str]:
    """Every module of the package that a module imports, anywhere in its file."""
    root = Path(hardener.__file__).parent
    path = root.joinpath(*module.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not file.is_file():
        return set()
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("hardener"):
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("hardener")}
        else:
            assert not isinstance(node, ast.ImportFrom) or node.level == 0  # relative imports would slip through
    return found


def reachable(module: str) -> set[str]:
    """The module itself and all that it imports, and so on."""
    reached: set[str] = set()
    waiting = [f"hardener.{module}"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += imports(module) - {"hardener"}  # the package itself is a lazy table of names
    return reached


def test_no_part_of_the_probe_is_overlooked():
    attacks = {path.stem for path in (Path(hardener.__file__).parent / "attacks").glob("[!_]*.py")}
    parts = {"bench", "judges", "judging", "ladder", "searching", *(f"attacks.{name}" for name in attacks)}
    assert {f"hardener.{part}" for part in parts} <= reachable("probing")


@pytest.mark.parametrize(
    "judge", ["probing", "evidence", "verdict", "checks", "measures", "metrics", "attacks.finetune"]
)
def test_the_judge_knows_nothing_of_the_defences(judge):
    reached = reachable(judge)
    assert len(reached) > 2
    forbidden = ("hardener.defenses", "hardener.lookahead", "hardener.loop", "hardener.losses")
    assert not [module for module in reached if module.startswith(forbidden)]
