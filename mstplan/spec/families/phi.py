"""Phi-3 and Phi-4."""

from __future__ import annotations

from .base import Code, Family, defaults

FAMILIES = {
    "phi": Family(
        defaults(2048, 24, 32, None, 51200, 8192, hidden_act="gelu_new", partial_rotary_factor=0.5),
        norm="layer",
        norm_bias=True,
        block="one-norm",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        gated=False,
        dropout="resid_pdrop",
        embedding_dropout="embd_pdrop",
        uncounted=("qk_layernorm",),
        code=Code(holds_parts=True, adds_branches_first=True),
        names={
            "final norm": "model.final_layernorm",
            "o_proj": "self_attn.dense",
            "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2",
        },
    ),
    "phi3": Family(
        defaults(3072, 32, 32, None, 32064, 8192),
        windows="every",
        qkv_bias=False,
        out_bias=False,
        fused_qkv=True,
        fused_mlp=True,
        dropout="resid_pdrop",
        embedding_dropout="",
        code=Code(slices_qkv=True, joins_rotary=True),
    ),
}
