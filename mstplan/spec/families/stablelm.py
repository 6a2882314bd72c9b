"""StableLM."""

from __future__ import annotations

from .base import Family, defaults

FAMILIES = {
    "stablelm": Family(
        defaults(2560, 32, 32, 32, 50304, 6912, partial_rotary_factor=0.25),
        norm="layer",
        norm_bias=True,
        qkv_bias="use_qkv_bias",
        out_bias=False,
        dropout="hidden_dropout",
        uncounted=("qk_layernorm", "use_parallel_residual"),
    ),
}
