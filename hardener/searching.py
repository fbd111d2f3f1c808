"""Search for the worst attack of a family: Optuna's TPE over rate, batch, schedule and benign share.

The family's bracketed ladder counts as the first trials. The search goes on while its best still rises in the last
third of the trials; a trial is given up once its attack loss is worse than the median of those before it. The running
maximum against the number of trials is reported, for a worst case without the number of trials is worth nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import optuna

from hardener.attacks.attack import Attack
from hardener.attacks.families import Family, Phase
from hardener.attacks.recorder import Watch
from hardener.conditions import LEAST_TRIALS, rising
from hardener.measurement import Run

MORE = 10
EXTENSIONS = 3
"""A search whose best still rises is extended by `MORE` runs, at most so often."""
TRAINS = 0.5
"""Share of the best worth from which a rate counts as one that trains."""
SHARES = {"harm only": 1.0, "half benign": 0.5, "nine tenths benign": 0.1}

Make = Callable[[Attack, Watch], Run]


def search(
    ladder: Sequence[Run], first: Attack, worth: Callable[[Run], float], make: Make
) -> tuple[list[Run], tuple[float, ...]]:
    """The ladder's runs and those of the search, and what each was worth, in order.

    `first` is an attack of the family at any rate; `make` makes an attack, or takes it from the store, and shows the
    losses to the watch, which says when to give up.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = _space(ladder, worth, first.family)
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=first.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=4),
    )
    plain = {name: choice.choices[0] for name, choice in space.items() if name != "rate"}  # type: ignore[attr-defined]
    for run in ladder:
        study.add_trial(
            optuna.trial.create_trial(params={"rate": run.rate, **plain}, distributions=space, value=worth(run))
        )
    runs, planned = list(ladder), LEAST_TRIALS
    for _ in range(1 + EXTENSIONS):
        while len(runs) < planned:
            runs.append(_trial(study, space, first, worth, make))
        if not rising([worth(run) for run in runs]):
            break
        planned += MORE
    return runs, tuple(map(worth, runs))


def _space(
    ladder: Sequence[Run], worth: Callable[[Run], float], family: Family
) -> dict[str, optuna.distributions.BaseDistribution]:
    """What is searched: rates up to ten times the highest that still trains."""
    best = max(map(worth, ladder))
    rates = [run.rate for run in ladder]
    highest = max([run.rate for run in ladder if worth(run) >= TRAINS * best > 0], default=max(rates))
    space: dict[str, optuna.distributions.BaseDistribution] = {
        "rate": optuna.distributions.FloatDistribution(min(rates), max(10 * highest, max(rates)), log=True),
        "batch": optuna.distributions.CategoricalDistribution((1.0, 0.5, 2.0)),
        "schedule": optuna.distributions.CategoricalDistribution(("constant", "cosine")),
    }
    if family.generative and family.phases == (Phase(),):
        space["rows"] = optuna.distributions.CategoricalDistribution(tuple(SHARES))
    return space


def _trial(
    study: optuna.Study,
    space: dict[str, optuna.distributions.BaseDistribution],
    first: Attack,
    worth: Callable[[Run], float],
    make: Make,
) -> Run:
    """One trial, from the suggestion to what it was worth."""
    trial = study.ask(space)
    attack = _attack(first, trial.params)

    def watch(index: int, loss: float) -> bool:
        trial.report(-loss, index)
        return trial.should_prune()

    run = make(attack, watch)
    if run.failed is None and not run.answered and run.curve[-1].step < attack.length:  # given up
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        study.tell(trial, worth(run))
    return run


def _attack(first: Attack, chosen: dict[str, object]) -> Attack:
    """The attack that a trial's parameters name."""
    family = replace(first.family, schedule="cosine" if chosen["schedule"] == "cosine" else "constant")
    if "rows" in chosen:
        family = replace(family, phases=(Phase(SHARES[str(chosen["rows"])]),))
    batch = max(1, round(first.batch_size * float(str(chosen["batch"]))))
    words = [f"batch {batch}", str(chosen["schedule"]), *([str(chosen["rows"])] if "rows" in chosen else [])]
    rate = float(f"{float(str(chosen['rate'])):.4g}")
    return replace(first, family=family, rate=rate, batch_size=batch, setting=", ".join(words))
