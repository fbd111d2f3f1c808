"""What cannot be true together in a recipe of values each right by itself, and names that nothing has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from string import Formatter
from typing import Any

from hardener import registry
from hardener.attacks.families import SCREENS, Kind
from hardener.defenses.configs import CONFIGS
from hardener.defenses.sophon_configs import Guarded
from hardener.problems import Problem, nearest
from hardener.recipe import ROLES, Data, Recipe, Role, Source, Train, Use

# The fields of a row, one set for each form it can have; the task takes the first that fits.
FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "causal-lm": (("prompt", "completion"), ("text",), ("messages",)),
    "sequence-classification": (("text", "text_pair", "label"), ("text", "label")),
    "image-classification": (("image", "label"),),
    "text-encoder": (("text", "text_pair", "label"), ("text", "label"), ("text", "text_pair"), ("text",)),
    "image-encoder": (("image", "label"), ("image",)),
    "unconditional-diffusion": (("image",),),
}
KINDS: dict[str, Kind] = {
    "causal-lm": "language",
    "sequence-classification": "classifier",
    "image-classification": "classifier",
    "text-encoder": "encoder",
    "image-encoder": "encoder",
    "unconditional-diffusion": "diffusion",
}
SCORES: dict[str, tuple[str, ...]] = {
    "causal-lm": ("exact-match", "likelihood-gain", "likelihood", "judged"),
    "sequence-classification": ("accuracy",),
    "image-classification": ("accuracy",),
    "text-encoder": ("accuracy", "closeness", "linear-probe"),
    "image-encoder": ("accuracy", "closeness", "linear-probe"),
    "unconditional-diffusion": ("denoising",),
}
# What each role is for; `defence` counts only where the recipe hardens.
NEEDED_USES: dict[Role, tuple[Use, ...]] = {
    "restricted": ("defence", "attack", "evaluation"),
    "alignment": ("defence",),
    "retain": ("defence", "attack", "evaluation"),  # attackers mix benign rows in
    "benign": ("attack", "evaluation"),
    "harmless": ("evaluation",),
}


def unknown_names(data: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the task and the defence that nothing installed provides; `data` need not be valid otherwise."""
    task, defense = data.get("task"), data.get("defense")
    if isinstance(task, str) and task not in (tasks := registry.known("tasks")):
        yield Problem(("task",), f"no task is called {task!r}; {nearest(task, tasks)}")
    name = defense.get("name") if isinstance(defense, Mapping) else None
    if isinstance(name, str) and name not in (defenses := registry.known("defenses")):
        yield Problem(("defense", "name"), f"no defence is called {name!r}; {nearest(name, defenses)}")


def contradictions(recipe: Recipe) -> list[Problem]:
    """Return every contradiction with its place; an empty list means that the recipe can be carried out."""
    return [*_sources(recipe), *_data(recipe), *_erase(recipe), *_defence(recipe), *_encoder(recipe), *_probe(recipe)]


def _all_sources(data: Data) -> Iterator[tuple[Role, int, Source]]:
    for role in ROLES:
        for index, source in enumerate(getattr(data, role) or ()):
            yield role, index, source


def _sources(recipe: Recipe) -> Iterator[Problem]:
    forms, scores = FIELDS.get(recipe.task, ()), SCORES.get(recipe.task, ())
    known = {field for form in forms for field in form}
    for role, index, source in _all_sources(recipe.data):
        place = ("data", role, index)
        unknown = [field for field in source.columns if field not in known]
        for field in unknown if forms else ():
            text = f"{recipe.task} has no field {field!r}; {nearest(field, known)}"
            yield Problem((*place, "columns", field), text)
        if forms and source.columns and not unknown and set(source.columns) not in map(set, forms):
            wanted = " or ".join(" + ".join(form) for form in forms)
            found = " + ".join(source.columns)
            yield Problem((*place, "columns"), f"a row of {recipe.task} is {wanted}, not {found}")
        if scores and source.score and source.score not in scores:
            text = f"{recipe.task} cannot be scored by {source.score!r}; known: {', '.join(scores)}"
            yield Problem((*place, "score"), text)
        for field, column in source.columns.items():
            if fault := template_fault(column):
                yield Problem((*place, "columns", field), fault)


def template_fault(column: str) -> str | None:
    """What is wrong with a `columns` template, in words; None if nothing is."""
    if "{" not in column:
        return None
    try:
        parts = [part for part in Formatter().parse(column) if part[1] is not None]
    except ValueError as error:
        return f"{column!r} is no template: {error}; a brace of the text itself is written twice"
    if any(not name or form or conversion for _, name, form, conversion in parts):
        return f"{column!r} is no template: between braces stands the name of a column and nothing else"
    return None


def _data(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if min(data.shares) < 0:
        yield Problem(("data", "shares"), f"shares must be ≥ 0, not {min(data.shares):g}")
    elif abs(sum(data.shares) - 1) > 1e-9:
        yield Problem(("data", "shares"), f"shares must sum to 1, not to {sum(data.shares):g}")
    if "{prompt}" not in data.template:
        yield Problem(("data", "template"), f"must hold {{prompt}}, which {data.template!r} does not")
    for role, needed in NEEDED_USES.items():
        served = {use for name, _, source in _all_sources(data) if name == role for use in source.uses}
        missing = [use for use in needed if use not in served and (use != "defence" or recipe.hardens)]
        if served and missing:
            yield Problem(("data", role), f"no source serves the use {' and '.join(missing)}; see its `uses`")


def _erase(recipe: Recipe) -> Iterator[Problem]:
    erase = recipe.erase
    if erase == "none":
        return
    yield from _warm_up("erase", erase)
    if (erase.modules == "located") != (erase.share is not None):
        yield Problem(("erase", "share"), "`modules: located` and a share go together")
    if (erase.modules == "located") != (erase.relearn != "none"):
        yield Problem(("erase", "relearn"), "`modules: located` and a simulated attack go together")
    for key, value in (("on_trouble", erase.on_trouble == "step-back"), ("utility_limit", erase.utility_limit)):
        if value:
            yield Problem(
                ("erase", key), "distillation stops where numbers go wrong, and has `stop_at`; leave this out"
            )
    if erase.unlearn != "none" and not recipe.data.alignment:
        yield Problem(("data", "alignment"), "erase.unlearn needs this role")
    if erase.parent_tokens and recipe.task == "image-classification":
        yield Problem(("erase", "parent_tokens"), "images have no tokens")
    if KINDS.get(recipe.task) in ("diffusion", "encoder"):
        yield Problem(("erase",), "what is distilled are the answers of classifiers and language models")
    if recipe.adapter != "none" and not recipe.defense:
        yield Problem(("adapter",), "erasing changes the weights themselves; an adapter needs a section `defense`")


def _warm_up(section: str, train: Train) -> Iterator[Problem]:
    if train.warmup_steps >= max(train.steps, 1):
        text = f"the rate rises for {train.warmup_steps} steps, and there are {train.steps} in all"
        yield Problem((section, "warmup_steps"), text)


def _defence(recipe: Recipe) -> Iterator[Problem]:
    if recipe.defense and not recipe.train:
        yield Problem(("defense",), "a defence needs a section `train`")
    if recipe.train and not recipe.defense:
        yield Problem(("train",), "training needs a section `defense`; leave both out to probe only")
    if recipe.train:
        yield from _warm_up("train", recipe.train)
    if recipe.train and recipe.train.checkpointing and recipe.task == "unconditional-diffusion":
        yield Problem(("train", "checkpointing"), "is for models of transformers")
    if not recipe.defense or recipe.defense.name not in CONFIGS:
        return
    name, config = recipe.defense.name, CONFIGS[recipe.defense.name]
    if recipe.task in FIELDS and recipe.task not in config.tasks:
        yield Problem(("defense", "name"), f"{name} is defined for {' and '.join(config.tasks)}, not {recipe.task}")
    for role in config.roles:
        if not getattr(recipe.data, role):
            yield Problem(("data", role), f"{name} needs this role")
    if recipe.train and recipe.train.batch_size % config.batch_multiple:
        text = f"{name} needs a multiple of {config.batch_multiple}, not {recipe.train.batch_size}"
        yield Problem(("train", "batch_size"), text)
    if recipe.train and recipe.train.optimizer != "adamw" and issubclass(config, Guarded):
        yield Problem(("train", "optimizer"), f"{name} trains with two Adams, as its authors do; leave this out")
    settings = recipe.defense.settings
    if recipe.train and settings.get("order") == "second" and recipe.train.dtype != "float32":
        text = "the second order is a difference of gradients, which bfloat16 rounds away; set float32"
        yield Problem(("train", "dtype"), text)
    if "suppression" in settings and (settings["suppression"] == "dos") != (recipe.task == "unconditional-diffusion"):
        text = "`dos` is the one suppression loss of diffusion models, and is for nothing else"
        yield Problem(("defense", "suppression"), text)
    if settings.get("inner_adapter", "none") != "none" and recipe.adapter != "none":
        yield Problem(("defense", "inner_adapter"), "an adapter is simulated on all weights: it needs `adapter: none`")
    for key in ("subspaces", "scopes"):
        listed = settings.get(key)
        if isinstance(listed, list | tuple) and "lora" in listed and recipe.adapter != "none":
            yield Problem(("defense", key), "a LoRA is simulated on all weights: it needs `adapter: none`")


def _encoder(recipe: Recipe) -> Iterator[Problem]:
    """What a model without a head does not have, and needs from the data."""
    if KINDS.get(recipe.task) != "encoder":
        return
    for role, index, source in _all_sources(recipe.data):
        kept = role == "retain"
        if source.score and kept == (source.score == "accuracy"):
            text = "an encoder has no head: retain rows are scored by closeness or linear-probe, all others by accuracy"
            yield Problem(("data", role, index, "score"), text)
        taught = not kept or source.score == "linear-probe"
        if taught and source.columns and "label" not in source.columns:
            yield Problem(("data", role, index, "columns"), "what an encoder is taught, or probed by, needs a label")
    if recipe.adapter != "none":
        yield Problem(("adapter",), "an encoder is hardened in all its weights")
    for key, head in (recipe.defense.settings if recipe.defense else {}).items():
        if key in ("head", "heads") and "fresh" not in head:
            yield Problem(("defense", key), "an encoder has no head to keep: attackers bring a fresh one")


def _probe(recipe: Recipe) -> Iterator[Problem]:
    probe = recipe.probe
    families = registry.known("attacks")
    named = probe.families or ()
    for index, family in enumerate(named):
        place = ("probe", "families", index)
        if family not in families:
            yield Problem(place, f"no attack family is called {family!r}; {nearest(family, families)}")
        elif family in named[:index]:
            yield Problem(place, f"{family} is named twice")
        elif not _fits(family, recipe):
            yield Problem(place, f"{family} does not attack {recipe.task} under the preset {probe.preset}")
        elif missing := _leader(family, recipe):
            text = f"{family} is tried at the best rate of {missing}: name that too, or set probe.rates.{family}"
            yield Problem(place, text)
    yield from _rates(recipe, {*families, "benign"})
    if probe.gate and probe.preset in SCREENS:
        yield Problem(
            ("probe", "gate"), f"the preset {probe.preset} never certifies; a gate needs standard or thorough"
        )
    yield from _judges(recipe)
    if probe.max_steps < probe.steps:
        text = f"max_steps ({probe.max_steps}) is less than steps ({probe.steps})"
        yield Problem(("probe", "max_steps"), text)


def _leader(family: str, recipe: Recipe) -> str:
    """The family that one follows, where it has no rates of its own and that one is not named; else empty."""
    if family in recipe.probe.rates:
        return ""
    leader: str = registry.find("attacks", family).follows
    return "" if leader in (recipe.probe.families or ()) else leader


def _rates(recipe: Recipe, known: set[str]) -> Iterator[Problem]:
    """Ladders that no attack would climb."""
    for name in recipe.probe.rates:
        place = ("probe", "rates", name)
        if name not in known:
            yield Problem(place, f"no attack family is called {name!r}; {nearest(name, known)}")
        elif name == "benign" or recipe.task not in FIELDS:
            continue
        elif (family := registry.find("attacks", name)).doses:
            yield Problem(place, f"{name} does not train, so it has no learning rates")
        elif not family.suits(KINDS[recipe.task]):
            yield Problem(place, f"{name} does not attack {recipe.task}")


def _judges(recipe: Recipe) -> Iterator[Problem]:
    probe = recipe.probe
    judged = [(role, index) for role, index, source in _all_sources(recipe.data) if source.score == "judged"]
    if judged and len({judge.model for judge in probe.judges}) < 2:
        yield Problem(("probe", "judges"), "the score `judged` needs at least two judges of different families")
    for role, index in judged:
        if (role, index) != ("restricted", 0):
            yield Problem(("data", role, index, "score"), "models judge the first restricted source alone")
    if probe.refusal_judge and probe.refusal_judge.kind != "classifier":
        yield Problem(("probe", "refusal_judge", "kind"), "refusals are told by a classifier")
    if recipe.task in FIELDS and recipe.task != "causal-lm":
        language = {"judges": probe.judges, "refusal_judge": probe.refusal_judge, "lm_eval": probe.lm_eval}
        for key in (key for key, value in language.items() if value):
            yield Problem(("probe", key), f"is for language models, not for {recipe.task}")
        if recipe.data.harmless:
            yield Problem(("data", "harmless"), f"over-refusal is measured on language models, not on {recipe.task}")


def _fits(family: str, recipe: Recipe) -> bool:
    """Whether an attack family is one for the task and of the preset, as far as both are hardener's own."""
    if family not in registry.BUILT_IN["attacks"] or recipe.task not in FIELDS:
        return True
    kind = KINDS[recipe.task]
    short = SCREENS.get(recipe.probe.preset)
    suits: bool = registry.find("attacks", family).suits(kind)
    return suits and (short is None or family in short[kind])
