"""The text part of Llama 4."""

from __future__ import annotations

from .base import Code, Family, Routed, defaults, names_of_linears

FAMILIES = {
    "llama4_text": Family(
        defaults(
            *(5120, 48, 40, 8, 202048, 8192),
            head_dim=128,
            intermediate_size_mlp=16384,
            num_experts=16,
            num_experts_per_tok=1,
            attention_chunk_size=8192,
            max_position_embeddings=131072,
            use_qk_norm=True,
            attn_temperature_tuning=True,
        ),
        qk_norm="unweighted",
        qk_norm_switch="use_qk_norm",
        mlp_width="intermediate_size_mlp",
        windows="chunked",
        unturned="listed",
        tempered="attn_temperature_tuning",
        experts=Routed(
            "intermediate_size",
            "sigmoid-all",
            shared_width="intermediate_size",
            fields=("moe_layers", "interleave_moe_layer_step"),
            linear_router=True,
            experts_first=True,
        ),
        code=Code(rotary="complex", frees_normed=True, holds_attended=True, softmax_as_scores=True),
        names={
            "router": "feed_forward.router",
            "experts.gate_up_proj": "feed_forward.experts.gate_up_proj",
            "experts.down_proj": "feed_forward.experts.down_proj",
            **names_of_linears("shared_experts", "feed_forward.shared_expert"),
            **names_of_linears("mlp", "feed_forward"),
        },
    ),
}
