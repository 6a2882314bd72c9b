"""Llama, and what runs its code."""

from __future__ import annotations

from .base import Code, Family, Routed, defaults

LLAMA = Family(defaults(4096, 32, 32, None, 32000, 11008), mlp_bias="mlp_bias")

FAMILIES = {
    "llama": LLAMA,
    "arcee": LLAMA._replace(defaults=defaults(2560, 32, 32, None, 32000, 18432, hidden_act="relu2"), gated=False),
    "granite": LLAMA._replace(scaled_embedding=True, code=Code(scales_branches=True, scales_logits=True)),
    "granitemoe": LLAMA._replace(
        defaults=defaults(4096, 32, 32, None, 32000, 11008, num_experts=8, num_experts_per_tok=2),
        scaled_embedding=True,
        experts=Routed("intermediate_size", "topk-softmax"),
        code=Code(scales_logits=True, fp32_router_logits=True),
        names={
            "router": "block_sparse_moe.router",
            "experts.gate_up_proj": "block_sparse_moe.experts.gate_up_proj",
            "experts.down_proj": "block_sparse_moe.experts.down_proj",
        },
    ),
    "hunyuan_v1_dense": LLAMA._replace(
        defaults=defaults(4096, 32, 32, None, 290943, 11008),
        mlp_bias=False,
        qk_norm="head",
        code=Code(late_qk_norm=True),
        names={"q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"},
        tiny={"head_dim": 32},
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
