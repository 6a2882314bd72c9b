"""Nemotron, and Minitron pruned from it."""

from __future__ import annotations

from .base import Code, Family, defaults

FAMILIES = {
    "nemotron": Family(
        defaults(6144, 32, 48, None, 256000, 24576, hidden_act="relu2", partial_rotary_factor=0.5),
        norm="layer-1p",
        norm_bias=True,
        mlp_bias="mlp_bias",
        gated=False,
        code=Code(joins_rotary=True),
    ),
}
