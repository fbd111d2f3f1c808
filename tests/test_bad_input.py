"""Whatever strangers wrote: each bad input has its case, its message and its exit code, and nothing is computed on it.

Here the inputs that no other test has. `test_recipe.py`, `test_data.py`, `test_hub.py` and `test_secrets.py` have more.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import tiny
import yaml
from fuzz_recipe import WORDS, load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from sample_report import language_model

from hardener import card, hub, recipe_file, registry, sources, stages
from hardener.console import Narrator
from hardener.errors import DataError, RecipeError, UnsupportedModelError, UsageError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def opened(model: Path, paths: dict[str, Path], *overrides: str) -> None:
    """Everything that a run does before it computes."""
    ref = hub.resolve(str(model))
    chosen = recipe_file.load("tiny-ctrap", small.overrides(paths, *overrides))
    registry.find("tasks", chosen.task).supports(ref.config)
    bench = stages.open_bench(sources.pin(chosen), hub.pull(ref), "cpu", Narrator(silent=True))
    stages.choose_families(bench, model)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.letter_data(tmp_path_factory.mktemp("few"), rows=80)


# --- recipes ------------------------------------------------------------------------------

BOMB = "a: &a [x, x]\n" + "".join(f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi"))  # noqa: B905
RECIPES = {
    "a bomb of aliases": (BOMB, "anchors and aliases"),
    "a merge key": ("<<: {name: x}\nname: x\n", "key '<<' is not text|<<: unknown key|written twice"),
    "a number with a million digits": (
        f"name: x\ntrain: {{steps: {'9' * 10**6}}}\n",
        "where a recipe has|whole number",
    ),
    "an absurd count": ("train: {steps: 1000000001}\n", "train.steps: should be less than or equal to 1000000000"),
    "an absurd batch": (
        "train: {batch_size: 1000000000}\n",
        "train.batch_size: should be less than or equal to 1000000",
    ),
    "an absurd seed": ("data: {seed: 99999999999999999}\n", "data.seed: should be less than or equal to 2147483647"),
    "an infinite rate": ("train: {lr: 1e999}\n", "train.lr: should be a finite number"),
    "a list for a section": ("train: [1]\n", "train: should be keys with values"),
    "bytes that are no text": ("name: !!binary aGFsbG8=\n", "tag tag:yaml.org,2002:binary is not allowed"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_bad_recipe_is_refused_at_once(tmp_path: Path, case: str) -> None:
    text, said = RECIPES[case]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said) as caught:
        recipe_file.load(path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "dataset",
    [
        *("https://example.com/x.jsonl", "https://example.com/x", "file:///etc/passwd", "hf://datasets/a/b/x.csv"),
        *("s3://bucket/k.parquet", "zip://x.csv::https://example.com/a.zip", "a/b/../../../etc", "//host/share"),
        *("../../../../etc/passwd", "~root/.ssh/id_rsa", "/dev/null", "/proc/self/environ"),
    ],
)
def test_no_address_and_no_path_elsewhere_is_read_as_data(letters: Path, few: dict[str, Path], dataset: str) -> None:
    with pytest.raises(UsageError) as caught:
        opened(letters, few | {"benign": Path("x")}, f"data.benign.0.dataset={json.dumps(dataset)}")
    assert caught.value.exit_code == 2


PIECES = st.lists(st.sampled_from(WORDS) | st.text("{}[]:-#&*!|>'\"%@`?, \n0e.~", max_size=6) | st.text(max_size=4))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=st.lists(st.sampled_from(WORDS) | st.text(max_size=6), max_size=4), pieces=PIECES, whole=st.booleans())
def test_no_text_and_no_override_give_anything_but_a_recipe_or_a_recipe_error(
    tmp_path: Path, line: list[str], pieces: list[str], whole: bool
) -> None:
    """What `fuzz_recipe.py` does by the million, led by coverage."""
    start = (
        "name: x\ntitle: t\ntask: causal-lm\ndata: {restricted: {dataset: x}, retain: {dataset: y}}\n" if whole else ""
    )
    overrides = "".join(line).replace("\n", "")
    load(f"{overrides}\n{start}{''.join(pieces)}".encode("utf-8", "replace"), tmp_path / "r.yaml")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not for this machine")
def test_the_fuzzer_finds_no_recipe_that_ends_in_anything_but_a_recipe_error() -> None:
    fuzzer = Path(__file__).with_name("fuzz_recipe.py")
    ran = subprocess.run([sys.executable, str(fuzzer), "--runs", "100000"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "Done 100000 runs" in ran.stderr


# --- data ------------------------------------------------------------------------------

ROW = '{"prompt": "a b", "completion": "b a"}\n'
LONG = json.dumps({"prompt": "a " * 500_000, "completion": "b"}) + "\n"
DATA: dict[str, tuple[str, str | bytes, str | None]] = {
    "a lone null": ("x.jsonl", "null\n", r"line 1 of x\.jsonl is null; a row is an object"),
    "a null among rows": ("x.jsonl", ROW + "\n  null\n" + ROW, "line 3 of .* is null"),
    "a file that is null": ("x.json", "\ufeff null", "line 1 of .* is null"),
    "a row that is a number": ("x.jsonl", "5\n", "cannot be read"),
    "a row that is a list": ("x.jsonl", "[1]\n" + ROW, "cannot be read"),
    "blank lines": ("x.jsonl", "\n\n", "cannot be read"),
    "empty objects": ("x.jsonl", "{}\n" * 9, "cannot be read"),
    "empty rows": ("x.jsonl", '{"prompt": "", "completion": ""}\n' * 40, "40 rows are empty or have no answer"),
    "half a row": ("x.jsonl", ROW + '{"prompt": "a', "cannot be read"),
    "brackets without end": ("x.json", "[" * 100_000, "cannot be read"),
    "half a character": ("x.jsonl", b'{"prompt": "\\ud800", "completion": "a"}\n', "cannot be read"),
    "another encoding": ("x.jsonl", b'{"prompt": "\xff", "completion": "a"}\n', "utf-8"),
    "a table without a header": (
        "x.csv",
        "a b,b a\n" * 40,
        r"has columns \['a b', 'b a'\] \(the first line of a table",
    ),
    "tabs without a header": ("x.tsv", "a b\tb a\n" * 40, r"the first line of a table names them"),
    "a ragged table": ("x.csv", "prompt,completion\na,b\na,b,c\n", "Expected 2 fields"),
    "an empty cell": ("x.csv", "prompt,completion\n" + "a,\n" * 40, "row 1: `completion` must be text, not null"),
    "a header alone": ("x.csv", "prompt,completion\n", "cannot be read"),
    "no Parquet": ("x.parquet", "PAR1xxxxPAR1", "cannot be read"),
    "other columns": ("x.jsonl", '{"a": 1}\n' * 40, r"has columns \['a'\]"),
    "one class only": ("x.jsonl", "", "has one class"),
    "a row of a million characters": ("x.jsonl", LONG, None),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data_is_refused_with_its_file(
    letters: Path, few: dict[str, Path], bert: Path, text_paths: dict[str, Path], tmp_path: Path, case: str
) -> None:
    name, text, said = DATA[case]
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if case == "one class only":
        tiny.jsonl(path, [{"text": f"a {i}", "label": 0} for i in range(40)])
        chosen = small.recipe(text_paths | {"restricted": path}, name="tiny-sophon-text")
        with pytest.raises(DataError, match=said):
            small.opened(chosen, bert)
        return
    if said is None:
        path.write_text(few["benign"].read_text() + path.read_text())
        opened(letters, few | {"benign": path})  # cut to data.max_length, as every row is
        return
    with pytest.raises(DataError, match=said) as caught:
        opened(letters, few | {"benign": path})
    assert caught.value.exit_code == 2
    assert name in str(caught.value) or "data.benign" in str(caught.value)


def test_a_null_in_a_file_of_a_folder_is_found(letters: Path, few: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("null\n")
    with pytest.raises(DataError, match=r"line 1 of train\.jsonl is null"):
        opened(letters, few | {"benign": folder})


def zipped(path: Path, text: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.jsonl", text)


def tarred(path: Path, text: bytes) -> None:
    entry = tarfile.TarInfo("../../rows.jsonl")
    entry.size = len(text)
    with tarfile.open(path, "w") as archive:
        archive.addfile(entry, io.BytesIO(text))


@pytest.mark.parametrize("name", ["train.zip", "train.jsonl", "train.tar", "train.jsonl.gz"])
@pytest.mark.parametrize("place", ["alone", "in a folder"])
def test_no_archive_is_unpacked_whatever_its_name_is(
    letters: Path, few: dict[str, Path], tmp_path: Path, name: str, place: str
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    text = few["benign"].read_bytes()
    pack = {".tar": tarred, ".gz": lambda path, text: path.write_bytes(gzip.compress(text))}
    pack.get(Path(name).suffix, zipped)(folder / name, text)
    with pytest.raises(DataError, match=r"never unpacked|is none of"):
        opened(letters, few | {"benign": folder if place == "in a folder" else folder / name})


# --- checkpoints ------------------------------------------------------------------------------


def tensors(folder: Path) -> dict[str, Any]:
    return load_file(folder / WEIGHTS)


def rewritten(folder: Path, values: dict[str, Any]) -> None:
    save_file(values, folder / WEIGHTS, metadata={"format": "pt"})


def header(folder: Path, change: Callable[[dict[str, Any], list[str]], object]) -> None:
    """Lie in the header of a safetensors file; the bytes after it stay."""
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    told = json.loads(data[8 : 8 + length])
    change(told, [name for name in told if name != "__metadata__"])
    text = json.dumps(told).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first(**lie: object) -> Callable[[Path], None]:
    return lambda folder: header(folder, lambda told, names: told[names[0]].update(lie))


def config(**lie: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | lie))

    return change


def written(name: str, data: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode()) and None


def indexed(where: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        names = list(tensors(folder))
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, where)}))

    return change


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def linked(folder: Path) -> None:
    (folder / "LICENSE").symlink_to("/etc/passwd")


def resized(rows: int) -> Callable[[Path], None]:
    """Another number of rows in both tables of words, as config says."""

    def change(folder: Path) -> None:
        values = tensors(folder)
        for name in {"model.embed_tokens.weight", "lm_head.weight"} & values.keys():
            table = values[name]
            more = np.zeros((max(rows, 0), table.shape[1]), table.dtype)
            values[name] = np.ascontiguousarray(np.concatenate([table, more])[: len(table) + rows])
            size = len(values[name])
        rewritten(folder, values)
        config(vocab_size=size)(folder)

    return change


def lacking(folder: Path) -> None:
    values = tensors(folder)
    del values["model.embed_tokens.weight"]
    rewritten(folder, values)


DEEP = "[" * 200_000
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle only": (pickled, "pickle, which can run code"),
    "pickle by another name": (written(WEIGHTS, b"\x80\x02cos\nsystem\n"), "truncated or damaged"),
    "no byte of weights": (written(WEIGHTS, b""), "truncated or damaged"),
    "a header longer than the file": (written(WEIGHTS, struct.pack("<Q", 2**40) + b"{}"), "truncated or damaged"),
    "a header of all ones": (written(WEIGHTS, b"\xff" * 64), "truncated or damaged"),
    "a header that is no JSON": (written(WEIGHTS, struct.pack("<Q", 8) + b"{{{{{{{{"), "truncated or damaged"),
    "overlapping offsets": (
        lambda f: header(f, lambda told, n: told[n[1]].update(data_offsets=told[n[0]]["data_offsets"])),
        "truncated or damaged",
    ),
    "an offset beyond the file": (first(data_offsets=[0, 10**12]), "truncated or damaged"),
    "a dtype of another size": (first(dtype="F64"), "truncated or damaged"),
    "a dtype that is none": (first(dtype="X7"), "truncated or damaged"),
    "a dtype that is none of weights": (first(dtype="I32"), "is stored as I32, the rest as F32"),
    "a shape that overflows": (first(shape=[2**40, 2**40]), "truncated or damaged"),
    "a negative shape": (first(shape=[-1]), "truncated or damaged"),
    "a shape turned round": (
        lambda f: header(f, lambda told, n: told[n[0]].update(shape=told[n[0]]["shape"][::-1])),
        "config and weights belong to different models",
    ),
    "a tensor that is not there": (lacking, "has no weights for model.embed_tokens.weight"),
    "weights that are no numbers": (
        lambda f: rewritten(f, {name: value * np.nan for name, value in tensors(f).items()}),
        "logits of .* are not finite",
    ),
    "an index to an absolute path": (indexed("/etc/passwd.safetensors"), "foreign file"),
    "an index to a path above": (indexed("../letters/model.safetensors"), "foreign file"),
    "an index to what is not there": (indexed("b.safetensors"), "names what is not there"),
    "a link out of the folder": (linked, "LICENSE links to a file outside the folder"),
    "a name with a line break": (written("a\nb.json", "{}"), "cannot stand in SHA256SUMS"),
    "a name that is no text": (lambda f: Path(os.fsdecode(bytes(f) + b"/\xff.json")).touch(), "cannot stand in"),
    "no tokenizer": (without_tokenizer, "the tokenizer of .* cannot be loaded"),
    "a tokenizer that is no JSON": (written("tokenizer.json", "{"), "the tokenizer of .* cannot be loaded"),
    "a tokenizer without end": (written("tokenizer.json", DEEP), "the tokenizer of .* cannot be loaded: Recursion"),
    "a chat template that is none": (written("chat_template.jinja", "{% if %}"), "the chat template of .* fails"),
    "a chat template that reaches out": (
        written("chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "access to attribute '__class__' .* is unsafe",
    ),
    "a chat template without end": (
        written("chat_template.jinja", "{% for i in range(10**9) %}{% endfor %}"),
        "Range too big",
    ),
    "a chat template that says nothing": (written("chat_template.jinja", "x"), "leaves out what user or assistant say"),
    "a config without end": (written("config.json", DEEP), "config.json is not JSON"),
    "a config in another encoding": (written("config.json", b"\xff"), "config.json is not JSON"),
    "an architecture that nobody knows": (config(model_type="mystery"), "'mystery' model cannot be loaded"),
    "another kind of model": (
        config(model_type="t5", architectures=["T5ForConditionalGeneration"]),
        "'t5' model cannot be loaded for the task causal-lm",
    ),
    "architectures that are no names": (config(architectures=[1]), "not a list of names"),
    "ten to the five layers": (config(num_hidden_layers=10**5), "speaks of 100000 layers"),
    "fewer than no layers": (config(num_hidden_layers=-1), "speaks of -1 layers"),
    "a width of ten to the nine": (config(hidden_size=10**9), "config and weights belong to different models"),
    "a width in words": (config(hidden_size="many"), "cannot be loaded"),
    "a vocabulary smaller than the tokenizer": (resized(-20), "the tokenizer beside the model"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_before_anything_is_computed(
    letters: Path, few: dict[str, Path], tmp_path: Path, case: str
) -> None:
    change, said = CHECKPOINTS[case]
    folder = Path(shutil.copytree(letters, tmp_path / "model"))
    change(folder)
    with pytest.raises((UnsupportedModelError, UsageError), match=said) as caught:
        opened(folder, few)
    assert caught.value.exit_code == 2
    assert str(tmp_path) not in str(caught.value)


def tied(folder: Path) -> None:
    values = tensors(folder)
    values.pop("lm_head.weight", None)
    rewritten(folder, values)
    config(tie_word_embeddings=True)(folder)


def bare(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


FINE: dict[str, Callable[[Path], object]] = {
    "tied weights": tied,
    "no chat template": bare,
    "a vocabulary larger than the tokenizer": resized(10),
    "a link to itself": lambda f: (f / "x.json").symlink_to(f / "x.json"),
    "a folder that holds itself": lambda f: (f / "sub").symlink_to(f),
    "a pipe": lambda f: os.mkfifo(f / "x.json"),
    "a card with broken front matter": written("README.md", "---\nlicense: [mit\n---\n"),
    "a card in another encoding": written("README.md", b"---\nlicense: \xff\n---\n"),
    "a card that would run code": written("README.md", "---\nlicense: !!python/object/apply:os.abort []\n---\n"),
    "a card that grows without end": written("README.md", f"---\n{BOMB}---\n"),
}


@pytest.mark.parametrize("case", FINE)
def test_what_is_odd_and_harmless_is_taken(letters: Path, few: dict[str, Path], tmp_path: Path, case: str) -> None:
    folder = Path(shutil.copytree(letters, tmp_path / "model"))
    FINE[case](folder)
    opened(folder, few)


# --- parent cards ------------------------------------------------------------------------------

HOSTILE = "```\n{{ 7 * 7 }}{% include '/etc/passwd' %}<script>alert(1)</script>](javascript:alert(1))\n# owned `x`|a|b"
FRONT: dict[str, Any] = {
    "broken": "---\nlicense: [mit\n---\n# x\n",
    "a list": "---\n- a\n---\n",
    "a text": "---\njust text\n---\n",
    "no end": "---\nlicense: mit\n",
    "odd values": {
        "license": ["mit", {"a": "b"}],
        "tags": 3,
        "language": {"a": "b"},
        "datasets": 7,
        "library_name": ["x"],
    },
    "nulls": dict.fromkeys(("license", "tags", "language", "datasets", "pipeline_tag", "library_name")),
    "markup in values": {"license": HOSTILE, "tags": [HOSTILE], "license_name": HOSTILE, "pipeline_tag": HOSTILE},
    "extra gates": {"extra_gated_fields": {HOSTILE: "text"}, "extra_gated_prompt": HOSTILE},
    "a bomb": f"---\n{BOMB}tags: [x]\n---\n",
}


@pytest.mark.parametrize("case", FRONT)
def test_whatever_a_parents_card_holds_ours_is_whole_and_runs_nothing(case: str) -> None:
    front = FRONT[case]
    parent = front if isinstance(front, str) else f"---\n{yaml.safe_dump(front)}---\n# x\n"
    made = card.render(language_model(), parent_card=parent)
    _, read, body = made.split("---\n", 2)
    assert yaml.safe_load(read)["tags"]
    assert "49" not in body.replace(card.render(language_model()).split("---\n", 2)[2], "")
    assert "<script>" not in body
    assert "root:" not in made


def test_names_with_html_and_template_syntax_stay_text() -> None:
    report = language_model()
    named = report.model_copy(
        update={
            "subject": HOSTILE,
            "parent": report.parent.model_copy(update={"id": HOSTILE, "architecture": HOSTILE}),
            "recipe": {**report.recipe, "title": HOSTILE},
        }
    )
    made = card.render(named)
    body = re.sub(r"```.*?\n *```", "", made.split("---\n", 2)[2], flags=re.DOTALL)  # in code everything is text
    assert "alert(1)" in body
    assert "<script>" not in body
    assert "\n# owned" not in body
    assert not re.search(r"(?<!\\)\]\(javascript:", body)
