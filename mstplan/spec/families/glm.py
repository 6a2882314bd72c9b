"""GLM-4."""

from __future__ import annotations

from .base import Code, Family, defaults

GLM = Family(
    defaults(4096, 40, 32, 2, 151552, 13696, head_dim=128, attention_bias=True, partial_rotary_factor=0.5),
    out_bias=False,
    fused_mlp=True,
    code=Code(interleaved_tables=True, joins_rotary=True),
)

FAMILIES = {
    "glm": GLM,
    "glm4": GLM._replace(
        block="sandwich",
        names={
            "post-attention norm": "post_self_attn_layernorm",
            "pre-MLP norm": "post_attention_layernorm",
            "post-MLP norm": "post_mlp_layernorm",
        },
    ),
}
