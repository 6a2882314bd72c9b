"""bitsandbytes' AdamW8bit."""

from __future__ import annotations

from .bitsandbytes import Bitsandbytes


class AdamW8bit(Bitsandbytes):
    name = "adamw-8bit"
    label = "bitsandbytes' AdamW8bit"
    short = "8-bit AdamW"
    gives_up = "exact moments"
    host_state_bytes = 8
    keeps_fp32_for_embeddings = True
    trainer = "adamw_bnb_8bit"
    theirs = "AdamW8bit"
    moments = 2
