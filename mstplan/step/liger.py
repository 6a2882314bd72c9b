"""What Liger's kernels take the place of, by the family of models.

from source: liger_kernel 0.8.5, transformers/monkey_patch.py, apply_liger_kernel_to_* with a model that is there, as Trainer's
use_liger_kernel calls it. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..errors import RecipeError

ALL = frozenset(
    ("input norm", "post-attention norm", "pre-MLP norm", "post-MLP norm", "q_norm", "k_norm", "final norm")
)
"""Norms, as `layers.py` calls them."""


class Served(NamedTuple):
    """What of a family Liger serves. copying: norms whose backward makes a gradient; that of the others writes over the one it is given."""

    rotary: bool = True
    norms: frozenset[str] = ALL
    copying: frozenset[str] = frozenset()
    loss: bool = True


_USUAL, _COPYING = Served(), Served(copying=ALL)
SERVED: Mapping[str, Served] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "phi3", "gemma"), _USUAL),
    "granite": _USUAL._replace(loss=False),
    "gemma2": _COPYING,
    "gemma3_text": _COPYING,
    "glm4": _COPYING._replace(rotary=False),
    **dict.fromkeys(
        ("olmo2", "olmo3"),
        Served(norms=ALL - {"q_norm", "k_norm"}, copying=frozenset(("post-attention norm", "post-MLP norm"))),
    ),
}
"""By model_type: dense models. Of mixtures of experts Liger replaces the experts too, which is not planned."""
LOSS_ONLY = frozenset(
    [
        "mixtral",
        "qwen3_moe",
        "deepseek_v2",
        "deepseek_v3",
        "gpt_oss",
        "exaone4",
        "nemotron",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
    ]
)
"""Other families whose LM head and loss it computes."""


def kernels_for(model_type: str) -> Served:
    """What Liger's kernels take the place of. Raises RecipeError for a family that they do not serve."""
    if model_type not in SERVED:
        known = ", ".join(sorted(SERVED))
        raise RecipeError(
            f"Liger's kernels are not planned for {model_type} (but for {known}).\nSet kernels='torch' (--kernels torch)."
        )
    return SERVED[model_type]


def check_loss(model_type: str) -> None:
    """Check that Liger computes the loss of such a model. Raises RecipeError."""
    if not (model_type in LOSS_ONLY or (model_type in SERVED and SERVED[model_type].loss)):
        raise RecipeError(
            f"Liger 0.8.5 has no loss for {model_type}.\nSet loss='chunked' (--loss chunked), which makes no logits of all tokens either."
        )
