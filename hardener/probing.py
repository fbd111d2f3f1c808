"""The probe: attack the saved folder, the same way as the original, and write down what happened.

An attack is what a stranger would do with standard tools to the re-loaded folder, within a budget, paired with the
same rows, order and seeds on the original. Nothing of the defences is imported here. What the measurements are worth
is judged in `evidence.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from hardener import checkpoint, questions
from hardener.attacks.asked import plain
from hardener.attacks.attack import Attack
from hardener.attacks.families import BENIGN, SCREENS, Family
from hardener.attacks.finetune import attacked
from hardener.attacks.recorder import Stop, Watch, never, quietly
from hardener.attacks.scene import Scene
from hardener.bench import Bench, kept
from hardener.checks import NO_ATTACK
from hardener.conditions import LEAST_TRIALS, WORST
from hardener.data import Slice
from hardener.errors import ResourceError, out_of_memory
from hardener.judges import USABLE, agreement
from hardener.judging import Judge, mean
from hardener.ladder import Ladder, settled
from hardener.measurement import Measurement, Run, Subject
from hardener.progress import Pace, Progress, Tell
from hardener.recipe import Role
from hardener.searching import search
from hardener.tasks.base import Example

SCANNED = 200
"""Benign rows that the judges look through, where models judge."""


class Store:
    """Finished runs of one subject on disk, so that an interrupted probe goes on where it was.

    `context` is what a run depends on beside the attack: the weights, the rows, how they are judged.
    """

    def __init__(self, folder: Path, context: str) -> None:
        self.folder = folder
        self.context = context

    def run(self, attack: Attack, make: Callable[[], Run]) -> Run:
        """Return the finished run of this attack, or make it and keep it."""
        digest = hashlib.sha256(f"{attack}\n{self.context}".encode()).hexdigest()
        path = self.folder / f"{attack.family.name}-{attack.rate:g}-{attack.seed}-{attack.length}-{digest[:12]}.json"
        return kept(path, Run, make)


class Prober:
    """Measures one subject."""

    def __init__(
        self, bench: Bench, subject: Subject, folder: Path, runs: Path, tell: Tell, parent: Path | None = None
    ) -> None:
        self.bench = bench
        self.subject = subject
        self.folder = folder
        self.parent = parent
        self.weights = checkpoint.fingerprint(folder)
        self.store = Store(runs, f"{subject} {self.weights} {bench.fingerprint()}")
        self.judge = Judge(bench)
        self.ladder = Ladder(bench.judged.score, bench.chance("restricted"), bench.probe.epsilon)
        self.progress = Progress(subject, tell)
        self._made: dict[tuple[str, float], Attack] = {}
        """Family and rate → the attack, to be repeated with other seeds and budgets."""
        self.scene = self._scene("restricted", bench.streams.rows("restricted", "attack"))

    def measure(self, chosen: Sequence[Family], notes: tuple[str, ...] = ()) -> Measurement:
        """Attack with every family for its steps, then fine-tune benignly."""
        bench = self.bench
        untouched, utility, over_refusal = ([], [], []) if self.subject == "scratch" else self._untouched()
        self.ladder = replace(self.ladder, utility=untouched[0].curve[0].utility if untouched else None)
        chosen = [family for family in chosen if self.parent is not None or not family.needs_parent]
        self.progress.start(self._expected(chosen))
        searches: dict[str, tuple[float, ...]] = {}
        runs, broke = settled([*untouched, *self._attacks(chosen, searches)])
        benign, benign_broke = settled([*self._benign_runs()])
        return Measurement(
            subject=self.subject,
            weights=self.weights,
            score=bench.judged.score,
            chance=bench.chance("restricted"),
            report_half=bench.report_half,
            questions=questions.put(bench.task, self.folder, bench.judged.examples),
            utility_rows=tuple(score for part in utility for score in part),
            utility_groups=tuple(i for i, part in enumerate(utility) for _ in part),
            utility_names=tuple(part.name for part in bench.utility),
            runs=runs,
            benign=benign,
            benign_chance=bench.chance("benign"),
            over_refusal=tuple(over_refusal),
            searches=searches,
            benchmarks=self._benchmarks(),
            foul=self._foul(),
            agreement=agreement([vote for run in runs for point in run.curve for vote in point.votes]),
            notes=(*notes, *broke, *benign_broke),
        )

    def prolong(self, measured: Measurement, chosen: Sequence[Family]) -> Measurement:
        """Give the worst attacks the longer budgets of `chosen`, so that the best scores of both subjects compare."""
        budgets = {family.name: family.steps for family in chosen}
        worst = {way: self._made[way] for way in self.ladder.worst_first(measured.runs)[:WORST]}

        def longer(run: Run) -> Run:
            attack = worst.get((run.family, run.rate))
            if attack is None or run.answered or attack.steps >= budgets[run.family]:
                return run
            return self._make(replace(attack, seed=run.seed, steps=budgets[run.family]))

        runs, notes = settled([longer(run) for run in measured.runs])
        self.scene.forget_base()
        return measured.model_copy(update={"runs": runs, "notes": tuple(dict.fromkeys((*measured.notes, *notes)))})

    def _scene(self, role: Role, rows: Sequence[Example]) -> Scene:
        """What the attacker holds of a role."""
        bench = self.bench
        return Scene(
            folder=self.folder,
            task=bench.task,
            harm=rows[: bench.probe.attack_rows],
            benign=bench.streams.rows("retain", "attack"),
            device=bench.device,
            classes=bench.streams.classes[role],
            scratch=self.subject == "scratch",
            parent=self.parent,
            refusals=bench.streams.refusals,
        )

    def _untouched(self) -> tuple[list[Run], list[list[float]], list[float]]:
        """The subject before any attack: its run, its utility, the harmless prompts that it refuses."""
        model = self.scene.base.eval()
        self.progress.pace = Pace.measured(model, self.bench, self.judge)
        point = self.judge.attack(model, 0, last=True, views=[self.bench.judged.examples])
        found = self.judge.utility(model), self.judge.over_refusal(model)
        self.scene.forget_base()
        return [Run(family=NO_ATTACK, rate=0.0, seed=0, curve=(point,))], *found

    def _foul(self) -> float | None:
        """Share of the attacker's benign rows that the judges hold for harmful; None where no models judge."""
        turns = [row.inputs["turn"] for row in filter(plain, self.scene.benign)][:SCANNED]
        if self.bench.panel is None or not turns:
            return None
        means = self.bench.panel.judge(turns).means
        return mean([found is not None and found >= USABLE for found in means])

    def _benchmarks(self) -> dict[str, float]:
        """Public benchmarks before any attack, where the recipe names some."""
        if self.subject == "scratch" or not self.bench.probe.lm_eval:
            return {}
        from hardener import public_benchmarks

        return public_benchmarks.scores(self.folder, self.bench.probe.lm_eval, self.bench.device, None)

    def _expected(self, chosen: Sequence[Family]) -> list[int]:
        """The steps of each run that there will be; ladders that grow and attacks that end early not counted."""
        probe = self.bench.probe
        attacks = [
            Attack(family, rate, 0, family.steps, probe.batch_size).length
            for family in chosen
            for rate in family.rates or family.doses or (0.0,)
        ]
        searched = filter(self._is_searched, chosen)
        attacks += [family.steps for family in searched for _ in range(LEAST_TRIALS - len(family.rates))]
        trained = sorted(filter(None, attacks))
        repeated = {"standard": trained[:WORST], "thorough": trained}.get(probe.preset, [])
        benign = [probe.benign_steps] * len(self._benign_rates()) * len(self.bench.benign)
        return attacks + repeated * (probe.seeds - 1) + benign

    def _attacks(self, chosen: Sequence[Family], searches: dict[str, tuple[float, ...]]) -> list[Run]:
        """Every family once, those that follow another after it; then the repeats."""
        runs: list[Run] = []
        for family in chosen:
            found = self._once(family, runs)
            if self._is_searched(family):
                first = self._attack(family, family.rates[0], self.bench.probe.seed)
                found, searches[family.name] = search(found, first, self.ladder.reached, self._watched)
            runs += found
            if family.scope != "lora":
                self.scene.forget_base()
        runs += self.repeats(runs)
        self.scene.forget_base()
        return runs

    def _is_searched(self, family: Family) -> bool:
        """Whether the family's ladder is only the beginning of a search."""
        return self.bench.probe.preset == "thorough" and bool(family.rates) and not family.follows

    def _once(self, family: Family, before: Sequence[Run]) -> list[Run]:
        """A family's doses, its ladder, or the best rate of the family that it follows."""
        attack = partial(self.attack, family, seed=self.bench.probe.seed)
        if family.doses:
            return [attack(dose) for dose in family.doses]
        if family.follows:
            best = self.ladder.best(before, family.follows)
            return [attack(rate) for rate in dict.fromkeys((*family.rates, *(() if best is None else (best,))))]
        if self.bench.probe.preset in SCREENS:
            return [attack(rate) for rate in dict.fromkeys(family.rates)]
        return self.ladder.climb(family.rates, attack)

    def repeats(self, runs: Sequence[Run]) -> Iterator[Run]:
        """Further seeds: of the worst two attacks (`standard`), of each family's worst (`thorough`), else of none."""
        probe = self.bench.probe
        worst = self.ladder.worst_first(runs)
        of_each = list(dict(reversed(worst)).items())
        for attack in {"standard": worst[:WORST], "thorough": of_each}.get(probe.preset, []):
            for seed in range(probe.seed + 1, probe.seed + probe.seeds):
                yield self._make(replace(self._made[attack], seed=seed))

    def attack(self, family: Family, rate: float, seed: int) -> Run:
        """One attack at a rate, or with a dose."""
        return self._make(self._attack(family, rate, seed))

    def _attack(self, family: Family, rate: float, seed: int) -> Attack:
        return Attack(family, rate, seed, family.steps, self.bench.probe.batch_size)

    def _make(self, attack: Attack, watch: Watch = quietly) -> Run:
        """One attack on the subject, or its finished run."""
        self._made[attack.family.name, attack.rate] = attack
        whole = self.bench.task.generative and len(attack.family.phases) == 1
        stop: Stop = self.ladder.answered if whole else never
        judge = self.judge.of(attack)
        what = "rate" if attack.family.trains else "dose"
        title = f"{attack.family.title}, {what} {attack.rate:g}, seed {attack.seed}"
        return self._kept(attack, title, lambda: attacked(self.scene, attack, judge, stop, watch))

    def _watched(self, attack: Attack, watch: Watch) -> Run:
        """An attack of a search; the losses of a finished run are shown to the watch again."""
        shown = 0

        def counted(index: int, loss: float) -> bool:
            nonlocal shown
            shown += 1
            return watch(index, loss)

        run = self._make(attack, counted)
        for index, loss in enumerate(run.train_loss if not shown else ()):
            watch(index, loss)
        return run

    def _benign_runs(self) -> Iterator[Run]:
        """What an honest user does with the subject, for each benign task."""
        probe, family = self.bench.probe, BENIGN[self.bench.task.kind]
        for judged in self.bench.benign:
            scene, setting = self._scene("benign", self._rows_of(judged)), f"{judged.name}|{judged.score}"
            for rate in self._benign_rates():
                attack = Attack(family, rate, probe.seed, probe.benign_steps, probe.batch_size, setting)
                judge = partial(self.judge.benign, judged)
                title = f"benign fine-tune on {judged.name}, rate {rate:g}"
                run = self._kept(attack, title, partial(attacked, scene, attack, judge))
                yield run.model_copy(update={"source": judged.name, "setting": ""})

    def _rows_of(self, judged: Slice) -> list[Example]:
        """The rows on which a user fine-tunes to the task of a benign source."""
        parts = self.bench.streams.of("benign", "attack")
        return [example for part in parts if part.name == judged.name for example in part.examples]

    def _benign_rates(self) -> tuple[float, ...]:
        """The benign ladder; empty where there is nothing that a user would start from."""
        if self.subject == "scratch":
            return ()
        return self.bench.probe.rates.get("benign", BENIGN[self.bench.task.kind].rates)

    def _kept(self, attack: Attack, title: str, make: Callable[[], Run]) -> Run:
        """Take the finished run from the store, or make it and keep it."""
        self.progress.reach()

        def announced() -> Run:
            self.progress.announce(title)
            with enough_memory(title, attack):
                return make()

        return self.store.run(attack, announced)


@contextmanager
def enough_memory(title: str, attack: Attack) -> Iterator[None]:
    """Turn too little memory into a ResourceError that names the attack and the settings to change.

    The batch is not cut, as the hardening cuts it: an objective of two terms has another value over parts.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(
            f"out of memory ({error}) in the attack {title}; free some, or start a new run with a lower "
            f"probe.batch_size (now {attack.batch_size}) or data.max_length"
        ) from error
