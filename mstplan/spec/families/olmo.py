"""OLMo 2 and 3, and OLMoE."""

from __future__ import annotations

from .base import LINEARS, Code, Family, Routed, defaults

OLMO2 = Family(
    defaults(4096, 32, 32, None, 50304, 11008),
    norm="rms-fp32-weight",
    block="post",
    qk_norm="full",
    code=Code(rotary_in_fp32=True),
)
OLMOE = Family(
    defaults(2048, 16, 16, None, 50304, 2048, num_experts=64, num_experts_per_tok=8),
    qk_norm="full",
    experts=Routed("intermediate_size", normalised="norm_topk_prob", linears=LINEARS),
)

FAMILIES = {
    "olmo2": OLMO2,
    "olmo3": OLMO2._replace(
        defaults={**OLMO2.defaults, "sliding_window": 4096},
        windows="listed",
        period=4,
        code=Code(rotary_in_fp32=True, local_rotary=True),
    ),
    "olmoe": OLMOE,
    "flex_olmo": OLMO2._replace(
        defaults=defaults(4096, 32, 32, None, 100352, 11008, num_experts=7, num_experts_per_tok=5),
        experts=OLMOE.experts,
    ),
}
