"""bitsandbytes' PagedAdamW32bit: fp32 states, those of large weights in CUDA's managed memory."""

from __future__ import annotations

from .bitsandbytes import Bitsandbytes


class PagedAdamW(Bitsandbytes):
    name = "paged-adamw"
    label = "bitsandbytes' PagedAdamW32bit"
    short = "paged AdamW"
    host_state_bytes = 8
    trainer = "paged_adamw_32bit"
    theirs = "PagedAdamW32bit"
    moments = 2
    bits = 32
    paged = True
