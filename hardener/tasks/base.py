"""The contract of a task, and what all tasks share.

A task knows one modality and no architecture: it loads a checkpoint through a transformers Auto class, turns a row of
data into an `Example`, examples into a batch, a batch into logits and labels, and scores rows. The head is whatever
changes shape with the number of labels.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hardener.attacks.families import Kind
from hardener.errors import UnsupportedModelError, UsageError
from hardener.loss import rowwise, wide

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Example:
    """One encoded row."""

    key: str
    """sha256 of the rendered model input (prompt text or decoded pixels); equal keys are the same input."""
    inputs: dict[str, Any]
    labels: Any
    """Class index, or token ids with -100 where nothing is predicted; None where a row has no label."""
    targets: int
    """How many rows (N) it adds to logits and labels: its weight in a mean over a batch."""


@dataclass(frozen=True)
class Batch:
    """Collated examples."""

    inputs: dict[str, Tensor]
    labels: Tensor
    targets: int

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return Batch(inputs, self.labels.to(device), self.targets)


class Task(ABC):
    """Base of all tasks."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    """By which attack families are chosen."""
    fields: ClassVar[tuple[tuple[str, ...], ...]]
    """Alternative sets of fields that a row may have; the first that the columns hold is taken, so longer ones stand
    before their parts."""
    mapping: ClassVar[str]
    """transformers' table of model types that the Auto class knows."""
    default_score: ClassVar[str]
    retain_score: ClassVar[str | None] = None
    """Of retain rows, where they are scored otherwise."""
    generative: ClassVar[bool]
    """True: an attacker wants general utility beside the restricted skill (language models)."""

    def __init__(self, folder: Path, *, template: str, max_length: int) -> None:
        self.folder = folder
        self.template = template
        self.max_length = max_length

    @classmethod
    def supports(cls, config: dict[str, Any]) -> None:
        """Check a parsed config.json from metadata alone. Raises UnsupportedModelError naming what the Auto
        class takes.
        """
        from transformers.models.auto import modeling_auto

        kinds: dict[str, str | tuple[str, ...]] = getattr(modeling_auto, cls.mapping)
        known = kinds.get(config.get("model_type", ""))
        if known is None:
            kind = config.get("model_type") or config.get("_class_name")
            raise UnsupportedModelError(
                f"a {kind!r} model cannot be loaded for the task {cls.name}; choose a recipe whose task fits"
            )
        classes = (known,) if isinstance(known, str) else known
        named = config.get("architectures") or list(classes[:1])
        if not set(named) & set(classes):
            raise UnsupportedModelError(
                f"the checkpoint is a {named[0]}, the task {cls.name} needs a {classes[0]}: "
                "train and save its head first, or choose a recipe whose task fits"
            )

    @property
    @abstractmethod
    def auto(self) -> Any:
        """The transformers Auto class."""

    @abstractmethod
    def encode(self, row: dict[str, Any]) -> Example | None:
        """Encode a row of fields; None if it is empty or nothing is left to predict after cutting."""

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> Batch:
        """Put examples into one batch."""

    @abstractmethod
    def targets(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits (N, C) and labels (N,); of a diffusion model, predicted and true noise, both (N, D)."""

    @abstractmethod
    def score(self, model: nn.Module, examples: Sequence[Example], score: str) -> list[float]:
        """Score each example, (rows,), in [0, 1] (`likelihood-gain`: answer NLL in nats per token)."""

    def mean(self, model: nn.Module, batch: Batch, loss: Callable[..., Tensor], *teachers: nn.Module) -> Tensor:
        """`loss` of what `targets` returns and of what `teachers` make of the same rows, in float32 or wider."""
        with torch.no_grad():
            told = [wide(self.targets(teacher, batch)[0]) for teacher in teachers]
        logits, labels = self.targets(model, batch)
        return loss(wide(logits), labels, *told)

    @rowwise
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What ordinary training lowers, of what `targets` returns: cross-entropy, mean over N, in nats."""
        return F.cross_entropy(wide(logits), labels)

    def beside(self, model: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """Further measures of a model on all these rows together, higher for more skill; reported, not judged."""
        return {}

    def picture(self, folders: Sequence[Path], examples: Sequence[Example], device: str) -> Image | None:
        """These rows, and below them what the model of each folder makes of them; None of tasks that draw nothing."""
        return None

    def load(self, folder: Path, **config: Any) -> nn.Module:
        """Load a checkpoint folder in float32 with dropout off: safetensors only, remote code never.

        Raises UsageError if weights are missing from the checkpoint (a headless encoder, say), UnsupportedModelError
        if config and weights do not fit each other.
        """
        with loadable(f"the model in {folder.name}"):
            model, info = self.auto.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                **config,
            )
        if info["mismatched_keys"]:
            name, stored, expected = min(info["mismatched_keys"])
            raise UnsupportedModelError(
                f"{folder.name}: {name} is stored with shape {tuple(stored)}, but config.json makes it "
                f"{tuple(expected)} ({len(info['mismatched_keys'])} such tensors); config and weights belong to "
                "different models"
            )
        if lacking := self.lacking(model, info["missing_keys"]):
            raise UsageError(
                f"{folder.name} has no weights for {', '.join(lacking[:3])} of {type(model).__name__}; "
                f"hardener needs a checkpoint that is complete for the task {self.name} (train its head first)"
            )
        switch_dropout_off(model)
        return model  # type: ignore[no-any-return]

    def lacking(self, model: nn.Module, missing: Iterable[str]) -> list[str]:
        """Those of the weights missing from a checkpoint that it must have."""
        return sorted(missing)

    def scratch(self, folder: Path, **config: Any) -> nn.Module:
        """Return the same architecture with random weights (the from-scratch control)."""
        from transformers import AutoConfig

        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, **config)
        model = self.auto.from_config(settings, dtype=torch.float32)
        switch_dropout_off(model)
        return model  # type: ignore[no-any-return]

    def batches(self, examples: Sequence[Example], size: int = 64) -> Iterator[tuple[Sequence[Example], Batch]]:
        """Cut examples into batches in order."""
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            yield part, self.collate(part)

    def head(self, model: nn.Module) -> dict[str, torch.Size]:
        """Name → shape of the parameters whose shape changes with `num_labels`; empty for language models."""
        labels = int(model.config.num_labels)  # type: ignore[union-attr, arg-type]
        here, there = self.head_shapes(model, labels), self.head_shapes(model, labels + 1)
        return {name: here[name] for name in here if here[name] != there[name]}

    def head_shapes(self, model: nn.Module, classes: int) -> dict[str, torch.Size]:
        """Shapes of all parameters of this architecture with `classes` labels, without allocating any."""
        config = copy.deepcopy(model.config)
        config.num_labels = classes  # type: ignore[union-attr]
        with torch.device("meta"):
            twin = self.auto.from_config(config)
        return {name: p.shape for name, p in twin.named_parameters()}

    @contextmanager
    def fresh_head(self, model: nn.Module, classes: int) -> Iterator[None]:
        """Put a newly drawn head with `classes` outputs in place of the model's own; on leaving, that one is back.

        Xavier-uniform matrices and zero biases, as SOPHON's authors draw it, from torch's present random state.
        """
        shapes = self.head_shapes(model, classes)
        own = {name: model.get_parameter(name) for name in self.head(model)}
        for name, old in own.items():
            set_parameter(model, name, nn.Parameter(drawn(shapes[name], old)))
        try:
            yield
        finally:
            for name, old in own.items():
                set_parameter(model, name, old)


@contextmanager
def loadable(what: str) -> Iterator[None]:
    """Say as an UnsupportedModelError what transformers cannot load; for its calls only.

    What it meets in a file that is damaged, absent or made for another model, it passes on as Python raised it.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, StrictDataclassError) as error:
        told = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(f"{what} cannot be loaded: {type(error).__name__}: {told}") from error


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint. Raises UnsupportedModelError if there is none."""
    from transformers import AutoTokenizer

    with loadable(f"the tokenizer of {folder.name}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # what some classes make of no file at all
        raise UnsupportedModelError(f"{folder.name} has no tokenizer; put the files that it was trained with beside it")
    return tokenizer


def drawn(shape: torch.Size, like: Tensor) -> Tensor:
    """A fresh head tensor: Xavier-uniform if it is a matrix, else zero."""
    value = torch.zeros(shape, dtype=like.dtype, device=like.device)
    return nn.init.xavier_uniform_(value) if value.dim() > 1 else value


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the parameter `name` (dotted) of the model."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def switch_dropout_off(model: nn.Module) -> None:
    """Passes that are compared must see the same network.

    Beside dropout layers, modules keep rates as numbers: `attention_dropout`, `dropout_prob`, `drop_path`, `layerdrop`.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def key_of(*parts: bytes | str) -> str:
    """Hash of a rendered model input."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()
