"""ERNIE-4.5 mixtures of experts."""

from __future__ import annotations

from .base import LINEARS, Code, Family, Routed, defaults

FAMILIES = {
    "ernie4_5_moe": Family(
        defaults(
            *(2560, 28, 20, 4, 103424, 12288),
            tie_word_embeddings=True,
            moe_intermediate_size=1536,
            num_experts=64,
            num_experts_per_tok=6,
            n_shared_experts=2,
            first_k_dense_replace=1,
        ),
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        head_bias="use_bias",
        experts=Routed(
            fp32=True,
            fields=(
                "moe_k",
                "moe_num_experts",
                "moe_num_shared_experts",
                "moe_layer_start_index",
                "moe_layer_end_index",
                "moe_layer_interval",
                "moe_norm_min",
            ),
            linears=LINEARS,
        ),
        code=Code(
            rotary_in_fp32=True,
            interleaved_tables=True,
            widened_rotary=True,
            fp32_router=True,
            corrected=True,
            shared_first=True,
        ),
        names={"correction": "mlp.gate.moe_statics.e_score_correction_bias"},
    ),
}
