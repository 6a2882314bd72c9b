"""A router that gives each expert as many tokens, in the place of what a model's own chose."""

from __future__ import annotations

import torch
from torch import nn

EXPERTS = 8
_MADE: dict[torch.Size, torch.Tensor] = {}


def route_evenly(model: nn.Module) -> None:
    """Give experts, in the place of what the router chose, each in its turn."""

    def choose(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, chosen, scores = args
        return x, even(chosen.shape), scores

    for module in model.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
            module.register_forward_pre_hook(choose)


def even(shape: torch.Size) -> torch.Tensor:
    """Numbers of experts (tokens, experts that a token visits), made once."""
    if shape not in _MADE:
        _MADE[shape] = (torch.arange(shape.numel()) % EXPERTS).view(shape)
    return _MADE[shape]
