"""gpt-oss."""

from __future__ import annotations

from .base import Code, Family, Routed, defaults

FAMILIES = {
    "gpt_oss": Family(
        defaults(
            *(2880, 36, 64, 8, 201088, 2880),
            head_dim=64,
            attention_bias=True,
            sliding_window=128,
            num_experts=128,
            num_experts_per_tok=4,
        ),
        norm="rms-fp32-weight",
        windows="listed",
        period=2,
        experts=Routed("intermediate_size", "topk-softmax", bias=True, clamped=True),
        sinks=True,
        has_sdpa=False,
        code=Code(rotary="halves", half_tables=True),
        names={"router": "mlp.router"},
    ),
}
