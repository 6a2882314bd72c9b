"""Running a module on stand-ins for its weights, so that a chunk's gradients touch nothing but themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def standing_in(module: nn.Module, weights: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Within the context `module` computes with detached copies (same storage) of `weights`, which are given out.

    Hooks on the real weights, and the graphs they belong to, see the sum over all chunks only, once.
    """
    leaves = {id(w): w.detach().requires_grad_() for w in weights}
    swapped: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    for part in module.modules():
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


def trained_weights(module: nn.Module) -> list[torch.Tensor]:
    return [weight for weight in module.parameters() if weight.requires_grad]
