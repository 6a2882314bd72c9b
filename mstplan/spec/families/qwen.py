"""Qwen2, Qwen3 and the text parts of Qwen2-VL, Qwen2.5-Omni, Qwen3-VL and Qwen3-Omni."""

from __future__ import annotations

from .base import LINEARS, Code, Family, Routed, defaults, names_of_linears

QWEN2 = Family(
    defaults(4096, 32, 32, 32, 151936, 22016, sliding_window=4096, max_window_layers=28),
    windows="late",
    window_switch=True,
    qkv_bias=True,
    out_bias=False,
)
QWEN2_VL = QWEN2._replace(
    defaults=defaults(8192, 80, 64, 8, 152064, 29568, sliding_window=4096, max_window_layers=80),
    code=Code(turns_by_row=True),
)
QWEN3 = QWEN2._replace(
    defaults={**QWEN2.defaults, "head_dim": 128},
    qkv_bias="attention_bias",
    out_bias="attention_bias",
    qk_norm="head",
)
QWEN3_MOE = QWEN3._replace(
    defaults=defaults(
        *(2048, 24, 32, 4, 151936, 6144),
        sliding_window=4096,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    windows="every",
    experts=Routed(may_be_none=True, normalised="norm_topk_prob", linears=LINEARS, experts_first=True),
)

QWEN2_MOE = QWEN2._replace(
    defaults=defaults(
        *(2048, 24, 16, 16, 151936, 5632),
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        qkv_bias=True,
    ),
    windows="none",
    window_switch=False,
    idle_mask=True,
    uncounted=("use_sliding_window",),
    qkv_bias="qkv_bias",
    experts=Routed(
        may_be_none=True,
        normalised="norm_topk_prob",
        shared_width="shared_expert_intermediate_size",
    ),
    code=Code(shared_first=True, shared_gate=True),
    names={
        **names_of_linears("shared_experts", "mlp.shared_expert"),
        "shared gate": "mlp.shared_expert_gate",
    },
)

_TINY_DELTA = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 64,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
_TINY_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
QWEN3_NEXT = Family(
    defaults(
        *(2048, 48, 16, 2, 151936, 5632),
        head_dim=256,
        partial_rotary_factor=0.25,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        num_experts=512,
        num_experts_per_tok=10,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
    ),
    norm="gemma",
    qk_norm="head",
    mixer="gated delta",
    gated_attention=True,
    attention_by="full_attention_interval",
    experts=Routed(
        may_be_none=True,
        normalised="norm_topk_prob",
        shared_width="shared_expert_intermediate_size",
        linears=LINEARS,
    ),
    code=Code(joins_rotary=True, shared_first=True, shared_gate=True),
    names=QWEN2_MOE.names,
    tiny={**_TINY_DELTA, **_TINY_EXPERTS},
)

QWEN3_5 = QWEN3_NEXT._replace(
    defaults=defaults(
        *(4096, 32, 16, 4, 248320, 12288),
        head_dim=256,
        partial_rotary_factor=0.25,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
    ),
    experts=None,
    code=Code(turns_by_row=True, joins_rotary=True, apart_products=True),
    names={},
    tiny=_TINY_DELTA,
)
QWEN3_5_MOE = QWEN3_5._replace(
    defaults={
        **QWEN3_5.defaults,
        **defaults(
            *(2048, 40, 16, 2, 248320, None),
            num_experts=256,
            num_experts_per_tok=8,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
        ),
    },
    experts=Routed(shared_width="shared_expert_intermediate_size"),
    code=Code(turns_by_row=True, joins_rotary=True, apart_products=True, shared_first=True, shared_gate=True),
    names=QWEN2_MOE.names,
    tiny=QWEN3_NEXT.tiny,
)

FAMILIES = {
    "qwen2": QWEN2,
    "qwen2_vl_text": QWEN2_VL,
    "qwen2_5_vl_text": QWEN2_VL,
    "qwen2_5_omni_text": QWEN2_VL._replace(
        defaults=defaults(
            *(3584, 28, 28, 4, 152064, 18944), sliding_window=32768, max_window_layers=28, tie_word_embeddings=True
        )
    ),
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "mellum": QWEN3_MOE._replace(
        defaults=defaults(
            *(2304, 28, 32, 4, 98304, 7168),
            head_dim=128,
            sliding_window=1024,
            num_experts=64,
            num_experts_per_tok=8,
            moe_intermediate_size=896,
            norm_topk_prob=True,
        ),
        windows="listed",
        period=1,
        window_switch=False,
        experts=Routed(normalised="norm_topk_prob", listed=True, linears=LINEARS, experts_first=True),
        code=Code(local_rotary=True),
    ),
    "qwen3_5_moe_text": QWEN3_5_MOE,
    "qwen3_5_text": QWEN3_5,
    "qwen3_next": QWEN3_NEXT,
    "qwen3_vl_text": QWEN3._replace(
        defaults=defaults(4096, 32, 32, 32, 151936, 22016, head_dim=128),
        windows="none",
        window_switch=False,
        code=Code(turns_by_row=True),
    ),
    "qwen3_vl_moe_text": QWEN3_MOE._replace(
        defaults=defaults(
            *(2048, 24, 16, 16, 151936, 5632),
            num_experts=60,
            num_experts_per_tok=4,
            moe_intermediate_size=1408,
            tie_word_embeddings=True,
        ),
        windows="none",
        window_switch=False,
        experts=Routed(),
        code=Code(turns_by_row=True),
    ),
}
