"""The order in which modules are called, which ZeRO-3 goes by: as laid out, and as DeepSpeed's hooks meet it in transformers' own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bench.deepspeed_zero import MIXTURES, config_of
from mstplan.plan.layout import step_of
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.spec.model import Model
from mstplan.step.recipe import strategy
from mstplan.step.steps import Chunks
from mstplan.step.zero import Zero
from mstplan.step.zero3 import CHECKED, Hook, Zero3
from mstplan.train.adapters import add_adapters

from ..spec.test_families import tiny

TOKENS = 8
Visits = list[tuple[bool, tuple[int, ...]]]
"""(whether weights are fetched, or else let go; values of each weight of the module's own, sorted). Of modules without any only the first."""
LATENT = ("deepseek_v2", "glm4_moe_lite")
LEAF_CLASSES = ("MixtralSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock")
"""Of DeepSpeed's DEFAULT_LEAF_MODULE_CLASSES (runtime/zero/leaf_module_config.py)."""


def small(family: str) -> dict[str, Any]:
    """A small config.json of a family, of latent attention with as many heads of keys, which the code asks for."""
    if family in MIXTURES:
        return config_of({"model": family})
    config = tiny(family)
    return {**config, "num_key_value_heads": config["num_attention_heads"]} if family in LATENT else config


def targets_of(model: Model) -> dict[str, Any]:
    """What adapters are on: of a mixture attention alone, as those of experts are not planned."""
    return {"lora_targets": ("attention",)} if model.experts is not None else {}


class _Told(torch.autograd.Function):
    """The identity, whose backward tells."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tell: Callable[[], None]) -> torch.Tensor:
        ctx.tell = tell
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        ctx.tell()
        return *gradients, None


def within(given: Any, tell: Callable[[], None]) -> Any:
    """The same, telling when a gradient comes to one of its tensors (apply_to_tensors_only)."""
    if isinstance(given, torch.Tensor):
        return _Told.apply(given, tell) if given.requires_grad else given
    if isinstance(given, (list, tuple)):
        return type(given)(within(each, tell) for each in given)
    if isinstance(given, dict):
        for name in list(given):
            given[name] = within(given[name], tell)
    return given


def hook(module: nn.Module, visits: Visits) -> None:
    """Hooks as parameter_offload.py of DeepSpeed registers them."""
    is_leaf = type(module).__name__ in LEAF_CLASSES
    for child in () if is_leaf else module.children():
        hook(child, visits)
    sizes = tuple(sorted(weight.numel() for weight in module.parameters(recurse=is_leaf)))
    if isinstance(
        module, peft.tuners.lora.Linear
    ):  # asks for a dtype, and so has it as one of its own (ZeROOrderedDict.__getitem__)
        sizes = (module.lora_A["default"].weight.numel(),)
    inputs = 0

    def before(_: nn.Module, given: Any) -> Any:
        nonlocal inputs
        visits.append((True, sizes))
        inputs = sum(isinstance(each, torch.Tensor) and each.requires_grad for each in given)
        return within(given, release)

    def release() -> None:
        nonlocal inputs
        inputs -= 1
        if sizes and not inputs:
            visits.append((False, sizes))

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        if sizes:
            visits.append((False, sizes))
        return within(output, lambda: visits.append((True, sizes)))

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


@pytest.mark.parametrize("rank", [0, 4], ids=["all", "lora"])
@pytest.mark.parametrize("family", sorted(CHECKED))
def test_modules_are_called_in_the_order_in_which_they_are_laid_out(family: str, rank: int) -> None:
    """rank: of adapters, whose modules peft puts in, and classes of its own around the model."""
    config = small(family)
    spec = read_config(config, "tiny")
    targets = targets_of(spec) if rank else {}
    recipe = strategy("standard", gpus=2, sharding="zero3", attention="eager", lora_rank=rank, **targets)
    zero = step_of(spec, recipe, card("h100"), Chunks(1, 1), TOKENS).zero
    assert isinstance(zero, Zero3)
    laid_out = [
        (visit.hook is Hook.FETCH, tuple(sorted(weight.numel for weight in visit.call.weights)))
        for visit in zero.visits
        if visit.hook is Hook.FETCH or (visit.hook is Hook.RELEASE and visit.call.weights)
    ]
    from transformers import AutoConfig

    settings = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    if rank:
        linear = r".*\.self_attn\.\w*_proj\w*" if targets else "all-linear"
        lora = peft.LoraConfig(r=rank, target_modules=linear, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    visits: Visits = []
    hook(model, visits)
    ids = torch.arange(TOKENS)[None] + 5
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert visits == laid_out


@pytest.mark.parametrize("family", sorted(CHECKED))
def test_adapters_lie_in_the_order_in_which_peft_makes_them(family: str) -> None:
    """As the partitions of ZeRO-1 and ZeRO-2 are cut."""
    from transformers import AutoConfig

    config = small(family)
    spec = read_config(config, "tiny")
    recipe = strategy("standard", gpus=2, sharding="zero2", lora_rank=4, attention="eager", **targets_of(spec))
    zero = step_of(spec, recipe, card("h100"), Chunks(1, 1), TOKENS).zero
    assert isinstance(zero, Zero)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager")
    add_adapters(model, recipe)
    trained = [weight.numel() for weight in model.parameters() if weight.requires_grad]
    assert [weight.numel for weight in zero.weights] == trained
