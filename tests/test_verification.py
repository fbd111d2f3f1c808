"""A release is checked against its own evidence, and every disagreement is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import small
import yaml
from sample_report import withheld

import hardener
from hardener import release as release_files
from hardener import report as reports
from hardener import verification
from hardener.errors import UsageError, VerifyError
from hardener.report import Interval


@pytest.fixture(scope="module")
def made(warm, letters, paths, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("made") / "run"
    overrides = small.overrides(paths, "train.steps=2")
    return hardener.harden(str(letters), recipe="tiny-ctrap", overrides=overrides, output=output, device="cpu").run


@pytest.fixture
def release(made, tmp_path) -> Path:
    return shutil.copytree(made / "release", tmp_path / "release")


def test_a_release_agrees_with_its_evidence(release):
    found = verification.verify(str(release))
    assert found["checks"] == {"sums": "ok", "report": "ok", "recipe": "ok"}
    assert found["verdict"] == "inconclusive"
    assert found["weights"] == reports.read(release / "hardener" / "report.json").weights


def change_weights(release: Path) -> None:
    path = release / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_recipe(release: Path) -> None:
    path = release / "hardener" / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["probe"]["seed"] = 1
    path.write_text(yaml.safe_dump(recipe))


def change_word(release: Path) -> None:
    path = release / "hardener" / "report.json"
    path.write_text(path.read_text().replace('"word": "inconclusive"', '"word": "protected"'))


def link_card(release: Path) -> None:
    card = (release / "README.md").rename(release.parent / "elsewhere.md")
    (release / "README.md").symlink_to(card)


def break_recipe(release: Path) -> None:
    (release / "hardener" / "recipe.yaml").write_text("name: [")


def break_report(release: Path) -> None:
    (release / "hardener" / "report.json").write_bytes(b"\xff")


CHANGES = {
    "another word": (change_word, "the report says “protected, ", True),
    "a link": (link_card, "README.md is a link; a release holds files", True),
    "a broken recipe": (break_recipe, "hardener/recipe.yaml:1: ", True),
    "a broken recipe, sums unchanged": (break_recipe, "recipe.yaml has another hash", False),
    "a broken report": (break_report, "hardener/report.json is not a hardener report", True),
    "a broken report, sums unchanged": (break_report, "report.json has another hash", False),
    "other weights": (change_weights, "the weights here (", True),
    "other weights, sums unchanged": (change_weights, "model.safetensors has another hash than SHA256SUMS says", False),
    "another tokenizer": (lambda r: (r / "tokenizer_config.json").write_text("{}"), "the weights here (", True),
    "another recipe": (change_recipe, "recipe.yaml is not the recipe in the report", True),
    "no recipe": (lambda r: (r / "hardener" / "recipe.yaml").unlink(), "hardener/recipe.yaml is missing", True),
    "no weights": (lambda r: (r / "model.safetensors").unlink(), "the weights here (", True),
    "a file less": (lambda r: (r / "config.json").unlink(), "config.json is in SHA256SUMS but not here", False),
    "a file more": (lambda r: (r / "extra.txt").write_text(""), "extra.txt is not in SHA256SUMS", False),
    "another card": (lambda r: (r / "README.md").write_text("protected"), "README.md has another hash", False),
    "no sums": (lambda r: (r / "SHA256SUMS").unlink(), "SHA256SUMS is missing", False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_found_and_named(release, name):
    change, said, sums_follow = CHANGES[name]
    change(release)
    if sums_follow:
        release_files.write_sums(release)
    with pytest.raises(VerifyError) as caught:
        verification.verify(str(release))
    assert said in str(caught.value)
    assert caught.value.exit_code == 1


def test_all_disagreements_are_named_at_once(release):
    change_weights(release)
    change_recipe(release)
    with pytest.raises(VerifyError) as caught:
        verification.verify(str(release))
    assert len(str(caught.value).splitlines()) == 5  # a title, two sums, the weights, the recipe


def test_the_hubs_own_file_is_no_disagreement(release):
    (release / ".gitattributes").write_text("*.safetensors filter=lfs")
    verification.verify(str(release))


def test_a_damaged_list_of_sums_is_a_disagreement_and_no_crash(release):
    (release / "SHA256SUMS").write_text("garbage\n\n")
    with pytest.raises(VerifyError, match="SHA256SUMS"):
        verification.verify(str(release))


def test_a_folder_without_evidence_is_no_release(letters):
    with pytest.raises(UsageError, match=r"is not a hardener release: it has no hardener/report\.json"):
        verification.verify(str(letters))


def test_a_release_of_a_local_parent_cannot_be_attacked_again_by_itself(release):
    with pytest.raises(UsageError, match="the parent letters was a local folder; probe it by hand: hardener probe"):
        verification.verify(str(release), re_probe=True)


def judged(made: Path, value: float, low: float, high: float, word: str = "raises cost"):
    evidence = reports.read(made / "release" / "hardener" / "report.json").evidence
    worst = Interval(value=value, low=low, high=high)
    return evidence.model_copy(
        update={"word": word, "measures": evidence.measures.model_copy(update={"w_hardened": worst})}
    )


def test_two_measurements_agree_where_their_intervals_meet(made):
    assert verification.compare(judged(made, 0.4, 0.3, 0.5), judged(made, 0.5, 0.4, 0.6)).startswith("ok: raises cost")


@pytest.mark.parametrize("found", [(0.9, 0.8, 1.0, "raises cost"), (0.4, 0.3, 0.5, "no measurable protection")])
def test_two_measurements_disagree_by_figure_or_by_word(made, found):
    with pytest.raises(VerifyError, match="measured again: "):
        verification.compare(judged(made, 0.4, 0.3, 0.5), judged(made, *found))


def test_without_a_measurement_nothing_is_compared(made):
    with pytest.raises(VerifyError, match="no worst case to compare"):
        verification.compare(None, judged(made, 0.4, 0.3, 0.5))


def test_a_certificate_that_was_withheld_agrees_with_its_figures():
    """The figures alone would give more than a condition allows; a report without the condition is found out."""
    told = withheld()
    assert verification._verdict(told) == []
    without = told.model_copy(update={"evidence": told.evidence.model_copy(update={"conditions": {}})})
    assert "its figures and checks give" in verification._verdict(without)[0]
