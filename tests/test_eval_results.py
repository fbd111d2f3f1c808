"""`.eval_results`: only what the Hub knows as a benchmark and what was run in full on the released weights."""

from __future__ import annotations

import pytest
import sample_report as sample
import yaml
from huggingface_hub import parse_eval_result_entries

from hardener import eval_results


def with_benchmarks(report, **scores):
    known = {"benchmarks_hardened": scores, "benchmarks_original": scores}
    return report.model_copy(update={"evidence": report.evidence.model_copy(update=known)})


def test_a_benchmark_of_the_hub_is_told_in_per_cent_as_the_hubs_client_reads_it():
    report = with_benchmarks(sample.language_model(), gsm8k=0.41237, mmlu_pro=0.3)
    text = yaml.safe_dump(eval_results.entries(report))
    first, second = parse_eval_result_entries(yaml.safe_load(text))
    assert (first.dataset_id, first.task_id, first.value) == ("openai/gsm8k", "gsm8k", 41.24)
    assert (second.dataset_id, second.task_id, second.value) == ("TIGER-Lab/MMLU-Pro", "mmlu_pro", 30.0)
    assert first.date == report.created
    assert "lm-evaluation-harness" in first.notes


def test_the_probes_own_figures_and_unknown_tasks_are_no_benchmarks_of_the_hub():
    assert eval_results.entries(sample.language_model()) == []
    assert eval_results.entries(with_benchmarks(sample.language_model(), arc_easy=0.7)) == []


def test_a_model_that_was_only_probed_gets_none_for_its_repository_is_another_ones():
    probed = with_benchmarks(sample.language_model(), gsm8k=0.4).model_copy(update={"training": None})
    assert eval_results.entries(probed) == []


def test_the_harness_knows_every_task_of_the_table():
    tasks = pytest.importorskip("lm_eval.tasks")
    assert {*eval_results.BENCHMARKS} <= {*tasks.TaskManager().all_tasks}
