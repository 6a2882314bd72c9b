"""MiniMax-M2."""

from __future__ import annotations

from .base import Code, Family, Routed, defaults

FAMILIES = {
    "minimax_m2": Family(
        defaults(3072, 62, 48, 8, 200064, 1536, head_dim=128, num_experts=256, num_experts_per_tok=8),
        qkv_bias=False,
        out_bias=False,
        qk_norm="full",
        rotary_width="rotary_dim",
        experts=Routed("intermediate_size", "sigmoid", linears=("w1", "w3", "w2")),
        code=Code(joins_rotary=True, fp32_expert_scores=True),
    ),
}
