"""A recipe is read strictly: what is written is what runs, and what is wrong is said all at once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hardener import recipe_file
from hardener.defenses.trap_configs import CtrapConfig
from hardener.errors import RecipeError
from hardener.recipe import CardChoice, Data, Lora, Probe, Recipe, Source, Train

VALID = """\
name: mine
title: A recipe
task: causal-lm
data:
  restricted:
    dataset: restricted.jsonl
  alignment: {dataset: alignment.jsonl}
  retain:
    - dataset: retain.jsonl
defense:
  name: ctrap
train:
  steps: 10
  batch_size: 8
  lr: 1e-4
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def _write(text: str | bytes, name: str = "r.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write


def problems(source: str | Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe_file.load(source, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def changed(old: str, new: str) -> str:
    assert VALID.count(old) == 1
    return VALID.replace(old, new)


# --- what is written is what runs -------------------------------------------------------------------------


def test_the_numbers_of_yaml_1_2_are_numbers(write: Any) -> None:
    recipe = recipe_file.load(write(VALID))
    assert recipe.train is not None
    assert recipe.train.lr == 1e-4
    assert isinstance(yaml.safe_load("1e-4"), str)  # the trap


def test_a_word_that_old_yaml_takes_for_a_truth_value_stays_a_word(write: Any) -> None:
    recipe = recipe_file.load(write(VALID + "card: {language: [no, nb]}\n"))
    assert recipe.card.language == ("no", "nb")


def test_the_settings_of_a_known_defence_are_completed(write: Any) -> None:
    defense = recipe_file.load(write(VALID)).defense
    assert defense is not None
    assert defense.settings == CtrapConfig().model_dump()
    assert defense.settings["radius"] == 0.1


def test_without_defence_and_training_a_recipe_probes(write: Any) -> None:
    recipe = recipe_file.load(write(VALID[: VALID.index("defense:")]))
    assert recipe.defense is None
    assert recipe.train is None


def test_local_paths_begin_in_the_folder_of_the_recipe(write: Any, monkeypatch: Any, tmp_path: Path) -> None:
    path = write(VALID.replace("alignment.jsonl", "org/hub-id"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    data = recipe_file.load(path, ["data.retain.0.dataset=./mine"]).data
    assert data.alignment is not None
    assert data.restricted[0].dataset == str(tmp_path / "restricted.jsonl")
    assert data.alignment[0].dataset == "org/hub-id"
    assert Path(data.retain[0].dataset) == elsewhere / "mine"


def test_a_column_called_dataset_is_no_path(write: Any) -> None:
    recipe = recipe_file.load(write(VALID), ["data.restricted.where={dataset: x.json}"])
    assert recipe.data.restricted[0].where == {"dataset": "x.json"}


def test_a_byte_order_mark_is_not_part_of_the_text(write: Any) -> None:
    assert recipe_file.load(write(b"\xef\xbb\xbf" + VALID.encode())).name == "mine"


# --- what is wrong is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line", "told"),
    [
        ("lr: 1e-4", "learning_rate: 1e-4", 15, "train.learning_rate: unknown key; did you mean train.lr?"),
        (
            "lr: 1e-4",
            "lr: 1e-4\n  bach_size: 4",
            16,
            "train.bach_size: unknown key; did you mean train.batch_size?",
        ),
        ("lr: 1e-4", "lr: 1e-4\ngate: protected", 16, "gate: unknown key; did you mean probe.gate?"),
        ("lr: 1e-4", "lr: 1e-4\n  zzz: 1", 16, "train.zzz: unknown key; known here: steps, batch_size"),
        (
            "name: ctrap",
            "name: ctrap\n  lambda: 1",
            12,
            "defense.lambda: unknown key; did you mean defense.lam?",
        ),
        ("name: ctrap", "name: ctrap\n  radius: -1", 12, "defense.radius: should be greater than 0, not -1"),
        ("name: ctrap", "name: ctarp", 11, "defense.name: no defence is called 'ctarp'; did you mean ctrap?"),
        ("causal-lm", "casual-lm", 3, "task: no task is called 'casual-lm'; did you mean causal-lm?"),
        ("steps: 10", "steps: ten", 13, "train.steps: should be a whole number, not 'ten'"),
        ("steps: 10", "steps:", 13, "train.steps: is required: a whole number"),
        ("steps: 10", 'steps: "10"', 13, "train.steps: should be a whole number, not '10'"),
        ("steps: 10", "steps: 1.5", 13, "train.steps: should be a whole number, not 1.5"),
        ("steps: 10", "steps: true", 13, "train.steps: should be a whole number, not True"),
        ("steps: 10", "steps: 0", 13, "train.steps: should be greater than or equal to 1, not 0"),
        ("lr: 1e-4", "lr: 1e999", 15, "train.lr: should be a finite number, not inf"),
        ("lr: 1e-4", "lr: .nan", 15, "train.lr: should be a finite number, not '.nan'"),
        ("title: A recipe", "title: 5", 2, "title: should be text, not 5"),
        ("train:", "adapter: non\ntrain:", 12, "adapter: should be 'none' or keys with values, not 'non'"),
        ("train:", "adapter: {r: 4}\ntrain:", 12, "adapter.alpha: missing"),
        ("train:", "train: 3\nx:", 12, "train: should be keys with values, not 3"),
        (
            "    dataset: restricted.jsonl",
            "    split: a",
            5,
            "data.restricted.dataset: missing (Hub id, or path",
        ),
        (
            "restricted.jsonl",
            "r.jsonl\n    uses: attack",
            7,
            "data.restricted.uses: should be a list, not 'attack'",
        ),
        ("restricted.jsonl", "r.jsonl\n    uses: [atack]", 7, "data.restricted.uses.0: should be 'defence'"),
        ("retain.jsonl", "r.jsonl\n      split: 3", 10, "data.retain.0.split: should be text, not 3"),
        ("steps: 10", "steps: 10\n  steps: 11", 14, "train.steps: written twice, first on line 13"),
        ("steps: 10", "1: 10", 13, "train: key '1' is not text; put it in quotes"),
        (
            "steps: 10",
            "steps: !!python/name:os.system",
            13,
            "train.steps: tag tag:yaml.org,2002:python/name:os.system",
        ),
        ("steps: 10", "steps: !!int x", 13, "train.steps: tag tag:yaml.org,2002:int is not allowed here"),
    ],
)
def test_a_mistake_is_told_with_line_key_and_remedy(write: Any, old: str, new: str, line: int, told: str) -> None:
    path = write(changed(old, new))
    assert any(message.startswith(f"{path}:{line}: {told}") for message in problems(path)), problems(path)


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        (b"", 1, "a recipe is keys with values; this file is empty"),
        (b"# only a remark\n", 1, "a recipe is keys with values; this file is empty"),
        (b"- a\n- b\n", 1, "a recipe is keys with values; not a list"),
        (b"name: x\n\ttitle: y\n", 2, "a tab stands where YAML wants spaces"),
        (b"name: x\ntitle: \xff\n", 2, "not UTF-8; save the file as UTF-8"),
        (b"name: x\ntitle: a\x00b\n", 2, "character U+0000 is not allowed in YAML"),
        (b"name: x\ntitle: [a\n", 3, "not valid YAML"),
        (b"name: x\n---\nname: y\n", 2, "not valid YAML: but found another document"),
        (b"name: x\na: &x [1]\nb: *x\n", 2, "anchors and aliases (& and *) are not allowed"),
        (b"a: b\nname: *x\n", 2, "anchors and aliases (& and *) are not allowed"),
        (b"name: " + b"[" * 100_000, 1, "more than 20 levels of nesting"),
    ],
)
def test_what_is_not_a_recipe_at_all_is_told_with_its_line(write: Any, text: bytes, line: int, told: str) -> None:
    path = write(text)
    (message,) = problems(path)
    assert message.startswith(f"{path}:{line}: {told}")


def test_all_problems_are_reported_at_once_in_the_order_of_lines(write: Any) -> None:
    text = changed("steps: 10", "steps: ten").replace("lr: 1e-4", "lrr: 1e-4\n  lrr: 2")
    path = write(text.replace("causal-lm", "causal"))
    assert [message.removeprefix(f"{path}:") for message in problems(path, "probe.preset=fast")] == [
        "3: task: no task is called 'causal'; did you mean causal-lm?",
        "12: train.lr: missing (learning rate of the outer (SOPHON: reinforcement) optimizer)",
        "13: train.steps: should be a whole number, not 'ten'",
        "15: train.lrr: unknown key; did you mean train.lr?",
        "16: train.lrr: written twice, first on line 15",
        "--set probe.preset=fast: probe.preset: should be 'reduced-cpu', 'quick', 'standard' or 'thorough', not 'fast'",
    ]


def test_a_huge_file_is_not_parsed(write: Any) -> None:
    (message,) = problems(write(b"#" * (recipe_file.MAX_BYTES + 1)))
    assert "1,048,577 bytes, where a recipe has 1,048,576 at most" in message


def test_an_unknown_name_gets_the_nearest_shipped_one(tmp_path: Path) -> None:
    assert problems("ctarp") == ["ctarp: no such file, and no shipped recipe of this name; did you mean ctrap?"]
    assert "cannot be read: Is a directory" in problems(tmp_path)[0]


# --- contradictions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train="], "defense: a defence needs a section `train`"),
        (["defense="], "train: training needs a section `defense`"),
        (["data.alignment="], "data.alignment: ctrap needs this role"),
        (["train.batch_size=9"], "train.batch_size: ctrap needs a multiple of 2, not 9"),
        (["defense.order=second", "train.dtype=bfloat16"], "train.dtype: the second order is a difference of"),
        (
            ["defense={name: ctrap-rollout, inner_adapter: {r: 2, alpha: 4}}", "adapter={r: 4, alpha: 8}"],
            "defense.inner_adapter: an adapter is simulated on all weights",
        ),
        (
            ["defense={name: ctrap-adaptive, subspaces: [all, lora]}", "adapter={r: 4, alpha: 8}"],
            "defense.subspaces: a LoRA is simulated on all weights",
        ),
        (
            ["defense={name: sophon-wide, scopes: [all, lora]}", "adapter={r: 4, alpha: 8}"],
            "defense.scopes: a LoRA is simulated on all weights",
        ),
        (["data.shares=[0.5, 0.5, 0.5]"], "data.shares: shares must sum to 1, not to 1.5"),
        (["data.shares=[1.5, -0.5, 0.0]"], "data.shares: shares must be ≥ 0, not -0.5"),
        (["data.retain=null"], "data.retain: is required: a list"),
        (["data.retain.uses=[]"], "data.retain.0.uses: needs at least one value"),
        (["data.template=Question:"], "data.template: must hold {prompt}, which 'Question:' does not"),
        (["train.warmup_steps=10"], "train.warmup_steps: the rate rises for 10 steps, and there are 10 in all"),
        (["probe.seed=-1"], "probe.seed: should be greater than or equal to 0, not -1"),
        (["train.seed=-1"], "train.seed: should be greater than or equal to 0, not -1"),
        (["data.seed=-1"], "data.seed: should be greater than or equal to 0, not -1"),
        (["probe.rates.full=[]"], "probe.rates.full: needs at least one value"),
        (["probe.rates.full=[1e-4, 0.0]"], "probe.rates.full.1: should be greater than 0, not 0.0"),
        (["probe.families=[]"], "probe.families: needs at least one value"),
        (["probe.families=[full, lora, full]"], "probe.families.2: full is named twice"),
        (["probe.families=[kept-head]"], "probe.families.0: kept-head does not attack causal-lm"),
        (
            ["probe.families=[relative]", "probe.preset=quick"],
            "probe.families.0: relative does not attack causal-lm under the preset quick",
        ),
        (["probe.families=[mixed]"], "probe.families.0: mixed is tried at the best rate of full: name that too"),
        (["probe.rates.prefilled=[0.1]"], "probe.rates.prefilled: prefilled does not train, so it has no learning"),
        (["probe.rates.kept-head=[0.1]"], "probe.rates.kept-head: kept-head does not attack causal-lm"),
        (["data.retain.0.uses=[defence, evaluation]"], "data.retain: no source serves the use attack"),
        (["data.retain.columns={text: '{a'}"], "data.retain.0.columns.text: '{a' is no template: expected '}'"),
        (["data.retain.columns={text: '{}'}"], "data.retain.0.columns.text: '{}' is no template: between braces"),
        (["data.retain.columns={text: '{a!r}'}"], "data.retain.0.columns.text: '{a!r}' is no template: between"),
        (["data.retain.columns={text: '{a:>9}'}"], "data.retain.0.columns.text: '{a:>9}' is no template: between"),
        (["probe.preset=quick", "probe.gate=protected"], "probe.gate: the preset quick never certifies"),
        (["probe.steps=9", "probe.max_steps=8"], "probe.max_steps: max_steps (8) is less than steps (9)"),
        (["data.restricted.uses=[attack, evaluation]"], "data.restricted: no source serves the use defence"),
        (["data.retain.0.uses=[evaluation]"], "data.retain: no source serves the use defence"),
        (["data.alignment.uses=[attack]"], "data.alignment: no source serves the use defence"),
        (
            ["data.benign={dataset: x, uses: [defence]}"],
            "data.benign: no source serves the use attack and evaluation",
        ),
        (
            ["task=image-classification"],
            "defense.name: ctrap is defined for causal-lm, not image-classification",
        ),
        (["probe.rates.ful=[0.1]"], "probe.rates.ful: no attack family is called 'ful'; did you mean full?"),
        (
            ["probe.families=[lorra]"],
            "probe.families.0: no attack family is called 'lorra'; did you mean lora?",
        ),
        (["data.retain.score=accuracy"], "data.retain.0.score: causal-lm cannot be scored by 'accuracy'"),
        (
            ["data.retain.columns.promt=x"],
            "data.retain.0.columns.promt: causal-lm has no field 'promt'; did you mean",
        ),
        (
            ["data.retain.columns={prompt: x}"],
            "data.retain.0.columns: a row of causal-lm is prompt + completion or",
        ),
    ],
)
def test_a_contradiction_is_refused(write: Any, overrides: list[str], told: str) -> None:
    assert any(told in message for message in problems(write(VALID), *overrides))


def test_a_contradiction_in_the_file_is_told_with_its_line(write: Any) -> None:
    path = write(changed("dataset: restricted.jsonl", "dataset: r.jsonl\n    score: accuracy"))
    assert problems(path)[0].startswith(f"{path}:7: data.restricted.0.score: ")


def test_uses_may_be_served_by_several_sources(write: Any) -> None:
    overrides = [
        "data.restricted.uses=[defence, attack]",
        "data.restricted.1={dataset: x, uses: [evaluation]}",
    ]
    assert len(recipe_file.load(write(VALID), overrides).data.restricted) == 2


def test_a_defence_that_is_installed_beside_is_accepted_with_its_own_settings(
    write: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    info = tmp_path / "trap-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trap\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hardener.defenses]\ntrap = trap:Trap\n")
    path = write(changed("name: ctrap", "name: trap\n  depth: 3"))
    assert "no defence is called 'trap'; did you mean ctrap?" in problems(path)[0]
    monkeypatch.syspath_prepend(tmp_path)
    defense = recipe_file.load(path).defense
    assert defense is not None
    assert defense.settings == {"depth": 3}


def test_a_follower_with_rates_of_its_own_needs_no_leader(write: Any) -> None:
    loaded = recipe_file.load(write(VALID), ["probe.families=[mixed]", "probe.rates.mixed=[0.001]"])
    assert loaded.probe.families == ("mixed",)


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("raise ImportError('it needs torch 1.0')", "cannot be imported: it needs torch 1.0; mend or uninstall"),
        ("OTHER = 1", "cannot be imported: module 'knock' has no attribute 'KNOCK'"),
        ("from hardener.attacks.families import FULL as KNOCK", "is no attack family of that name"),
    ],
)
def test_an_attack_of_another_package_that_is_none_is_told(
    write: Any, tmp_path: Path, monkeypatch: Any, module: str, told: str
) -> None:
    info = tmp_path / "knock-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: knock\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hardener.attacks]\nknock = knock:KNOCK\n")
    (tmp_path / "knock.py").write_text(module + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "knock", raising=False)
    with pytest.raises(RecipeError, match=re.escape(told)):
        recipe_file.load(write(VALID), ["probe.families=[knock]"])


# --- overrides --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.steps=7", "train.steps", 7),
        ("train.lr=5e-3", "train.lr", 5e-3),
        ("train.clip=", "train.clip", None),
        ("train.clip=null", "train.clip", None),
        ("train.checkpointing=true", "train.checkpointing", True),
        ("title=a = b", "title", "a = b"),
        ('title="5"', "title", "5"),
        ("data.template=Q: {prompt}", "data.template", "Q: {prompt}"),
        ("card.language=[de, no]", "card.language", ("de", "no")),
        ("probe.rates.full=[1e-4, 1e-3]", "probe.rates", {"full": (1e-4, 1e-3)}),
        ("adapter={r: 4, alpha: 8}", "adapter", Lora(r=4, alpha=8)),
        ("data.restricted.split=test", "data.restricted.0.split", "test"),
        ("data.restricted.0.split=test", "data.restricted.0.split", "test"),
        ("data.retain.split=test", "data.retain.0.split", "test"),
        ("data.retain.1.dataset=org/x", "data.retain.1.dataset", "org/x"),
        ("data.benign.dataset=org/x", "data.benign.0.dataset", "org/x"),
        ("data.benign.0.dataset=org/x", "data.benign.0.dataset", "org/x"),
        ("defense.lam=0.5", "defense.lam", 0.5),
    ],
)
def test_an_override_reaches_its_key(write: Any, override: str, path: str, value: Any) -> None:
    found: Any = recipe_file.load(write(VALID), [override])
    for part in path.split("."):
        found = found[int(part)] if part.isdecimal() else getattr(found, part)
    assert found == value


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.steps", "must be key.path=value, e.g. train.steps=100"),
        ("=3", "must be key.path=value"),
        ("train..steps=3", "must be key.path=value"),
        ("0.steps=3", "must be key.path=value"),
        ("train.step=3", "train.step: unknown key; did you mean train.steps?"),
        ("train.steps=many", "train.steps: should be a whole number, not 'many'"),
        ("train.steps.x=1", "train.steps: should be a whole number, not {'x': 1}"),
        ("data.retain.3.dataset=x", "there is no item 3; the list has 1"),
        ("train.steps=[1", "not valid YAML"),
        ("train.steps=&a 3", "anchors and aliases"),
        ("train.steps=!!set {}", "tag tag:yaml.org,2002:set is not allowed here"),
    ],
)
def test_an_override_that_fails_is_named(write: Any, override: str, told: str) -> None:
    (message,) = problems(write(VALID), override)
    assert message.startswith(f"--set {override}: {told}")


def test_an_item_of_many_needs_its_index(write: Any) -> None:
    messages = problems(write(VALID), "data.retain.1.dataset=x", "data.retain.split=y")
    assert messages == ["--set data.retain.split=y: there are 2 items here; put an index before 'split'"]


def test_a_word_gives_way_to_a_section(write: Any) -> None:
    recipe = recipe_file.load(write(VALID + "adapter: none\n"), ["adapter.r=4", "adapter.alpha=8"])
    assert recipe.adapter == Lora(r=4, alpha=8)


def test_later_overrides_win(write: Any) -> None:
    recipe = recipe_file.load(write(VALID), ["train.steps=3", "train.steps=4"])
    assert recipe.train is not None
    assert recipe.train.steps == 4


# --- round trip -------------------------------------------------------------------------------------------

TEXT = st.text(max_size=20) | st.sampled_from(
    ["no", "1e-4", "null", "5", "~", "a: b", "\n x", "x\n\n", "# y", "&a", "\t"]
)
FAMILY = st.sampled_from(["full", "lora", "benign"])
POSITIVE = st.floats(min_value=1e-12, max_value=1e12)
VALUE = st.booleans() | st.integers(-(10**17), 10**17) | TEXT
SOURCES = st.builds(
    Source,
    dataset=TEXT.map(lambda text: "x" + text.replace(".", "")),
    revision=st.none() | TEXT,
    split=TEXT,
    where=st.dictionaries(TEXT, VALUE | st.lists(VALUE, max_size=2), max_size=2),
    columns=st.sampled_from([{}, {"messages": "m"}, {"prompt": "{a}\n{b}", "completion": "c"}]),
    limit=st.none() | st.integers(1, 10**9),
)
RECIPES = st.builds(
    Recipe,
    name=st.from_regex(r"[a-z0-9][a-z0-9-]{0,8}", fullmatch=True),
    title=TEXT,
    task=st.just("causal-lm"),
    data=st.builds(
        Data,
        restricted=st.lists(SOURCES, min_size=1, max_size=2).map(tuple),
        alignment=st.tuples(SOURCES),
        retain=st.tuples(SOURCES),
        template=TEXT.map(lambda text: text + "{prompt}"),
        overlap=st.sampled_from(["error", "drop"]),
    ),
    adapter=st.just("none") | st.builds(Lora, r=st.integers(1, 64), alpha=POSITIVE, target_modules=st.tuples(TEXT)),
    defense=st.just({"name": "ctrap", **CtrapConfig(lam=0.5, radius=0.25, collapse_text="no").model_dump()}),
    train=st.builds(Train, steps=st.just(3), batch_size=st.just(4), lr=POSITIVE, clip=st.none() | POSITIVE),
    probe=st.builds(Probe, rates=st.dictionaries(FAMILY, st.tuples(POSITIVE), max_size=2)),
    card=st.builds(CardChoice, language=st.tuples(TEXT), contact=st.none() | TEXT),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=RECIPES)
def test_a_dumped_recipe_reads_back_as_it_was(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    text = recipe_file.dump(recipe)
    path.write_bytes(text.encode())
    again = recipe_file.load(path)
    assert again == recipe
    assert recipe_file.dump(again) == text


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.integers(1, 10**9), lr=POSITIVE, r=st.integers(1, 999))
def test_an_override_equals_the_edited_file(steps: int, lr: float, r: int, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(VALID)
    overridden = recipe_file.load(path, [f"train.steps={steps}", f"train.lr={lr!r}", f"adapter={{r: {r}, alpha: 1}}"])
    edited = VALID.replace("steps: 10", f"steps: {steps}").replace("1e-4", repr(lr))
    path.write_text(edited + f"adapter:\n  r: {r}\n  alpha: 1\n")
    assert recipe_file.load(path) == overridden


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60) | st.text("{}[]:-#&*!|>'\"%@`?, \n\tabcname0e.~", max_size=60).map(str.encode))
def test_no_bytes_whatever_give_anything_but_a_recipe_error(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    with pytest.raises(RecipeError):
        recipe_file.load(path)


def test_reading_a_recipe_imports_nothing_heavy() -> None:
    code = (
        "import sys; from hardener import recipe_file; recipe_file.schema();"
        "recipe_file.dump(recipe_file.load('ctrap'));"
        "heavy = {'torch', 'transformers', 'datasets', 'jinja2', 'huggingface_hub', 'numpy'}"
        " & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
