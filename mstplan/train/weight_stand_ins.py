"""Running a module on stand-ins for its weights, so that a chunk's gradients touch nothing but themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import ModelError


@contextmanager
def swap_weights(modules: Iterable[nn.Module], weights: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Within the context the modules compute with detached copies (same storage) of `weights`, which are given out.

    Hooks on the real weights, and the graphs they belong to, see the sum over all chunks only, once.
    """
    leaves = {id(w): w.detach().requires_grad_() for w in weights}
    swapped: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    for part in (part for module in modules for part in module.modules()):
        for name, weight in part._parameters.items():
            if weight is not None and id(weight) in leaves:
                swapped.append((part._parameters, name, weight))
    try:
        for parameters, name, weight in swapped:
            parameters[name] = leaves[id(weight)]  # type: ignore[assignment]
        yield [leaves[id(w)] for w in weights]
    finally:
        for parameters, name, weight in swapped:
            parameters[name] = weight


def trained_weights(*modules: nn.Module) -> list[torch.Tensor]:
    """Each once, in the modules' order. Raises ModelError for weights that are not there as a whole."""
    return own_weights([part for module in modules for part in module.modules()])


def own_weights(parts: Sequence[nn.Module]) -> list[torch.Tensor]:
    """`trained_weights` of the modules themselves, without those of modules in them."""
    for part in parts:
        if any(torch.is_tensor(value) and value.requires_grad for value in vars(part).values()):
            _refuse(part, "its weights are views of FSDP 1's flat one. Use FSDP 2 (fully_shard, or fsdp_version: 2)")
    weights = {id(w): w for part in parts for w in part.parameters(recurse=False) if w.requires_grad}
    for part in parts:
        if any(hasattr(w, "placements") for w in part.parameters(recurse=False)):
            _refuse(part, "its weights are sharded by themselves. Shard whole decoder layers with FSDP 2 (fully_shard)")
    return list(weights.values())


def _refuse(part: nn.Module, why: str) -> NoReturn:
    raise ModelError(f"cannot run {type(part).__name__} in chunks: {why},\nor set mlp_chunks=1 and loss_chunks=1.")


def current_autocast(device: str) -> dict[str, Any]:
    """The autocast of this moment, for a chunk. Without its cache: that would keep the casts of every chunk's stand-in weights
    until autocast ends."""
    state = {"device_type": device, "enabled": False, "cache_enabled": False}
    if torch.amp.is_autocast_available(device):
        state |= {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}
    return state
