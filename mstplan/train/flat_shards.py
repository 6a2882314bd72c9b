"""FSDP1: torch's `FullyShardedDataParallel` of every decoder layer and of the model, as transformers' Trainer and accelerate ran it
(Accelerator.prepare_model): full shards, weights of a group one flat parameter."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch.distributed.fsdp import BackwardPrefetch, FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from transformers import PreTrainedModel

from ..step.recipe import Recipe
from . import locate


def flat_shards(model: PreTrainedModel, recipe: Recipe) -> FullyShardedDataParallel:
    """The model, whose layers are wrapped in place, with its weights in flat shards over all ranks."""
    layers = set(locate.find_parts(model).layers)
    dtypes = (
        MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=getattr(torch, recipe.reduced_dtype))
        if recipe.gathers_in_bf16
        else None
    )
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module in layers),
        mixed_precision=dtypes,
        backward_prefetch=BackwardPrefetch.BACKWARD_PRE if recipe.backward_prefetch == "pre" else None,
        device_id=next(model.parameters()).device,
        use_orig_params=False,
    )
    with warnings.catch_warnings():  # fake tensors' pointers are compared
        warnings.simplefilter("ignore")
        wrapped.check_is_root()  # makes the empty tensors that are filled in each step, which its first forward would
    return wrapped
