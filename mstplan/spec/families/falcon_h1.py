"""Falcon-H1: attention and Mamba-2 side by side in every layer, with numbers that their inputs and outputs are multiplied by."""

from __future__ import annotations

from .base import Code, Family, defaults, names_of_linears

FAMILIES = {
    "falcon_h1": Family(
        defaults(
            *(4096, 32, 32, 8, 128000, 14336),
            mamba_d_ssm=1024,
            mamba_n_heads=128,
            mamba_n_groups=1,
            mamba_d_state=256,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_chunk_size=256,
            mamba_conv_bias=True,
            mamba_proj_bias=False,
            mamba_norm_before_gate=True,
            mamba_rms_norm=False,
            projectors_bias=False,
        ),
        mlp_bias="mlp_bias",
        mixer="attention and mamba2",
        attention_by="none has",
        mixer_fields={"out_bias": "projectors_bias"},
        inner_width="mamba_d_ssm",
        scaled_embedding=True,
        code=Code(scales_logits=True, scales_mixers=True, mixes_samples=True, bars_out_proj=True),
        names={
            **names_of_linears("mlp", "feed_forward"),
            "post-attention norm": "pre_ff_layernorm",
            "final norm": "model.final_layernorm",
        },
        tiny={"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_state": 32},
    ),
}
