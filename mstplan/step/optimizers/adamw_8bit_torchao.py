"""torchao's AdamW8bit."""

from __future__ import annotations

from .torchao import Torchao


class TorchaoAdamW8bit(Torchao):
    name = "adamw-8bit-torchao"
    label = "torchao's AdamW8bit"
    short = "torchao's 8-bit AdamW"
    host_state_bytes = 8
    no_shards = "its blocks are planned for whole weights"
    trainer = "adamw_torch_8bit"
    theirs = "AdamW8bit"
    bits = 8
    block = 256
