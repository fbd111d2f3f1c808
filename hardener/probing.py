"""The probe: attack the saved folder, the same way as the original, and write down what happened.

An attack is what a stranger would do with standard tools to the re-loaded folder, within a budget, paired with the
same rows, order and seeds on the original. Nothing of the defences is imported here. What the measurements are worth
is judged in `evidence.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from hardener import checkpoint, files, questions
from hardener.attacks.asked import plain
from hardener.attacks.attack import Attack
from hardener.attacks.families import BENIGN, SCREENS, Family
from hardener.attacks.finetune import attacked
from hardener.attacks.recorder import Stop, Watch, never, quietly
from hardener.attacks.scene import Scene
from hardener.bench import Bench, kept
from hardener.checks import NO_ATTACK
from hardener.conditions import LEAST_TRIALS, WORST
from hardener.crew import ALONE, Crew, Told
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

T = TypeVar("T")
SCANNED = 200
"""Benign rows that the judges look through, where models judge."""


class Store:
    """Finished runs of one subject on disk, so that an interrupted probe goes on where it was.

    `context` is what a run depends on beside the attack: the weights, the rows, how they are judged. Where several
    processes attack, each has its own store, and all stores have what any of them made.
    """

    def __init__(self, folder: Path, context: str, crew: Crew = ALONE) -> None:
        self.folder = folder
        self.context = context
        self.crew = crew
        if crew.size > 1:
            self._share()

    def _share(self) -> None:
        """Let the others have what an interrupted run left on the first one's disk."""
        for path in sorted(self.folder.glob("*.json")) if self.crew.first else ():
            with suppress(ValueError):  # a damaged one is told of when it is asked for
                self.crew.tell(path.name, Run.model_validate(files.read_sealed(path)).model_dump_json())
        self.crew.agree(self.context)

    def name(self, attack: Attack) -> str:
        """The file of an attack's run."""
        digest = hashlib.sha256(f"{attack}\n{self.context}".encode()).hexdigest()
        return f"{attack.family.name}-{attack.rate:g}-{attack.seed}-{attack.length}-{digest[:12]}.json"

    def run(self, attack: Attack, make: Callable[[], Run]) -> Run:
        """Return the finished run of this attack, or make it and keep it."""
        name = self.name(attack)

        def made() -> Run:
            run = make()
            self.crew.tell(name, run.model_dump_json())
            return run

        return kept(self.folder / name, Run, made)

    def hear(self) -> Iterator[tuple[Told, Run]]:
        """Keep what other processes made since this was last asked."""
        for told in self.crew.heard():
            run = Run.model_validate_json(told.run)
            yield told, kept(self.folder / told.name, Run, lambda run=run: run)  # type: ignore[misc]


class Prober:
    """Measures one subject."""

    def __init__(
        self,
        bench: Bench,
        subject: Subject,
        folder: Path,
        runs: Path,
        tell: Tell,
        parent: Path | None = None,
        crew: Crew = ALONE,
    ) -> None:
        self.bench = bench
        self.subject = subject
        self.folder = folder
        self.parent = parent
        self.weights = checkpoint.fingerprint(folder)
        self.crew = crew
        self.store = Store(runs, f"{subject} {self.weights} {bench.fingerprint()}", crew)
        self.judge = Judge(bench)
        self.ladder = Ladder(bench.judged.score, bench.chance("restricted"), bench.probe.epsilon)
        self.progress = Progress(subject, tell)
        self._made: dict[tuple[str, float], Attack] = {}
        """Family and rate → the attack, to be repeated with other seeds and budgets."""
        self._reached: set[str] = set()
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
        benign, benign_broke = settled([run() for run in self._benign_runs()])
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

        runs, notes = settled(self._all([partial(longer, run) for run in measured.runs]))
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
        pace = Pace.measured(model, self.bench, self.judge)
        self.progress.pace = Pace(pace.step / self.crew.size, pace.point / self.crew.size)
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
        """Public benchmarks before any attack, where the recipe names some; of the process that reports."""
        if self.subject == "scratch" or not self.bench.probe.lm_eval or not self.crew.first:
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

    def _all(self, pieces: Sequence[Callable[[], T]]) -> list[T]:
        """What the pieces return, in order; none waits for another. Runs of other processes are found in the store."""
        self._spread(pieces)
        return [piece() for piece in pieces]

    def _spread(self, pieces: Sequence[Callable[[], object]]) -> None:
        """Do the pieces in whichever process is free; one that is alone does each when it is needed."""
        self.crew.spread(pieces, self._hear)

    def _hear(self) -> None:
        """Keep and tell what other processes made."""
        for told, run in self.store.hear():
            self._reach(told.name)
            self.progress.announce(f"{run.family} at {run.rate:g}, seed {run.seed}: made by process {told.rank}")

    def _attacks(self, chosen: Sequence[Family], searches: dict[str, tuple[float, ...]]) -> list[Run]:
        """Every family once, those that follow another after it; then the repeats."""
        runs: list[Run] = []
        self._spread([*self._benign_runs(), *self._beginnings(chosen)])
        for follows in (False, True):
            families = [family for family in chosen if bool(family.follows) is follows]
            self._spread([partial(self._whole, family, runs, searches) for family in families])
            for family in families:
                runs += self._whole(family, runs, searches)
        runs += self.repeats(runs)
        self.scene.forget_base()
        return runs

    def _beginnings(self, chosen: Sequence[Family]) -> Iterator[Callable[[], Run]]:
        """The attacks that wait for no other: long ones first, and those last that share one loaded base."""
        first = [family for family in chosen if not family.follows]
        for family in sorted(first, key=lambda family: (family.scope == "lora", not family.trains)):
            for rate in dict.fromkeys(family.doses or family.rates):
                yield partial(self.attack, family, rate, self.bench.probe.seed)

    def _whole(self, family: Family, before: Sequence[Run], searches: dict[str, tuple[float, ...]]) -> list[Run]:
        """All that is tried of a family with the first seed."""
        found = self._once(family, before)
        if self._is_searched(family):
            first = self._attack(family, family.rates[0], self.bench.probe.seed)
            found, searches[family.name] = search(found, first, self.ladder.reached, self._watched)
        if family.scope != "lora":
            self.scene.forget_base()
        return found

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

    def repeats(self, runs: Sequence[Run]) -> list[Run]:
        """Further seeds: of the worst two attacks (`standard`), of each family's worst (`thorough`), else of none."""
        probe = self.bench.probe
        worst = self.ladder.worst_first(runs)
        of_each = list(dict(reversed(worst)).items())
        again = {"standard": worst[:WORST], "thorough": of_each}.get(probe.preset, [])
        seeds = range(probe.seed + 1, probe.seed + probe.seeds)
        return self._all([partial(self._make, replace(self._made[way], seed=seed)) for way in again for seed in seeds])

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

    def _benign_runs(self) -> list[Callable[[], Run]]:
        """What an honest user does with the subject, for each benign task."""
        rates = self._benign_rates()
        return [partial(self._benign, judged, rate) for judged in self.bench.benign for rate in rates]

    def _benign(self, judged: Slice, rate: float) -> Run:
        """One fine-tune to a benign task."""
        probe, family = self.bench.probe, BENIGN[self.bench.task.kind]
        scene, setting = self._scene("benign", self._rows_of(judged)), f"{judged.name}|{judged.score}"
        attack = Attack(family, rate, probe.seed, probe.benign_steps, probe.batch_size, setting)
        make = partial(attacked, scene, attack, partial(self.judge.benign, judged))
        run = self._kept(attack, f"benign fine-tune on {judged.name}, rate {rate:g}", make)
        return run.model_copy(update={"source": judged.name, "setting": ""})

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
        self._hear()
        self._reach(self.store.name(attack))

        def announced() -> Run:
            self.progress.announce(title)
            with enough_memory(title, attack):
                return make()

        return self.store.run(attack, announced)

    def _reach(self, name: str) -> None:
        """Count a run that is due, once."""
        if name not in self._reached:
            self._reached.add(name)
            self.progress.reach()


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
