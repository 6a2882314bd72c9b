"""GPT-NeoX and Pythia."""

from __future__ import annotations

from .base import LAYER, Code, Family, defaults

FAMILIES = {
    "gpt_neox": Family(
        defaults(
            *(6144, 44, 64, None, 50432, 24576),
            hidden_act="gelu",
            attention_bias=True,
            partial_rotary_factor=0.25,
            dtype="float16",  # of the published GPT-NeoX and Pythia weights
        ),
        norm="layer",
        norm_bias=True,
        block="parallel",
        mlp_bias=True,
        fused_qkv=True,
        gated=False,
        own_heads=False,
        dropout="hidden_dropout",
        parallel_switch="use_parallel_residual",
        code=Code(joins_rotary=True),
        names={
            LAYER: "gpt_neox.layers.{}.",
            "embed_tokens": "gpt_neox.embed_in",
            "final norm": "gpt_neox.final_layer_norm",
            "qkv_proj": "attention.query_key_value",
            "o_proj": "attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
    ),
}
