"""Vision towers in a step with images, a file for each family: what it makes of them, and puts in place of the tokens that stand for images.

A new one is a rule in `spec/vision.py`, and a file here with a function and a line in `TOWERS`. Towers that have none are answered by the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ...errors import RecipeError
from ...units import SHORTEST
from ..recipe import Recipe
from ..roles import Role
from ..tape import Tensor, tensor_of
from . import clip, siglip
from .base import Images, Seen
from .encoder import cast_pixels, outside

if TYPE_CHECKING:
    from ...spec.model import Model


class Family(NamedTuple):
    """see: lays out tower and projector, and puts their features into the embeddings (b, s, d). modules: those with weights, in the order in
    which the model makes them, of layers in that of one."""

    see: Callable[[Images, Tensor], Seen]
    modules: Sequence[str]


TOWERS: Mapping[str, Family] = {
    "gemma3": Family(siglip.see_by_siglip, siglip.MODULES),
    "llava": Family(clip.see_by_clip, clip.MODULES),
}
MASKED = frozenset({"gemma3"})
"""Families whose layers are given explicit masks with images: these see all of themselves."""


def masks_text(model: Model, recipe: Recipe) -> bool:
    """Whether images make all layers' masks explicit."""
    return bool(recipe.images) and model.vision is not None and model.vision.family in MASKED


def cast_inputs(images: Images) -> None:
    """FSDP2's policy of bf16 casts what the whole model is given before it runs (FSDPState._pre_forward)."""
    if images.recipe.gathers_in_bf16:
        images.pixels = cast_pixels(images.writer(outside(images), images.vision.encoder.patches))


def see(images: Images, hidden: Tensor) -> Seen:
    """Lay out all that is done with a step's images. hidden: what was embedded (b, s, d)."""
    seen = TOWERS[images.vision.family].see(images, hidden)
    return seen._replace(returned=(*seen.returned, *images.pixels))


def check_reached(images: Images, recipe: Recipe) -> None:
    """Check that gradients come to all that is trained, where others wait for them. Raises RecipeError."""
    check_idle([named.names[0] for named in images.unused if named.names[0] not in images.frozen], recipe)


def check_idle(names: Sequence[str], recipe: Recipe) -> None:
    """The same of the names of trained weights that no gradient comes to. DDP waits for them in its second step, and raises an error
    (find_unused_parameters=False); what ZeRO makes of them is not counted. Raises RecipeError."""
    if names and (recipe.has_gradient_buckets or recipe.zero_stage):
        what = "waits for it" if recipe.has_gradient_buckets else "wants it in its partitions"
        raise RecipeError(
            f"no gradient comes to {names[0]}, from which no feature of an image is made, and {recipe.sharding} {what}.\n"
            "Freeze the tower (--freeze vision), or take --sharding fsdp."
        )


def modules_of_towers(model: Model) -> Sequence[str]:
    """Modules of a model's tower and projector, in the order in which they are made."""
    return TOWERS[model.vision.family].modules if model.vision is not None else ()


def uncounted(model: Model, recipe: Recipe) -> str:
    """What the formula does not count with a recipe's images; "": it counts them. Raises RecipeError for images that the model cannot have."""
    if not recipe.images:
        return ""
    if model.vision is None:
        return "this model's tower"
    check_tokens(model.name, recipe, model.vision.tokens)
    options = {
        "--offload saved-tensors": recipe.offload == "saved-tensors",
        f"--kernels {recipe.kernels}": recipe.kernels != "torch",
        "--attention eager": recipe.attention == "eager" or model.eager_only,
        f"--precision {recipe.precision}": recipe.runs_autocast and recipe.used_dtype != "bfloat16",
        "--checkpoint children": recipe.checkpoint == "children",
    }
    return next((option for option, asked in options.items() if asked), "")


def check_images(model: Model, recipe: Recipe) -> None:
    """Check that the formula counts the images of a recipe, if it is asked for an answer. Raises RecipeError."""
    if model.stand_in is None and (option := uncounted(model, recipe)):
        raise RecipeError(
            f"images with {option} are not counted by the formula, but by the trace alone.\n"
            "max-seq, plan and trace answer by the trace where torch is installed (pip install 'mstplan[torch]')."
        )


def check_tokens(name: str, recipe: Recipe, tokens: int) -> None:
    """Check that nothing else is said of images whose size is always the tower's. Raises RecipeError."""
    if recipe.image_tokens not in (None, tokens):
        raise RecipeError(
            f"--image-tokens {recipe.image_tokens:,}: every image is {tokens:,} tokens in {name}.\nLeave it out."
        )


def check_room(recipe: Recipe, tokens: int, seq_len: int) -> None:
    """Check that images of so many tokens leave one for text. Raises RecipeError."""
    taken = recipe.images * tokens
    if recipe.images and taken >= seq_len:
        raise RecipeError(
            f"{recipe.images:,} images of {tokens:,} tokens take {taken:,} of a sequence's tokens, and leave none of {seq_len:,} for text.\n"
            f"Give a --seq-len from {taken + 1:,}, fewer --images, or smaller ones."
        )


def shortest_length(model: Model, recipe: Recipe) -> int:
    """Tokens that a sequence has at least: those of its images, and one of text."""
    tokens = model.vision.tokens if model.vision is not None else 0
    return max(SHORTEST, recipe.images * tokens + 1)


def check_length(model: Model, recipe: Recipe, seq_len: int) -> None:
    """Check that a length has room for the images that the formula counts. Raises RecipeError."""
    if model.vision is not None:
        check_room(recipe, model.vision.tokens, seq_len)


def image_notes(recipe: Recipe, tokens: int, pixels: Sequence[int]) -> tuple[str, str]:
    """What is said of a step's images: the tokens that they take, and what is in and what is not. pixels: the shape of an image's."""
    taken, shape = recipe.images * tokens, " x ".join(f"{size:,}" for size in pixels)
    counted = f"of each sequence's tokens {taken:,} are {recipe.images:,} images' ({tokens:,} each, of pixel_values {shape} in fp32)"
    parts = (
        "towers and projectors run forward and backward, where trained with gradients and optimizer states; their layers are checkpointed "
        "where those of text are, each by itself, and never run in pieces. Not in: what cuDNN takes for convolutions, tokens that a "
        "processor puts around images (they are text), audio, video"
    )
    return counted, parts


def with_images(model: Model, recipe: Recipe, waiting: str) -> Model:
    """A model whose tower the formula lays out, with what is said of steps with images in place of `waiting`, what is said of others."""
    vision = model.vision
    assert vision is not None
    encoder = vision.encoder
    notes = image_notes(recipe, vision.tokens, (1, encoder.channels, encoder.side, encoder.side))
    return model._replace(notes=(*(note for note in model.notes if note != waiting), *notes))


def images_of_batch(model: Model, recipe: Recipe) -> list[Tensor]:
    """What comes with tokens of a batch: pixels in fp32, as processors make them, and which tokens are images'."""
    if not recipe.images or model.vision is None:
        return []
    encoder = model.vision.encoder
    pixels = f"b {recipe.images} {encoder.channels} {encoder.side} {encoder.side}"
    tensors = [tensor_of({}, "pixels of images", pixels, "float32", role=Role.BATCH)]
    if model.vision.family in MASKED:
        tensors.append(tensor_of({}, "types of tokens", "b s", "int64", role=Role.BATCH))
    return tensors


def numbers_of_patches(model: Model, recipe: Recipe) -> int:
    """Bytes of a tower's buffer of the numbers of an image's patches, in int64, of CLIP and its class as well."""
    if not recipe.images or model.vision is None:
        return 0
    return 8 * (model.vision.encoder.patches + (model.vision.family == "llava"))
