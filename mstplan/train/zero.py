"""Weights that DeepSpeed's ZeRO-3 shards, whole where pieces run on them.

ZeRO-3 gathers a module's weights in hooks around the module's call, in both passes, and lets go of them after it. Pieces run what is below
a call, so a module that is run in pieces is one to DeepSpeed, a leaf (deepspeed/utils/z3_leaf_module.py), which has to be said before
deepspeed.initialize. What runs after the call (the loss) gathers for itself, here. A weight takes its gradient in whole, so backward leaves
weights gathered; DeepSpeed's hook on the module's input lets go of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import ModelError

_LEAF = "_z3_leaf"  # DeepSpeed's own mark


def mark_leaf(module: nn.Module) -> None:
    """Let DeepSpeed, should it come, gather all weights of a module for one call."""
    module.__dict__[_LEAF] = True


def unmark_leaf(module: nn.Module) -> None:
    """Undo `mark_leaf`."""
    module.__dict__.pop(_LEAF, None)


def check_not_begun(model: nn.Module) -> None:
    """Check that ZeRO-3 has not put its hooks on the modules of a model yet. Raises ModelError."""
    if any("ds_id" in vars(module) for module in model.modules()):
        raise ModelError(
            f"{type(model).__name__} is under DeepSpeed's ZeRO-3 already, which gathers weights for modules that pieces run past.\n"
            "Call minisequence before deepspeed.initialize, or before Trainer is made."
        )


def has_shards(module: nn.Module) -> bool:
    """Whether ZeRO-3 shards any of a module's weights."""
    return any(hasattr(weight, "ds_id") for weight in module.parameters())


def gather(modules: Iterable[nn.Module]) -> list[Any]:
    """Make the sharded weights of modules whole, and give out those that were not."""
    weights: list[Any] = [weight for module in modules for weight in module.parameters() if hasattr(weight, "ds_id")]
    missing = list({id(weight): weight for weight in weights if weight.ds_status.name != "AVAILABLE"}.values())
    if missing:
        with torch.no_grad():
            missing[0].all_gather(param_list=missing)
    return missing


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context the sharded weights of modules are whole; afterwards they are as they were."""
    missing = gather(modules)
    try:
        yield
    finally:
        if missing:
            missing[0].partition(param_list=missing, has_been_updated=False)
