"""Weights by the device mesh that they are on: no operation of torch over many tensors spans two meshes, so that what clips gradients and what steps
weights goes over one mesh after the other (transformers' Trainer, create_optimizer and _mixed_mesh_grad_norm)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Each = TypeVar("Each")


def by_mesh(weights: Iterable[Each], mesh_of: Callable[[Each], Hashable]) -> list[list[Each]]:
    """The weights of each mesh, meshes in the order of their first weight. mesh_of: what tells a weight's mesh from others."""
    groups: dict[Hashable, list[Each]] = {}
    for weight in weights:
        groups.setdefault(mesh_of(weight), []).append(weight)
    return list(groups.values())
