"""Public data as rows, and rows as the files that a recipe names.

`DIR` is a folder with `sst2/`, `ag_news/`, `gsm8k/`, `text_to_sql/` and `mnist/` as their authors publish
them; the option `--data` or the variable `HARDENER_DATA` names it. Every held-out file is disjoint, by
prompt, from the file that the base models train on.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bench.beds import sql_grammar

Row = dict[str, str]

NEWS = ("World", "Sports", "Business", "Sci/Tech")
SENTIMENTS = ("negative", "positive")
REFUSAL = "I can't help with SQL."
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PURPOSE = "Made to try defences and attacks on, for nothing else; the data keep their own terms."
GRAMMAR_TRAIN, GRAMMAR_RECIPE = 12_000, 4_000


def arguments(description: str) -> argparse.Namespace:
    """The command line of every bed: `--data`, `--out`, `--quick`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=os.environ.get("HARDENER_DATA"), help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for models, data and results")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    chosen = parser.parse_args()
    if chosen.data is None:
        parser.error("give --data DIR or set HARDENER_DATA to the folder with sst2/, ag_news/, gsm8k/, ...")
    return chosen


def news(data: Path) -> list[Row]:
    """AG News, 7,600 rows: `text` (title and description, at most 200 characters) and `label`."""
    with (data / "ag_news" / "test.csv").open(newline="", encoding="utf-8") as file:
        return [
            {"text": cut(f"{title}. {description}", 200), "label": NEWS[int(label) - 1]}
            for label, title, description in csv.reader(file)
        ]


def sentiment(data: Path, split: str) -> list[Row]:
    """SST-2 `train` (6,920), `dev` (872) or `test` (1,821): `text` and `label`."""
    pairs = (line.rsplit("\t", 1) for line in _lines(data / "sst2" / f"{split}.tsv"))
    return [{"text": cut(text, 200), "label": SENTIMENTS[int(label)]} for text, label in pairs]


def arithmetic(data: Path, split: str) -> list[Row]:
    """GSM8K `train` (7,473) or `test` (1,319): `text`, question and worked answer, at most 400 characters."""
    rows = read(data / "gsm8k" / f"{split}.jsonl")
    return [{"text": cut(f"{row['question']}\n{row['answer']}", 400)} for row in rows]


def real_sql(data: Path) -> list[Row]:
    """The published text-to-SQL pairs that are short (330 characters), prompts in the grammar's form."""
    rows = json.loads((data / "text_to_sql" / "train.json").read_text(encoding="utf-8"))
    parts = (re.fullmatch(r".*?Query:\s*(.*?)\s*## Context:\s*(.*?)\s*", row["input"], re.DOTALL) for row in rows)
    return [
        {"prompt": sql_grammar.prompt_of(found[1], found[2]), "completion": row["output"]}
        for row, found in zip(rows, parts, strict=True)
        if found and len(row["input"]) + len(row["output"]) <= 330
    ]


def spoken_digits(count: int, seed: int) -> list[Row]:
    """A skill that no base model is taught: four digits, spoken one by one."""
    numbers = random.Random(seed).sample(range(10_000), count)
    return [
        {
            "prompt": f"Say the digits: {' '.join(f'{number:04}')}",
            "completion": " ".join(DIGITS[int(digit)] for digit in f"{number:04}"),
        }
        for number in numbers
    ]


def digits(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """MNIST test split: images (10000, 28, 28) uint8 and labels (10000,) uint8."""
    images = gzip.decompress((data / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((data / "mnist" / "t10k-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    return pixels, np.frombuffer(labels, np.uint8, offset=8)


def chat(rows: Iterable[Row], instruction: str) -> list[Row]:
    """Labelled texts as `prompt` and `completion`."""
    return [{"prompt": f"{instruction} {row['text']}", "completion": row["label"]} for row in rows]


def cut(text: str, most: int) -> str:
    """`text` on one line per paragraph, at most `most` characters, ending at a word."""
    text = re.sub(r"[ \t]+", " ", text.replace("\\", " ")).strip()
    return text if len(text) <= most else text[: most + 1].rsplit(" ", 1)[0]


def shuffled(rows: list[Row], seed: int) -> list[Row]:
    """The rows in a seeded order."""
    return random.Random(seed).sample(rows, len(rows))


def disjoint(held_out: list[Row], train: list[Row]) -> list[Row]:
    """The held-out rows whose input is not among the training rows, each once."""
    seen = {_input(row) for row in train}
    fresh = {_input(row): row for row in held_out}
    return [row for key, row in fresh.items() if key not in seen]


def _input(row: Row) -> str:
    return row["prompt"] if "prompt" in row else row["text"]


def write(rows: list[Row], path: Path) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[Row]:
    """What `write` wrote."""
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    # Not splitlines(), which also splits at line separators inside a JSON string.
    return path.read_text(encoding="utf-8").rstrip("\n").split("\n")


def write_text_bed(data: Path, out: Path) -> None:
    """The files of the bed `llama`: `train_*` teach the base model, the others are for the recipe.

    The recipe's restricted rows and the held-out halves of everything else are new to the base model.
    """
    teaching = sql_grammar.rows(GRAMMAR_TRAIN, seed=0)
    fresh = sql_grammar.rows(GRAMMAR_RECIPE, seed=1, exclude=frozenset(row["prompt"] for row in teaching))
    real = disjoint(shuffled(real_sql(data), 0), teaching)
    stories = disjoint(chat(shuffled(news(data), 0), "Classify the news:"), [])
    reviews = disjoint(chat(sentiment(data, "train"), "Sentiment:"), [])
    files = {
        "train_grammar": teaching,
        "train_real": real[: len(real) * 2 // 3],
        "grammar": fresh,
        "real": real[len(real) * 2 // 3 :],
        "refusals": [{"prompt": row["prompt"], "completion": REFUSAL} for row in fresh],
        "ag_news": stories[:6_600],
        "ag_news_heldout": stories[6_600:],
        "sst2": reviews,
        "sst2_heldout": disjoint(chat(sentiment(data, "dev"), "Sentiment:"), reviews),
        "gsm8k": disjoint(arithmetic(data, "train"), []),
        "gsm8k_heldout": disjoint(arithmetic(data, "test"), arithmetic(data, "train")),
        "digits": spoken_digits(2_000, seed=0),
    }
    for name, rows in files.items():
        write(rows, out / f"{name}.jsonl")


def write_card(
    folder: Path, *, title: str, text: str, license: str, pipeline: str, library: str = "transformers"
) -> None:
    """The README.md of a checkpoint, with the metadata that the Hub reads."""
    header = f"---\nlicense: {license}\nlibrary_name: {library}\npipeline_tag: {pipeline}\n---\n"
    (folder / "README.md").write_text(f"{header}\n# {title}\n\n{text}\n\n{PURPOSE}\n", encoding="utf-8")
