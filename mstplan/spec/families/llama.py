"""Llama, and what runs its code."""

from __future__ import annotations

from .base import LINEARS, Code, Family, Routed, defaults, names_of_linears

LLAMA = Family(defaults(4096, 32, 32, None, 32000, 11008), mlp_bias="mlp_bias")
HUNYUAN = LLAMA._replace(
    defaults=defaults(4096, 32, 32, None, 290943, 11008),
    mlp_bias=False,
    qk_norm="head",
    code=Code(late_qk_norm=True),
    names={"q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"},
    tiny={"head_dim": 32},
)
GRANITE = LLAMA._replace(scaled_embedding=True, code=Code(scales_branches=True, scales_logits=True))
GRANITE_MOE = LLAMA._replace(
    defaults=defaults(4096, 32, 32, None, 32000, 11008, num_experts=8, num_experts_per_tok=2),
    scaled_embedding=True,
    experts=Routed("intermediate_size", "topk-softmax"),
    code=Code(scales_logits=True, fp32_router_logits=True),
    names={
        "router": "block_sparse_moe.router",
        "experts.gate_up_proj": "block_sparse_moe.experts.gate_up_proj",
        "experts.down_proj": "block_sparse_moe.experts.down_proj",
    },
)

FAMILIES = {
    "llama": LLAMA,
    "arcee": LLAMA._replace(defaults=defaults(2560, 32, 32, None, 32000, 18432, hidden_act="relu2"), gated=False),
    "cwm": LLAMA._replace(
        defaults=defaults(6144, 64, 48, 8, 128256, 21504, head_dim=128, sliding_window=8192),
        qkv_bias=False,
        out_bias=False,
        windows="listed",
        period=4,
        full_first=True,
    ),
    "granite": GRANITE,
    "hyperclovax": GRANITE._replace(
        block="sandwich",
        only={"use_post_norm": True},
        names={
            "post-attention norm": "post_norm1",
            "pre-MLP norm": "post_attention_layernorm",
            "post-MLP norm": "post_norm2",
        },
    ),
    "jais2": LLAMA._replace(
        defaults=defaults(*(3328, 32, 26, None, 150272, 26624), hidden_act="relu2", attention_bias=True, mlp_bias=True),
        norm="layer",
        norm_bias=True,
        gated=False,
    ),
    "granitemoe": GRANITE_MOE,
    "granitemoeshared": GRANITE_MOE._replace(
        defaults={**GRANITE_MOE.defaults, "shared_intermediate_size": 0},
        experts=Routed("intermediate_size", "topk-softmax", shared_width="shared_intermediate_size"),
        code=Code(
            scales_branches=True, scales_logits=True, fp32_router_logits=True, fused_shared=True, shared_apart=True
        ),
        names={
            **GRANITE_MOE.names,
            "shared_experts.gate_up_proj": "shared_mlp.input_linear",
            "shared_experts.down_proj": "shared_mlp.output_linear",
        },
        tiny={"shared_intermediate_size": 128},
    ),
    "granitemoehybrid": LLAMA._replace(
        defaults=defaults(
            *(4096, 32, 32, None, 32000, 11008),
            num_experts=8,
            num_experts_per_tok=2,
            shared_intermediate_size=1024,
            mamba_n_heads=128,
            mamba_n_groups=1,
            mamba_d_state=256,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_chunk_size=256,
            mamba_conv_bias=True,
            mamba_proj_bias=False,
        ),
        mlp_bias=False,
        mlp_width="shared_intermediate_size",
        fused_mlp=True,
        scaled_embedding=True,
        mixer="mamba2",
        attention_by="none has",
        rotary_switch="position_embedding_type",
        experts=Routed(
            "intermediate_size",
            "topk-softmax",
            may_be_none=True,
            shared_width="shared_intermediate_size",
        ),
        code=Code(
            scales_branches=True,
            scales_logits=True,
            fp32_router_logits=True,
            fused_shared=True,
            withholds_ids=True,
            mixes_samples=True,
            shared_apart=True,
        ),
        names={
            "mlp.gate_up_proj": "shared_mlp.input_linear",
            "mlp.down_proj": "shared_mlp.output_linear",
            "shared_experts.gate_up_proj": "shared_mlp.input_linear",
            "shared_experts.down_proj": "shared_mlp.output_linear",
            "router": "block_sparse_moe.router",
            "experts.gate_up_proj": "block_sparse_moe.experts.gate_up_proj",
            "experts.down_proj": "block_sparse_moe.experts.down_proj",
        },
        tiny={
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_local_experts": 4,
            "shared_intermediate_size": 128,
            "mamba_n_heads": 8,
            "mamba_d_state": 32,
        },
    ),
    "hunyuan_v1_dense": HUNYUAN,
    "hunyuan_v1_moe": HUNYUAN._replace(
        defaults={**HUNYUAN.defaults, "num_experts": 1, "num_experts_per_tok": 1},
        experts=Routed("intermediate_size", fp32=True, shared_width="intermediate_size", linears=LINEARS),
        code=Code(late_qk_norm=True, fp32_router=True, shared_first=True),
        names={
            **HUNYUAN.names,
            "router": "mlp.gate.wg",
            **names_of_linears("shared_experts", "mlp.shared_mlp"),
        },
        tiny={**HUNYUAN.tiny, "num_experts": 8, "moe_topk": 2},
    ),
    "internlm3": LLAMA._replace(
        defaults=defaults(4096, 48, 32, 2, 128512, 10240, head_dim=128), uncounted=("qkv_bias", "bias")
    ),
    "iquestcoder": LLAMA._replace(defaults=defaults(5120, 80, 40, 8, 76800, 27648, head_dim=128)),
    "smollm3": LLAMA._replace(
        defaults=defaults(2048, 36, 16, 4, 128256, 11008, tie_word_embeddings=True),
        windows="listed",
        window_switch=True,
        unturned="listed",
    ),
}
