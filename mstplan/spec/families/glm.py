"""GLM-4 and GLM-4.5."""

from __future__ import annotations

from .base import LINEARS, Code, Family, Routed, defaults
from .deepseek import DEEPSEEK_V3

GLM = Family(
    defaults(4096, 40, 32, 2, 151552, 13696, head_dim=128, attention_bias=True, partial_rotary_factor=0.5),
    out_bias=False,
    fused_mlp=True,
    code=Code(interleaved_tables=True, joins_rotary=True),
)
EXPERTS = Routed(router="sigmoid-groups", fp32=True, normalised="norm_topk_prob", linears=LINEARS, experts_first=True)
GLM4_MOE = Family(
    defaults(
        *(4096, 46, 96, 8, 151552, 10944),
        partial_rotary_factor=0.5,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=1408,
        n_shared_experts=1,
        first_k_dense_replace=1,
        norm_topk_prob=True,
    ),
    out_bias=False,
    qk_norm="head",
    qk_norm_switch="use_qk_norm",
    experts=EXPERTS,
    code=Code(joins_rotary=True, qk_norm_last=True),
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
    "glm4_moe": GLM4_MOE,
    "glm4_moe_lite": DEEPSEEK_V3._replace(
        defaults=defaults(
            *(2048, 47, 20, 20, 154880, 10240),
            num_experts=64,
            num_experts_per_tok=4,
            moe_intermediate_size=1536,
            n_shared_experts=1,
            norm_topk_prob=True,
            kv_lora_rank=512,
            q_lora_rank=768,
            qk_nope_head_dim=192,
            qk_rope_head_dim=64,
            v_head_dim=256,
        ),
        experts=EXPERTS._replace(listed=True, dense_first=1),
        only={"first_k_dense_replace": 1, "head_dim": "qk_rope_head_dim"},
    ),
    "solar_open": GLM4_MOE._replace(
        defaults=defaults(
            *(4096, 48, 64, 8, 196608, None),
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=1280,
            n_shared_experts=1,
            norm_topk_prob=True,
        ),
        qk_norm="none",
        qk_norm_switch=None,
        code=Code(),
    ),
}
