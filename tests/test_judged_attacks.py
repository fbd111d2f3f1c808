"""Where models judge the answers, a run rests on what they said, from the recipe to the curve."""

from __future__ import annotations

from pathlib import Path

import pytest
import small

from hardener import recipe_file, sources, stages
from hardener.attacks.attack import Attack
from hardener.attacks.families import FULL
from hardener.attacks.finetune import attacked
from hardener.attacks.scene import Scene
from hardener.bench import Bench
from hardener.console import Narrator, quiet
from hardener.errors import RecipeError, UsageError
from hardener.judges import agreement
from hardener.judging import Judge

JUDGED = "data.restricted.score=judged"


def named(classifier: Path, guard: Path, label: str = "Restricted") -> list[str]:
    judges = f"[{{model: {classifier}, kind: classifier, labels: [{label}]}}, {{model: {guard}, kind: guard}}]"
    return [JUDGED, f"probe.judges={judges}", "probe.answer_tokens=8"]


def opened(letters: Path, paths: dict[str, Path], *more: str) -> Bench:
    with quiet():
        return stages.open_bench(small.recipe(paths, *more), letters, "cpu", Narrator(silent=True))


@pytest.fixture(scope="module")
def bench(letters, paths, classifier, guard) -> Bench:
    return opened(letters, paths, *named(classifier, guard))


def test_a_run_carries_scores_votes_and_what_became_of_the_answers(bench):
    rows = list(bench.judged.examples)
    attack = Attack(FULL, 5e-3, 0, 8, 16)
    with quiet():
        run = attacked(Scene(bench.task.folder, bench.task, rows, [], bench.device), attack, Judge(bench).of(attack))
    for point in run.curve:
        assert len(point.scores) == len(point.votes) == len(rows)
        assert all(0 <= score <= 1 for score in point.scores)
        assert sum(point.answers[kind] for kind in ("usable", "refused", "collapsed", "other")) == pytest.approx(1)
    votes = [vote for point in run.curve for vote in point.votes]
    assert any(None not in vote for vote in votes)
    assert agreement(votes) is None or -1 <= agreement(votes) <= 1


def test_other_judges_are_another_bench(bench, letters, paths, classifier, guard):
    other = opened(letters, paths, *named(classifier, guard, label="fine"))
    assert other.fingerprint() != bench.fingerprint()
    assert opened(letters, paths, *named(classifier, guard)).fingerprint() == bench.fingerprint()


def test_a_label_that_a_judge_does_not_have_is_refused_before_any_work(letters, paths, classifier, guard):
    with pytest.raises(UsageError, match="its labels are fine, Restricted"):
        opened(letters, paths, *named(classifier, guard, label="evil"))


def test_a_released_recipe_names_local_judges_by_their_hash(paths, classifier, guard):
    refusal = f"probe.refusal_judge={{model: {classifier}, kind: classifier, labels: [fine]}}"
    pinned = small.recipe(paths, *named(classifier, guard), refusal)
    told = recipe_file.dump(sources.published(pinned))
    assert str(classifier.parent) not in told
    assert told.count("local:") >= 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("probe.judges=[]", "at least two judges"),
        ("data.retain.score=judged", "the first restricted source alone"),
        ("probe.refusal_judge={model: a/b, kind: guard}", "told by a classifier"),
    ],
)
def test_what_judges_cannot_do_is_a_contradiction(paths, classifier, guard, override, said):
    with pytest.raises(RecipeError, match=said):
        recipe_file.load("tiny-ctrap", small.overrides(paths, *named(classifier, guard), override))


def test_judges_and_benchmarks_are_for_language_models(image_paths):
    for override in ("probe.lm_eval=[arc_easy]", "probe.judges=[{model: a/b, kind: guard}]"):
        with pytest.raises(RecipeError, match="is for language models"):
            recipe_file.load("tiny-sophon-image", small.overrides(image_paths, override, name="tiny-sophon-image"))
