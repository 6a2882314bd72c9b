"""Bamba: Mamba-2 with attention in a few layers."""

from __future__ import annotations

from .base import Code, Family, defaults, names_of_linears

FAMILIES = {
    "bamba": Family(
        defaults(
            *(4096, 32, 32, 8, 128000, 14336),
            partial_rotary_factor=0.5,
            mamba_n_heads=128,
            mamba_n_groups=1,
            mamba_d_state=256,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_chunk_size=256,
            mamba_conv_bias=True,
            mamba_proj_bias=False,
            z_loss_coefficient=0.0,
        ),
        mlp_bias="mlp_bias",
        mixer="mamba2",
        attention_by="attn_layer_indices",
        only={"z_loss_coefficient": 0.0},
        code=Code(joins_rotary=True, mixes_samples=True),
        names={
            **names_of_linears("mlp", "feed_forward"),
            "post-attention norm": "pre_ff_layernorm",
            "final norm": "model.final_layernorm",
        },
        tiny={"num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 32},
    ),
}
