"""Resumable training state: everything that the next step depends on, as safetensors and JSON.

A state is a folder `step-NNNNNN` with `tensors.safetensors` (trainable weights, buffers, optimizer moments, random
state) and `state.json` (counters, the log, the tensors' hash). It appears as a whole or not at all; the last two are
kept, and one whose hash does not agree is passed over. Of several processes the first writes and reads it; tensors are
whole in it, so any number of processes can go on from it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hardener import files
from hardener.group import Group, full, like

if TYPE_CHECKING:
    from hardener.loop import Outer

KEPT = 2


class States:
    """The states of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, outer: Outer, step: int, log: list[dict[str, float]]) -> None:
        """Write the state after `step`, then drop old ones. Raises ResourceError if the disk is full."""
        shards, scalars = _optimizer_state(outer)
        shards |= {f"weight/{name}": p.detach() for name, p in _trainable(outer)}
        shards |= {f"buffer/{name}": b for name, b in outer.model.named_buffers()}
        shards |= {f"rng/{i}": state for i, state in enumerate(_rng())}
        tensors = _on_first(shards, outer.group)
        if not outer.group.first:
            return
        with files.new_folder(self.folder / f"step-{step:06d}") as new:
            save_file(tensors, new / "tensors.safetensors")
            state = {
                "step": step,
                "sha256": files.sha256(new / "tensors.safetensors"),
                "memory": outer.memory,
                "drawn": {role: s.drawn for role, s in outer.samplers.items()},
                "optimizers": scalars,
                "schedules": {name: s.state_dict() for name, s in outer.schedules.items()},
                "log": log,
            }
            files.write_sealed(new / "state.json", state)
        self._drop_old()

    def _drop_old(self) -> None:
        for old in self.all()[:-KEPT]:
            shutil.rmtree(old)

    def all(self) -> list[Path]:
        """Saved states, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def restore(self, outer: Outer, log: list[dict[str, float]]) -> int:
        """Put the newest whole state into `outer` and `log`; returns its step, 0 if there is none."""
        state, tensors = self._newest() if outer.group.first else (None, {})
        state = outer.group.told(state)
        if state is None:
            return 0
        if outer.group.first:
            self._drop_old()  # a process that was killed may have left one too many
        _put(outer, state, _in_all(tensors, outer.group))
        log[:] = state["log"]
        return int(state["step"])

    def _newest(self) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """The newest state that is whole, None if there is none."""
        for folder in reversed(self.all()):
            state = _read(folder)
            if state is not None:
                return state, load_file(folder / "tensors.safetensors")
        return None, {}


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        state = files.read_sealed(folder / "state.json")
        whole = state["sha256"] == files.sha256(folder / "tensors.safetensors")
    except (OSError, ValueError):
        return None
    return state if whole else None


def _on_first(shards: dict[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Whole tensors in the memory of the first process, one after another; the others help and keep none."""
    tensors = {}
    for name, shard in shards.items():
        tensor = full(shard)
        if group.first:
            tensors[name] = tensor.contiguous().cpu().clone()
    return tensors


def _in_all(tensors: dict[str, Tensor], group: Group) -> dict[str, Tensor]:
    """The first process's tensors, in every process."""
    forms = group.told({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    if not group.first:
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in forms.items()}
    group.give(list(tensors.values()))
    return tensors


def _trainable(outer: Outer) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in outer.model.named_parameters() if p.requires_grad]


def _optimizer_state(outer: Outer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer moments as named tensors, and everything else of the optimizers as plain values."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, optimizer in outer.optimizers.items():
        whole = optimizer.state_dict()
        scalars[name] = {"groups": whole["param_groups"], "state": {}}
        for index, entries in whole["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{name}/{index}/{key}"] = value
                else:
                    scalars[name]["state"].setdefault(str(index), {})[key] = value
    return tensors, scalars


def _put(outer: Outer, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, p in _trainable(outer):
            p.copy_(like(tensors[f"weight/{name}"], p))
        for name, buffer in outer.model.named_buffers():
            buffer.copy_(tensors[f"buffer/{name}"])
    for name, optimizer in outer.optimizers.items():
        saved = state["optimizers"][name]
        entries: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in saved["state"].items()}
        params = [p for entry in optimizer.param_groups for p in entry["params"]]
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            if kind == "optimizer" and rest.startswith(f"{name}/"):
                _, index, field = rest.split("/")
                entries.setdefault(int(index), {})[field] = like(value, params[int(index)])
        optimizer.load_state_dict({"state": entries, "param_groups": saved["groups"]})
    for name, schedule in outer.schedules.items():
        schedule.load_state_dict(state["schedules"][name])
    outer.memory = dict(state["memory"])
    for role, sampler in outer.samplers.items():
        sampler.drawn = state["drawn"][role]
    _set_rng([tensors[f"rng/{i}"] for i in range(len(_rng()))])


def _rng() -> list[Tensor]:
    """Random state of the CPU, then of the GPU that is computed on."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def _set_rng(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(states[1])
