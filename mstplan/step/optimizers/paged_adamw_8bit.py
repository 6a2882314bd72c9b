"""bitsandbytes' PagedAdamW8bit: states of large weights in CUDA's managed memory."""

from __future__ import annotations

from .bitsandbytes import Bitsandbytes


class PagedAdamW8bit(Bitsandbytes):
    name = "paged-adamw-8bit"
    label = "bitsandbytes' PagedAdamW8bit"
    short = "paged 8-bit AdamW"
    host_state_bytes = 8
    keeps_fp32_for_embeddings = True
    trainer = "paged_adamw_8bit"
    theirs = "PagedAdamW8bit"
    moments = 2
    paged = True
