"""Images of a batch: the tokens that they take, and what a transformers model is given beside token ids.

A family's rule says how an image of a size, or of a number of tokens, becomes pixels and tokens, as its processor does it
(transformers' image_processing_*.py and processing_*.py). Tokens that a processor puts beside an image's own (row breaks, marks of
begin and end) are text to the model, and not counted as the image's. Limits of a processor that stand in its own file
(max_pixels), not in config.json, are not applied, but for Llama-4's number of tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil, isqrt
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from ..errors import RecipeError, quoted
from ..step.recipe import Recipe
from ..step.towers import check_room, check_tokens

PLAIN_TOKEN = 3
"""Stands for all text: an id that no family uses for images."""
FAMILIES: dict[str, Callable[[PreTrainedConfig, Recipe], Image]] = {}


class Image(NamedTuple):
    """One image. tokens: that it takes in its sequence. pixels: shape of its part of pixel_values, along the first axis. numbers: its row
    of further inputs. types: the input that says of each token whether it is an image's; none: the model needs none."""

    tokens: int
    pixels: tuple[int, ...]
    numbers: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    types: str = ""


class ImageBatch(NamedTuple):
    """Token ids (rows, tokens), and what the model is given beside them but pixel_values, whose shape is `pixels`: integers, on the CPU."""

    ids: torch.Tensor
    numbers: dict[str, torch.Tensor]
    pixels: tuple[int, ...]


def image_of(settings: PreTrainedConfig, recipe: Recipe) -> Image:
    """The images of a recipe, all alike. Raises RecipeError for a model without a rule for them, or sizes that it cannot have."""
    if (rule := FAMILIES.get(settings.model_type)) is None:
        raise RecipeError(
            f"--images: how {settings.model_type} is given images is not known to mstplan, or it reads none.\n"
            f"Known: {', '.join(FAMILIES)}; without --images a step on text alone is planned."
        )
    return rule(settings, recipe)


def image_batch(settings: PreTrainedConfig, recipe: Recipe, seq_len: int) -> ImageBatch:
    """A batch whose sequences begin with their images. Raises RecipeError where these do not fit."""
    image = image_of(settings, recipe)
    taken = recipe.images * image.tokens
    check_room(recipe, image.tokens, seq_len)
    ids = torch.full((recipe.batch, seq_len), PLAIN_TOKEN)
    types = torch.zeros_like(ids)
    for n in range(recipe.images):  # text between them, where there is room, tells them apart
        start = n * image.tokens + min(n + 1, seq_len - taken)
        ids[:, start : start + image.tokens] = settings.image_token_id
        types[:, start : start + image.tokens] = 1
    count = recipe.batch * recipe.images
    numbers = {name: torch.tensor([row] * count) for name, row in image.numbers.items()}
    if image.types:
        numbers[image.types] = types
    return ImageBatch(ids, numbers, (count * image.pixels[0], *image.pixels[1:]))


# ---- rules ------------------------------------------------------------------------------------------------------------------


def _size(recipe: Recipe) -> tuple[int, int] | None:
    """Height and width in pixels, if the recipe says them."""
    if not recipe.image_size:
        return None
    height, width = recipe.image_size.split("x")
    return int(height), int(width)


def _fixed(settings: PreTrainedConfig, recipe: Recipe, tokens: int, types: str = "") -> Image:
    """Whatever size an image has, it is resized to the tower's."""
    check_tokens(settings.model_type, recipe, tokens)
    vision: Any = settings.vision_config
    return Image(tokens, (1, 3, vision.image_size, vision.image_size), types=types)


def _llava(settings: Any, recipe: Recipe) -> Image:
    if settings.vision_config.model_type == "pixtral":
        return _pixtral(settings, recipe, 1)
    side = settings.vision_config.image_size // settings.vision_config.patch_size
    with_class = settings.vision_config.model_type.startswith("clip")
    return _fixed(settings, recipe, side * side + (with_class and settings.vision_feature_select_strategy == "full"))


def _gemma3(settings: Any, recipe: Recipe) -> Image:
    return _fixed(settings, recipe, settings.mm_tokens_per_image, "token_type_ids")


def _grid(settings: PreTrainedConfig, recipe: Recipe, unit: int) -> tuple[int, int]:
    """Rows and columns of tokens of `unit` x `unit` pixels each, rounded as Qwen-VL's smart_resize does."""
    if (size := _size(recipe)) is not None:
        if max(size) > 200 * min(size):
            raise RecipeError(f"--image-size {recipe.image_size}: one side is over 200 times the other.\nGive another.")
        rows, columns = (max(1, round(side / unit)) for side in size)
        return rows, columns
    if recipe.image_tokens is None:
        raise RecipeError(
            f"--images: images of {settings.model_type} have any size.\nAdd --image-tokens, or --image-size HEIGHTxWIDTH in pixels."
        )
    rows = next(n for n in range(isqrt(recipe.image_tokens), 0, -1) if recipe.image_tokens % n == 0)
    if recipe.image_tokens > 200 * rows * rows:
        raise RecipeError(
            f"--image-tokens {recipe.image_tokens:,}: no rectangle of so many tokens is less than 200 times as wide as high.\nGive another number."
        )
    return rows, recipe.image_tokens // rows


def _qwen_vl(settings: Any, recipe: Recipe) -> Image:
    vision = settings.vision_config
    merge = vision.spatial_merge_size
    rows, columns = _grid(settings, recipe, vision.patch_size * merge)
    grid = (1, rows * merge, columns * merge)
    numbers_of_patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = (grid[1] * grid[2], numbers_of_patch)
    return Image(rows * columns, pixels, {"image_grid_thw": grid}, "mm_token_type_ids")


def _pixtral(settings: Any, recipe: Recipe, merge: int) -> Image:
    """Images are made no larger than the tower's image_size, and padded to a common size: all are alike here."""
    vision = settings.vision_config
    unit = vision.patch_size * merge
    if (size := _size(recipe)) is not None and max(size) > vision.image_size:
        sides = (max(1, side * vision.image_size // max(size)) for side in size)
        rows, columns = (ceil(side / unit) for side in sides)
    elif size is not None:
        rows, columns = (ceil(side / unit) for side in size)
    else:
        rows, columns = _grid(settings, recipe, unit)
    if max(rows, columns) * unit > -(-vision.image_size // unit) * unit:
        raise RecipeError(
            f"--image-tokens {quoted(recipe.image_tokens)}: {rows:,} x {columns:,} tokens of {unit} pixels are beyond the tower's "
            f"{vision.image_size:,}.\nGive fewer."
        )
    height, width = rows * unit, columns * unit
    return Image(rows * columns, (1, 3, height, width), {"image_sizes": (height, width)})


def _mistral3(settings: Any, recipe: Recipe) -> Image:
    return _pixtral(settings, recipe, settings.spatial_merge_size)


def _llama4(settings: Any, recipe: Recipe) -> Image:
    """Tiles of the tower's size: as many as the given tokens are; and one of the whole image beside several."""
    vision = settings.vision_config
    each = round((vision.image_size // vision.patch_size) ** 2 * vision.pixel_shuffle_ratio**2)
    if (size := _size(recipe)) is not None:
        tiles = _tiles(*size, vision.image_size)
        tiles += tiles > 1
        return Image(each * tiles, (tiles, 3, vision.image_size, vision.image_size))
    tokens = each if recipe.image_tokens is None else recipe.image_tokens
    tiles, rest = divmod(tokens, each)
    if rest or tiles in (0, 2):
        raise RecipeError(
            f"--image-tokens {tokens:,}: an image of Llama-4 is one tile of {each:,} tokens, or n of them and one of the whole.\n"
            f"Give {each:,}, or {each:,} x (n + 1) for n from 2."
        )
    return Image(tokens, (tiles, 3, vision.image_size, vision.image_size))


MOST_TILES = 16
"""Llama-4's max_patches, as published and by default."""


def _tiles(height: int, width: int, side: int) -> int:
    """How many tiles of side x side pixels Llama-4's processor cuts an image into: those of the canvas on which it is enlarged least, or if
    none is large enough reduced least; of several the smallest (models/llama4/image_processing_llama4.py, get_best_fit)."""
    shapes = torch.tensor(
        [
            (rows, count // rows)
            for count in range(1, MOST_TILES + 1)
            for rows in range(1, count + 1)
            if count % rows == 0
        ]
    )
    scales = torch.minimum(shapes[:, 0] * side / height, shapes[:, 1] * side / width)  # in fp32, as there
    enough = scales >= 1
    best = scales[enough].min() if enough.any() else scales.max()
    return int(shapes[scales == best].prod(1).min())


FAMILIES.update(
    {
        "llava": _llava,
        "gemma3": _gemma3,
        "qwen2_vl": _qwen_vl,
        "qwen2_5_vl": _qwen_vl,
        "qwen3_vl": _qwen_vl,
        "qwen3_vl_moe": _qwen_vl,
        "mistral3": _mistral3,
        "llama4": _llama4,
    }
)
