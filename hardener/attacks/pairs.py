"""Where a model can be re-scaled without any change of what it computes: the tables that `canonical.py` reads.

Names are ends of dotted names; the others of a row belong to the same block, or to the whole model after a "/". A part
of a fused layer stands in brackets: q, k, v stacked, or for each group of heads in turn (*), or a half.

What is known, by family of architectures:

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
