"""EXAONE 4, and K-EXAONE with experts."""

from __future__ import annotations

from .base import LINEARS, Code, Family, Routed, defaults

EXAONE4 = Family(
    defaults(4096, 32, 32, 32, 102400, 16384, sliding_window=4096),
    block="post",
    qkv_bias=False,
    out_bias=False,
    qk_norm="head",
    windows="listed",
    period=4,
    unturned="full beside windows",
    code=Code(qk_norm_last=True),
)

FAMILIES = {
    "exaone4": EXAONE4,
    "exaone_moe": EXAONE4._replace(
        defaults={
            **EXAONE4.defaults,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
        },
        block="pre",
        experts=Routed(
            router="sigmoid-groups",
            fp32=True,
            normalised="norm_topk_prob",
            listed=True,
            fields=("num_shared_experts",),
            linears=LINEARS,
            experts_first=True,
        ),
    ),
}
