"""One of four real ranks on the CPU, two of which split matrices and two share the parts: `python -m tests.tracing.four_splitters RANK FOLDER`; see
two_splitters.py. Each trains on a row of a batch of two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing.fsdp import mesh_of, shard_model
from mstplan.tracing.tensor_parallel import split_over_ranks

from . import two_ranks
from .two_sharers import seeded, whole_batch
from .two_splitters import LOSS, MODELS, NORMS, loss_of, whole_gradients


def recipes() -> dict[str, Recipe]:
    all_four: dict[str, Any] = {"gpus": 4, "tensor_parallel": 2, "sharding": "fsdp", "precision": "fp32"}
    return {
        "in shards": strategy("standard", **all_four),
        "in shards, checkpoint": strategy("checkpoint", **all_four),
        "in shards, foreach": strategy("checkpoint", **all_four, adamw_kernel="foreach"),
        "in shards, clipped": strategy("checkpoint", **all_four, max_grad_norm=1.0),
        "in shards, for-loop": strategy("checkpoint", **all_four, adamw_kernel="for-loop", batch=2),
        "in shards, accumulated": strategy("standard", **all_four, accumulation=3),
        "in shards, scattered each time": strategy("standard", **all_four, accumulation=2, sync_each_batch=True),
        "in shards, norms over tokens": strategy("checkpoint", **all_four, **NORMS),
        "in shards, norms over tokens, accumulated": strategy("standard", **all_four, **NORMS, accumulation=2, batch=2),
        "in shards, loss over the vocabulary": strategy("checkpoint", **all_four, **LOSS, max_grad_norm=1.0),
    }


TRAINED = ("in shards", "in shards, norms over tokens", "in shards, loss over the vocabulary")


def train(config: dict[str, Any], recipe: Recipe, rank: int) -> dict[str, Any]:
    """The loss of both rows, and whole gradients of their mean, by name; and of the sum of two batches, the first of which is not scattered."""
    model, mesh = seeded(config, recipe), mesh_of("cpu", recipe)
    split_over_ranks(model, recipe, mesh)  # type: ignore[arg-type]
    shard_model(model, recipe, mesh)
    ids = whole_batch(2)[0][rank // 2 :][:1] % 1000
    summed = loss_of(model, ids, recipe)
    dist.all_reduce(summed)
    gradients = whole_gradients(model)
    model.zero_grad()
    for batch, is_last in ((ids, False), (ids.flip(1), True)):
        model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        loss_of(model, batch, recipe)
    return {"loss": summed / 4, "gradients": gradients, "accumulated": whole_gradients(model)}


def and_train(rank: int, folder: Path) -> None:
    found = {(name, way): train(config, recipes()[way], rank) for name, config in MODELS.items() for way in TRAINED}
    if rank == 0:
        torch.save(found, folder / "trained.pt")


if __name__ == "__main__":
    two_ranks.main(recipes(), ranks=4, and_then=and_train, config=MODELS["llama"])
