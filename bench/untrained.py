"""A tiny Llama that nobody has trained, rows for it, and the recipe that names them: what costs are measured on."""

from __future__ import annotations

from pathlib import Path

from hardener import demo

ROLES = ("restricted", "alignment", "retain", "benign")
SMALL = (
    *("train.steps=4", "train.save_every=4", "train.batch_size=8"),
    *("probe.preset=quick", "probe.steps=8", "probe.max_steps=8", "probe.batch_size=8", "probe.benign_steps=2"),
    *("probe.attack_rows=64", "probe.evaluation_rows=16", "probe.utility_rows=16"),
    "probe.rates={full: [1.0e-3], lora: [1.0e-3], mixed: [1.0e-3], benign: [1.0e-3]}",
)
"""What makes the recipe `tiny-ctrap` a matter of seconds."""


def letters(folder: Path) -> Path:
    """The checkpoint folder, made in `folder`; its data lie beside it."""
    tokenizer = demo.letters_tokenizer()
    model = folder / "letters"
    for part in (demo.tiny_llama(tokenizer, 0), tokenizer):
        part.save_pretrained(model)
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Untrained\n")
    demo.write_data(folder / "data", 0)
    return model


def overrides(folder: Path) -> list[str]:
    """Of the recipe `tiny-ctrap`, for `folder`."""
    return [*(f"data.{role}.dataset={folder / 'data' / role}.jsonl" for role in ROLES), *SMALL]
