"""Attention kernels, a file each: which attention they serve, what they keep, their workspace.

Recipes, the command line's help, refusals and the layers that are laid out read `KERNELS`, in the order in which
scaled_dot_product_attention asks them (aten transformers/cuda/sdp_utils.cpp, priority_order).
"""

from __future__ import annotations

from ...errors import RecipeError
from .base import AttentionCall, Kernel
from .cudnn import Cudnn
from .eager import Eager
from .efficient import Efficient
from .flash import Flash
from .math import Math

SDPA = "sdpa"
"""What recipes call scaled_dot_product_attention, which chooses its kernel itself."""
NO_SDPA = "flash"
"""What runs where transformers has no sdpa for a model and the kernel can serve."""
KERNELS: dict[str, Kernel] = {each.name: each for each in (Cudnn(), Flash(), Efficient(), Math(), Eager())}
"""By the name that recipes have for them."""


def attentions() -> list[str]:
    """The names that a recipe's attention can have."""
    return [SDPA, *(name for name, each in KERNELS.items() if each.by_name)]


def runs_sdpa(attention: str) -> bool:
    """Whether a recipe's attention comes to scaled_dot_product_attention, which takes an explicit mask for sliding windows."""
    return attention == SDPA or KERNELS[attention].within_sdpa


def chosen(attention: str, asked: AttentionCall) -> Kernel:
    """The kernel that a recipe's attention comes to. Raises RecipeError for one that is named and does not serve."""
    if attention == SDPA:
        return next(each for each in KERNELS.values() if each.is_asked(asked.platform) and _serves(each, asked))
    kernel = KERNELS[attention]
    if kernel.within_sdpa and not _serves(kernel, asked):
        raise RecipeError(
            f"attention {attention} does not serve {asked.words}.\nUse --attention sdpa, which chooses one that does."
        )
    return kernel


def _serves(kernel: Kernel, asked: AttentionCall) -> bool:
    """from source: aten transformers/sdp_utils_cpp.h, check_batch_size_and_num_heads_dense, which every fused kernel asks."""
    return kernel.serves(asked) and (kernel.name == Math.name or not asked.broadcast)
