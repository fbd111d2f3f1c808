"""What all benchmarks of cost share: rows, a table, a JSON file, and how time and memory are measured.

    python -m bench.NAME [--quick] [--json FILE] [--device cuda]

A row has `what`, `value`, `unit`, `goal` (None where there is none) and `better`, `lower` or `higher`. Time is CPU time
of this process on a CPU, so that other work on the machine counts little, and wall time on a GPU; a quotient is the
median over turns that both sides take. Memory on a CPU is counted in live bytes of tensors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from hardener.memory import Live

Row = dict[str, Any]


def row(what: str, value: float, unit: str, goal: float | None = None, better: str = "lower") -> Row:
    return {"what": what, "value": value, "unit": unit, "goal": goal, "better": better}


def clock(device: str = "cpu") -> float:
    """Seconds: CPU time of this process on a CPU, wall time on a GPU, once it has done what it was told."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds(action: Callable[[], object], device: str = "cpu") -> float:
    """How long an action takes."""
    began = clock(device)
    action()
    return clock(device) - began


def quotient(one: Callable[[], object], other: Callable[[], object], repeats: int, device: str = "cpu") -> float:
    """How many times as long `one` takes, the median over turns."""
    one(), other()  # moments are made, kernels are chosen
    return statistics.median(seconds(one, device) / seconds(other, device) for _ in range(repeats))


def peak(action: Callable[[], object], device: str = "cpu") -> int:
    """Most live bytes of tensors that the second call makes."""
    action()
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        return torch.cuda.max_memory_allocated() - before
    with Live() as live:
        action()
    return live.peak


def main(what: str | None, measured: Callable[[bool, str], Iterator[Row]]) -> None:
    """Show each row as `measured(quick, device)` finds it, and write them all."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small enough for a minute of two cores")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args()
    rows = []
    for found in measured(chosen.quick, chosen.device):
        rows.append(found)
        goal = "" if found["goal"] is None else f"{found['goal']:.3g}"
        print(f"{found['what']:<62} {found['value']:>9.3f} {found['unit']:<3} {goal:>6}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")
