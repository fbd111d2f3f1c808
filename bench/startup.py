"""How long a command takes before it does anything: CPU time of `--help`, `recipes list` and `harden --dry-run`.

    python -m bench.startup [--quick] [--json FILE]

CPU time in user and system mode of a process of its own, the median over repeats; the first run, which compiles what is
not compiled yet, is not counted. The dry run is one on a tiny local model with local data.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import untrained
from bench.rows import Row, main, row

GOAL = 0.3


def spent(command: Sequence[str], folder: Path) -> float:
    """CPU time of one run, in seconds."""

    def children() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = children()
    subprocess.run([sys.executable, "-m", "hardener", *command], check=True, capture_output=True, cwd=folder)
    return children() - before


def measured(quick: bool, device: str, repeats: int = 0) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = [word for override in untrained.overrides(folder) for word in ("--set", override)]
        dry = ["harden", str(untrained.letters(folder)), "--recipe", "tiny-ctrap", *sets, "--device", device]
        for what, command, goal in (
            ("--help", ["--help"], GOAL),
            ("recipes list", ["recipes", "list"], GOAL),
            ("harden --dry-run, local model", [*dry, "--dry-run"], None),
        ):
            _, *times = (spent(command, folder) for _ in range(1 + (repeats or (3 if quick else 11))))
            yield row(what, statistics.median(times), "s", goal)


if __name__ == "__main__":
    main(__doc__, measured)
