"""Mamba-2: state spaces without attention or MLP."""

from __future__ import annotations

from .base import Code, Family

FAMILIES = {
    "mamba2": Family(
        {
            "hidden_size": 4096,
            "num_hidden_layers": 64,
            "num_attention_heads": None,
            "num_key_value_heads": None,
            "intermediate_size": None,
            "vocab_size": 32768,
            "num_heads": 128,
            "head_dim": 64,
            "n_groups": 8,
            "state_size": 128,
            "conv_kernel": 4,
            "expand": 2,
            "chunk_size": 256,
            "use_bias": False,
            "use_conv_bias": True,
            "residual_in_fp32": True,
        },
        mlp_width="",
        mixer="mamba2",
        attention_by="none has",
        mixer_fields={
            "n_heads": "num_heads",
            "d_head": "head_dim",
            "n_groups": "n_groups",
            "d_state": "state_size",
            "d_conv": "conv_kernel",
            "expand": "expand",
            "chunk_size": "chunk_size",
            "proj_bias": "use_bias",
            "conv_bias": "use_conv_bias",
            "out_bias": "use_bias",
        },
        residual_in_fp32=True,
        has_sdpa=False,
        code=Code(withholds_ids=True, mixes_samples=True, bars_out_proj=True, widens_logits=True),
        names={
            "layer": "backbone.layers.{}.",
            "embed_tokens": "backbone.embeddings",
            "input norm": "norm",
            "final norm": "backbone.norm_f",
            "mamba": "mixer",
        },
        tiny={"num_heads": 8, "state_size": 32},
    ),
}
