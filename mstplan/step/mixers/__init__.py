"""What mixes a layer's tokens otherwise than by attention, a file each: transformers' plain torch code, operation by operation.

Packages with kernels for these, which transformers takes where it finds them, make other tensors: `Recipe.kernels` says which are there
(`mixer_packages.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import RecipeError
from ...spec.families import family_of
from ...spec.model import GatedDelta, Mamba2, Model, ShortConv
from ..adapters import WORDS
from ..losses import LOSSES
from ..mixer_packages import check_kernels
from ..recipe import Recipe
from ..roles import Role
from ..tape import Tensor
from .gated_delta import gated_delta
from .mamba2 import mamba2
from .short_conv import short_conv

if TYPE_CHECKING:
    from ..layers import Writer


def runs_in_pieces(model: Model) -> bool:
    """Whether some layers run in pieces around what mixes their tokens, which is in one place and not all that they do."""
    return any(
        kind.mixer == "attention" or (kind.feed_forward and kind.mixer not in ("none", "attention and mamba2"))
        for kind in model.layer_kinds
    )


def check_recipe(model: Model, recipe: Recipe, several_mlp_chunks: bool) -> None:
    """Raise RecipeError for a recipe with which the formula does not count what mixes the model's tokens."""
    if family_of(model.model_type).code.mixes_samples and recipe.packing > 1:
        raise RecipeError(
            f"transformers' code of {model.model_type} does not tell packed samples apart with sdpa, so that is not planned.\n"
            "Leave --packing out."
        )
    check_kernels(model, recipe.kernels)
    if model.mixer is None or isinstance(model.mixer, ShortConv):
        return
    if recipe.lora_rank and family_of(model.model_type).code.bars_out_proj:
        named = {target.rsplit(".", 1)[-1] for target in recipe.lora_targets}
        if named & {*WORDS, "out_proj"}:
            raise RecipeError(
                f"peft puts no adapters on out_proj of model_type {model.model_type}, and refuses targets that name it.\n"
                "Name others: --lora-targets in_proj."
            )
    if recipe.kernels == "mamba-ssm":
        _check_mamba_ssm(model, recipe)
    if recipe.layer_in_chunks and not runs_in_pieces(model):
        twice = any(kind.mixer == "attention and mamba2" for kind in model.layer_kinds)
        what = "mix tokens in two places, side by side" if twice else "mix all tokens together, and do nothing else"
        raise RecipeError(f"layers of {model.name} {what}, and do not run in pieces.\nTake mst (-s mst).")
    if model.wide_residual and LOSSES[recipe.loss].is_fused:
        raise RecipeError(
            f"hidden states of {model.name} are in fp32, of which the loss {recipe.loss!r} is not counted.\nSet loss='chunked' (--loss chunked)."
        )
    if recipe.checkpoint == "children" and any(kind.mixer == "attention and mamba2" for kind in model.layer_kinds):
        raise RecipeError(
            f"attention and Mamba-2 side by side in the layers of {model.name} are not planned with --checkpoint children.\nUse --checkpoint layer."
        )
    if several_mlp_chunks and not model.feeds_forward:
        raise RecipeError(f"{model.name} has no MLP to run in pieces.\nSet mlp_chunks=1 (--chunks 1,N).")
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


def _check_mamba_ssm(model: Model, recipe: Recipe) -> None:
    """transformers gives mamba-ssm out_proj's weight, past what peft and bitsandbytes put in that module's place."""
    named = {target.rsplit(".", 1)[-1] for target in recipe.lora_targets} if recipe.lora_rank else set()
    if named & {*WORDS, "out_proj"}:
        raise RecipeError(
            f"mamba-ssm takes out_proj's weight of {model.name} as it is, past an adapter on it.\nName others: --lora-targets in_proj."
        )
    if recipe.quantize != "none":
        raise RecipeError(
            f"mamba-ssm takes out_proj's weight of {model.name} as it is, and knows no quantised one.\nUse --quantize none, or --kernels torch."
        )


def mix(w: Writer, x: Tensor) -> Tensor:
    """What the model's mixer makes of x (t, d): (t, d)."""
    sizes = w.model.mixer
    assert sizes is not None
    with w.tape.assign_role(Role.ATTENTION):
        if isinstance(sizes, Mamba2):
            return mamba2(w, x, sizes)
        return gated_delta(w, x, sizes) if isinstance(sizes, GatedDelta) else short_conv(w, x, sizes)
