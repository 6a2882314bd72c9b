"""Adapters on a transformers model, by peft: added in place, so that the model's own classes stay what they are."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import MissingError, RecipeError, one_line, quoted
from ..step.adapters import ALL_LINEAR, ATTENTION
from ..step.expert_adapters import no_variants
from ..step.recipe import Recipe
from . import locate
from .text_part import towers_of


def add_adapters(model: PreTrainedModel, recipe: Recipe) -> None:
    """Freeze the model and add the recipe's adapters, in place. Raises MissingError without peft, RecipeError for targets that the model
    has not."""
    try:
        import peft
    except ImportError:
        raise MissingError("adapters need peft: pip install peft") from None
    config = peft.LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=2 * recipe.lora_rank,
        lora_dropout=recipe.lora_dropout,
        target_modules=_target_modules(model, recipe),
        exclude_modules=_tower_modules(model),
        modules_to_save=list(recipe.lora_modules_to_save) or None,
        use_dora=recipe.dora,
        task_type="CAUSAL_LM",
    )
    try:
        peft.get_peft_model(model, config, autocast_adapter_dtype=recipe.adapter_dtype == "fp32")
    except ValueError as e:
        if "lora.ParamWrapper does not work" in str(e):
            raise RecipeError(no_variants(type(model).__name__)) from None
        raise RecipeError(
            f"peft cannot add these adapters: {one_line(e, 200)}\n--lora-targets takes {ALL_LINEAR}, {ATTENTION}, or names of modules."
        ) from None
    for name, weight in model.named_parameters():
        if "lora_" in name and recipe.adapter_dtype == "bf16":  # beside quantised weights peft makes them in fp32
            weight.data = weight.data.to(torch.bfloat16)


def _tower_modules(model: PreTrainedModel) -> str | None:
    """A pattern for all modules of towers: adapters are the text part's."""
    paths = [re.escape(path) for path in towers_of(model)]
    return rf"({'|'.join(paths)})(\..*)?" if paths else None


def _target_modules(model: PreTrainedModel, recipe: Recipe) -> str | list[str]:
    """What LoraConfig takes."""
    if ALL_LINEAR in recipe.lora_targets:
        return ALL_LINEAR
    names = [name for name in recipe.lora_targets if name != ATTENTION]
    if ATTENTION in recipe.lora_targets:
        names += _linear_names_of_attention(model)
    return list(dict.fromkeys(names))


def _linear_names_of_attention(model: PreTrainedModel) -> list[str]:
    """Names within a layer of the linear layers inside what mixes tokens: the last part alone may be that of an MLP's, too."""
    names: dict[str, None] = {}
    for layer in locate.find_parts(model).layers:
        paths = {part: path for path, part in layer.named_modules()}
        mixing = [child for child in layer.modules() if child is not layer and locate.mixes_tokens(child)]
        parts = [part for child in mixing for part in child.modules() if isinstance(part, nn.Linear | Conv1D)]
        names.update((paths[part], None) for part in parts)
    if not names:
        raise RecipeError(f"{quoted(type(model).__name__)} has no linear layers in its attention.")
    return list(names)


def prepare_for_kbit(model: nn.Module) -> None:
    """What is not quantised in fp32, and frozen, in place (peft utils/other.py, prepare_model_for_kbit_training)."""
    for weight in model.parameters():
        weight.requires_grad = False
        is_packed = hasattr(weight, "quant_type")  # 4 bits, which may pass for numbers
        if weight.dtype in (torch.bfloat16, torch.float16) and not is_packed:
            weight.data = weight.data.to(torch.float32)


def is_adapter(name: str) -> bool:
    """Whether a weight of that name is an adapter's or of a module's trained copy."""
    parts = name.split(".")
    return any(part.startswith("lora_") or part == "modules_to_save" for part in parts)


def holds_adapters(model: Any) -> bool:
    return any(is_adapter(name) for name, _ in model.named_parameters())
