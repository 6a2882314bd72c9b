"""How many chunks: as the caller says, or as the planner recommends for the model, the card and the length at hand."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import ModelError, RecipeError, UnreadError
from ..plan.solve import choose_chunks, fixed_chunks
from ..spec.config import read_config
from ..spec.hardware import Card, card, card_that_torch_names, host_memory
from ..spec.model import Model
from ..step.recipe import Recipe
from ..step.steps import Chunks, every_nth
from .stand_in import stand_in

_ATTENTION = {
    "eager": "eager",
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
    "flash_attention_4": "flash",
}

LOG = logging.getLogger("mstplan")


def attention_of(config: Any) -> str:
    """What a recipe calls the attention that a transformers configuration asks for."""
    return _ATTENTION.get(getattr(config, "_attn_implementation", "sdpa"), "sdpa")


def describe(config: Any, module: PreTrainedModel | None = None) -> Model:
    """The planner's description of a transformers configuration; of what it does not read one taken from the module, if there is one.
    Raises ModelError."""
    name = type(config).__name__
    try:
        return read_config(config.to_dict(), name)
    except UnreadError as e:
        if module is None:
            raise
        return stand_in(module, name, str(e).splitlines()[0])


class ChunkCounts:
    """The chunks of MLP and loss for hidden states (b, s, d). `recipe` says which of them are "auto".

    What the planner does not read in `config`, a transformers configuration, it takes from the module, if there is one. Raises
    ModelError when the planner is needed and cannot.
    """

    def __init__(self, config: Any, recipe: Recipe, module: PreTrainedModel | None = None):
        self.recipe = recipe
        self.fixed: Chunks | None = None
        self.module = module
        self._recommended: dict[tuple[Any, ...], Chunks] = {}
        if not recipe.is_open:
            self.fixed = fixed_chunks(recipe)
            return
        self.recipe = recipe.changed(attention=attention_of(config))
        try:
            self.model = describe(config, module)
        except ModelError as e:
            raise ModelError(
                f"no chunks can be recommended: {str(e).splitlines()[0]}\nGive mlp_chunks and loss_chunks"
                + (", and attention_groups." if recipe.layer_in_chunks else ".")
            ) from None

    def chunks_for(self, hidden: torch.Tensor) -> Chunks:
        """Chunks for hidden states (b, s, d), or (s, d) of one sequence."""
        if self.fixed is not None:
            return self.fixed
        batch, length = hidden.shape[:-1].numel() // hidden.shape[-2], hidden.shape[-2]
        device = hidden.device.type
        mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        key = (batch, length, hidden.device, hidden.dtype, mixed)
        if key not in self._recommended:
            precision = "mixed" if mixed else "bf16" if hidden.dtype.itemsize == 2 else "fp32"
            recipe = self.recipe.changed(batch=batch, precision=precision)
            chunks = self._choose(recipe, card_of(hidden.device), length)
            LOG.info(
                "minisequence: %d x %d tokens in %d (MLP) and %d (loss) chunks, heads in %d groups",
                batch,
                length,
                *chunks,
            )
            self._recommended[key] = chunks
        return self._recommended[key]

    def _choose(self, recipe: Recipe, card: Card, length: int) -> Chunks:
        """As the formula recommends; where it does not count the recipe with this model, for one of the sizes of the module."""
        try:
            return choose_chunks(self.model, recipe, card, length)
        except RecipeError as e:
            if self.module is None or self.model.mixer is None:
                raise
            self.model = stand_in(self.module, self.model.name, str(e).splitlines()[0])
        return choose_chunks(self.model, recipe, card, length)

    def describe_recipe(self) -> str:
        recipe, every = (
            self.recipe,
            {
                "none": "no checkpoints",
                "layer": "every layer checkpointed",
                "reentrant": "every layer checkpointed, reentrant",
                "selective": "every layer checkpointed but for attention",
            },
        )
        if (nth := every_nth(recipe)) is not None:
            every[str(recipe.checkpoint)] = f"every {nth}. layer checkpointed"
        numbers = {"auto": "in as many chunks as recommended", 1: "in one piece"}
        mlp, loss = (numbers.get(n, f"in {n} chunks") for n in (recipe.mlp_chunks, recipe.loss_chunks))
        checkpoints = every.get(str(recipe.checkpoint), f"checkpoints over {recipe.checkpoint} layers")
        offload = ", layer inputs in CPU RAM" if recipe.offload_layer_inputs else ""
        what = "layers but for attention" if recipe.layer_in_chunks else "MLP"
        return f"{what} {mlp}, loss {loss}, {checkpoints}{offload}"


def card_of(device: torch.device) -> Card:
    """What the planner knows about `device`: the card by the name that torch gives it, or by its amount of memory; for a CPU
    a card with as much memory as the machine has."""
    if device.type != "cuda":
        return card(memory=host_memory())
    properties = torch.cuda.get_device_properties(device)
    return card_that_torch_names(properties.name, properties.total_memory)
