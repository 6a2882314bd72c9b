"""EXAONE 4."""

from __future__ import annotations

from .base import Code, Family, defaults

FAMILIES = {
    "exaone4": Family(
        defaults(4096, 32, 32, 32, 102400, 16384, sliding_window=4096),
        block="post",
        qkv_bias=False,
        out_bias=False,
        qk_norm="head",
        windows="listed",
        period=4,
        unturned="full beside windows",
        code=Code(qk_norm_last=True),
    ),
}
