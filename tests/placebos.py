"""Placebos: changes of scale that change no output, one per kind of pair, each by a factor of 30.

    for kind, (family, change) in PLACEBOS.items():
        change(model)       # a model of that family; under torch.no_grad()

`family` is llama, vit, resnet or bert; `relu-bert` is a BERT whose `hidden_act` is relu, and `dinov2` has layer scales.
The strongest disguises are those in which every matrix grows: a fixed small learning rate hardly moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

FACTOR = 30.0


def shrink(module: nn.Module) -> None:
    """Divide what the module writes."""
    module.weight.div_(FACTOR)
    if getattr(module, "bias", None) is not None:
        module.bias.div_(FACTOR)


def grow(*modules: nn.Module) -> None:
    """Multiply what the modules make of their input."""
    for module in modules:
        module.weight.mul_(FACTOR)


def grow_all(module: nn.Module) -> None:
    """Multiply what the module writes."""
    for parameter in module.parameters():
        parameter.mul_(FACTOR)


def blocks(model: nn.Module, name: str) -> Iterable[Any]:
    """All modules of a kind of name, say each `mlp`."""
    return [module for path, module in model.named_modules() if path.rpartition(".")[2] == name]


def llama_gain(model: Any) -> None:
    for layer in model.model.layers:
        shrink(layer.input_layernorm)
        grow(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        shrink(layer.post_attention_layernorm)
        grow(layer.mlp.gate_proj, layer.mlp.up_proj)


def last_gain(model: Any) -> None:
    shrink(model.model.norm)
    grow(model.lm_head)


def llama_stream(model: Any) -> None:
    grow(model.model.embed_tokens)
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            grow_all(linear)


def llama_whole(model: Any) -> None:
    for change in (llama_gain, last_gain, llama_stream):
        change(model)


def up_down(model: Any) -> None:
    for mlp in blocks(model, "mlp"):
        shrink(mlp.up_proj)
        grow(mlp.down_proj)


def value_output(model: Any) -> None:
    for attention in blocks(model, "self_attn"):
        shrink(attention.v_proj)
        grow(attention.o_proj)


def query_key(model: Any) -> None:
    for attention in blocks(model, "self_attn"):
        shrink(attention.k_proj)
        grow(attention.q_proj)
        if attention.q_proj.bias is not None:
            attention.q_proj.bias.mul_(FACTOR)


def vit_gain(model: Any) -> None:
    for layer in model.vit.layers:
        shrink(layer.layernorm_before)
        grow(layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj)
        shrink(layer.layernorm_after)
        grow(layer.mlp.fc1)


def vit_stream(model: Any) -> None:
    grow_all(model.vit.embeddings)
    for layer in model.vit.layers:
        grow_all(layer.attention.o_proj)
        grow_all(layer.mlp.fc2)


def vit_whole(model: Any) -> None:
    vit_gain(model)
    vit_stream(model)
    shrink(model.vit.layernorm)
    grow(model.classifier)


def layer_scale(model: Any) -> None:
    for layer in model.dinov2.encoder.layer:
        for scale, linear in ((layer.layer_scale1, layer.attention.o_proj), (layer.layer_scale2, layer.mlp.fc2)):
            scale.lambda1.div_(FACTOR)
            grow_all(linear)


def bert_value_output(model: Any) -> None:
    for attention in blocks(model, "attention"):
        shrink(attention.self.value)
        grow(attention.output.dense)


def bert_query_key(model: Any) -> None:
    for attention in blocks(model, "attention"):
        shrink(attention.self.key)
        grow_all(attention.self.query)


def bert_embeddings(model: Any) -> None:
    for name in ("word", "position", "token_type"):
        grow(model.bert.embeddings.get_submodule(f"{name}_embeddings"))


def relu(model: Any) -> None:
    for layer in model.bert.encoder.layer:
        shrink(layer.intermediate.dense)
        grow(layer.output.dense)


def resnet_whole(model: Any) -> None:
    batch_norm(model)
    before_batch_norm(model)


def batch_norm(model: Any) -> None:
    for layer in blocks(model, "layer"):
        shrink(layer[0].normalization)
        grow(layer[1].convolution)


def before_batch_norm(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "convolution"):
            grow(module.convolution)
            module.normalization.running_mean.mul_(FACTOR)
            module.normalization.running_var.mul_(FACTOR**2)


PLACEBOS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "gains": ("llama", llama_gain),
    "last gain": ("llama", last_gain),
    "stream": ("llama", llama_stream),
    "gains and stream": ("llama", llama_whole),
    "up and down": ("llama", up_down),
    "value and output": ("llama", value_output),
    "query and key": ("llama", query_key),
    "gains and shifts": ("vit", vit_gain),
    "stream, vision": ("vit", vit_stream),
    "gains and stream, vision": ("vit", vit_whole),
    "layer scale": ("dinov2", layer_scale),
    "value and output, encoder": ("bert", bert_value_output),
    "query and key, encoder": ("bert", bert_query_key),
    "embeddings before a norm": ("bert", bert_embeddings),
    "ReLU": ("relu-bert", relu),
    "batch norm": ("resnet", batch_norm),
    "weight before a norm": ("resnet", before_batch_norm),
    "batch norm and weight before it": ("resnet", resnet_whole),
}
