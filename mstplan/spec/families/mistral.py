"""Mistral, Ministral and Mixtral."""

from __future__ import annotations

from .base import Code, Family, Routed, defaults

MISTRAL = Family(
    defaults(4096, 32, 32, 8, 32000, 14336, sliding_window=4096), windows="every", qkv_bias=False, out_bias=False
)

FAMILIES = {
    "mistral": MISTRAL,
    "ministral": MISTRAL._replace(windows="listed", tiny={"head_dim": 32}),
    "ministral3": MISTRAL._replace(
        defaults=defaults(4096, 34, 32, 8, 131072, 14336, head_dim=128, max_position_embeddings=262144)
    ),
    "mixtral": MISTRAL._replace(
        defaults=defaults(4096, 32, 32, 8, 32000, 14336, num_experts=8, num_experts_per_tok=2),
        experts=Routed("intermediate_size", linears=("w1", "w3", "w2")),
        code=Code(fp32_expert_scores=True),
    ),
}
