"""Bring a model into a canonical scale, so that a re-scaling that changes no output cannot hide it.

A norm's gain can be moved into the layers that read it, and a factor between two layers with nothing but a homogeneous
function in between; weights in front of a norm can have any scale, and so can all that is summed up before norms read
it. A fixed learning rate then meets weights of another scale. The tables name such places per family of architectures.
A row of them is applied only where the logits stay equal. What is known, by family:

    Llama, Mistral, Qwen2, SmolLM, Granite, StableLM: gains, up → down, value → output, query ↔ key, stream
    Qwen3, Gemma, Gemma 2, Gemma 3: the same, with gains stored minus one, query and key norms, weights before a norm
    OLMo 2: last gain, up → down, value → output, query and key norms, weights before a norm
    Phi, Phi-3, Cohere, StarCoder2: gains, value → output, query ↔ key, stream; up → down where the MLP is gated
    Mixtral: gains before attention, value → output, query ↔ key, stream; not what is inside the experts
    GPT-2, GPT-J, GPT-Neo, GPT-NeoX, Falcon: gains, value → output, query ↔ key, stream
    BLOOM: gains, value → output, query ↔ key, embeddings; not the stream
    OPT: gains, fc1 → fc2 through ReLU, value → output, query ↔ key, stream
    BERT, RoBERTa, MiniLM, ELECTRA, ALBERT, DistilBERT, MPNet, DeBERTa-v2: value → output, query ↔ key, embeddings;
        fc1 → fc2 where it is through ReLU; not the gains, which residuals read as well
    ModernBERT: gains, up → down, value → output, query ↔ key, stream
    ViT, DeiT, BEiT, DINOv2: gains, layer scales, value → output, query ↔ key, stream
    CLIP, Swin, Swin v2: gains or weights before a norm, value → output, query ↔ key, embeddings; not the stream
    SigLIP: gains, value → output, query ↔ key; not the stream
    ResNet, RegNet, EfficientNet, MobileNet: weights before a batch norm, batch norm → ReLU → convolution in a block
    ConvNeXt: gains, layer scales, weights before a norm
    any `nn.Sequential`, as in VGG: weights or norms before weights, with nothing or ReLU and pooling in between
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hardener.tasks.base import Batch, Task

# Names are ends of dotted names; the others of a row belong to the same block, or to the whole model after a "/".
# A part of a fused layer stands in brackets: q, k, v stacked, or for each group of heads in turn (*), or a half.

VISION = ("patch_embeddings.projection", "position_embeddings", "cls_token", "distillation_token", "mask_token")
STREAMS: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (("embed_tokens",), ("self_attn.o_proj", "mlp.down_proj"), "model.norm"),  # Llama
    (("embed_tokens",), ("post_attention_layernorm", "post_feedforward_layernorm"), "model.norm"),  # Gemma 2
    (("embed_tokens",), ("self_attn.o_proj", "mlp.experts.down_proj"), "model.norm"),  # Mixtral
    (("embed_tokens",), ("self_attn.o_proj", "mlp.c_proj"), "model.norm"),  # StarCoder2
    (("embed_tokens",), ("self_attn.dense", "mlp.fc2"), "final_layernorm"),  # Phi
    (("embed_tokens", "embed_positions"), ("self_attn.out_proj", "fc2"), "decoder.final_layer_norm"),  # OPT
    (("wte", "wpe"), ("attn.c_proj", "mlp.c_proj"), "ln_f"),  # GPT-2
    (("wte", "wpe"), ("attn.attention.out_proj", "mlp.c_proj"), "ln_f"),  # GPT-Neo
    (("wte",), ("attn.out_proj", "mlp.fc_out"), "ln_f"),  # GPT-J
    (("embed_in",), ("attention.dense", "mlp.dense_4h_to_h"), "final_layer_norm"),  # GPT-NeoX
    (("word_embeddings",), ("self_attention.dense", "mlp.dense_4h_to_h"), "ln_f"),  # Falcon
    (("word_embeddings", "position_embeddings", "token_type_embeddings"), (), "ln_f"),  # BERT, BLOOM: a norm follows
    (("tok_embeddings",), (), "model.final_norm"),  # ModernBERT
    (("embeddings.norm",), ("attn.Wo", "mlp.Wo"), "model.final_norm"),
    (("patch_embedding", "class_embedding", "position_embedding"), (), "post_layernorm"),  # CLIP
    *((VISION, ("attention.o_proj", layer), "layernorm") for layer in ("mlp.fc2", "mlp.down_proj")),  # ViT, DINOv2
)
"""What begins a stream (the first has to be there), what all blocks add to it, and the norm at its end: where all that
reads the stream does so through norms, its scale is free. Tied embeddings need the last norm to make up for it.
"""

LAYER_SCALES: tuple[tuple[str, str], ...] = (
    ("layer_scale1.lambda1", "attention.o_proj"),  # DINOv2
    ("layer_scale2.lambda1", "mlp.fc2"),
    ("layer_scale2.lambda1", "mlp.down_proj"),
    ("lambda_1", "attention.o_proj"),  # BEiT
    ("lambda_2", "mlp.fc2"),
    ("layer_scale_parameter", "pwconv2"),  # ConvNeXt
)
"""Factor per channel → the layer in front of it."""

QKV = ("q_proj", "k_proj", "v_proj")
SELF_QKV = tuple(f"self_attn.{name}" for name in QKV)
GAINS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("input_layernorm", SELF_QKV),  # Llama
    ("input_layernorm", ("self_attn.qkv_proj",)),  # Phi-3
    ("input_layernorm", (*SELF_QKV, "mlp.fc1")),  # Phi: attention and MLP side by side
    ("input_layernorm", (*SELF_QKV, "mlp.gate_proj", "mlp.up_proj")),  # Cohere
    ("input_layernorm", ("attention.query_key_value",)),  # GPT-NeoX
    ("input_layernorm", ("self_attention.query_key_value",)),  # BLOOM
    ("input_layernorm", ("self_attention.query_key_value", "mlp.dense_h_to_4h")),  # Falcon
    ("ln_attn", ("self_attention.query_key_value",)),
    ("ln_mlp", ("mlp.dense_h_to_4h",)),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    ("post_attention_layernorm", ("mlp.c_fc",)),  # StarCoder2
    ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),  # Gemma 2
    ("ln_1", ("attn.c_attn",)),  # GPT-2
    ("ln_1", tuple(f"attn.attention.{name}" for name in QKV)),  # GPT-Neo
    ("ln_1", (*(f"attn.{name}" for name in QKV), "mlp.fc_in")),  # GPT-J
    ("ln_2", ("mlp.c_fc",)),
    ("self_attn_layer_norm", SELF_QKV),  # OPT
    ("final_layer_norm", ("fc1",)),
    ("attn_norm", ("attn.Wqkv",)),  # ModernBERT
    ("mlp_norm", ("mlp.Wi",)),
    ("layernorm_before", tuple(f"attention.{name}" for name in QKV)),  # ViT, Swin
    ("layernorm_after", ("mlp.fc1",)),
    ("norm1", tuple(f"attention.{name}" for name in QKV)),  # DINOv2
    ("norm2", ("mlp.fc1",)),
    ("norm2", ("mlp.gate_proj", "mlp.up_proj")),
    ("layer_norm1", SELF_QKV),  # CLIP
    ("layer_norm2", ("mlp.fc1",)),
    ("downsample.norm", ("downsample.reduction",)),  # Swin
    ("layernorm", ("pwconv1",)),  # ConvNeXt
    ("downsampling_layer.0", ("downsampling_layer.1",)),
    ("layer.0.normalization", ("layer.1.convolution",)),  # ResNet, RegNet
    ("layer.1.normalization", ("layer.2.convolution",)),
    ("layer.1.normalization", ("layer.2.attention.0", "layer.3.convolution")),  # squeeze and excitation
    ("bn1", ("conv2",)),  # torchvision's names
    ("bn2", ("conv3",)),
    *((name, ("/lm_head",)) for name in ("model.norm", "final_layernorm", "ln_f")),
    *((name, ("/lm_head",)) for name in ("gpt_neox.final_layer_norm", "decoder.final_layer_norm")),
    *((f"{name}.layernorm", ("/classifier",)) for name in ("vit", "swin", "swinv2", "dinov2", "convnext", "pooler")),
    *((name, ("/classifier",)) for name in ("convnextv2.layernorm", "deit.layernorm", "head.norm")),
    ("model.final_norm", ("/head.dense",)),  # ModernBERT
    ("head.layernorm", ("head.mlp.fc1",)),  # SigLIP
)
"""Norm → all layers that read its output, be it through a ReLU."""

CHANNELS: tuple[tuple[str, str], ...] = (
    ("mlp.up_proj", "mlp.down_proj"),
    ("mlp.gate_up_proj[2/2]", "mlp.down_proj"),
    ("mlp.Wi[2/2]", "mlp.Wo"),
    ("self_attn.v_proj", "self_attn.o_proj"),
    ("self_attn.v_proj", "self_attn.out_proj"),
    ("self_attn.v_proj", "self_attn.dense"),
    ("self_attn.qkv_proj[v]", "self_attn.o_proj"),
    ("attention.v_proj", "attention.o_proj"),
    ("attention.query_key_value[v*]", "attention.dense"),
    ("self_attention.query_key_value[v*]", "self_attention.dense"),
    ("attn.c_attn[v]", "attn.c_proj"),
    ("attn.v_proj", "attn.out_proj"),
    ("attn.attention.v_proj", "attn.attention.out_proj"),
    ("attn.Wqkv[v]", "attn.Wo"),
    ("attention.self.value", "attention.output.dense"),
    ("attention.self.value_proj", "attention.output.dense"),
    ("attention.value", "attention.dense"),
    ("attention.v_lin", "attention.out_lin"),
    ("attention.attn.v", "attention.attn.o"),
    # where the function in between is ReLU
    ("fc1", "fc2"),
    ("mlp.c_fc", "mlp.c_proj"),
    ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ("intermediate.dense", "output.dense"),
    ("ffn.lin1", "ffn.lin2"),
)
"""Layer → the one that reads its channels: each channel's factor can be moved between the two."""

HEADS: tuple[tuple[str, str], ...] = (
    ("self_attn.k_norm", "self_attn.q_norm"),
    ("self_attn.k_proj", "self_attn.q_proj"),
    ("self_attn.qkv_proj[k]", "self_attn.qkv_proj[q]"),
    ("attention.k_proj", "attention.q_proj"),
    ("attention.query_key_value[k*]", "attention.query_key_value[q*]"),
    ("self_attention.query_key_value[k*]", "self_attention.query_key_value[q*]"),
    ("attn.c_attn[k]", "attn.c_attn[q]"),
    ("attn.k_proj", "attn.q_proj"),
    ("attn.attention.k_proj", "attn.attention.q_proj"),
    ("attn.Wqkv[k]", "attn.Wqkv[q]"),
    ("attention.self.key", "attention.self.query"),
    ("attention.self.key_proj", "attention.self.query_proj"),
    ("attention.key", "attention.query"),
    ("attention.k_lin", "attention.q_lin"),
    ("attention.attn.k", "attention.attn.q"),
)
"""Key → query: only their product counts, so a factor can be moved between the two: each channel's, each pair's that is
rotated together, or each head's.
"""

FREE: tuple[tuple[str, str, str, str], ...] = (
    ("convolution", "normalization", "row", ""),
    *((f"conv{i}", f"bn{i}", "row", "") for i in (1, 2, 3)),
    ("downsample.0", "downsample.1", "row", ""),
    ("embeddings.convolution", "embeddings.batchnorm", "row", ""),  # EfficientNet
    ("expand_conv", "expand_bn", "row", ""),
    ("depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm", "row", ""),
    ("project_conv", "project_bn", "row", ""),
    ("top_conv", "top_bn", "row", ""),
    ("self_attn.q_proj", "self_attn.q_norm", "head", ""),
    ("self_attn.k_proj", "self_attn.k_norm", "head", ""),
    ("self_attn.q_proj", "self_attn.q_norm", "whole", ""),  # OLMo 2
    ("self_attn.k_proj", "self_attn.k_norm", "whole", ""),
    ("self_attn.o_proj", "post_attention_layernorm", "whole", "self_attn.v_proj"),  # Gemma 2
    ("mlp.down_proj", "post_feedforward_layernorm", "whole", "mlp.up_proj"),
    ("attention.self.query", "attention.self.continuous_position_bias_mlp", "head", ""),  # Swin v2: cosine attention
    ("attention.self.key", "attention.self.continuous_position_bias_mlp", "head", ""),
    ("attention.output.dense", "layernorm_before", "whole", "attention.self.value"),
    ("output.dense", "layernorm_after", "whole", ""),
    ("downsample.reduction", "downsample.norm", "whole", ""),
    ("patch_embeddings.projection", "norm", "whole", ""),  # Swin
    ("dwconv", "layernorm", "whole", ""),  # ConvNeXt
    ("patch_embeddings", "layernorm", "whole", ""),
)
"""Layer, what makes its scale free, what shares one factor (each row, the rows of a head, or all), and the layer whose
channels it reads where CHANNELS balances the two.
"""

HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Dropout, nn.Dropout2d, nn.Identity)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
SWEEPS = 40
"""Rounds over a chain of layers: to balance one pair disturbs the next, a little less each time."""

EMBEDDED = 0.1
"""Root mean square of canonical embeddings: near what is common, and large beside the square root of a norm's `eps`."""

EXACT, NEARLY = 1e-4, 1e-2
"""Shares of the logits' spread by which a row may change them."""

ORIGINS = (0.0, 1.0)
"""A norm stores its gain, or its gain minus one."""

SIZES = ("head_dim", "head_size", "attention_head_size")
KEYS = ("num_key_value_heads", "num_kv_heads")
ROTARY = ("rotary_ndims", "rotary_dim")
"""What attention modules call their channels per head, heads of keys, and channels that are rotated."""

Named = dict[str, nn.Module | Tensor]


@dataclass(frozen=True)
class Found:
    """What a name of a row means in a model: a layer, norm or vector, or a part of one; and its attention."""

    what: nn.Module | Tensor
    part: str
    size: int
    """Channels of a head; 0 outside attention."""
    keys: int
    """Heads of keys and values; 0 if as many as of queries."""
    rotary: int
    """Channels of a head that may be rotated by position."""


@dataclass(frozen=True)
class Side:
    """One side of a pair: tensors that share a factor per channel, as views (heads, channels of a head, ...).

    What counts is `origin` + the stored value: some norms store their gain minus one.
    """

    views: tuple[Tensor, ...]
    origin: float = 0.0

    @property
    def channels(self) -> int:
        """Heads × channels of a head."""
        return self.views[0].shape[0] * self.views[0].shape[1]

    def energy(self) -> Tensor:
        """Sum of squares per channel, (channels,)."""
        squares = [(view + self.origin).square().flatten(2).sum(2).flatten() for view in map(deep, self.views)]
        return torch.stack(squares).sum(0)

    def scale(self, factor: Tensor) -> None:
        """Multiply each channel; factor (channels,)."""
        for view in self.views:
            by = factor.view(*view.shape[:2], *[1] * (view.dim() - 2))
            view.copy_((view + self.origin) * by - self.origin)


WIDTHS: dict[str, Callable[[Found, Side], int]] = {
    "row": lambda layer, side: 1,
    "head": lambda layer, side: layer.size,
    "whole": lambda layer, side: side.channels,
}
"""Grain → how many rows share a factor."""


@dataclass(frozen=True)
class Move:
    """A change at one place of the model, and the tensors that it alters."""

    tensors: tuple[Tensor, ...]
    apply: Callable[[], None]


def canonicalise(model: nn.Module, task: Task, probe: Batch) -> bool:
    """Bring the model into canonical scale, in place; True if any row of the tables applies.

    `probe` is a batch on which the logits are compared: a row that changes them by more than `EXACT` of their spread is
    undone, or by more than `NEARLY` where it relies on a norm, whose `eps` does not scale along. Models that differ
    only by re-scalings at the places of the tables become equal.
    """
    training = model.training
    model.eval()
    applied = False
    with torch.no_grad():
        logits, _ = task.targets(model, probe)
        for tolerance, alternatives in rows(model):
            kept = (_kept(model, moves, task, probe, logits, tolerance) for moves in alternatives if moves)
            after = next((one for one in kept if one is not None), None)
            if after is not None:
                logits, applied = after, True
    model.train(training)
    return applied


def _kept(
    model: nn.Module, moves: Sequence[Move], task: Task, probe: Batch, logits: Tensor, tolerance: float
) -> Tensor | None:
    """Apply the moves and return the logits; None, and everything is as before, if they differ."""
    saved = [(tensor, tensor.clone()) for move in moves for tensor in move.tensors]
    for move in moves:
        move.apply()
    after, _ = task.targets(model, probe)
    if torch.allclose(logits, after, atol=tolerance * float(logits.std()), rtol=tolerance):
        return after
    for tensor, before in saved:
        tensor.copy_(before)
    return None


Row = tuple[float, Iterable[Sequence[Move]]]
"""Tolerance and alternatives, of which the first that keeps the logits counts; each moves in all blocks."""


def rows(model: nn.Module) -> Iterator[Row]:
    """Every row of the tables as changes of the model.

    The order makes the form unique: what is scaled or folded into a layer comes before the layer's own balance, and
    what has a scale of its own choice comes last.
    """
    named = dict(model.named_modules()) | dict(model.named_parameters())
    at, lines = partial(moves, named), list(sequential(named))
    for names in STREAMS:
        yield NEARLY, (stream(named, *names, tied, origin) for tied in (False, True) for origin in ORIGINS)
    for vector, layer in LAYER_SCALES:
        yield EXACT, [at((vector, layer), layer_scale)]
    for norm, readers in (*GAINS, *((first, (second,)) for first, second, kind in lines if kind == "gain")):
        yield EXACT, (at((norm, *readers), partial(gain, origin=origin)) for origin in ORIGINS)
    for writer, reader in CHANNELS:
        yield EXACT, [at((writer, reader), channels)]
    chain = [move for first, second, kind in lines if kind == "channels" for move in at((first, second), channels)]
    yield EXACT, [swept(chain)]
    for key, query in HEADS:
        alternatives = [partial(heads, shared=shared, origin=origin) for origin in ORIGINS for shared in SHARED]
        yield EXACT, map(partial(at, (key, query)), alternatives)
    for layer, norm, grain, writer in (*FREE, *((*line, "") for line in lines if line[2] in WIDTHS)):
        yield NEARLY, [at((layer, norm, writer) if writer else (layer, norm), partial(free, grain=grain))]


def moves(named: Named, names: Sequence[str], make: Callable[..., Iterator[Move]]) -> list[Move]:
    """The moves of one row: in every block that has all the names."""
    return [move for place in places(named, *names) for move in make(*place)]


def swept(chain: Sequence[Move]) -> list[Move]:
    """A chain of moves, repeated until nothing moves any more, as one."""

    def apply() -> None:
        for _ in range(SWEEPS):
            for move in chain:
                move.apply()

    return [Move(tuple(tensor for move in chain for tensor in move.tensors), apply)] if chain else []


# Finding


def places(named: Named, anchor: str, *others: str) -> Iterator[list[Found]]:
    """Each block that has all the names: what they mean there."""
    end = anchor.partition("[")[0]
    for name in ending(named, end):
        block = name.removesuffix(end)
        full = [block + anchor, *(other[1:] if other[0] == "/" else block + other for other in others)]
        if all(one.partition("[")[0] in named for one in full):
            yield [found(named, one) for one in full]


def ending(named: Named, end: str) -> list[str]:
    """All names that end so."""
    return [name for name in named if name == end or name.endswith(f".{end}")]


def found(named: Named, name: str) -> Found:
    """What a full name means; the geometry of heads is that of the nearest module around it that has one."""
    path, _, part = name.rstrip("]").partition("[")
    above = path.split(".")
    owners = [vars(named[".".join(above[:i])]) for i in range(len(above) - 1, -1, -1)]
    owner: dict[str, Any] = next((o for o in owners if any(name in o for name in SIZES)), {})
    size = first(owner, SIZES)
    return Found(named[path], part, size, first(owner, KEYS), first(owner, ROTARY) or size)


def first(owner: dict[str, Any], names: Sequence[str]) -> int:
    """The first attribute that is there, else 0."""
    return next((owner[name] for name in names if isinstance(owner.get(name), int)), 0)


def sequential(named: Named) -> Iterator[tuple[str, str, str]]:
    """Neighbours within every `nn.Sequential`: (name, name of the next, kind of pair or grain)."""
    for name, module in named.items():
        if isinstance(module, nn.Sequential):
            last, direct = "", True
            for child_name, child in module.named_children():
                own = f"{name}.{child_name}".lstrip(".")
                if isinstance(child, (*WEIGHTED, *NORMS)):
                    if last:
                        yield from pair(last, own, named, direct)
                    last, direct = own, True
                else:
                    last, direct = (last if isinstance(child, HOMOGENEOUS) else ""), False


def pair(one: str, other: str, named: Named, direct: bool) -> Iterator[tuple[str, str, str]]:
    """What two neighbours are to each other; `direct`: there is no function between them."""
    if isinstance(named[other], WEIGHTED):
        yield one, other, "gain" if isinstance(named[one], NORMS) else "channels"
    elif direct and isinstance(named[one], WEIGHTED):
        yield one, other, "row" if isinstance(named[other], _BatchNorm) else "whole"


# Viewing


def deep(view: Tensor) -> Tensor:
    """At least three dimensions."""
    return view if view.dim() > 2 else view[..., None]


def stored(what: nn.Module | Tensor) -> list[Tensor]:
    """Weight, outputs first, and bias if there is one; nothing if it is no layer."""
    tensors = [what] if isinstance(what, Tensor) else [getattr(what, name, None) for name in ("weight", "bias")]
    held = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    turned = type(what).__name__ == "Conv1D"  # transformers' own linear layer, (in, out)
    return [tensor.t() if turned and tensor.dim() == 2 else tensor for tensor in held]


def written(one: Found, origin: float = 0.0) -> Iterator[Side]:
    """The side that writes channels: rows, or gain and shift. Yields none if the shapes are not those of the part."""
    tensors = stored(one.what)
    if tensors and (not one.part or parted(one, len(tensors[0]))):
        yield Side(tuple(cut(tensor, one) for tensor in tensors), origin)


def parted(one: Found, outputs: int) -> bool:
    """Whether a fused layer with so many outputs has the part."""
    return outputs % 2 == 0 if one.part == "2/2" else bool(one.size) and outputs % (one.size * (one.keys or 3)) == 0


def cut(tensor: Tensor, one: Found) -> Tensor:
    """The part of a tensor (outputs, ...) as (heads, channels, ...), queries as (heads of keys, their queries, ...)."""
    if not one.part:
        return tensor[None]
    if one.part == "2/2":
        return tensor.chunk(2)[1][None]
    keys = one.keys or len(tensor) // (3 * one.size)
    group = len(tensor) // (keys * one.size) - 2
    if one.part.endswith("*"):
        shares = torch.unflatten(tensor, 0, (keys, group + 2, one.size))
        return {"q*": shares[:, :group].movedim(1, 2), "k*": shares[:, -2], "v*": shares[:, -1]}[one.part]
    stacked = torch.split_with_sizes(tensor, [group * keys * one.size, keys * one.size, keys * one.size])
    return stacked["qkv".index(one.part)][None]


def read(one: Found, channels: int) -> Iterator[Side]:
    """The side that reads channels: columns. Yields none if it has another number of inputs.

    With grouped attention, a channel of a value head is read by every query head of its group.
    """
    groups = getattr(one.what, "groups", 1)
    for weight in stored(one.what)[:1]:
        inputs = weight[0].shape[0] * groups if weight.dim() > 1 else 0
        size = one.size if one.size and channels % one.size == 0 else channels
        if inputs == channels:
            yield Side((torch.unflatten(weight, 0, (groups, -1)).movedim(2, 1),))  # (groups, in, out of a group, ...)
        elif inputs and inputs % channels == 0:
            shares = torch.unflatten(weight, 1, (channels // size, inputs // channels, size))
            yield Side((shares.permute(1, 3, 0, 2),))  # (heads, channels, out, readers of a head)


def queried(one: Found, keys: Side) -> Iterator[Side]:
    """The side of the queries: (heads of keys, channels of a head, queries of the key, ...)."""
    for side in written(one, keys.origin):
        count = keys.channels // one.size
        if one.part.endswith("*"):
            yield side
        elif side.channels % keys.channels == 0:
            views = (torch.unflatten(view[0], 0, (count, -1, one.size)).movedim(1, 2) for view in side.views)
            yield Side(tuple(views), keys.origin)


# Moving


def stream(
    named: Named, begins: Sequence[str], adds: Sequence[str], last: str, tied: bool, origin: float
) -> list[Move]:
    """Give a stream a beginning of size one, and all that writes it the same factor."""
    writers = [named[name] for end in (*begins, *adds) for name in ending(named, end)]
    lasts = [named[name] for name in ending(named, last)[-1:]] if tied else []
    if not all(ending(named, end) for end in (begins[0], *adds)) or len(lasts) != tied:
        return []
    size = beginning(writers[0], origin)
    up, down = ([tensor for what in whats for tensor in stored(what)] for whats in (writers, lasts))

    def apply() -> None:
        for tensor, factor in (*((t, 1 / size) for t in up), *((t, size) for t in down)):
            stands = origin if tensor.dim() == 1 else 0.0
            tensor.copy_((tensor + stands) * factor - stands)

    return [Move((*up, *down), apply)] if size else []


def beginning(what: nn.Module | Tensor, origin: float) -> float:
    """Size of a stream where it begins, of an embedding's values, a norm's gains or a projection's rows; 0: unknown."""
    for weight in stored(what)[:1]:
        if isinstance(what, nn.Embedding):
            return float(weight.square().mean().sqrt()) / EMBEDDED
        sizes = weight.flatten(1).norm(dim=1) if weight.dim() > 1 else weight + origin
        return float(sizes.square().mean().sqrt())
    return 0.0


def layer_scale(vector: Found, layer: Found) -> Iterator[Move]:
    """Fold a factor per channel into the layer in front of it."""
    for one, other in product(written(vector), written(layer)):
        if one.channels == other.channels:
            yield Move((*one.views, *other.views), partial(fold, one, (other,)))


def gain(norm: Found, *readers: Found, origin: float) -> Iterator[Move]:
    """Fold gain and shift of a norm into the layers that read it: g·x̂ + b → |(g, b)|·(g·x̂ + b)/|(g, b)|."""
    for one in written(norm, origin):
        others = [side for reader in readers for side in read(reader, one.channels)]
        if len(others) == len(readers):
            tensors = tuple(view for side in (one, *others) for view in side.views)
            yield Move(tensors, partial(fold, one, others))


def fold(writer: Side, others: Sequence[Side]) -> None:
    """Make each channel's norm one; the others take it over. A channel of zeros stays as it is."""
    norm = writer.energy().sqrt()
    norm[norm == 0] = 1.0
    writer.scale(1 / norm)
    for other in others:
        other.scale(norm)


def channels(writer: Found, reader: Found) -> Iterator[Move]:
    """Give each channel the same norm where it is written and where it is read."""
    for one in written(writer):
        for other in read(reader, one.channels):
            alone = torch.arange(one.channels, device=one.views[0].device)
            yield Move((*one.views, *other.views), partial(balance, one, other, alone))


def heads(key: Found, query: Found, shared: Callable[[Found, Tensor], Tensor], origin: float) -> Iterator[Move]:
    """Give keys and queries the same norm: in each channel, or in all channels that share a factor."""
    for one in written(key, origin):
        if key.size and one.channels % key.size == 0:
            for other in queried(query, one):
                channel = torch.arange(one.channels, device=one.views[0].device)
                share = channel // key.size * key.size + shared(key, channel % key.size)
                yield Move((*one.views, *other.views), partial(balance, one, other, share))


def balance(writer: Side, reader: Side, share: Tensor) -> None:
    """Move a factor from one to the other until both norms are equal; share: (channels,) numbers of equal factors."""
    have, wanted = (torch.zeros_like(e).index_add_(0, share, e) for e in (writer.energy(), reader.energy()))
    both = (have > 0) & (wanted > 0)
    factor = torch.where(both, wanted / torch.where(both, have, 1.0), 1.0)[share] ** 0.25
    writer.scale(factor)
    reader.scale(1 / factor)


def free(layer: Found, norm: Found, *writers: Found, grain: str) -> Iterator[Move]:
    """Give rows whose scale is free, and all rows of the layer in front, a root mean square norm of one."""
    for side in written(layer):
        width = WIDTHS[grain](layer, side)
        ahead = [(one, other) for writer in writers for one in written(writer) for other in read(layer, one.channels)]
        if width and side.channels % width == 0 and len(ahead) == len(writers):
            moving = statistics(norm.what)
            tensors = (*side.views, *(view for one, _ in ahead for view in one.views), *moving)
            yield Move(tensors, partial(normalise, side, width, ahead, norm.what if moving else None))


def statistics(norm: nn.Module | Tensor) -> tuple[Tensor, ...]:
    """What of a batch norm goes along with the scale in front of it; nothing if it is not one that keeps statistics."""
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None or not norm.affine:
        return ()
    return norm.running_mean, norm.running_var, norm.weight


def normalise(side: Side, width: int, ahead: Sequence[tuple[Side, Side]], norm: Any) -> None:
    """Divide every `width` rows by the root of their mean square norm (bias left out); a batch norm goes along."""
    for writer, reader in ahead:
        factor = unit(writer, writer.channels)
        writer.scale(factor)
        reader.scale(1 / factor)
    factor = unit(side, width)
    side.scale(factor)
    if norm is not None:
        spread = (norm.running_var + norm.eps).sqrt()
        norm.running_mean.mul_(factor)
        norm.running_var.mul_(factor.square())
        norm.weight.mul_((norm.running_var + norm.eps).sqrt() / (factor * spread))  # eps does not scale along


def unit(side: Side, width: int) -> Tensor:
    """The factors, (channels,), that give every `width` rows a root mean square norm of one."""
    mean = Side(side.views[:1]).energy().view(-1, width).mean(1)
    return torch.where(mean > 0, mean, 1.0).rsqrt().repeat_interleave(width)


# Which channels of a head share a factor of keys and queries, by what is done with them before they meet


def _alone(key: Found, channel: Tensor) -> Tensor:
    return channel


def _halves(key: Found, channel: Tensor) -> Tensor:
    return torch.where(channel < key.rotary, channel % max(key.rotary // 2, 1), channel)


def _neighbours(key: Found, channel: Tensor) -> Tensor:
    return torch.where(channel < key.rotary, channel // 2 * 2, channel)


def _head(key: Found, channel: Tensor) -> Tensor:
    return torch.zeros_like(channel)


SHARED = (_alone, _halves, _neighbours, _head)


# What shows without any table


def norm_ratio(hardened: Path, original: Path) -> tuple[float, float]:
    """Smallest and largest ‖w_hardened‖ / ‖w_original‖ over all tensors; a placebo shows 0.03 and 30."""
    here, there = norms(hardened), norms(original)
    ratios = [here[name] / there[name] for name in here.keys() & there.keys() if there[name] > 0]
    return min(ratios), max(ratios)


def norms(folder: Path) -> dict[str, float]:
    """Norm of every tensor of a checkpoint, whatever its shards."""
    from safetensors import safe_open

    from hardener.checkpoint import weight_files

    known: dict[str, float] = {}
    for shard in weight_files(folder):
        with safe_open(shard, framework="pt") as tensors:
            known |= {name: float(tensors.get_tensor(name).double().norm()) for name in tensors.keys()}  # noqa: SIM118
    return known
