"""Command R and Aya (Cohere), Command R7B and A (Cohere 2)."""

from __future__ import annotations

from .base import Code, Family, defaults

COHERE = Family(
    defaults(8192, 40, 64, None, 256000, 22528, tie_word_embeddings=True, max_position_embeddings=8192),
    norm="centred",
    block="one-norm",
    uncounted=("use_qk_norm",),
    code=Code(widens_before_rotary=True, scales_logits=True),
)

FAMILIES = {
    "cohere": COHERE,
    "cohere2": COHERE._replace(
        defaults={**COHERE.defaults, "sliding_window": 4096},
        own_heads=True,
        windows="listed",
        period=4,
        unturned="full",
        uncounted=(),
    ),
}
