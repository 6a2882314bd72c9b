"""What transformers calls a decoder's weights, as model.named_parameters() lists them (models/*/modeling_*.py).

`layers.py` asks by the part of the step that a weight belongs to; tests compare the names of every family with its module's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

LAYER = "layer"
"""What the names of a layer's weights begin with; {} stands for the layer's number."""

_USUAL = {
    LAYER: "model.layers.{}.",
    "embed_tokens": "model.embed_tokens",
    "final norm": "model.norm",
    "lm_head": "lm_head",
    "input norm": "input_layernorm",
    "post-attention norm": "post_attention_layernorm",
    "pre-MLP norm": "pre_feedforward_layernorm",
    "post-MLP norm": "post_feedforward_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "qkv_proj": "self_attn.qkv_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "sinks": "self_attn.sinks",
    "q_a_proj": "self_attn.q_a_proj",
    "q_a_layernorm": "self_attn.q_a_layernorm",
    "q_b_proj": "self_attn.q_b_proj",
    "kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    "kv_a_layernorm": "self_attn.kv_a_layernorm",
    "kv_b_proj": "self_attn.kv_b_proj",
    "router": "mlp.gate",
    "experts.gate_up_proj": "mlp.experts.gate_up_proj",
    "experts.down_proj": "mlp.experts.down_proj",
    "shared_experts.gate_proj": "mlp.shared_experts.gate_proj",
    "shared_experts.up_proj": "mlp.shared_experts.up_proj",
    "shared_experts.down_proj": "mlp.shared_experts.down_proj",
}
_OTHERWISE: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        LAYER: "transformer.h.{}.",
        "embed_tokens": "transformer.wte",
        "position embeddings": "transformer.wpe",
        "final norm": "transformer.ln_f",
        "input norm": "ln_1",
        "post-attention norm": "ln_2",
        "qkv_proj": "attn.c_attn",
        "o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
    "gpt_neox": {
        LAYER: "gpt_neox.layers.{}.",
        "embed_tokens": "gpt_neox.embed_in",
        "final norm": "gpt_neox.final_layer_norm",
        "qkv_proj": "attention.query_key_value",
        "o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    "gpt_oss": {"router": "mlp.router"},
    "starcoder2": {"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
    "glm4": {
        "post-attention norm": "post_self_attn_layernorm",
        "pre-MLP norm": "post_attention_layernorm",
        "post-MLP norm": "post_mlp_layernorm",
    },
    "granitemoe": {
        "router": "block_sparse_moe.router",
        "experts.gate_up_proj": "block_sparse_moe.experts.gate_up_proj",
        "experts.down_proj": "block_sparse_moe.experts.down_proj",
    },
}


@lru_cache(maxsize=64)
def names_of(model_type: str) -> Mapping[str, str]:
    """By the part of a step: the weight's name, or its module's, within its layer or else within the model."""
    return {**_USUAL, **_OTHERWISE.get(model_type, {})}
