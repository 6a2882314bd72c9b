"""Qwen2, Qwen3 and the text parts of Qwen2-VL."""

from __future__ import annotations

from .base import Family, Routed, defaults

QWEN2 = Family(
    defaults(4096, 32, 32, 32, 151936, 22016, sliding_window=4096, max_window_layers=28),
    windows="late",
    window_switch=True,
    qkv_bias=True,
    out_bias=False,
)
QWEN2_VL = QWEN2._replace(defaults=defaults(8192, 80, 64, 8, 152064, 29568, sliding_window=4096, max_window_layers=80))
QWEN3 = QWEN2._replace(
    defaults={**QWEN2.defaults, "head_dim": 128},
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    qk_norm="head",
)

FAMILIES = {
    "qwen2": QWEN2,
    "qwen2_vl_text": QWEN2_VL,
    "qwen2_5_vl_text": QWEN2_VL,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3._replace(
        defaults=defaults(
            *(2048, 24, 32, 4, 151936, 6144),
            sliding_window=4096,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        windows="every",
        experts=Routed(may_be_none=True),
    ),
}
