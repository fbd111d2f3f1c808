"""A checkpoint folder, in and out.

In: float32 weights through the task's Auto class, an adapter if the recipe asks for one. Out: a *drop-in release* —
what loads the parent, byte for byte, and the hardened weights under the parent's tensor names, in the parent's dtypes
and shards, so that it loads wherever the parent loads. Whatever else lies in the folder stays there.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hardener import files, metadata
from hardener.errors import UnsupportedModelError
from hardener.recipe import Lora
from hardener.tasks.base import Task


@dataclass(frozen=True)
class Saved:
    """What saving did to the hardened weights."""

    weights: str
    """sha256 over weights, config and processor files."""
    cast_loss: float
    """‖cast(W) − W‖ / ‖W − W₀‖: share of the hardening lost when casting to the release dtype."""
    moved: float
    """‖W − W₀‖ / ‖W₀‖."""


def attach(model: nn.Module, lora: Lora, task: Task) -> nn.Module:
    """Wrap the model in a float32 LoRA adapter; only the adapter trains."""
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks by the old name
            return get_peft_model(model, config)  # type: ignore[no-any-return]
    except ValueError as error:
        raise UnsupportedModelError(f"adapter.target_modules: {error}") from error


def merged(model: nn.Module) -> nn.Module:
    """Return the plain model, with an adapter merged in float32."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model  # type: ignore[operator]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in order."""
    return [folder / name for name in metadata.weight_files(_source(folder))]


def released(folder: Path) -> list[str]:
    """Names of the files that a release takes from a checkpoint folder: weights and what loads them, but no card.

    A local folder is read by the rule by which a Hub model is fetched. Raises UnsupportedModelError for a file that
    links to a place outside the folder: what is there was not meant to be published.
    """
    names = [name for name in metadata.release_files(_source(folder)) if name != "README.md"]
    weights = {path.relative_to(folder).as_posix() for path in weight_files(folder)}
    for name in names:
        target = (folder / name).resolve()
        if name not in weights and not target.is_relative_to(folder.resolve()) and not _in_hub_cache(target):
            raise UnsupportedModelError(
                f"{folder.name}: {name} links to a file outside the folder; put a copy there, or take the link away"
            )
    return names


def _source(folder: Path) -> metadata.Folder:
    return metadata.Folder(folder.name, folder, metadata.listing(folder))


def _in_hub_cache(target: Path) -> bool:
    """Snapshots in the Hub's cache consist of links to `models--ORG--NAME/blobs/HASH`."""
    return target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")


def save(model: nn.Module, parent: Path, release: Path) -> Saved:
    """Write the release folder as a whole, shard by shard, in the parent's layout.

    Raises UnsupportedModelError if the model's tensors do not map onto the parent's, ResourceError if the disk is full.
    """
    with files.new_folder(release) as new, files.scratch_folder(release.with_name(".merged")) as scratch:
        copy_companions(parent, new)
        as_stored(model, parent).save_pretrained(scratch, max_shard_size="2GB")  # type: ignore[operator]
        written = _Tensors(scratch)
        plain = model.state_dict()
        lost = moved = size = 0.0
        unknown = set(written.names)
        for shard in weight_files(parent):
            tensors: dict[str, Tensor] = {}
            with safe_open(shard, framework="pt") as old:
                for name in old.keys():  # noqa: SIM118 — a safetensors handle is no dict
                    before = old.get_tensor(name)
                    value = written.get(name) if name in unknown else plain.get(name)
                    unknown.discard(name)
                    # A tensor the model does not know (a stored buffer, say) is kept as the parent has it.
                    after = before if value is None else value.to(before.dtype)
                    if value is not None:
                        lost += _square(after, value)
                        moved += _square(value, before)
                        size += float(before.double().square().sum())
                    tensors[name] = after.contiguous()
                metadata = old.metadata() or {"format": "pt"}
            save_file(tensors, new / shard.relative_to(parent), metadata=metadata)
        if unknown:
            raise UnsupportedModelError(
                f"{type(model).__name__} saves tensors that the parent does not have, such as {min(unknown)}, so the "
                "release would not load where the parent loads; re-save the parent with today's transformers first"
            )
    return Saved(
        weights=fingerprint(release),
        cast_loss=(lost / moved) ** 0.5 if moved else 0.0,
        moved=(moved / size) ** 0.5 if size else 0.0,
    )


def as_stored(model: nn.Module, parent: Path) -> nn.Module:
    """The model, or what is beneath its head where the parent's tensors are named as by that alone."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    for shard in weight_files(parent):
        with safe_open(shard, framework="pt") as stored:
            if any(name.startswith(f"{prefix}.") for name in stored.keys()):  # noqa: SIM118 — no dict either
                return model
    return model.get_submodule(prefix) if prefix and hasattr(model, prefix) else model


def copy_companions(parent: Path, release: Path) -> None:
    """Copy what loads the parent's weights (config, processor, licence), byte for byte."""
    for name in sorted(set(released(parent)) - {path.relative_to(parent).as_posix() for path in weight_files(parent)}):
        target = release / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(parent / name, target)


def fingerprint(folder: Path) -> str:
    """The hash of what is attacked and released: weights, config, processor files; neither card nor evidence.

    A folder that holds no whole model has the hash of nothing, which is that of no model.
    """
    digest = hashlib.sha256()
    try:
        names = released(folder)
    except UnsupportedModelError:
        names = []
    for name in names:
        digest.update(f"{files.sha256(folder / name)}  {name}\n".encode())
    return digest.hexdigest()


class _Tensors:
    """The tensors of a folder that `save_pretrained` wrote, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, Path] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as tensors:
                self._where |= dict.fromkeys(tensors.keys(), shard)

    @property
    def names(self) -> list[str]:
        return list(self._where)

    def get(self, name: str) -> Tensor:
        with safe_open(self._where[name], framework="pt") as tensors:
            value: Tensor = tensors.get_tensor(name)
        return value


def _square(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().sum())
