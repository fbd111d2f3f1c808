"""The run folder: a journal of stages, a lock, and everything a later command needs.

RUN/  run.json       what was asked, stages done, fingerprint, process, times
      recipe.yaml    resolved, with local paths (the released copy has hashes instead)
      state/         resumable training state
      probe/         measurements and single attack runs as JSON
      release/       exactly what is pushed
"""

from __future__ import annotations

import datetime
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from hardener import files
from hardener.errors import DivergedError, HardenerError, RunError, UsageError

T = TypeVar("T")
JOURNAL = "run.json"
LOCK = ".lock"
STARTED = {LOCK, "recipe.yaml", ".recipe.yaml.new", f".{JOURNAL}.new"}
"""What a start leaves that was killed before there was a journal."""


class RunFolder:
    """One run on disk. Make it with `create` or `reopen`."""

    def __init__(self, path: Path, journal: dict[str, Any]) -> None:
        self.path = path
        self._journal = journal

    @classmethod
    def create(cls, path: Path, request: dict[str, Any], recipe: str) -> RunFolder:
        """Start a new run. Raises RunError as `check_free` does."""
        check_free(path)
        created = today()
        with files.explained_disk(path):
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o700)
        run = cls(path, {"schema": 1, "created": created, "request": request, "fingerprint": {}, "stages": {}})
        with run._held():
            check_free(path)  # another process may have been quicker
            files.write_text(path / "recipe.yaml", recipe)
            run._write()
        return run

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Open an existing run. Raises RunError if it is none."""
        try:
            journal = files.read_sealed(path / JOURNAL)
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"{path} is not a run folder: it has no {JOURNAL}") from None
        except ValueError as error:
            raise RunError(f"{path / JOURNAL} is damaged ({error}); start a new run") from None
        if not _is_journal(journal):
            raise RunError(f"{path / JOURNAL} is not the journal of a run; start a new run")
        return cls(path, journal)

    @property
    def request(self) -> dict[str, Any]:
        """What was asked for, as the command line gave it."""
        return dict(self._journal["request"])

    def ask(self, **more: Any) -> None:
        """Change what was asked for, where it does not touch what was computed: how the release is dressed."""
        self._journal["request"] |= more
        self._write()

    @property
    def created(self) -> str:
        """Date of the run, which the report and card carry."""
        return str(self._journal["created"])

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def state(self) -> Path:
        """Resumable training state."""
        return self.path / "state"

    @property
    def probe(self) -> Path:
        """Measurements and attack runs."""
        return self.path / "probe"

    @property
    def release(self) -> Path:
        """What is pushed."""
        return self.path / "release"

    @property
    def report(self) -> Path:
        """The report, inside the release."""
        return self.release / "hardener" / "report.json"

    @property
    def begun(self) -> bool:
        """Whether there is work to go on from: a training state or a finished attack."""
        return any(self.state.glob("step-*")) or any(self.probe.rglob("*.json"))

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, and say so in the journal. Raises RunError if another one does."""
        with self._held():
            self._journal["pid"] = os.getpid()
            self._write()
            yield

    @contextmanager
    def _held(self) -> Iterator[None]:
        with (self.path / LOCK).open("a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(
                    f"{self.path} is in use by process {self._journal.get('pid', '?')}; "
                    "wait for it, or choose another folder"
                ) from None
            yield

    def guard(self, fingerprint: dict[str, str]) -> None:
        """Keep what the run rests on, or refuse to go on with something else. Raises RunError with the difference."""
        before = self._journal["fingerprint"] or fingerprint
        changed = [
            f"{key}: was {before.get(key, 'absent')}, is {fingerprint.get(key, 'absent')}"
            for key in sorted(before.keys() | fingerprint.keys())
            if before.get(key) != fingerprint.get(key)
        ]
        if changed:
            raise RunError(
                f"{self.path} was started with something else and cannot be resumed:\n  " + "\n  ".join(changed)
            )
        self._journal["fingerprint"] = fingerprint
        self._write()

    def stage(self, name: str, make: Callable[[], T], load: Callable[[Any], T], dump: Callable[[T], Any]) -> T:
        """Return the result of a finished stage, or run it and note that it is finished."""
        stages = self._journal["stages"]
        if name in stages:
            return load(stages[name]["result"])
        began = time.time()
        result = make()
        self.keep(name, dump(result), time.time() - began)
        return result

    def result(self, name: str) -> Any:
        """What a finished stage left, as plain data; None if it is not finished."""
        return self._journal["stages"].get(name, {}).get("result")

    def keep(self, name: str, result: Any, seconds: float = 0.0) -> None:
        """Note the result of a finished stage, as plain data."""
        self._journal["stages"][name] = {"result": result, "seconds": round(seconds, 1)}
        self._write()

    def forget(self, name: str) -> None:
        """Drop the result of a stage that holds no longer."""
        self._journal["stages"].pop(name, None)
        self._write()

    def seconds(self) -> dict[str, float]:
        """Wall time of each finished stage."""
        return {name: stage["seconds"] for name, stage in self._journal["stages"].items()}

    def _write(self) -> None:
        files.write_sealed(self.path / JOURNAL, self._journal)


def check_free(path: Path) -> None:
    """Raise RunError if a new run cannot have this folder: it holds something already, or a file is in the way."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise RunError(f"{there} is a file; choose another folder with --output")
    left = {entry.name for entry in path.iterdir()} if there == path else set()
    if left and not (LOCK in left and left <= STARTED):
        hint = f"continue it with --resume {path}, or choose" if (path / JOURNAL).is_file() else "choose"
        raise RunError(f"{path} is not empty; {hint} another folder with --output")


def _is_journal(value: dict[str, Any]) -> bool:
    parts = {"request": dict, "fingerprint": dict, "stages": dict, "created": str}
    if not all(isinstance(value.get(key), kind) for key, kind in parts.items()):
        return False
    return "model" in value["request"] and all("result" in stage for stage in value["stages"].values())


@contextmanager
def resumable(run: RunFolder, line: str) -> Iterator[None]:
    """Note on whatever ends the block early how to go on, for whoever tells a person about it."""
    try:
        yield
    except DivergedError as error:
        vars(error)["go_on"] = "Going on would end the same way; start a new run with a lower train.lr"
        raise
    except BaseException as error:
        bug = isinstance(error, Exception) and not isinstance(error, HardenerError)
        if run.begun:
            vars(error)["go_on"] = f"The state is saved; go on with: {line}"
        elif not bug:
            vars(error)["go_on"] = f"Go on with: {line}"
        raise


def today() -> str:
    """The date, from SOURCE_DATE_EPOCH if it is set. Raises UsageError if that is no time."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", str(time.time()))
    try:
        return datetime.datetime.fromtimestamp(float(epoch), datetime.timezone.utc).date().isoformat()
    except (ValueError, OverflowError, OSError):
        raise UsageError(f"SOURCE_DATE_EPOCH is {epoch!r}, not seconds since 1970; mend or unset it") from None
