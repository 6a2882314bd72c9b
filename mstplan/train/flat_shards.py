"""FSDP1: torch's `FullyShardedDataParallel` of every decoder layer and of the model, as transformers' Trainer and accelerate ran it
(Accelerator.prepare_model): full shards, weights of a group one flat parameter. Beside frozen weights each module without children whose
weight is trained is wrapped by itself (peft utils/other.py, fsdp_auto_wrap_policy)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import BackwardPrefetch, FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp._common_utils import HandleTrainingState
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from transformers import PreTrainedModel

from ..step.recipe import Recipe
from . import locate


def flat_shards(model: PreTrainedModel, recipe: Recipe) -> FullyShardedDataParallel:
    """The model, whose layers and adapters' matrices are wrapped in place, with its weights in flat shards over all ranks."""
    apart = {module for modules in wrapped_apart(model, recipe).values() for module in modules}
    dtypes = (
        MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=getattr(torch, recipe.reduced_dtype))
        if recipe.gathers_in_bf16
        else None
    )
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module in apart),
        mixed_precision=dtypes,
        backward_prefetch=BackwardPrefetch.BACKWARD_PRE if recipe.backward_prefetch == "pre" else None,
        device_id=next(model.parameters()).device,
        use_orig_params=recipe.use_orig_params,
    )
    with warnings.catch_warnings():  # fake tensors' pointers are compared
        warnings.simplefilter("ignore")
        wrapped.check_is_root()  # makes the empty tensors that are filled in each step, which its first forward would
        _gather_once(wrapped)
    if recipe.checkpoint == "reentrant":
        _checkpoint_around(wrapped)
    return wrapped


def _checkpoint_around(wrapped: FullyShardedDataParallel) -> None:
    """Have checkpoints of layers begin before FSDP1 gathers them, as transformers had it before 5: it called the checkpoint, and that the layer, in
    its place in the model (gradient_checkpointing_func(layer.__call__, ...) in modeling_llama.py); today's layers checkpoint themselves, within."""
    for state in FullyShardedDataParallel.fsdp_modules(wrapped):
        layer: Any = state.module
        if getattr(layer, "gradient_checkpointing", False):
            layer.gradient_checkpointing = False
            around = partial(_run_around, state.forward, layer._gradient_checkpointing_func)
            state.forward = around  # type: ignore[method-assign]


def _run_around(forward: Callable[..., Any], checkpoint: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(partial(forward, **kwargs), *args)


def _gather_once(wrapped: FullyShardedDataParallel) -> None:
    """Gather FSDP1's flat weights, group by group, as a first step does: from then on those that a module is asked for between its runs, as peft asks
    for the dtype of an adapter's, are views in the dtype in which they are used (FlatParamHandle._use_unsharded_views)."""
    for state in FullyShardedDataParallel.fsdp_modules(wrapped):
        if (handle := state._handle) is None:
            continue
        before, handle._training_state = handle._training_state, HandleTrainingState.FORWARD
        handle.pre_unshard()
        handle.unshard()
        handle.post_unshard()
        handle.reshard(True)
        handle.post_reshard()
        handle._training_state = before


def wrapped_apart(model: PreTrainedModel, recipe: Recipe) -> dict[nn.Module, list[nn.Module]]:
    """Layers, each with the modules of a flat parameter of their own: itself, and before it the matrices of adapters in it, in the order of modules."""
    return {
        layer: [*(_trained_leaves(layer) if recipe.lora_rank else ()), layer]
        for layer in locate.find_parts(model).layers
    }


def _trained_leaves(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if not [*part.children()] and isinstance(weight, nn.Parameter) and weight.requires_grad:
            yield part
