"""Phi-3 and Phi-4."""

from __future__ import annotations

from .base import Code, Family, defaults

FAMILIES = {
    "phi3": Family(
        defaults(3072, 32, 32, None, 32064, 8192),
        windows="every",
        qkv_bias=False,
        out_bias=False,
        fused_qkv=True,
        fused_mlp=True,
        dropout="resid_pdrop",
        code=Code(slices_qkv=True, joins_rotary=True),
    ),
}
