"""StableLM."""

from __future__ import annotations

from .base import Code, Family, defaults

FAMILIES = {
    "stablelm": Family(
        defaults(2560, 32, 32, 32, 50304, 6912, partial_rotary_factor=0.25, use_parallel_residual=False),
        norm="layer",
        norm_bias=True,
        qkv_bias="use_qkv_bias",
        out_bias=False,
        dropout="hidden_dropout",
        embedding_dropout="",
        block="one-norm",
        parallel_switch="use_parallel_residual",
        uncounted=("qk_layernorm",),
        code=Code(holds_parts=True, holds_normed=True, drops_mlp_only=True),
    ),
}
