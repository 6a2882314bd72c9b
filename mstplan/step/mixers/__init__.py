"""What mixes a layer's tokens otherwise than by attention, a file each: transformers' plain torch code, operation by operation.

Packages with kernels for these (causal-conv1d, mamba-ssm, flash-linear-attention), which transformers takes where it finds
them, make other tensors: they are not counted (`plan/advice.py` says so).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import RecipeError
from ...spec.families import family_of
from ...spec.model import GatedDelta, Mamba2, Model, ShortConv
from ..recipe import Recipe
from ..roles import Role
from ..tape import Tensor
from .gated_delta import gated_delta
from .mamba2 import mamba2
from .short_conv import short_conv

if TYPE_CHECKING:
    from ..layers import Writer


def check_recipe(model: Model, recipe: Recipe) -> None:
    """Raise RecipeError for a recipe with which the formula does not count what mixes the model's tokens."""
    if family_of(model.model_type).code.mixes_samples and recipe.packing > 1:
        raise RecipeError(
            f"transformers' code of {model.model_type} does not tell packed samples apart with sdpa, so that is not planned.\n"
            "Leave --packing out."
        )
    if model.mixer is None or isinstance(model.mixer, ShortConv):
        return
    if recipe.runs_autocast or recipe.used_dtype != "bfloat16":
        raise RecipeError(
            f"the formula counts the mixing layers of {model.name}, which compute in fp32 of their own, with weights in bf16 and without autocast "
            "only.\nUse --precision bf16 without --autocast, or --rung trace."
        )
    if recipe.offload == "saved-tensors" and recipe.checkpoint not in ("layer", "selective"):
        raise RecipeError(
            f"saved tensors in CPU RAM are not counted for the mixing layers of {model.name} where they are not checkpointed.\n"
            "Add --checkpoint layer, or use --rung trace."
        )


def mix(w: Writer, x: Tensor) -> Tensor:
    """What the model's mixer makes of x (t, d): (t, d)."""
    sizes = w.model.mixer
    assert sizes is not None
    with w.tape.assign_role(Role.ATTENTION):
        if isinstance(sizes, Mamba2):
            return mamba2(w, x, sizes)
        return gated_delta(w, x, sizes) if isinstance(sizes, GatedDelta) else short_conv(w, x, sizes)
