"""Public benchmarks by lm-evaluation-harness, on tasks made here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from hardener import public_benchmarks
from hardener.errors import UsageError

ROWS = [{"prompt": f"copy {word}", "completion": "a", "choices": ["a", "b"]} for word in "klmnopqrst"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that answers every `copy` with "a"."""
    return tiny.easy(tmp_path_factory.mktemp("harness"), rows=200)[0]


@pytest.fixture
def include(tmp_path: Path) -> Path:
    """Two tasks: what the model says, and which of two answers it prefers."""
    data = str(tiny.jsonl(tmp_path / "rows.jsonl", ROWS))
    shared = {
        **{"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}}, "test_split": "test"},
        "doc_to_text": "{{prompt}}",
    }
    said = {
        **{"output_type": "generate_until", "doc_to_target": "{{completion}}"},
        "generation_kwargs": {"until": ["<end>"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    chosen = {
        **{"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": 1},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    write(tmp_path, "hardener_said", shared | said)
    write(tmp_path, "hardener_chosen", shared | chosen)
    return tmp_path


def write(folder: Path, name: str, task: dict[str, Any]) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}))


def test_each_task_has_the_score_that_the_model_earns(model: Path, include: Path) -> None:
    pytest.importorskip("lm_eval")
    found = public_benchmarks.scores(model, ["hardener_said", "hardener_chosen"], "cpu", include)
    assert found == {"hardener_said": 1.0, "hardener_chosen": 0.0}  # it says "a", and "b" is marked as right


def test_the_primary_score_is_the_first_of_which_more_is_better() -> None:
    found = {"alias": "x", "sample_len": 9, "perplexity,none": 3.5, "acc,none": 0.5, "acc_norm,none": 0.75}
    better = {"perplexity": False, "acc": True, "acc_norm": True}
    assert public_benchmarks._primary("x", found, better) == 0.5
    with pytest.raises(UsageError, match="'x' has no score of which more is better"):
        public_benchmarks._primary("x", {"perplexity,none": 3.5}, better)


def test_an_unknown_task_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UsageError, match="no task 'no_such_task'"):
        public_benchmarks.scores(tmp_path / "nothing", ["no_such_task"], "cpu")


def test_without_the_harness_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r'pip install "hardener\[eval\]"'):
        public_benchmarks.scores(tmp_path, ["hellaswag"], "cpu")
