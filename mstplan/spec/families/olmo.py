"""OLMo 2 and 3."""

from __future__ import annotations

from .base import Code, Family, defaults

OLMO2 = Family(
    defaults(4096, 32, 32, None, 50304, 11008),
    norm="rms-fp32-weight",
    block="post",
    qk_norm="full",
    code=Code(rotary_in_fp32=True),
)

FAMILIES = {
    "olmo2": OLMO2,
    "olmo3": OLMO2._replace(defaults={**OLMO2.defaults, "sliding_window": 4096}, windows="listed", period=4),
}
