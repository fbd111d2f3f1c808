"""Every shipped recipe is valid, complete, and says what it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hardener import recipe_file, resources
from hardener.defenses.configs import CONFIGS
from hardener.recipe import Lora, Recipe
from hardener.resources import shipped

NAMES = resources.recipes()


def test_the_recipes_of_the_papers_are_shipped() -> None:
    assert {
        "ctrap",
        "ctrap-adaptive",
        "ctrap-rollout",
        "erase",
        "erase-anew",
        "sophon-image",
        "sophon-text",
        "tiny-ctrap",
        "tiny-erase",
        "tiny-sophon-image",
        "tiny-sophon-text",
    } <= set(NAMES)
    assert list(NAMES) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_reads_back_from_its_dump(name: str, tmp_path: Path) -> None:
    recipe = recipe_file.load(name)
    assert recipe.name == name
    path = tmp_path / "again.yaml"
    path.write_text(recipe_file.dump(recipe), encoding="utf-8")
    assert recipe_file.load(path) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_begins_with_what_it_does_and_how_to_run_it(name: str) -> None:
    text = (shipped("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    header = [line for line in text.split("\nname:")[0].splitlines() if line]
    assert all(line.startswith("#") for line in header)
    assert sum(line.startswith("#   hardener ") for line in header) == 3
    assert any(f"--recipe {name} " in line for line in header)
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_scores_every_source_on_purpose(name: str) -> None:
    data = recipe_file.load(name).data
    for role in (data.restricted, data.alignment, data.retain, data.benign):
        assert all(source.score for source in role or ())


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("tiny-")])
def test_every_dataset_of_a_shipped_recipe_has_its_licence_in_the_header(name: str) -> None:
    header = (shipped("recipes") / f"{name}.yaml").read_text(encoding="utf-8").split("\nname:")[0]
    data = recipe_file.load(name).data
    for role in (data.restricted, data.alignment, data.retain, data.benign):
        assert all(f"#   {source.dataset} " in header for source in role or ())


@pytest.mark.parametrize("name", [name for name in NAMES if "erase" not in name])
def test_the_paper_of_a_shipped_recipe_is_that_of_its_defence(name: str) -> None:
    recipe = recipe_file.load(name)
    assert recipe.defense is not None
    assert recipe.paper == CONFIGS[recipe.defense.name].paper


def test_tiny_recipes_take_their_data_from_the_current_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_file.load("tiny-ctrap").data.restricted[0].dataset == str(tmp_path / "restricted.jsonl")


def test_ctrap_has_the_published_setting() -> None:
    recipe = recipe_file.load("ctrap")
    assert recipe.train is not None
    assert recipe.defense is not None
    assert recipe.adapter == Lora(r=32, alpha=4, target_modules=("q_proj", "k_proj", "v_proj"))
    settings = recipe.defense.settings
    assert (settings["lam"], settings["radius"], settings["collapse_text"]) == (0.1, 0.1, "an error")
    assert settings["order"] == "first"
    train = recipe.train
    assert (train.steps, train.batch_size, train.lr, train.weight_decay, train.clip) == (
        20_000,
        10,
        5e-4,
        0.1,
        1.0,
    )
    assert train.schedule == "constant"
    alpaca = recipe.data.template.format(prompt="Q")
    assert alpaca.startswith("Below is an instruction")
    assert alpaca.endswith("### Instruction:\nQ\n\n### Response:\n")


def test_the_rollout_has_the_setting_of_its_one_trial_and_says_that_it_is_not_the_papers() -> None:
    recipe = recipe_file.load("ctrap-rollout")
    assert recipe.defense is not None
    settings = recipe.defense.settings
    assert (settings["lam"], settings["cap"]) == (1.0, 1.0)
    assert (settings["inner_steps"], settings["inner_lr"]) == ((2, 16), (3e-5, 3e-4))
    assert (settings["inner_optimizer"], settings["inner_state"], settings["benign_weight"]) == ("adamw", "fresh", 0.0)
    assert "extension" in recipe.title
    assert "not the paper's" in (shipped("recipes") / "ctrap-rollout.yaml").read_text(encoding="utf-8")
    assert recipe.data == recipe_file.load("ctrap").data


def test_the_adaptive_trap_erases_first_and_says_that_it_is_no_papers() -> None:
    recipe = recipe_file.load("ctrap-adaptive")
    assert recipe.defense is not None
    assert recipe.erase != "none"
    alone = recipe_file.load("erase")
    assert alone.defense is None
    assert alone.data == recipe.data == recipe_file.load("ctrap").data
    for erase in (recipe.erase, alone.erase):
        assert erase != "none"
        assert (erase.alpha, erase.modules, erase.share) == (1.0, "located", 0.2)
    assert set(recipe.defense.settings["goals"]) == {"harm", "mixed", "benign-loss", "repair", "warm-up"}
    assert "extension" in recipe.title
    assert "An extension" in (shipped("recipes") / "ctrap-adaptive.yaml").read_text(encoding="utf-8")


def test_sophon_image_has_the_published_setting() -> None:
    recipe = recipe_file.load("sophon-image")
    assert recipe.train is not None
    assert recipe.defense is not None
    settings = recipe.defense.settings
    assert (settings["suppression"], settings["alpha_lr"], settings["inner_steps"]) == ("ice", 3e-4, 50)
    assert settings["inner_batch"] + settings["query_batch"] == 150
    assert (recipe.train.steps, recipe.train.lr) == (800, 5e-4)


# --- the schema -------------------------------------------------------------------------------------------


def violations(schema: dict[str, Any], value: Any, root: dict[str, Any], at: str = "") -> Iterator[str]:
    """The part of JSON schema that says which keys, types and constants there may be."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        branches = [list(violations(branch, value, root, at)) for branch in schema["anyOf"]]
        yield from min(branches, key=len)
        return
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        yield f"{at}: {value!r}"
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "number": (int, float),
        "integer": int,
        "boolean": bool,
    }
    kind = schema.get("type")
    if (kind in kinds and not isinstance(value, kinds[kind])) or (kind == "null" and value is not None):
        yield f"{at}: {value!r} is no {kind}"
    elif kind == "object":
        yield from (f"{at}: no {key}" for key in schema.get("required", ()) if key not in value)
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties", True))
            if inner is False:
                yield f"{at}.{key}: unknown"
            elif inner is not True:
                yield from violations(inner, item, root, f"{at}.{key}")
    elif kind == "array":
        for item in value:
            yield from violations(schema.get("items", {}), item, root, f"{at}[]")
    if "not" in schema and not list(violations(schema["not"], value, root, at)):
        yield f"{at}: {value!r} is excluded"


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_accepts_what_is_shipped_and_what_is_dumped(name: str) -> None:
    schema = recipe_file.schema()
    file = yaml.safe_load((shipped("recipes") / f"{name}.yaml").read_text(encoding="utf-8"))
    dumped = yaml.safe_load(recipe_file.dump(recipe_file.load(name)))
    assert list(violations(schema, file, schema)) == []
    assert list(violations(schema, dumped, schema)) == []


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "stps", 3),
        ("train", "steps", "x"),
        ("defense", "lamda", 1.0),
        ("defense", "lam", "x"),
        ("data", "retain", 3),
    ],
)
def test_the_schema_refuses_what_load_refuses(section: str, key: str, value: Any) -> None:
    schema = recipe_file.schema()
    data = yaml.safe_load(recipe_file.dump(recipe_file.load("ctrap")))
    data[section][key] = value
    assert list(violations(schema, data, schema))


def test_every_field_of_the_schema_with_a_choice_says_what_it_does() -> None:
    for config in CONFIGS.values():
        assert all(field.description for field in config.model_fields.values())
    assert recipe_file.schema()["properties"].keys() == Recipe.model_fields.keys()
