"""Apertus."""

from __future__ import annotations

from .base import Code, Family, defaults

FAMILIES = {
    "apertus": Family(
        defaults(4096, 32, 32, None, 131072, 14336, hidden_act="xielu", max_position_embeddings=65536),
        gated=False,
        qk_norm="head",
        code=Code(qk_norm_last=True),
        names={"input norm": "attention_layernorm", "post-attention norm": "feedforward_layernorm"},
    ),
}
