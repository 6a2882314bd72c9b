"""DeepSeek-V2, V3 and V3.2, and Youtu, with multi-head latent attention."""

from __future__ import annotations

from .base import LATENT, LINEARS, Code, Family, Routed, defaults
from .llama import LLAMA

DEEPSEEK_V3 = Family(
    defaults(
        *(7168, 61, 128, 128, 129280, 18432),
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        n_shared_experts=1,
        first_k_dense_replace=3,
        norm_topk_prob=True,
        **LATENT,
    ),
    latent=True,
    experts=Routed(
        router="sigmoid-groups", fp32=True, normalised="norm_topk_prob", linears=LINEARS, experts_first=True
    ),
    code=Code(rotary="halves"),
)

FAMILIES = {
    "deepseek_v2": Family(
        defaults(
            *(4096, 32, 32, None, 102400, 11008),
            num_experts=64,
            moe_intermediate_size=1407,
            n_shared_experts=2,
            **LATENT,
        ),
        latent=True,
        experts=Routed(method="topk_method", fp32=True, normalised=False, linears=LINEARS, experts_first=True),
        uncounted=("mlp_bias",),
        code=Code(rotary="complex"),
        tiny={"num_experts_per_tok": 2, "moe_intermediate_size": 384},
    ),
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": DEEPSEEK_V3._replace(
        defaults={**DEEPSEEK_V3.defaults, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048},
        indexed=True,
        always_masked=True,
        only={"index_topk": 2048},  # step/tape.py, MOST_CHOSEN
        experts=Routed(
            router="sigmoid-groups",
            fp32=True,
            normalised="norm_topk_prob",
            listed=True,
            linears=LINEARS,
            experts_first=True,
        ),
    ),
    "youtu": LLAMA._replace(
        defaults=defaults(2048, 32, 16, 16, 128256, 6144, tie_word_embeddings=True, **LATENT),
        mlp_bias=False,
        latent=True,
    ),
}
