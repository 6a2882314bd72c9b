"""bitsandbytes' Lion, whose one state is fp32."""

from __future__ import annotations

from .bitsandbytes import Bitsandbytes


class Lion(Bitsandbytes):
    name = "lion"
    label = "bitsandbytes' Lion"
    short = "Lion"
    host_state_bytes = 4
    trainer = "lion_32bit"
    theirs = "Lion"
    moments = 1
    bits = 32
