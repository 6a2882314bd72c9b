"""dots.llm1."""

from __future__ import annotations

from .base import LINEARS, Family, Routed, defaults

FAMILIES = {
    "dots1": Family(
        defaults(
            4608, 62, 32, 32, 152064, 10944, moe_intermediate_size=1408, sliding_window=4096, max_window_layers=62
        ),
        qk_norm="head",
        windows="late",
        experts=Routed(
            router="sigmoid-groups", fp32=True, normalised="norm_topk_prob", linears=LINEARS, experts_first=True
        ),
        tiny={"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 384},
    ),
}
