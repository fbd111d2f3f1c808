"""The straight line, whole: what it leaves, that it repeats, that it survives being killed, that it publishes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import small
import tiny
from hub_server import PLAIN_HTTP, Hub, hub_server
from safetensors.torch import load_file

import hardener
from hardener import checkpoint, pipeline, recipe_file, resources, summary
from hardener import report as reports
from hardener.errors import (
    DataError,
    DivergedError,
    GateError,
    HubError,
    RunError,
    UnsupportedModelError,
    UsageError,
    VerifyError,
)
from hardener.run import RunFolder

pytestmark = [PLAIN_HTTP, pytest.mark.usefixtures("warm")]
LONG = ("train.steps=40", "train.save_every=2")
"""So many steps that a run can be caught in the middle."""


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def harden(model: Path | str, recipe: str, overrides: list[str], output: Path, **more) -> pipeline.Outcome:
    return hardener.harden(str(model), recipe=recipe, overrides=overrides, output=output, device="cpu", **more)


@pytest.fixture(scope="module", autouse=True)
def _dated() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        yield


@pytest.fixture(scope="module")
def done(warm, letters, paths, tmp_path_factory) -> pipeline.Outcome:
    """A run that nothing disturbed."""
    return harden(letters, "tiny-ctrap", small.overrides(paths, *LONG), tmp_path_factory.mktemp("done") / "run")


def test_the_run_folder_holds_what_every_later_command_needs(done, letters):
    run = done.run
    assert {path.name for path in run.iterdir()} == {"run.json", "recipe.yaml", "state", "probe", "release", ".lock"}
    companions = {path.name for path in letters.iterdir()} - {"model.safetensors"}
    plots = {path.name for path in (run / "release" / "hardener").glob("*.png")}
    assert {p.name for p in (run / "release").iterdir()} == companions | {"model.safetensors", "hardener", "SHA256SUMS"}
    evidence = {"report.json", "recipe.yaml", "bom.cdx.json"}
    assert {p.name for p in (run / "release" / "hardener").iterdir()} == plots | evidence
    assert plots
    assert {"original.json", "hardened.json"} <= {path.name for path in (run / "probe").iterdir()}
    journal = json.loads((run / "run.json").read_text())
    assert set(journal["stages"]) == {"harden"}
    assert journal["fingerprint"]["recipe.train.steps"] == "40"


def test_the_sums_are_those_of_sha256sum(done):
    told = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=done.run / "release", capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
    assert len(told.stdout.splitlines()) == len(contents(done.run / "release")) - 1


def test_the_report_is_of_this_release(done, letters):
    report = reports.read(done.run / "release" / "hardener" / "report.json")
    assert report == done.report
    assert report.weights == checkpoint.fingerprint(done.run / "release")
    assert report.parent.weights == checkpoint.fingerprint(letters) != report.weights
    assert (report.parent.id, report.parent.local) == ("letters", True)
    assert report.created == "2023-11-14"
    assert report.training.steps == 40
    released = recipe_file.load(done.run / "release" / "hardener" / "recipe.yaml")
    assert report.recipe == released.model_dump(mode="json")


def test_nothing_released_names_a_path_of_this_machine(done, letters, paths):
    for name, data in contents(done.run / "release").items():
        for place in (letters.parent, paths["benign"].parent, done.run.parent, Path.home()):
            assert str(place).encode() not in data, name


def test_the_evidence_of_a_screening_run_certifies_nothing(done):
    assert done.report.evidence.word == "inconclusive"
    assert done.exit_code == 4


def test_a_run_killed_twice_ends_with_the_same_bytes(done, letters, paths, tmp_path):
    """SIGKILL in the training, again in the probe; the rest in this process. Another folder, another cache."""
    run = tmp_path / "run"
    line = [word for one in small.overrides(paths, *LONG) for word in ("--set", one)]
    first = small.Command(
        "harden", letters, "--recipe", "tiny-ctrap", "--output", run, "--device", "cpu", *line, home=tmp_path / "home"
    )
    first.signal_when(lambda: (run / "state" / "step-000004").is_dir(), signal.SIGKILL)
    assert first.end()[0] == -signal.SIGKILL
    assert not (run / "release").exists()
    second = small.Command("harden", "--resume", run, home=tmp_path / "home")
    second.signal_when(lambda: list((run / "probe" / "runs" / "hardened").glob("*.json")), signal.SIGKILL)
    assert second.end()[0] == -signal.SIGKILL
    assert "harden" in json.loads((run / "run.json").read_text())["stages"]
    assert not (run / "release" / "hardener").exists()
    attacked = contents(run / "probe" / "runs")
    outcome = hardener.harden(resume=run)
    assert contents(run / "release") == contents(done.run / "release")
    assert outcome.report == done.report
    assert attacked.items() <= contents(run / "probe" / "runs").items()


def test_resuming_a_finished_run_changes_nothing(done):
    before = contents(done.run / "release")
    when = (done.run / "release" / "model.safetensors").stat().st_mtime_ns
    again = hardener.harden(resume=done.run)
    assert again.report == done.report
    assert contents(done.run / "release") == before
    assert (done.run / "release" / "model.safetensors").stat().st_mtime_ns == when


def test_resuming_with_another_recipe_or_parent_is_refused_with_the_difference(done, letters, tmp_path):
    run = shutil.copytree(done.run, tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("steps: 40", "steps: 41"))
    with pytest.raises(RunError, match=r"cannot be resumed:\n  recipe\.train\.steps: was 40, is 41$"):
        hardener.harden(resume=run)
    (run / "recipe.yaml").write_text(recipe)
    parent = shutil.copytree(letters, tmp_path / "letters")
    (parent / "generation_config.json").write_text("{}")
    RunFolder.reopen(run).ask(model=str(parent))
    with pytest.raises(RunError, match=r"resumed:\n  parent: was \w+, is \w+$"):
        hardener.harden(resume=run)


def test_the_original_is_not_attacked_twice(done, letters, paths, tmp_path):
    again = harden(letters, "tiny-ctrap", small.overrides(paths, *LONG, "train.steps=1"), tmp_path / "run")
    assert not (tmp_path / "run" / "probe" / "runs" / "original").exists()
    assert (tmp_path / "run" / "probe" / "original.json").read_bytes() == (
        done.run / "probe" / "original.json"
    ).read_bytes()
    assert again.report.evidence.measures.w_original == done.report.evidence.measures.w_original


def test_a_dry_run_writes_nothing_and_says_what_would_happen(letters, paths, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = contents(letters)
    outcome = harden(letters, "tiny-ctrap", small.overrides(paths), tmp_path / "run", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert contents(letters) == before
    assert (outcome.exit_code, outcome.run, outcome.report) == (0, None, None)
    assert outcome.plan.outer_steps == 4
    assert outcome.plan.parameters == sum(v.numel() for v in load_file(letters / "model.safetensors").values())


DRY = {
    "an illegal name": ({"push_to": "a/b/c"}, "is not a Hub repository id"),
    "the parent": ({"push_to": "letters", "private": True}, "is the parent itself"),
    "no licence": ({"push_to": "me/hardened"}, "names no licence"),
    "no such device": ({"device": "mps"}, "--device mps: no such device here"),
}


@pytest.mark.parametrize("case", DRY)
def test_a_dry_run_finds_what_can_be_found_without_the_network(letters, paths, tmp_path, case):
    options, said = DRY[case]
    bare = shutil.copytree(letters, tmp_path / "letters")
    (bare / "README.md").unlink(missing_ok=True)
    with pytest.raises(UsageError, match=said):
        pipeline.harden(
            str(bare),
            recipe="tiny-ctrap",
            overrides=small.overrides(paths),
            output=tmp_path / "run",
            dry_run=True,
            **options,
        )
    assert not (tmp_path / "run").exists()


def test_a_dry_run_finds_a_folder_that_is_taken(done, letters, paths):
    with pytest.raises(RunError, match="is not empty; continue it with --resume"):
        harden(letters, "tiny-ctrap", small.overrides(paths), done.run, dry_run=True)


def test_what_resuming_would_ignore_is_named(done, letters):
    with pytest.raises(UsageError, match=r"leave out MODEL, probe\.gate=protected, --output, --device$"):
        harden(letters, None, ["probe.gate=protected"], done.run, resume=done.run)
    with pytest.raises(
        UsageError, match="leave out --recipe, --revision, --push-to, --private, --create-pr, --branch, --f"
    ):
        pipeline.harden(
            resume=done.run,
            recipe="ctrap",
            revision="main",
            push_to="me/hardened",
            private=True,
            create_pr=True,
            branch="x",
            from_report="y",
        )


def test_a_run_whose_data_was_changed_is_not_resumed_and_the_file_is_named(letters, paths, tmp_path):
    mine = {role: shutil.copyfile(path, tmp_path / path.name) for role, path in paths.items()}
    broken = small.overrides(mine, "train.lr=1.0e+30", "train.steps=30")
    with pytest.raises(DivergedError) as caught:
        harden(letters, "tiny-ctrap", broken, tmp_path / "run")
    assert "start a new run with a lower train.lr" in caught.value.go_on
    with mine["benign"].open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(DataError, match=rf"data\.benign\.0\.dataset: {mine['benign'].name} has sha256"):
        hardener.harden(resume=tmp_path / "run")


@pytest.mark.parametrize("name", resources.recipes())
def test_a_probe_reads_a_recipe_without_its_defence(name):
    wrong = ["defense={name: nonsense}", "train.steps=-1", "data.alignment=null"]
    recipe = recipe_file.load(name, wrong, probe=True)
    assert (recipe.defense, recipe.train) == (None, None)


@pytest.mark.parametrize("entry", ["harden", "probe"])
def test_after_a_wrong_request_the_corrected_line_can_be_run(letters, paths, tmp_path, entry):
    columns = "data.benign.columns={prompt: nope, completion: completion}"
    with pytest.raises(DataError, match="column nope is missing"):
        getattr(pipeline, entry)(
            str(letters),
            recipe="tiny-ctrap",
            overrides=small.overrides(paths, columns),
            output=tmp_path / "run",
            device="cpu",
        )
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_for_the_probe_alone_cannot_harden(letters, paths, tmp_path):
    with pytest.raises(UsageError, match="has no defense and train sections; use it with `hardener probe`"):
        harden(letters, "tiny-ctrap", small.overrides(paths, "defense=null", "train=null"), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_model_and_a_recipe_are_needed():
    with pytest.raises(UsageError, match="name a model and a recipe"):
        hardener.harden(None)


@pytest.mark.parametrize("bed", ["image", "text"])
def test_sophon_hardens_a_classifier_from_end_to_end(request, tmp_path, bed):
    fixtures = {"image": ("resnet", "image_paths"), "text": ("bert", "text_paths")}[bed]
    folder, files = (request.getfixturevalue(name) for name in fixtures)
    name = f"tiny-sophon-{bed}"
    outcome = harden(folder, name, small.overrides(files, name=name), tmp_path / "run")
    report, release = outcome.report, tmp_path / "run" / "release"
    assert outcome.exit_code == 4  # 16 rows are no evidence
    assert report.training.title == "SOPHON"
    assert (tmp_path / "run" / "probe" / "scratch.json").is_file()
    old, new = load_file(folder / "model.safetensors"), load_file(release / "model.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in old.items()} == {k: (v.dtype, v.shape) for k, v in new.items()}
    assert any(not old[key].equal(new[key]) for key in old)
    assert hardener.verify(str(release))["checks"] == small.VERIFIED


def test_an_adapter_hardens_and_is_merged_into_the_release(letters, paths, tmp_path):
    lora = "adapter={r: 4, alpha: 8, target_modules: all-linear}"
    outcome = harden(letters, "tiny-ctrap", small.overrides(paths, lora), tmp_path / "run")
    old, new = (load_file(f / "model.safetensors") for f in (letters, tmp_path / "run" / "release"))
    assert old.keys() == new.keys()
    assert old["model.embed_tokens.weight"].equal(new["model.embed_tokens.weight"])
    assert not old["model.layers.0.mlp.up_proj.weight"].equal(new["model.layers.0.mlp.up_proj.weight"])
    assert 0 < outcome.report.training.trainable < sum(v.numel() for v in old.values()) / 4


def test_mixed_precision_works_after_attacks_in_the_same_process(letters, paths, tmp_path):
    outcome = harden(letters, "tiny-ctrap", small.overrides(paths, "train.dtype=bfloat16"), tmp_path / "run")
    assert outcome.report.training.steps == 4


def test_a_probe_of_a_release_leaves_evidence_and_no_weights(done, letters, paths, tmp_path):
    outcome = hardener.probe(
        str(done.run / "release"),
        recipe="tiny-ctrap",
        against=str(letters),
        overrides=small.overrides(paths),
        output=tmp_path / "run",
        device="cpu",
    )
    assert outcome.report.training is None
    assert outcome.report.weights == done.report.weights
    names = set(contents(tmp_path / "run" / "release"))
    assert {"README.md", "SHA256SUMS", "hardener/report.json", "hardener/recipe.yaml"} <= names
    assert not [name for name in names if name.endswith(".safetensors")]


def test_a_lone_probe_says_figures_and_no_verdict_against_anything(letters, paths, tmp_path):
    outcome = hardener.probe(
        str(letters), recipe="tiny-ctrap", overrides=small.overrides(paths), output=tmp_path / "run", device="cpu"
    )
    assert outcome.exit_code == 0
    assert outcome.report.evidence.measures.w_original is None


def test_a_gate_without_an_original_is_refused_before_anything_starts(letters, paths, tmp_path):
    gated = small.overrides(paths, "probe.preset=standard", "probe.gate=raises-cost")
    with pytest.raises(UsageError, match="a gate needs --against ORIGINAL"):
        hardener.probe(str(letters), recipe="tiny-ctrap", overrides=gated, output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_card_of_a_finished_run_can_be_rendered_again(done):
    before = contents(done.run / "release")
    assert hardener.card_run(done.run) == before["README.md"].decode()
    assert contents(done.run / "release") == before


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_what_was_changed_after_the_attack_gets_neither_card_nor_push(done, tmp_path, name):
    run = shutil.copytree(done.run, tmp_path / "run")
    changed = run / "release" / name
    changed.write_bytes(changed.read_bytes()[:-1] + b" ")
    before = contents(run / "release")
    with pytest.raises(VerifyError, match="is not what was attacked"):
        hardener.card_run(run)
    with pytest.raises(VerifyError, match="is not what was attacked"):
        hardener.push_run(run, "org/never", push_anyway=True)
    assert contents(run / "release") == before  # the sums do not follow


# --- publishing --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def easy(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    return tiny.easy(tmp_path_factory.mktemp("easy"))


@pytest.fixture(scope="module")
def server(easy, tmp_path_factory) -> Iterator[Hub]:
    with hub_server(tmp_path_factory.mktemp("hub")) as running, pytest.MonkeyPatch.context() as patch:
        running.connect(patch)
        running.add_model("org/letters", easy[0], card={"license": "apache-2.0"})
        yield running


def easily(paths: dict[str, Path], *more: str) -> list[str]:
    return [*(f"data.{role}.dataset={path}" for role, path in paths.items()), *small.EASY, *more]


def test_one_line_hardens_and_publishes_in_one_verified_commit(server, easy, tmp_path):
    outcome = harden("org/letters", "tiny-ctrap", easily(easy[1]), tmp_path / "run", push_to="org/letters-hardened")
    assert (outcome.report.evidence.word, outcome.exit_code) == ("no measurable protection", 0)
    repo = server.repos["org/letters-hardened"]
    assert outcome.pushed.commit == repo.head.oid
    assert len(repo.commits) == 2  # the Hub's own first, and ours
    assert not repo.private
    there = {name: data for name, data in repo.files.items() if name != ".gitattributes"}
    assert there == contents(tmp_path / "run" / "release")
    assert outcome.report.parent.commit == server.repos["org/letters"].head.oid
    checked = hardener.verify("org/letters-hardened")
    assert (checked["verdict"], checked["weights"]) == ("no measurable protection", outcome.report.weights)
    again = hardener.harden(resume=tmp_path / "run")  # nothing is pushed twice
    assert again.pushed == outcome.pushed
    assert len(repo.commits) == 2


def test_a_release_that_fails_is_not_published_until_that_is_overruled(server, easy, tmp_path):
    ruined, run = ["train.lr=0.3", "train.steps=4"], tmp_path / "run"
    outcome = harden("org/letters", "tiny-ctrap", easily(easy[1], *ruined), run, push_to="org/gated")
    assert outcome.exit_code == 1
    assert outcome.pushed is None
    assert outcome.withheld.startswith("broken: ")
    assert outcome.withheld.endswith("the empty repository org/gated was removed again")
    assert "org/gated" not in server.repos
    with pytest.raises(GateError, match=r"not pushed — broken: .*--push-anyway"):
        hardener.push_run(run, "org/gated")
    assert "org/gated" not in server.repos
    assert not outcome.report.pushed_anyway
    overruled = hardener.harden(resume=run, push_anyway=True)
    repo = server.repos["org/gated"]
    assert overruled.exit_code == 1
    assert overruled.pushed.commit == repo.head.oid
    assert not repo.private
    text = repo.files["README.md"].decode().split("---\n", 2)[2]
    first = next(line for line in text.splitlines() if line.strip())
    assert summary.GATE_MISSED in first
    assert overruled.report.pushed_anyway
    by_hand = hardener.push_run(run, "org/by-hand", push_anyway=True)
    assert server.repos["org/by-hand"].head.oid == by_hand.commit


def test_inconclusive_evidence_publishes_nothing(server, letters, paths, tmp_path):
    server.add_model("org/untrained", letters, card={"license": "apache-2.0"})
    outcome = harden("org/untrained", "tiny-ctrap", small.overrides(paths), tmp_path / "run", push_to="org/nothing")
    assert outcome.exit_code == 4
    assert outcome.withheld.startswith("inconclusive: ")
    assert "org/nothing" not in server.repos


def test_a_push_that_failed_is_finished_by_resuming_and_ends_public(server, easy, tmp_path):
    line = (easily(easy[1]), tmp_path / "run")
    server.corrupt.add("model.safetensors")
    with pytest.raises(HubError, match=r"not what was sent: model\.safetensors.*\n.*stays private until"):
        harden("org/letters", "tiny-ctrap", *line, push_to="org/second-try")
    server.corrupt.clear()
    assert server.repos["org/second-try"].private
    outcome = hardener.harden(resume=tmp_path / "run")
    repo = server.repos["org/second-try"]
    assert outcome.pushed.commit == repo.head.oid
    assert not repo.private
    assert {n: d for n, d in repo.files.items() if n != ".gitattributes"} == contents(tmp_path / "run" / "release")

    server.fail("POST .*/commit/", 502)
    with pytest.raises(HubError, match="org/by-hand-twice stays private until the push is repeated"):
        hardener.push_run(tmp_path / "run", "org/by-hand-twice")
    assert server.repos["org/by-hand-twice"].private
    hardener.push_run(tmp_path / "run", "org/by-hand-twice")
    assert not server.repos["org/by-hand-twice"].private

    server.repos["org/by-hand-twice"].private = True  # by its owner, after it was published
    hardener.push_run(tmp_path / "run", "org/by-hand-twice")
    assert server.repos["org/by-hand-twice"].private


def test_bad_data_removes_the_repository_that_was_made_for_it(server, easy, tmp_path):
    columns = "data.benign.columns={prompt: nope, completion: completion}"
    with pytest.raises(UsageError, match="column nope is missing"):
        harden("org/letters", "tiny-ctrap", easily(easy[1], columns), tmp_path / "run", push_to="org/unused")
    assert "org/unused" not in server.repos


@pytest.mark.parametrize("case", ["foreign", "read-only token"])
def test_a_target_without_rights_is_refused_before_any_training(server, easy, tmp_path, monkeypatch, case):
    monkeypatch.setattr(server, "role", "read" if case == "read-only token" else "write")
    repo = "org/mine" if case == "read-only token" else "stranger/theirs"
    with pytest.raises(HubError) as caught:
        harden("org/letters", "tiny-ctrap", easily(easy[1]), tmp_path / "run", push_to=repo)
    assert caught.value.exit_code == 3
    assert repo in str(caught.value)
    assert not (tmp_path / "run" / "state").exists()
    assert not (tmp_path / "run" / "probe").exists()
    assert repo not in server.repos


def test_pickled_weights_are_refused_without_moving_them(server, easy, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copyfile(easy[0] / "config.json", folder / "config.json")
    (folder / "pytorch_model.bin").write_bytes(b"pickle" * 1000)
    server.add_model("org/pickled", folder, card={"license": "mit"})
    with pytest.raises(UnsupportedModelError, match="pickle, which can run code") as caught:
        harden("org/pickled", "tiny-ctrap", easily(easy[1]), tmp_path / "run")
    assert caught.value.exit_code == 2
    assert not server.asked(r"pytorch_model\.bin")
    assert not (tmp_path / "run").exists()


def test_a_release_can_be_made_again_from_its_report(done, letters, paths, tmp_path):
    data = [f"data.{role}.dataset={path}" for role, path in paths.items()]
    again = pipeline.harden(
        str(letters), from_report=done.run / "release", overrides=data, output=tmp_path / "run", device="cpu"
    )
    assert contents(again.run / "release") == contents(done.run / "release")


def test_a_report_is_not_mixed_with_another_model_or_recipe(done, letters, resnet):
    release = done.run / "release"
    with pytest.raises(UsageError, match="leave them out"):
        pipeline.harden(str(letters), recipe="ctrap", from_report=release)
    with pytest.raises(UsageError, match="was a local folder: hardener harden PATH"):
        pipeline.harden(from_report=release)
    with pytest.raises(UsageError, match="is not the parent"):
        pipeline.harden(str(resnet), from_report=release)
