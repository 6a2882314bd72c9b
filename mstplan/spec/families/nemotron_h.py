"""Nemotron-H: each layer is Mamba-2, attention, an MLP or experts alone, and nothing is turned by its position."""

from __future__ import annotations

from .base import Code, Family, Routed, defaults

_DEFAULTS: dict[str, object] = {
    **defaults(4096, 4, 32, 8, 131072, 21504),
    "num_hidden_layers": None,  # as many as it lists
    "head_dim": 128,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "chunk_size": 128,
    "use_bias": False,
    "use_conv_bias": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7688,
    "moe_shared_expert_intermediate_size": 7688,
    "norm_topk_prob": True,
}

FAMILIES = {
    "nemotron_h": Family(
        _DEFAULTS,
        norm="rms-wide-weight",
        qkv_bias=False,
        out_bias=False,
        mlp_bias="mlp_bias",
        gated=False,
        activation="mlp_hidden_act",
        positions="none",
        mixer="mamba2",
        parted=True,
        mixer_fields={
            "n_heads": "mamba_num_heads",
            "d_head": "mamba_head_dim",
            "n_groups": "n_groups",
            "d_state": "ssm_state_size",
            "d_conv": "conv_kernel",
            "chunk_size": "chunk_size",
            "proj_bias": "use_bias",
            "conv_bias": "use_conv_bias",
            "out_bias": "use_bias",
        },
        inner_width="heads",
        uncounted=("tie_word_embeddings",),  # which its class never ties
        experts=Routed(
            router="sigmoid-groups",
            fp32=True,
            normalised="norm_topk_prob",
            shared_width="moe_shared_expert_intermediate_size",
            latent="moe_latent_size",
            fields=("moe_shared_expert_overlap", "moe_latent_size"),
            experts_first=True,
        ),
        code=Code(mixes_samples=True, bars_out_proj=True, widens_logits=True),
        names={
            "embed_tokens": "model.embeddings",
            "input norm": "norm",
            "final norm": "model.norm_f",
            "mamba": "mixer",
            **{name: f"mixer.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
            "mlp.up_proj": "mixer.up_proj",
            "mlp.down_proj": "mixer.down_proj",
            "router": "mixer.gate",
            "experts.gate_up_proj": "mixer.experts.up_proj",
            "experts.down_proj": "mixer.experts.down_proj",
            "shared_experts.up_proj": "mixer.shared_experts.up_proj",
            "shared_experts.down_proj": "mixer.shared_experts.down_proj",
            "to latent": "mixer.fc1_latent_proj",
            "from latent": "mixer.fc2_latent_proj",
        },
        tiny={
            "n_routed_experts": 4,
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"],
            "mamba_num_heads": 8,
            "ssm_state_size": 32,
            "head_dim": 32,
            "num_experts": 4,
            "moe_intermediate_size": 128,
            "moe_shared_expert_intermediate_size": 128,
        },
    ),
}
