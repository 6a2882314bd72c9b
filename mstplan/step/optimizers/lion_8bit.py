"""bitsandbytes' Lion8bit."""

from __future__ import annotations

from .bitsandbytes import Bitsandbytes


class Lion8bit(Bitsandbytes):
    name = "lion-8bit"
    label = "bitsandbytes' Lion8bit"
    short = "8-bit Lion"
    host_state_bytes = 4
    keeps_fp32_for_embeddings = True
    trainer = "lion_8bit"
    theirs = "Lion8bit"
    moments = 1
