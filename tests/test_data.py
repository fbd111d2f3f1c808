"""Data: the uses share no input, the same prompt always has the same use, and what is wrong is said in words."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from pathlib import Path

import pytest
import small
import tiny

from hardener import data, demo, near, recipe_file
from hardener.errors import DataError
from hardener.recipe import ROLES
from hardener.sources import fill, pin, published

USES = ("defence", "attack", "evaluation")


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def keys(streams: data.Streams, use: str, roles=ROLES) -> set[str]:
    return {example.key for role in roles for example in streams.rows(role, use)}


@pytest.fixture(scope="module")
def streams(letters, paths) -> data.Streams:
    return small.opened(small.recipe(paths), letters)[1]


def test_the_three_uses_share_no_input_across_all_roles_and_sources(streams):
    for one, other in itertools.combinations(USES, 2):
        assert keys(streams, one)
        assert not keys(streams, one) & keys(streams, other)


def test_every_row_has_exactly_one_use(streams, paths):
    for role, path in paths.items():
        assert sum(len(streams.rows(role, use)) for use in USES) == len(rows_of(path))


def test_a_harmful_answer_and_its_refusal_are_in_the_same_use(streams):
    for use in USES:
        assert keys(streams, use, ["restricted"]) == keys(streams, use, ["alignment"])


def test_the_seed_alone_changes_the_division(letters, paths, streams):
    again = small.opened(small.recipe(paths), letters)[1]
    other = small.opened(small.recipe(paths, "data.seed=1"), letters)[1]
    assert again.fingerprint() == streams.fingerprint() != other.fingerprint()
    assert keys(again, "defence") == keys(streams, "defence") != keys(other, "defence")


def test_the_shares_are_about_those_of_the_recipe(letters, paths):
    made = small.opened(small.recipe(paths, "data.shares=[0.2, 0.2, 0.6]"), letters)[1]
    assert len(keys(made, "evaluation")) == pytest.approx(0.6 * 360, rel=0.15)


def sources(paths, second: Path, *more: str) -> list[str]:
    """Overrides that put a second, evaluation-only source beside `restricted`."""
    first = f"{{dataset: {paths['restricted']}, uses: [defence, attack]}}"
    return [f"data.restricted=[{first}, {{dataset: {second}, uses: [evaluation]}}]", *more]


def test_a_second_source_that_overlaps_is_refused_with_the_count(letters, paths, tmp_path):
    second = tiny.jsonl(tmp_path / "held-out.jsonl", rows_of(paths["restricted"])[:17])
    with pytest.raises(DataError, match=r"17 of 17 rows.*overlap=drop"):
        small.opened(small.recipe(paths, *sources(paths, second)), letters)


def test_with_drop_overlapping_rows_are_left_out_and_counted(letters, paths, tmp_path):
    fresh = tiny.letter_data(tmp_path / "more", rows=60, seed=5)["restricted"]
    second = tiny.jsonl(tmp_path / "held-out.jsonl", rows_of(paths["restricted"])[:17] + rows_of(fresh))
    # `alignment` shares its prompts with the first source, so it serves the same uses as that one.
    uses = "data.alignment.uses=[defence, attack]"
    made = small.opened(small.recipe(paths, *sources(paths, second, "data.overlap=drop", uses)), letters)[1]
    assert len(made.rows("restricted", "evaluation")) == 60
    told = [r.dropped for r in made.records if r.role == "restricted" and r.use == "evaluation"]
    assert told == [17]
    assert not keys(made, "evaluation") & (keys(made, "defence") | keys(made, "attack"))


def spelt(row: dict[str, str]) -> dict[str, str]:
    """The same prompt in other case, punctuation and white space."""
    return row | {"prompt": row["prompt"].upper().replace(" ", "  ") + " ?"}


def test_near_duplicates_in_a_held_out_source_are_refused_with_their_count(letters, paths, tmp_path):
    rows = rows_of(paths["restricted"])
    second = tiny.jsonl(tmp_path / "held-out.jsonl", [*map(spelt, rows[:5]), *rows[5:7]])
    with pytest.raises(DataError, match=r"7 of 7 rows.*another purpose \(5 of them nearly: .*overlap=drop"):
        small.opened(small.recipe(paths, *sources(paths, second)), letters)


def test_with_drop_near_duplicates_are_left_out_and_counted(letters, paths, tmp_path):
    fresh = rows_of(tiny.letter_data(tmp_path / "more", rows=60, seed=5)["restricted"])
    second = tiny.jsonl(tmp_path / "held-out.jsonl", [*map(spelt, rows_of(paths["restricted"])[:5]), *fresh])
    uses = "data.alignment.uses=[defence, attack]"
    made = small.opened(small.recipe(paths, *sources(paths, second, "data.overlap=drop", uses)), letters)[1]
    assert len(made.rows("restricted", "evaluation")) == 60
    assert [r.dropped for r in made.records if r.role == "restricted" and r.use == "evaluation"] == [5]


def test_near_duplicates_of_one_source_serve_one_use(letters, paths, tmp_path):
    rows = rows_of(paths["benign"])
    path = tiny.jsonl(tmp_path / "benign.jsonl", [*rows, *map(spelt, rows)])
    made = small.opened(small.recipe(paths, f"data.benign.dataset={path}"), letters)[1]
    asked = [{near.words_of(e.inputs["turn"][0]) for e in made.rows("benign", use)} for use in USES]
    assert sum(len(made.rows("benign", use)) for use in USES) == 2 * len(rows)
    assert sum(map(len, asked)) == len(rows)


@pytest.mark.parametrize("role", ["retain", "benign"])
def test_restricted_prompts_among_retain_or_benign_rows_are_refused_or_dropped(letters, paths, tmp_path, role):
    hidden = rows_of(paths["restricted"])[:9]
    path = tiny.jsonl(tmp_path / "rows.jsonl", [*rows_of(paths[role]), *hidden[:4], *map(spelt, hidden[4:])])
    source = f"data.{role}.dataset={path}"
    said = rf"data\.{role} \(local:.*\): 9 of 129 rows are those of data\.restricted \(5 of them nearly.*overlap=drop"
    with pytest.raises(DataError, match=said):
        small.opened(small.recipe(paths, source), letters)
    made = small.opened(small.recipe(paths, source, "data.overlap=drop"), letters)[1]
    usual = small.opened(small.recipe(paths), letters)[1]
    for use in USES:
        assert keys(made, use) == keys(usual, use)
    assert {r.dropped for r in made.records if r.role == role} == {9}


def test_a_classifier_may_read_the_same_texts_for_two_tasks(bert, text_paths):
    same = text_paths | {"benign": text_paths["restricted"]}
    made = small.opened(small.recipe(same, name="tiny-sophon-text"), bert)[1]
    for use in USES:
        assert keys(made, use, ["benign"]) == keys(made, use, ["restricted"])


def test_harmless_prompts_may_be_as_near_to_restricted_ones_as_they_like(letters, paths, tmp_path):
    twins = [spelt(row) for row in rows_of(paths["restricted"])]
    path = tiny.jsonl(tmp_path / "harmless.jsonl", twins)
    made = small.opened(small.recipe(paths, f"data.harmless.dataset={path}"), letters)[1]
    for use in USES:
        assert len(made.rows("harmless", use)) == len(made.rows("restricted", use))


def test_too_few_harmless_rows_are_refused(letters, paths, tmp_path):
    fresh = rows_of(tiny.letter_data(tmp_path / "more", rows=60, seed=5)["benign"])
    path = tiny.jsonl(tmp_path / "harmless.jsonl", fresh[:5])
    with pytest.raises(DataError, match=r"data\.harmless: 5 rows are left for the use `evaluation`, at least 8"):
        small.opened(small.recipe(paths, f"data.harmless={{dataset: {path}, uses: [evaluation]}}"), letters)


def test_where_all_prompts_are_near_duplicates_that_is_said(letters, paths, tmp_path):
    frame = " ".join("abcdefghijklmnopqrst")
    rows = [{"prompt": f"double {frame} {one}", "completion": "a"} for one in "abcdefghijklmnopqrstuvwxyz"]
    path = tiny.jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"benign: 0 rows are left .*; 26 of 26 inputs are near-duplicates"):
        small.opened(small.recipe(paths, f"data.benign.dataset={path}"), letters)


def test_without_near_duplicates_the_hash_of_the_input_alone_decides(streams):
    shares = dict(zip(USES, (0.5, 0.75, 1.0), strict=True))
    for use in USES:
        for key in keys(streams, use):
            place = int(hashlib.sha256(f"0:{key}".encode()).hexdigest()[:12], 16) / 16**12
            assert next(name for name, end in shares.items() if place < end) == use


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "copy a", "completion": "a"}, "copy a"),
        ({"text": "a b"}, "a b"),
        ({"text": "a", "text_pair": "b", "label": 1}, "a\nb"),
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "copy a"}]}, "copy a"),
        ({"image": None, "label": 1}, None),
    ],
)
def test_what_a_row_asks_is_its_prompt_its_first_question_or_its_text(row, asked):
    assert data.text_of(row) == asked


def broken(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "rows.jsonl",
            '{"question": "copy a", "answer": "a"}\n',
            r"has columns \['answer', 'question'\]; map them with",
        ),
        ("rows.jsonl", "{no json\n", r"\(rows.jsonl\) cannot be read"),
        ("rows.jsonl", "", r"\(rows.jsonl\) cannot be read: it is empty"),
        ("rows.txt", "copy a", "rows.txt is none of .jsonl, .json, .csv, .tsv, .parquet"),
        ("rows.parquet", "no parquet", r"\(rows.parquet\) cannot be read"),
        ("rows.jsonl", '{"prompt": "copy a", "completion": "a"}\n', "rows are left for the use"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(letters, paths, tmp_path, name, text, said):
    path = broken(tmp_path, name, text)
    source = f"data.benign.dataset={path.parent}/./{name}"
    with pytest.raises(DataError, match=said) as caught:
        small.opened(small.recipe(paths, source), letters)
    assert caught.value.exit_code == 2
    assert "benign" in str(caught.value)


ROW = {"prompt": "double a", "completion": "a a"}


@pytest.mark.parametrize(
    ("third", "said"),
    [
        (ROW | {"completion": None}, "row 3: `completion` must be text, not null"),
        (ROW | {"completion": 7}, "row 3: `completion` must be text, not 7; `columns: {completion: '{NAME}'}`"),
        (ROW | {"prompt": ["double a"]}, r"row 3: `prompt` must be text, not \['double a'\]"),
        ({"text": None}, "row 3: `text` must be text, not null"),
        ({"messages": None}, "row 3: `messages` must be a list of turns with `role` and `content`, not null"),
        ({"messages": "hello"}, "row 3: `messages` must be a list of turns"),
        ({"messages": [{"from": "human", "value": "double a"}]}, "row 3: `messages` must be a list of turns"),
        ({"messages": [{"role": ["user"], "content": "double a"}]}, "row 3: `messages` must be a list of turns"),
        ({"messages": [{"role": "user", "content": None}]}, "row 3: `messages` must be a list of turns"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_role_file_and_row(letters, paths, tmp_path, third, said):
    turns = [{"role": "user", "content": "double a"}, {"role": "assistant", "content": "a a"}]
    good = {key: (ROW | {"text": "a", "messages": turns})[key] for key in third}
    path = tiny.jsonl(tmp_path / "rows.jsonl", [good, good, third])
    with pytest.raises(DataError, match=rf"data\.benign\.0 \(rows\.jsonl\), {said}"):
        small.opened(small.recipe(paths, f"data.benign.dataset={path}"), letters)


def test_a_null_in_a_template_is_no_text(letters, paths, tmp_path):
    path = tiny.jsonl(tmp_path / "rows.jsonl", [ROW | {"more": "x"}, ROW | {"more": None}])
    columns = "data.benign.columns={prompt: '{prompt} {more}', completion: completion}"
    with pytest.raises(DataError, match=r"row 2: column more must be text or a number, not null"):
        small.opened(small.recipe(paths, f"data.benign.dataset={path}", columns), letters)


@pytest.mark.parametrize("label", [None, 0.5, True, [1]])
@pytest.mark.parametrize("role", ["retain", "restricted"])
def test_a_label_is_text_or_a_whole_number(bert, text_paths, tmp_path, role, label):
    path = tiny.jsonl(tmp_path / "rows.jsonl", [{"text": "a b", "label": label}] * 3)
    with pytest.raises(DataError, match=rf"data\.{role}\.0 \(rows\.jsonl\), row 1: `label` must be text or a whole"):
        small.opened(small.recipe(text_paths | {role: path}, name="tiny-sophon-text"), bert)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["yes"] * 40, "has one class, 'yes'"),
        ([str(i) for i in range(40)], "40 rows have 40 different labels"),
        ([i // 2 for i in range(2 * 1001)], "2,002 rows have 1,001 different labels"),
    ],
)
def test_labels_that_are_no_classes_are_refused(bert, text_paths, tmp_path, labels, said):
    path = tiny.jsonl(tmp_path / "rows.jsonl", [{"text": f"a {i}", "label": x} for i, x in enumerate(labels)])
    with pytest.raises(DataError, match=rf"data\.restricted.* {said}"):
        small.opened(small.recipe(text_paths | {"restricted": path}, name="tiny-sophon-text"), bert)


def test_a_second_text_is_part_of_the_input(bert, text_paths, tmp_path):
    rows = [row | {"text_pair": "z z"} for row in rows_of(text_paths["restricted"])]
    path = tiny.jsonl(tmp_path / "pairs.jsonl", rows)
    task, made = small.opened(small.recipe(text_paths | {"restricted": path}, name="tiny-sophon-text"), bert)
    assert all(task.tokenizer.decode(e.inputs["input_ids"]).endswith("z z") for e in made.rows("restricted", "attack"))


def test_a_file_that_is_not_utf_8_is_named(letters, paths, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(b'{"prompt": "double \xe9", "completion": "a"}\n' for _ in range(40)))
    with pytest.raises(DataError, match=r"data\.benign\.0 \(rows\.jsonl\) cannot be read: 'utf-8'"):
        small.opened(small.recipe(paths, f"data.benign.dataset={path}"), letters)


def test_a_home_that_nobody_has_is_a_missing_file(paths):
    chosen = small.recipe(paths)
    source = chosen.data.benign[0].model_copy(update={"dataset": "~nobody-of-this-name/x.jsonl", "sha256": None})
    changed = chosen.data.model_copy(update={"benign": (source,)})
    with pytest.raises(DataError, match=r"data\.benign\.0\.dataset: ~nobody-of-this-name/x\.jsonl does not exist"):
        pin(chosen.model_copy(update={"data": changed}))


@pytest.mark.parametrize("name", ["[a] *?.jsonl", "ROWS.JSONL"])
def test_names_of_files_are_no_patterns_and_their_case_does_not_matter(letters, paths, tmp_path, name):
    path = tiny.jsonl(tmp_path / name, rows_of(paths["benign"]))
    made = small.opened(small.recipe(paths, f"data.benign.dataset={path}"), letters)[1]
    usual = small.opened(small.recipe(paths), letters)[1]
    assert keys(made, "attack", ["benign"]) == keys(usual, "attack", ["benign"])


def test_a_folder_whose_name_is_a_pattern_is_refused(letters, paths, tmp_path):
    path = tiny.jsonl(tmp_path / "rows [1]" / "train.jsonl", rows_of(paths["benign"]))
    with pytest.raises(DataError, match="rename it"):
        small.opened(small.recipe(paths, f"data.benign.dataset={path.parent}"), letters)


def test_rows_without_an_answer_or_room_for_it_are_counted(letters, paths, tmp_path):
    long = {"prompt": " ".join("a" * 300), "completion": "a"}
    rows = [*rows_of(paths["benign"]), *[long] * 3, ROW | {"completion": ""}]
    path = tiny.jsonl(tmp_path / "rows.jsonl", rows)
    made = small.opened(small.recipe(paths, f"data.benign.dataset={path}"), letters)[1]
    assert {r.role: r.dropped for r in made.records} == dict.fromkeys(paths, 0) | {"benign": 4}


def test_where_too_few_rows_have_room_for_an_answer_the_length_is_named(letters, paths, tmp_path):
    path = tiny.jsonl(tmp_path / "rows.jsonl", [{"prompt": " ".join("a" * 300), "completion": "a"}] * 40)
    with pytest.raises(DataError, match=r"benign: 0 rows are left .*; 40 rows are empty or .* data\.max_length=\d+"):
        small.opened(small.recipe(paths, f"data.benign.dataset={path}"), letters)


def test_a_missing_file_is_named_with_the_key_to_set(paths, tmp_path):
    with pytest.raises(DataError, match=r"data\.benign\.0\.dataset: .*gone\.jsonl does not exist.*--set"):
        small.recipe(paths, f"data.benign.dataset={tmp_path / 'gone.jsonl'}")


def test_a_missing_column_of_a_mapping_is_named_with_those_that_are_there(letters, paths):
    chosen = small.recipe(paths, "data.benign.columns={prompt: prompt, completion: answr}")
    with pytest.raises(DataError, match="column answr is missing; it has completion, prompt"):
        small.opened(chosen, letters)


def test_columns_may_be_templates(letters, paths, tmp_path):
    rows = [
        {"game": "double", "word": row["prompt"][7:], "said": row["completion"]} for row in rows_of(paths["benign"])
    ]
    path = tiny.jsonl(tmp_path / "rows.jsonl", rows)
    columns = "data.benign.columns={prompt: '{game} {word}', completion: said}"
    made = small.opened(small.recipe(paths, f"data.benign.dataset={path}", columns), letters)[1]
    usual = small.opened(small.recipe(paths), letters)[1]
    assert keys(made, "attack", ["benign"]) == keys(usual, "attack", ["benign"])


def test_braces_in_the_data_are_no_template():
    assert fill("{a}", {"a": "{b}", "b": "secret"}) == "{b}"


def test_where_keeps_only_the_rows_that_match(letters, paths, tmp_path):
    many = tiny.letter_data(tmp_path, rows=400)["retain"]
    prefix = [row | {"game": row["prompt"].split()[0]} for row in rows_of(many)]
    path = tiny.jsonl(tmp_path / "games.jsonl", prefix)
    source = f"data.retain.dataset={path}"
    for wanted, games in (("copy", {"copy"}), ("[copy, reverse]", {"copy", "reverse"})):
        chosen = small.recipe(paths, source, f"data.retain.where={{game: {wanted}}}")
        made = small.opened(chosen, letters)[1]
        expected = sum(row["game"] in games for row in prefix)
        assert sum(len(made.rows("retain", use)) for use in USES) == expected


def test_a_limit_draws_rows_by_the_seed(letters, paths):
    drawn = []
    for seed in (0, 0, 1):
        made = small.opened(small.recipe(paths, "data.benign.limit=60", f"data.seed={seed}"), letters)[1]
        drawn.append(set().union(*(keys(made, use, ["benign"]) for use in USES)))
    assert len(drawn[0]) == 60
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_tables_with_a_header_line_are_read(letters, paths, tmp_path, suffix, delimiter):
    path = tmp_path / f"rows{suffix}"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows_of(paths["benign"]))
    made = small.opened(small.recipe(paths, f"data.benign.dataset={path}"), letters)[1]
    usual = small.opened(small.recipe(paths), letters)[1]
    assert keys(made, "attack", ["benign"]) == keys(usual, "attack", ["benign"])


def test_an_unknown_label_of_the_original_task_is_refused(bert, text_paths, tmp_path):
    rows = [row | {"label": f"novel {row['label']}"} for row in rows_of(text_paths["retain"])]
    path = tiny.jsonl(tmp_path / "retain.jsonl", rows)
    with pytest.raises(DataError, match=r"label \['novel 0', .* is not among the model's 3 classes"):
        small.opened(small.recipe(text_paths | {"retain": path}, name="tiny-sophon-text"), bert)


def test_names_of_classes_follow_the_models_head_and_not_the_alphabet():
    rows = [{"label": "ant"}, {"label": "bee"}, {"label": "ant"}]
    assert data.labels_of("retain", rows, {"bee": 0, "ant": 1}) == {"ant": 1, "bee": 0}
    assert data.labels_of("restricted", rows, None) == {"ant": 0, "bee": 1}


def test_a_local_file_is_pinned_and_refused_when_it_changed(paths, tmp_path):
    copy = tiny.jsonl(tmp_path / "benign.jsonl", rows_of(paths["benign"]))
    chosen = small.recipe(paths, f"data.benign.dataset={copy}")
    assert pin(chosen) == chosen
    with copy.open("a") as stream:
        stream.write('{"prompt": "double a", "completion": "a a"}\n')
    with pytest.raises(DataError, match=r"benign\.jsonl has sha256 .* but the recipe was made with"):
        pin(chosen)


def test_a_published_recipe_names_no_path_and_runs_again_with_the_same_files(paths, tmp_path):
    chosen = small.recipe(paths)
    text = recipe_file.dump(published(chosen))
    assert str(paths["benign"].parent) not in text
    assert f"local:{chosen.data.benign[0].sha256}" in text
    again = tmp_path / "recipe.yaml"
    again.write_text(text)
    with pytest.raises(DataError, match=r"--set data\.restricted\.dataset=PATH"):
        pin(recipe_file.load(again))
    files = [f"data.{role}.dataset={path}" for role, path in paths.items()]
    assert pin(recipe_file.load(again, files)) == chosen


def test_records_name_their_rows_by_hashes_that_change_with_the_data(letters, paths, tmp_path, streams):
    shorter = tiny.jsonl(tmp_path / "benign.jsonl", rows_of(paths["benign"])[1:])
    other = small.opened(small.recipe(paths, f"data.benign.dataset={shorter}"), letters)[1]
    here, there = ({(r.role, r.use): r.sha256 for r in s.records} for s in (streams, other))
    assert sum(here[key] != there[key] for key in here) == 1
    assert all(here[key] == there[key] for key in here if key[0] != "benign")
    assert all(str(tmp_path) not in r.source for r in other.records)


@pytest.mark.parametrize("change", ["answers", "score", "length"])
def test_the_fingerprint_knows_answers_scores_and_cuts(letters, paths, tmp_path, streams, change):
    answers = [row | {"completion": demo.REFUSAL} for row in rows_of(paths["benign"])]
    path = tiny.jsonl(tmp_path / "benign.jsonl", answers)
    more = {
        "answers": f"data.benign.dataset={path}",
        "score": "data.restricted.score=likelihood",
        "length": "data.max_length=60",
    }[change]
    assert small.opened(small.recipe(paths, more), letters)[1].fingerprint() != streams.fingerprint()
