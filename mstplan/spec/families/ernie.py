"""ERNIE 4.5, and Helium, whose rotary embedding is of the same kind."""

from __future__ import annotations

from .base import Code, Family, defaults

FAMILIES = {
    "ernie4_5": Family(
        defaults(1024, 18, 16, 2, 103424, 3072, head_dim=128, tie_word_embeddings=True),
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        attention_dropout="",
        code=Code(rotary_in_fp32=True, interleaved_tables=True),
    ),
    "helium": Family(
        defaults(2560, 24, 20, 20, 48000, 7040, head_dim=128),
        norm="rms-fp32-weight",
        out_bias=False,
        square_output=True,
        mlp_bias="mlp_bias",
        code=Code(interleaved_tables=True),
        tiny={"head_dim": 32},
    ),
}
