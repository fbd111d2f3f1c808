"""Names → classes: the built-in table, then third parties' entry points. A new member is one line of text."""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal

from hardener.errors import RecipeError

Kind = Literal["tasks", "defenses", "attacks"]

BUILT_IN: dict[Kind, dict[str, str]] = {
    "tasks": {
        "causal-lm": "hardener.tasks.causal_lm:CausalLM",
        "sequence-classification": "hardener.tasks.sequence_classification:SequenceClassification",
        "image-classification": "hardener.tasks.image_classification:ImageClassification",
        "text-encoder": "hardener.tasks.encoder:TextEncoder",
        "image-encoder": "hardener.tasks.encoder:ImageEncoder",
        "unconditional-diffusion": "hardener.tasks.diffusion:UnconditionalDiffusion",
    },
    "defenses": {
        "ctrap": "hardener.defenses.ctrap:Ctrap",
        "ctrap-rollout": "hardener.defenses.ctrap_rollout:CtrapRollout",
        "ctrap-adaptive": "hardener.defenses.ctrap_adaptive:CtrapAdaptive",
        "sophon": "hardener.defenses.sophon:Sophon",
        "sophon-wide": "hardener.defenses.sophon_wide:SophonWide",
    },
    "attacks": {
        "full": "hardener.attacks.families:FULL",
        "lora": "hardener.attacks.families:LORA",
        "relative": "hardener.attacks.families:RELATIVE",
        "canonical": "hardener.attacks.families:CANONICAL",
        "mixed": "hardener.attacks.families:MIXED",
        "mixed-90": "hardener.attacks.families:MIXED_90",
        "mixed-muon": "hardener.attacks.families:MIXED_MUON",
        "benign-loss": "hardener.attacks.families:BENIGN_LOSS",
        "kl": "hardener.attacks.families:KL",
        "warm-up-cosine": "hardener.attacks.families:COSINE",
        "second-template": "hardener.attacks.families:TEMPLATE",
        "retain-then-harm": "hardener.attacks.families:RETAIN_THEN_HARM",
        "harm-then-repair": "hardener.attacks.families:REPAIR",
        "benign-only": "hardener.attacks.families:BENIGN_ONLY",
        "kicked": "hardener.attacks.families:KICKED",
        "ablated": "hardener.attacks.families:ABLATED",
        "ablated-tuned": "hardener.attacks.families:ABLATED_TUNED",
        "dpo": "hardener.attacks.families:DPO",
        "prefilled": "hardener.attacks.families:PREFILLED",
        "few-shot": "hardener.attacks.families:FEW_SHOT",
        "pruned": "hardener.attacks.families:PRUNED",
        "rounded": "hardener.attacks.families:ROUNDED",
        "merge": "hardener.attacks.families:MERGED",
        "delta-removal": "hardener.attacks.families:DELTA_REMOVED",
        "fresh-head": "hardener.attacks.families:FRESH_HEAD",
        "fresh-head-sgd": "hardener.attacks.families:FRESH_HEAD_SGD",
        "kept-head": "hardener.attacks.families:KEPT_HEAD",
        "fresh-head-lora": "hardener.attacks.families:FRESH_HEAD_LORA",
        "fresh-head-relative": "hardener.attacks.families:FRESH_HEAD_RELATIVE",
        "fresh-head-adagrad": "hardener.attacks.families:FRESH_HEAD_ADAGRAD",
        "fresh-head-adadelta": "hardener.attacks.families:FRESH_HEAD_ADADELTA",
        "kept-head-sgd": "hardener.attacks.families:KEPT_HEAD_SGD",
        "kept-head-adagrad": "hardener.attacks.families:KEPT_HEAD_ADAGRAD",
        "kept-head-adadelta": "hardener.attacks.families:KEPT_HEAD_ADADELTA",
        "fresh-head-only": "hardener.attacks.families:FRESH_ONLY",
        "fresh-head-only-sgd": "hardener.attacks.families:FRESH_ONLY_SGD",
        "fresh-head-only-adagrad": "hardener.attacks.families:FRESH_ONLY_ADAGRAD",
        "fresh-head-only-adadelta": "hardener.attacks.families:FRESH_ONLY_ADADELTA",
        "kept-head-only": "hardener.attacks.families:KEPT_ONLY",
        "kept-head-only-sgd": "hardener.attacks.families:KEPT_ONLY_SGD",
        "kept-head-only-adagrad": "hardener.attacks.families:KEPT_ONLY_ADAGRAD",
        "kept-head-only-adadelta": "hardener.attacks.families:KEPT_ONLY_ADADELTA",
        "fresh-head-cosine": "hardener.attacks.families:FRESH_COSINE",
        "fresh-head-canonical": "hardener.attacks.families:FRESH_CANONICAL",
        "fresh-head-healed": "hardener.attacks.families:FRESH_HEALED",
        "fresh-head-rescaled": "hardener.attacks.families:FRESH_RESCALED",
        "few-rows-5": "hardener.attacks.families:FEW_ROWS_5",
        "few-rows-20": "hardener.attacks.families:FEW_ROWS_20",
    },
}


def known(kind: Kind) -> dict[str, str]:
    """All names of a kind with where they live; entry points `hardener.<kind>` add to the built-in table."""
    third_party = {point.name: point.value for point in entry_points(group=f"hardener.{kind}")}
    return third_party | BUILT_IN[kind]


def find(kind: Kind, name: str) -> Any:
    """Import the member `name`.

    Raises RecipeError naming the nearest known name, or saying what is wrong with a third party's.
    """
    if name in BUILT_IN[kind]:  # without a look at everything that is installed
        return _imported(BUILT_IN[kind][name])
    table = known(kind)
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(f"no {kind[:-1]} is called {name!r}{hint or '.'} Known: {', '.join(sorted(table))}")
    installed = f"the {kind[:-1]} {name!r} of an installed package, {table[name]},"
    try:
        found = _imported(table[name])
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"{installed} cannot be imported: {error}; mend or uninstall that package") from error
    if kind == "attacks" and getattr(found, "name", None) != name:
        raise RecipeError(f"{installed} is no attack family of that name; mend or uninstall that package")
    return found


def _imported(place: str) -> Any:
    """What `module:attribute` names."""
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)
