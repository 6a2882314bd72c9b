"""Falcon (7B, 40B, 180B and 11B). Falcon 3 is a Llama."""

from __future__ import annotations

from .base import LAYER, Code, Family, defaults

FAMILIES = {
    "falcon": Family(
        defaults(
            *(4544, 32, 71, None, 65024, None),
            ffn_hidden_size=None,
            activation="gelu",
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            new_decoder_architecture=False,
            multi_query=True,
            parallel_attn=True,
        ),
        norm="layer",
        norm_bias=True,
        block="one-norm",
        norms="num_ln_in_parallel_attn",
        qkv_bias=False,
        out_bias=False,
        fused_qkv=True,
        gated=False,
        own_heads="new_decoder_architecture",
        kv_heads="num_kv_heads",
        multi_query="multi_query",
        keys="copied",
        always_masked=True,
        own_flash=True,
        mlp_width="ffn_hidden_size",
        activation="activation",
        uncounted=("alibi", "bias"),  # Falcon-RW's
        only={"parallel_attn": True, "hidden_dropout": 0},
        code=Code(
            slices_qkv=True,
            norms_first=True,
            adds_in_place=True,
            attends_itself=True,
            returns_weights=True,
            multiplies_views=True,
            scales_in_place=True,
            softmax_as_scores=True,
        ),
        tiny={"ffn_hidden_size": 704},
        names={
            LAYER: "transformer.h.{}.",
            "embed_tokens": "transformer.word_embeddings",
            "final norm": "transformer.ln_f",
            "attention norm": "ln_attn",
            "post-attention norm": "ln_mlp",
            "qkv_proj": "self_attention.query_key_value",
            "o_proj": "self_attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
    ),
}
