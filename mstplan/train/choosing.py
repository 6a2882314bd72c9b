"""`minisequence(model, plan="auto")`: the strategy that trains sequences of a length on the device at hand in the least time."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import ModelError, RecipeError
from ..plan.solve import Plan, plan_at
from ..plan.ways import nearest_plan
from ..spec.hardware import free_host_memory
from ..step.recipe import STRATEGIES, Recipe, strategy_label
from ..units import format_gib, format_tokens
from .chunks import attention_of, card_of, describe
from .fused import liger_is_at_hand

LEANEST = "mst-layer-offload"
LOG = logging.getLogger("mstplan")


def choose(model: PreTrainedModel, batch: int, seq_len: int, autocast: bool) -> Recipe:
    """The strategy whose step is nominally the fastest of those that fit, the simplest of equals; says so. autocast: are products run in
    bf16? Raises RecipeError when none fits, ModelError for a model that the planner cannot read."""
    try:
        described = describe(model.config, model)
    except ModelError as e:
        raise ModelError(
            f"no strategy can be chosen: {str(e).splitlines()[0]}\nSay which: checkpoint, offload, layer_in_chunks."
        ) from None
    recipe = _recipe_of(model, batch, autocast)
    card = card_of(model.device)._replace(host_bytes=free_host_memory())
    plans: dict[str, Plan] = {}
    for name, named in STRATEGIES.items():
        if named.checkpoint == "none" or model.supports_gradient_checkpointing:
            plans[name] = plan_at(described, recipe.changed(**dict(named.unusual_fields())), card, seq_len)
    if (leanest := plans.get(LEANEST)) is not None and not any(plan.fits for plan in plans.values()):
        with suppress(RecipeError):  # for attention in several operations
            from_host = leanest.recipe.changed(attention_on_host=True)
            plans[f"{LEANEST} with attention_on_host"] = plan_at(described, from_host, card, seq_len)
    fitting = {name: plan for name, plan in plans.items() if plan.fits}
    if not fitting:
        nearest = nearest_plan(list(plans.values()))
        raise RecipeError(
            f"no strategy trains {batch} x {format_tokens(seq_len)} tokens of {type(model).__name__} with AdamW here: "
            f"the leanest needs {format_gib(nearest.peak_bytes)} of {format_gib(nearest.budget_bytes)}."
            "\nShorten the sequences, train adapters (peft), or ask `mstplan advice`."
        )
    name = min(fitting, key=lambda name: fitting[name].step_seconds)
    LOG.warning(
        "minisequence chose %s for %d x %s tokens (%s of %s on the device, with AdamW)",
        strategy_label(name),
        batch,
        format_tokens(seq_len),
        format_gib(fitting[name].peak_bytes),
        format_gib(fitting[name].budget_bytes),
    )
    return fitting[name].recipe


def _recipe_of(model: PreTrainedModel, batch: int, autocast: bool) -> Recipe:
    """How the model at hand is trained, as far as that can be seen: with AdamW; frozen weights count as trained, but for those beside
    peft's adapters."""
    fields: dict[str, Any] = {"batch": batch, "attention": attention_of(model.config)}
    halves = model.dtype.itemsize == 2
    fields["precision"] = "bf16" if halves else "mixed" if autocast else "fp32"
    fields["autocast"] = halves and autocast
    fields["kernels"] = "liger" if liger_is_at_hand(model) else "torch"
    adapters = [(name, weight) for name, weight in model.named_parameters() if ".lora_A." in name]
    if adapters:
        fields["lora_rank"] = max(weight.shape[0] for _, weight in adapters)
        fields["lora_targets"] = tuple(sorted({name.split(".lora_A.")[0].rsplit(".", 1)[-1] for name, _ in adapters}))
        fields["adapter_dtype"] = "bf16" if adapters[0][1].dtype is torch.bfloat16 else "fp32"
    return Recipe(**fields)
