"""Seed-OSS."""

from __future__ import annotations

from .base import Family, defaults

FAMILIES = {
    "seed_oss": Family(
        defaults(
            *(4096, 64, 80, 8, 155136, 27648),
            head_dim=128,
            max_position_embeddings=524288,
            attention_bias=True,
            attention_dropout=0.1,
            residual_dropout=0.1,
        ),
        out_bias="attention_out_bias",
        mlp_bias="mlp_bias",
        dropout="residual_dropout",
        embedding_dropout="",
    ),
}
