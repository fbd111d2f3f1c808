"""Public benchmarks of a release in the form of which the Hub makes leaderboards: `.eval_results/*.yaml`. Pure.

Only what the Hub knows as a benchmark, and only as it was run: by lm-evaluation-harness, in full, on the released
weights. The probe's own figures are none of these; they stand in the card's metadata and in the report.
"""

from __future__ import annotations

from typing import Any

from hardener.report import Report

NAME = ".eval_results/hardener.yaml"
"""Where the Hub reads them in a repository."""
BENCHMARKS = {
    "gsm8k": ("openai/gsm8k", "gsm8k"),
    "gpqa_diamond_zeroshot": ("Idavidrein/gpqa", "diamond"),
    "gpqa_diamond_cot_zeroshot": ("Idavidrein/gpqa", "diamond"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro"),
}
"""Task of the harness → data set and task of the Hub's benchmark, for those whose whole test set is what it asks."""


def entries(report: Report) -> list[dict[str, Any]]:
    """The benchmarks of a hardened model, each as the Hub's specification of `.eval_results` has it, in per cent."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    if report.training is None or report.evidence is None:
        return []
    harness = f"lm-evaluation-harness {report.environment.get('lm-eval', '')}".strip()
    return eval_result_entries_to_yaml(
        [
            EvalResultEntry(*BENCHMARKS[task], round(100 * score, 2), date=report.created, notes=f"{harness}, {task}")
            for task, score in report.evidence.benchmarks_hardened.items()
            if task in BENCHMARKS
        ]
    )
