"""LFM2: short convolutions beside attention."""

from __future__ import annotations

from .base import Code, Family, Routed, defaults

LFM2 = Family(
    defaults(
        *(2560, 32, 32, 8, 65536, 12288),
        tie_word_embeddings=True,
        conv_bias=False,
        conv_L_cache=3,
        block_multiple_of=256,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=True,
    ),
    qkv_bias=False,
    out_bias=False,
    qk_norm="head",
    adjusted_width=True,
    mixer="short conv",
    attention_by="full_attn_idxs",
    names={
        "input norm": "operator_norm",
        "post-attention norm": "ffn_norm",
        "final norm": "model.embedding_norm",
        "o_proj": "self_attn.out_proj",
        "q_norm": "self_attn.q_layernorm",
        "k_norm": "self_attn.k_layernorm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    },
    tiny={"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
)

LFM2_MOE = LFM2._replace(
    defaults=defaults(
        *(2048, 32, 32, 8, 65536, 7168),
        tie_word_embeddings=True,
        conv_bias=False,
        conv_L_cache=3,
        moe_intermediate_size=1792,
        num_experts=32,
        num_experts_per_tok=4,
        num_dense_layers=2,
        first_k_dense_replace=2,
        norm_topk_prob=True,
        use_expert_bias=True,
    ),
    adjusted_width=False,
    attention_by="layer_types",
    experts=Routed(
        router="sigmoid",
        normalised="norm_topk_prob",
        fields=("num_dense_layers", "use_expert_bias"),
        experts_first=True,
    ),
    code=Code(plain_router=True),
    names={
        **LFM2.names,
        "router": "feed_forward.gate",
        "experts.gate_up_proj": "feed_forward.experts.gate_up_proj",
        "experts.down_proj": "feed_forward.experts.down_proj",
    },
    tiny={
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
    },
)

FAMILIES = {"lfm2": LFM2, "lfm2_moe": LFM2_MOE}
