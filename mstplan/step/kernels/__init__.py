"""Attention kernels, a file each: which attention they serve, what they keep, their workspace.

Recipes, the command line's help, refusals and the layers that are laid out read `KERNELS`, in the order in which
scaled_dot_product_attention asks them (aten transformers/cuda/sdp_utils.cpp; cuDNN's, first on Hopper from torch 2.11, is left out).
"""

from __future__ import annotations

from .base import AttentionCall, Kernel
from .eager import Eager
from .efficient import Efficient
from .flash import Flash

SDPA = "sdpa"
"""What recipes call scaled_dot_product_attention, which chooses its kernel itself."""
NO_SDPA = "flash"
"""What runs where transformers has no sdpa for a model and the kernel can serve."""
KERNELS: dict[str, Kernel] = {each.name: each for each in (Flash(), Efficient(), Eager())}
"""By the name that recipes have for them."""


def attentions() -> list[str]:
    """The names that a recipe's attention can have."""
    return [SDPA, *(name for name, each in KERNELS.items() if each.by_name)]


def chosen(attention: str, asked: AttentionCall) -> Kernel:
    """The kernel that a recipe's attention comes to."""
    if attention != SDPA:
        return KERNELS[attention]
    return next(each for each in KERNELS.values() if each.by_sdpa and each.serves(asked))
