"""What a model is, from metadata alone: file list, config.json, the card, headers of the safetensors files.

What cannot be hardened is refused here, before a byte of weights moves: other formats than safetensors,
quantized weights, adapters, code, an index that points elsewhere, headers that do not fit their file.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from hardener import files
from hardener.client import explained
from hardener.errors import HubError, UnsupportedModelError

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoFile

log = logging.getLogger("hardener")

Header = dict[str, tuple[str, int]]
"""Tensor name → (safetensors dtype, number of elements)."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PIPELINE = "model_index.json"
"""What makes a folder a pipeline of the library diffusers; the model that is hardened is its denoiser."""
DENOISER = "unet/diffusion_pytorch_model.safetensors"
DENOISER_CONFIG = "unet/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
PARTS = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
"""All that a pipeline may consist of: part → library and class."""
QUANTIZED = "quantization_config"
KEPT = (
    *("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.codes", "vocab.bpe"),
    *("additional_chat_templates/*.jinja", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
    *(DENOISER_CONFIG, SCHEDULER_CONFIG),
    *("[0-9]_*/config.json", "[0-9]_*/model.safetensors"),  # what sentence-transformers puts behind an encoder
)
"""What belongs to a release besides the weights, as patterns of whole paths."""
LEFT = ("*.index.json", "*_results.json", "trainer_state.json")
"""What matches above but speaks of other weights or of another training."""
LEARNED = (".weight", ".bias")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TABLE = re.compile(r"(^|[._])(embed_\w+|\w+_embeddings|embeddings|embed|wte|wpe)\.weight$")
"""Tensors from which rows are taken; the embeddings of patches are convolutions, and are called otherwise."""
OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")
PICKLE = "pickle, which can run code when it is loaded"
OTHER_FORMATS = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), PICKLE),
    ".gguf": "GGUF (quantized for inference)",
    ".onnx": "ONNX",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
}


@dataclass(frozen=True)
class ModelRef:
    """A model pinned to a commit, known from metadata alone."""

    id: str
    """Hub id, or the name (never the path) of a local folder."""
    commit: str | None
    """40 hexadecimal digits; None for a local folder."""
    folder: Path | None
    files: dict[str, int]
    """Every file that a release needs: path → bytes."""
    config: dict[str, Any]
    parameters: int
    multiplied: int
    """Parameters that every token is multiplied with: all but the embedding tables, which are looked up; of a language
    model that has no output layer of its own, its table is one."""
    dtype: str
    """The dtype that most elements have, as "float32", "bfloat16", "float16"."""
    tensors: dict[str, str]
    """Tensor name → safetensors dtype."""
    card: dict[str, Any]
    """YAML front matter of README.md; empty where there is none."""
    gated: str | bool
    private: bool

    @property
    def architecture(self) -> str:
        """The class of the model; "?" where its config names none."""
        return str((self.config.get("architectures") or [self.config.get("_class_name", "?")])[0])

    @property
    def license(self) -> dict[str, Any]:
        """The keys `license`, `license_name`, `license_link`, as far as the card has them."""
        keys = ("license", "license_name", "license_link")
        return {key: self.card[key] for key in keys if self.card.get(key)}

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(self.files.values())


class Source(Protocol):
    """Where metadata comes from."""

    @property
    def id(self) -> str:
        """How the model is called in messages and in the card."""

    @property
    def sizes(self) -> dict[str, int]:
        """Every file: path → bytes."""

    def path(self, name: str) -> Path:
        """A small file on disk."""

    def header(self, name: str) -> Header:
        """The header of a safetensors file; raises UnsupportedModelError if it does not fit the file."""


@dataclass(frozen=True)
class Folder:
    """Metadata of files on disk; safetensors itself checks that header and file agree."""

    id: str
    folder: Path
    sizes: dict[str, int]

    def path(self, name: str) -> Path:  # noqa: D102
        return self.folder / name

    def header(self, name: str) -> Header:  # noqa: D102
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / name, framework="numpy") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, not a dict
                return {key: (one.get_dtype(), prod(one.get_shape())) for key, one in slices.items()}
        except SafetensorError as error:
            raise UnsupportedModelError(f"{self.id}: {name} is truncated or damaged: {error}") from error


@dataclass(frozen=True)
class Remote:
    """Metadata of files on the Hub: small files whole, safetensors files by their first bytes."""

    id: str
    api: HfApi
    commit: str
    sizes: dict[str, int]
    hashes: dict[str, str]
    """File → how the Hub knows it (`files.has_hash`)."""

    def path(self, name: str) -> Path:
        """A small file in the cache. Raises HubError where other bytes came than the Hub names."""
        with explained(self.id):
            path = Path(self.api.hf_hub_download(self.id, name, revision=self.commit))
        check_bytes(self.id, path.parents[name.count("/")], {name: self.hashes[name]})
        return path

    def header(self, name: str) -> Header:  # noqa: D102
        from huggingface_hub.errors import SafetensorsParsingError

        try:
            with explained(f"{self.id}/{name}"):
                found = self.api.parse_safetensors_file_metadata(self.id, name, revision=self.commit).tensors
        except SafetensorsParsingError as error:
            raise UnsupportedModelError(f"{self.id}: {name} is truncated or damaged: {error}") from error
        end = max((tensor.data_offsets[1] for tensor in found.values()), default=0)
        if end + 8 >= self.sizes[name]:
            raise UnsupportedModelError(
                f"{self.id}: {name} is truncated: its header promises {end} bytes of weights, "
                f"the whole file has {self.sizes[name]}"
            )
        return {key: (tensor.dtype, tensor.parameter_count) for key, tensor in found.items()}


def hash_of(file: RepoFile) -> str:
    """How the Hub knows a file: a large one by SHA-256, a small one by the hash that git gives it."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def check_bytes(model: str, folder: Path, hashes: dict[str, str]) -> None:
    """Raise HubError for files whose bytes are not those that the Hub names, and take them out of the cache."""
    wrong = [name for name, digest in sorted(hashes.items()) if not files.has_hash(folder / name, digest)]
    for name in wrong:
        (folder / name).resolve().unlink()
        (folder / name).unlink(missing_ok=True)
    if wrong:
        raise HubError(
            f"{model}: {', '.join(wrong)} came with other bytes than the Hub names, and left the cache again; "
            "run the same line again"
        )


def describe(
    source: Source,
    *,
    commit: str | None = None,
    folder: Path | None = None,
    gated: str | bool = False,
    private: bool = False,
) -> ModelRef:
    """Read everything that a ModelRef holds; raises UnsupportedModelError for what is refused."""
    files = release_files(source)
    config = _config(source)
    header = headers(source)
    _check_layers(source, config, header)
    return ModelRef(
        id=source.id,
        commit=commit,
        folder=folder,
        files=files,
        config=config,
        parameters=sum(elements for _, elements in header.values()),
        multiplied=_multiplied(config, header),
        dtype=_dtype(source, header),
        tensors={name: dtype for name, (dtype, _) in header.items()},
        card=_card(source),
        gated=gated,
        private=private,
    )


def weight_files(source: Source) -> list[str]:
    """The safetensors files that make up the model, in the order in which transformers looks for them.

    Of a pipeline, the one file of its denoiser.
    """
    if "adapter_config.json" in source.sizes:
        raise UnsupportedModelError(
            f"{source.id} holds an adapter (adapter_config.json); merge it into its base model "
            "(peft: merge_and_unload), save that and harden the merged model"
        )
    if WEIGHTS in source.sizes:
        return [WEIGHTS]
    if INDEX in source.sizes:
        return _shards(source)
    wanted = WEIGHTS
    if PIPELINE in source.sizes:
        check_pipeline(source)
        wanted = DENOISER
    if wanted in source.sizes:
        return [wanted]
    found = sorted({suffix for name in source.sizes if (suffix := Path(name).suffix) in OTHER_FORMATS})
    if not found:
        raise UnsupportedModelError(f"{source.id} has no weights: neither {wanted} nor {INDEX} nor any other format")
    kinds = ", ".join(dict.fromkeys(OTHER_FORMATS[suffix] for suffix in found))
    raise UnsupportedModelError(
        f"{source.id} has no {wanted}; its weights are {kinds}. Only safetensors are loaded: convert the "
        "model on a machine you trust (transformers or diffusers, save_pretrained), or choose an original in "
        "safetensors"
    )


def check_pipeline(source: Source) -> None:
    """Raise UnsupportedModelError unless the pipeline is one denoiser without conditions and its noise schedule.

    Classes are known names of diffusers: a pipeline that names others would run code that came with it.
    """
    index = _json(source, PIPELINE)
    parts = {name: part for name, part in index.items() if not name.startswith("_")}
    if index.get("_class_name") != "DDPMPipeline" or parts != PARTS:
        named = ", ".join(f"{name}: {part}" for name, part in sorted(parts.items()))
        raise UnsupportedModelError(
            f"{source.id} is a {index.get('_class_name')} of {named}; of pipelines, hardener takes a DDPMPipeline of "
            "diffusers' own UNet2DModel and DDPMScheduler"
        )


def _shards(source: Source) -> list[str]:
    index = _json(source, INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()) or not index:
        raise UnsupportedModelError(f"{source.id}: {INDEX} has no weight_map of tensor and file names")
    shards = sorted(set(index.values()))
    for name in shards:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UnsupportedModelError(f"{source.id}: {INDEX} points to the foreign file {name!r}")
    if absent := [name for name in shards if name not in source.sizes]:
        raise UnsupportedModelError(f"{source.id}: {INDEX} names what is not there: {', '.join(absent)}")
    return shards


def headers(source: Source) -> Header:
    """All tensors of the model; raises UnsupportedModelError where index and files disagree."""
    weights = weight_files(source)
    with ThreadPoolExecutor(max_workers=8) as pool:
        per_file = dict(zip(weights, pool.map(source.header, weights), strict=True))
    if weights[0] not in (WEIGHTS, DENOISER):
        index = _json(source, INDEX)["weight_map"]
        absent = [tensor for tensor, name in index.items() if tensor not in per_file[name]]
        if absent:
            raise UnsupportedModelError(
                f"{source.id}: {INDEX} puts {absent[0]} in {index[absent[0]]}, which does not hold it "
                f"({len(absent)} such tensors)"
            )
    return {tensor: found for header in per_file.values() for tensor, found in header.items()}


def _config(source: Source) -> dict[str, Any]:
    name = DENOISER_CONFIG if weight_files(source) == [DENOISER] else "config.json"
    if name not in source.sizes:
        raise UnsupportedModelError(f"{source.id} has no {name}, so its architecture is unknown")
    config = _json(source, name)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if quantized := next((part[QUANTIZED] for part in parts if part.get(QUANTIZED)), None):
        method = quantized.get("quant_method", "bitsandbytes") if isinstance(quantized, dict) else quantized
        raise UnsupportedModelError(
            f"{source.id} is quantized ({method}); harden the full-precision original and quantize the result"
        )
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
        raise UnsupportedModelError(f"{source.id}: the architectures of {name} are {named!r}, not a list of names")
    if name == DENOISER_CONFIG and SCHEDULER_CONFIG not in source.sizes:
        raise UnsupportedModelError(f"{source.id} has no {SCHEDULER_CONFIG}, so its noise schedule is unknown")
    if name == "config.json" and not config.get("model_type"):
        raise UnsupportedModelError(
            f"{source.id}: config.json names no model_type, so only its own code could load it; "
            "hardener never runs code from a model repository"
        )
    return config


def _check_layers(source: Source, config: dict[str, Any], header: Header) -> None:
    """Raise UnsupportedModelError for more layers than there are tensors: building them would take for ever."""
    layers = config.get("num_hidden_layers", 0)
    if not isinstance(layers, int) or not 0 <= layers <= len(header):
        raise UnsupportedModelError(
            f"{source.id}: config.json speaks of {layers!r} layers, and the weights are {len(header)} tensors; config "
            "and weights belong to different models"
        )


def _multiplied(config: dict[str, Any], header: Header) -> int:
    elements = {name: count for name, (_, count) in header.items()}
    tables = [count for name, count in elements.items() if TABLE.search(name)]
    speaks = any("CausalLM" in name or "LMHead" in name for name in config.get("architectures") or ())
    tied = speaks and not any(OUTPUT.search(name) for name in elements)
    return sum(elements.values()) - sum(tables) + (max(tables, default=0) if tied else 0)


def _dtype(source: Source, header: Header) -> str:
    elements: Counter[str] = Counter()
    for dtype, count in header.values():
        elements[dtype] += count
    dtype = max(elements, key=lambda name: elements[name], default="nothing")
    if dtype not in DTYPES:
        raise UnsupportedModelError(
            f"{source.id} holds mostly {dtype} weights; gradients need {', '.join(DTYPES.values())}"
        )
    if odd := [name for name, (kind, _) in header.items() if name.endswith(LEARNED) and kind not in DTYPES]:
        raise UnsupportedModelError(
            f"{source.id}: {odd[0]} is stored as {header[odd[0]][0]}, the rest as {dtype}; the file is damaged, or "
            "quantized in part"
        )
    return DTYPES[dtype]


def release_files(source: Source) -> dict[str, int]:
    """What a release needs, path → bytes: the weights in use, and what transformers or a licence asks for."""
    weights = weight_files(source)
    index = [] if weights[0] in (WEIGHTS, DENOISER) else [INDEX]
    others = [name for name in source.sizes if _matches(name, KEPT) and not _matches(name, LEFT)]
    if odd := [name for name in others if not name.isprintable()]:
        raise UnsupportedModelError(f"{source.id}: the file name {odd[0]!r} cannot stand in SHA256SUMS; rename it")
    return {name: source.sizes[name] for name in sorted({*weights, *index, *others})}


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    """`fnmatch`, but `*` stays within one folder level."""
    return any(path.count("/") == one.count("/") and fnmatchcase(path, one) for one in patterns)


def _card(source: Source) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    if "README.md" not in source.sizes:
        return {}
    try:
        return dict(metadata_load(source.path("README.md")) or {})
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        log.warning("%s: the metadata of README.md cannot be read and is left out: %s", source.id, error)
        return {}


def _json(source: Source, name: str) -> dict[str, Any]:
    try:
        content = json.loads(source.path(name).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedModelError(f"{source.id}: {name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{source.id}: {name} is not a JSON object")
    return content


def listing(folder: Path) -> dict[str, int]:
    """All files under a folder, path → bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
