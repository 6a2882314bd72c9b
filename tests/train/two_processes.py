"""One of two processes on the CPU: `python -m tests.train.two_processes RANK FOLDER`.

Each runs half of the batch under DDP or FSDP, for every case below. Rank 0 writes to FOLDER/differences.json, by case, how far
loss and gathered gradients are from those of one process with the whole batch, or the error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from mstplan.train import minisequence

from ..ranks import compare
from .llama import CHUNKS, Step, difference, small_llama, step, tokens

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "none": {"checkpoint": "none"},
    "layer": {"checkpoint": "layer"},
    "two layers": {"checkpoint": 2},
    "offload": {"offload": True},
    "layers in chunks": {"layer_in_chunks": True, "attention_groups": 1},
    "attention from the host": {"layer_in_chunks": True, "attention_groups": 1, "attention_on_host": True},
}


def shard(model: Any, head: str = "") -> nn.Module:
    """FSDP2 over every layer and the root. head: "alone" or "with norm", where it is sharded by itself as well."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if head:
        fully_shard(model.lm_head if head == "alone" else [model.model.norm, model.lm_head], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_parts(model: Any) -> nn.Module:
    """FSDP2 with every MLP sharded by itself."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer.mlp, mesh=mesh)
    return shard(model)


def shard_by_version_1(model: nn.Module, originals: bool) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=originals, device_id=torch.device("cpu"))


def chunked(model: nn.Module, checkpoint: str) -> nn.Module:
    return minisequence(model, **CHUNKS, **CHECKPOINTS[checkpoint])


def cases() -> dict[str, Callable[[], nn.Module]]:
    found: dict[str, Callable[[], nn.Module]] = {
        "DDP": lambda: DistributedDataParallel(small_llama()),
        "FSDP": lambda: shard(small_llama()),
    }
    for checkpoint in CHECKPOINTS:
        found[f"DDP, wrapped before, {checkpoint}"] = lambda c=checkpoint: DistributedDataParallel(
            chunked(small_llama(), c)
        )
        found[f"DDP, wrapped after, {checkpoint}"] = lambda c=checkpoint: chunked(
            DistributedDataParallel(small_llama()), c
        )
        found[f"FSDP, wrapped before, {checkpoint}"] = lambda c=checkpoint: shard(chunked(small_llama(), c))
        found[f"FSDP, wrapped after, {checkpoint}"] = lambda c=checkpoint: chunked(shard(small_llama()), c)
    for head in ("alone", "with norm"):
        found[f"FSDP, head {head}"] = lambda h=head: shard(chunked(small_llama(), "layer"), h)
    found["DDP, unused parameters looked for"] = lambda: DistributedDataParallel(
        chunked(small_llama(), "layer"), find_unused_parameters=True
    )
    found["FSDP, MLPs by themselves"] = lambda: shard_parts(chunked(small_llama(), "layer"))
    for originals in (False, True):
        found[f"FSDP 1, {originals}"] = lambda o=originals: shard_by_version_1(chunked(small_llama(), "none"), o)
    found["DDP, a token lost"] = lambda: DistributedDataParallel(small_llama())
    return found


def half_step(model: nn.Module, ids: torch.Tensor) -> Step:
    """Loss, averaged over the processes, and whole gradients under the names of the model itself."""
    loss, gradients = step(model, ids)
    mean = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(mean)
    whole = {
        name: gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        for name, gradient in gradients.items()
    }
    return mean.item() / 2, {name.removeprefix("module."): gradient for name, gradient in whole.items()}


@cache
def whole_step() -> Step:
    return step(small_llama(), tokens(4, 13))


def off(name: str, rank: int) -> float:
    mine = tokens(4, 13)[2 * rank : 2 * rank + 2, : 12 if "lost" in name else 13]
    model = cases()[name]()
    return max(difference(half_step(model, mine), whole_step()) for _ in range(2))


if __name__ == "__main__":
    compare(cases(), off)
