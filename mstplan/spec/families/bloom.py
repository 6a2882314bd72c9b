"""BLOOM: transformers has eager attention alone for it, whose scores begin as biases of positions (alibi)."""

from __future__ import annotations

from .base import LAYER, Code, Family, defaults

FAMILIES = {
    "bloom": Family(
        defaults(*(64, 2, 8, None, 250880, None), n_inner=None, tie_word_embeddings=True),
        norm="layer",
        norm_bias=True,
        embedding_norm=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        fused_qkv=True,
        gated=False,
        own_heads=False,
        mlp_width="n_inner",
        dropout="hidden_dropout",
        embedding_dropout="",
        positions="alibi",
        uncounted=("apply_residual_connection_post_layernorm", "slow_but_exact"),
        only={"n_inner": None},
        fixed_activation="bloom_gelu",
        has_sdpa=False,
        eager_only=True,
        code=Code(slices_qkv=True, attends_itself=True, returns_weights=True, adds_within=True),
        names={
            LAYER: "transformer.h.{}.",
            "embed_tokens": "transformer.word_embeddings",
            "embedding norm": "transformer.word_embeddings_layernorm",
            "final norm": "transformer.ln_f",
            "qkv_proj": "self_attention.query_key_value",
            "o_proj": "self_attention.dense",
            "mlp.up_proj": "mlp.dense_h_to_4h",
            "mlp.down_proj": "mlp.dense_4h_to_h",
        },
    ),
}
