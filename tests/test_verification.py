"""A release is checked against its own evidence, and every disagreement is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import small
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hub_server import PLAIN_HTTP, Hub, hub_server
from safetensors.torch import load_file, save_file
from sample_report import parent, withheld
from test_signing import write_keys

import hardener
from hardener import bom, checkpoint, signing, verification
from hardener import release as release_files
from hardener import report as reports
from hardener.errors import UsageError, VerifyError
from hardener.report import Interval, Parent
from hardener.run import RunFolder


@pytest.fixture(autouse=True, scope="module")
def _one_day() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1795000000")
        yield


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
    assert found["checks"] == {
        **{"sums": "ok", "report": "ok", "recipe": "ok", "parent": "not checked (a local folder)"},
        **{"bom": "ok", "signature": "none"},
    }
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


def change_bom(release: Path) -> None:
    path = release / "hardener" / "bom.cdx.json"
    path.write_text(path.read_text().replace('"value": "inconclusive"', '"value": "protected"'))


def deepen(release: Path) -> None:
    for name in ("SHA256SUMS", ".gitattributes", "model.sig"):
        (release / "hardener" / name).write_text("")


CHANGES = {
    "another BOM": (change_bom, "hardener/bom.cdx.json is not what report and weights give", True),
    "no BOM": (lambda r: (r / "hardener" / "bom.cdx.json").unlink(), "hardener/bom.cdx.json is missing", True),
    "a broken BOM": (lambda r: (r / "hardener" / "bom.cdx.json").write_bytes(b"\xff"), "bom.cdx.json: ", True),
    "the BOM of other weights": (change_weights, "bom.cdx.json is not what report and weights give", True),
    "a second list of sums": (deepen, "hardener/SHA256SUMS is not in SHA256SUMS", False),
    "a second file of the Hub": (deepen, "hardener/.gitattributes is not in SHA256SUMS", False),
    "a second signature": (deepen, "hardener/model.sig is not in SHA256SUMS", False),
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


def test_sums_that_a_killed_process_left_unfinished_are_not_named_by_the_next(release):
    (release / ".SHA256SUMS.new").write_text("")
    release_files.write_sums(release)
    assert ".SHA256SUMS" not in (release / "SHA256SUMS").read_text()
    verification.verify(str(release))


def test_all_disagreements_are_named_at_once(release):
    change_weights(release)
    change_recipe(release)
    with pytest.raises(VerifyError) as caught:
        verification.verify(str(release))
    assert len(str(caught.value).splitlines()) == 6  # a title, two sums, the weights, the recipe, the BOM


def test_a_bom_of_another_version_says_whose_it_is(release):
    path = release / "hardener" / "report.json"
    path.write_text(path.read_text().replace(f'"hardener":"{hardener.__version__}"', '"hardener":"0.0.1"', 1))
    path.write_text(path.read_text().replace(f'"hardener": "{hardener.__version__}"', '"hardener": "0.0.1"', 1))
    with pytest.raises(VerifyError, match=rf"hardener 0\.0\.1 wrote it, this is {hardener.__version__}"):
        verification.verify(str(release))


def test_the_hubs_own_file_is_no_disagreement(release):
    (release / ".gitattributes").write_text("*.safetensors filter=lfs")
    verification.verify(str(release))


def test_a_damaged_list_of_sums_is_a_disagreement_and_no_crash(release):
    (release / "SHA256SUMS").write_text("garbage\n\n")
    with pytest.raises(VerifyError, match="SHA256SUMS"):
        verification.verify(str(release))


def test_a_release_of_before_recipes_had_some_key_still_agrees(release):
    path = release / "hardener" / "report.json"
    told = json.loads(path.read_text())
    assert told["recipe"].pop("erase") == "none"
    assert told["recipe"]["defense"].pop("order") == "first"
    report = reports.Report.model_validate(told)
    assert verification._recipe(release, report) == []
    report.recipe["probe"]["seed"] = 1
    assert verification._recipe(release, report) == ["hardener/recipe.yaml is not the recipe in the report"]


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


# --- the signature ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> tuple[Path, Path]:
    return write_keys(tmp_path_factory.mktemp("keys"), "ours", ec.generate_private_key(ec.SECP256R1()))


def test_a_signature_is_checked_with_the_key_and_told_without(release, keys):
    who = signing.sign(release, keys[0])
    assert verification.verify(str(release), public_key=keys[1])["checks"]["signature"] == f"ok ({who})"
    assert verification.verify(str(release))["checks"]["signature"] == signing.UNCHECKED


def test_a_forger_who_mends_sums_and_bom_is_found_by_the_signature_alone(release, keys):
    signing.sign(release, keys[0])
    (release / "README.md").write_text("protected")
    release_files.write_sums(release)
    verification.verify(str(release))
    with pytest.raises(VerifyError, match="no signature of these files"):
        verification.verify(str(release), public_key=keys[1])


def test_a_bad_signature_is_named_with_all_other_disagreements(release, keys):
    change_recipe(release)
    with pytest.raises(VerifyError) as caught:
        verification.verify(str(release), public_key=keys[1])
    assert len(str(caught.value).splitlines()) == 4  # a title, the signature, a sum, the recipe
    assert "model.sig is missing" in str(caught.value)


def test_a_run_that_was_asked_to_sign_signs_whatever_it_writes_last(made, keys, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    RunFolder.reopen(run).ask(sign=str(keys[0]))
    for _ in range(2):  # the second time over a release that is signed already
        release_files.card_run(run)
        assert verification.verify(str(run / "release"), public_key=keys[1])["checks"]["signature"].startswith(
            "ok (key "
        )
    assert "model.sig" not in (run / "release" / "SHA256SUMS").read_text()
    assert not [p for p in (run / "release").rglob("*") if p.is_file() and bytes(keys[0]) in p.read_bytes()]
    RunFolder.reopen(run).ask(sign=None)
    release_files.card_run(run)
    assert not (run / "release" / "model.sig").exists()


# --- the parent on the Hub --------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Hub]:
    with hub_server(tmp_path / "home") as hub:
        hub.connect(monkeypatch)
        yield hub


@pytest.fixture
def told(server, letters) -> Parent:
    """The letters Llama on the Hub, as a report names it."""
    server.add_model("org/letters", letters, card={"license": "mit"})
    return parent(
        id="org/letters", commit=server.repos["org/letters"].head.oid, weights=checkpoint.fingerprint(letters)
    )


def test_the_parent_is_compared_with_the_hub_without_fetching_its_weights(server, told, letters):
    assert verification._parent(told) == "ok"
    assert verification.remote_fingerprint("org/letters", told.commit) == checkpoint.fingerprint(letters)
    asked = [request.path for request in server.requests]
    assert any(path.endswith("/config.json") for path in asked)
    assert not [path for path in asked if path.endswith(".safetensors")]


def test_a_parent_in_shards_is_compared_shard_by_shard(server, told, letters, tmp_path):
    folder = shutil.copytree(letters, tmp_path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in {*places.values()}:
        save_file({name: tensors[name] for name in tensors if places[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    server.add_model("org/sharded", folder)
    commit = server.repos["org/sharded"].head.oid
    assert verification.remote_fingerprint("org/sharded", commit) == checkpoint.fingerprint(folder)


WRONG_PARENTS = {
    "other weights": (
        {"weights": "00" * 32},
        r"at its commit on the Hub \([0-9a-f]{12}\) is not the one in the report",
    ),
    "no such commit": ({"commit": "ab" * 20}, "the parent org/letters has no commit abab"),
    "a branch": ({"commit": "main"}, "names no commit of the parent org/letters, but 'main'"),
    "no commit": ({"commit": None}, "names no commit of the parent org/letters, but None"),
    "no id": ({"id": "../../letters"}, "the parent in the report: '../../letters' is not a Hub repository id"),
}


@pytest.mark.parametrize("name", WRONG_PARENTS)
def test_a_parent_that_is_not_the_one_in_the_report_is_found(told, name):
    change, said = WRONG_PARENTS[name]
    with pytest.raises(VerifyError, match=said):
        verification._parent(told.model_copy(update=change))


def test_a_commit_that_holds_no_model_is_no_parent(server, told, tmp_path):
    server.add_model("org/empty", tmp_path / "nothing", card={"license": "mit"})
    empty = told.model_copy(update={"id": "org/empty", "commit": server.repos["org/empty"].head.oid})
    with pytest.raises(VerifyError, match="the parent at commit "):
        verification._parent(empty)


def test_what_cannot_be_asked_is_said_to_be_unchecked(server, told, monkeypatch):
    gone = told.model_copy(update={"id": "org/gone"})
    assert verification._parent(gone).startswith("not checked (org/gone: no such repository, or it is private")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert verification._parent(told).startswith("not checked (org/letters: no answer from http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert verification._parent(told) == "not checked (offline)"
    assert verification._parent(told.model_copy(update={"local": True})) == "not checked (a local folder)"


def test_a_wrong_parent_stands_among_the_disagreements_of_the_release(release, told):
    path = release / "hardener" / "report.json"
    report = reports.read(path)
    path.write_text(
        report.model_copy(update={"parent": told.model_copy(update={"weights": "0" * 64})}).model_dump_json()
    )
    release_files.write_sums(release)
    with pytest.raises(VerifyError, match="the parent org/letters at its commit on the Hub"):
        verification.verify(str(release))


# --- the same again ---------------------------------------------------------------------------------------


def test_a_signed_release_is_made_again_from_its_report_with_an_equal_bom(release, keys, letters, paths, tmp_path):
    signing.sign(release, keys[0])
    data = [f"data.{role}.dataset={path}" for role, path in paths.items()]
    again = hardener.harden(str(letters), from_report=release, overrides=data, output=tmp_path / "run", device="cpu")
    for name in ("hardener/report.json", "hardener/bom.cdx.json", "model.safetensors", "SHA256SUMS"):
        assert (again.run / "release" / name).read_bytes() == (release / name).read_bytes()
    assert not (again.run / "release" / "model.sig").exists()
    report = reports.read(release / "hardener" / "report.json")
    told = json.loads((release / "hardener" / "bom.cdx.json").read_text())
    assert told == bom.bom(report, release)
    assert list(JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(told), all_errors=True) or ()) == []
    for private in (str(letters), str(letters.parent), *map(str, paths.values())):
        assert private not in json.dumps(told)


def test_a_signed_release_on_the_hub_is_checked_as_it_lies_in_the_cache(server, release, keys):
    who = signing.sign(release, keys[0])
    server.add_model("org/letters-hardened", release)
    found = verification.verify("org/letters-hardened", public_key=keys[1])
    assert found["checks"]["signature"] == f"ok ({who})"
    assert found["checks"]["bom"] == "ok"


@PLAIN_HTTP
def test_a_signed_run_is_pushed_with_its_signature_over_what_is_pushed(server, made, keys, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    RunFolder.reopen(run).ask(sign=str(keys[0]))
    release_files.push_run(run, "org/letters-hardened", private=True, push_anyway=True)
    assert "model.sig" in server.repos["org/letters-hardened"].files
    found = verification.verify("org/letters-hardened", public_key=keys[1])
    assert found["checks"]["signature"].startswith("ok (key ")
