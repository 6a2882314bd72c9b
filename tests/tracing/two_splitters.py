"""One of two real ranks on the CPU that split every matrix: `python -m tests.tracing.two_splitters RANK FOLDER`; see two_ranks.py. Each also trains
on a batch, for whose loss and gradients tests/tracing/test_tensor_parallel.py has a single process beside it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing.fsdp import mesh_of
from mstplan.tracing.tensor_parallel import split_over_ranks

from . import two_ranks
from .two_ranks import CONFIG
from .two_sharers import seeded, whole_batch

MODELS: dict[str, dict[str, Any]] = {
    "llama": CONFIG | {"vocab_size": 1000},
    "qwen3": CONFIG
    | {"vocab_size": 1000, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 64},
}
"""With vocabularies that two ranks divide; Qwen3 norms each head's queries and keys."""

NORMS: dict[str, Any] = {"sequence_parallel_norms": True}
LOSS: dict[str, Any] = {**NORMS, "loss_parallel": True}


def recipes() -> dict[str, Recipe]:
    both: dict[str, Any] = {"gpus": 2, "tensor_parallel": 2, "precision": "fp32", "adamw_kernel": "for-loop"}
    return {
        "standard": strategy("standard", **both),
        "checkpoint": strategy("checkpoint", **both),
        "two rows": strategy("checkpoint", **both, batch=2),
        "fused, clipped": strategy("checkpoint", **both | {"adamw_kernel": "fused"}, max_grad_norm=1.0),
        "foreach": strategy("checkpoint", **both | {"adamw_kernel": "foreach"}),
        "accumulated": strategy("standard", **both, accumulation=2),
        "accumulated, fused, clipped": strategy(
            "standard", **both | {"adamw_kernel": "fused"}, accumulation=3, max_grad_norm=1.0
        ),
        "autocast": strategy("checkpoint", **both | {"precision": "mixed"}),
        "selective": strategy("checkpoint", **both, checkpoint="selective"),
        "reentrant": strategy("checkpoint", **both, checkpoint="reentrant"),
        "every second": strategy("checkpoint", **both, checkpoint="every-2"),
        "norms over tokens": strategy("standard", **both, **NORMS),
        "norms over tokens, two rows": strategy("standard", **both, **NORMS, batch=2, accumulation=2),
        "norms over tokens, fused, clipped": strategy(
            "checkpoint", **both | NORMS | {"adamw_kernel": "fused"}, max_grad_norm=1.0
        ),
        "loss over the vocabulary": strategy("standard", **both, **LOSS),
        "loss over the vocabulary, two rows": strategy(
            "checkpoint", **both | LOSS | {"adamw_kernel": "foreach"}, batch=2
        ),
    }


TRAINED = ("standard", "norms over tokens", "loss over the vocabulary")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(weight.grad).clone() for name, weight in model.named_parameters() if weight.grad is not None}


def loss_of(model: nn.Module, ids: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The loss of tokens, when its backward is done."""
    places = {"position_ids": torch.arange(ids.shape[1])[None]} if recipe.sequence_parallel_norms else {}
    with loss_parallel() if recipe.loss_parallel else nullcontext():
        loss = model(input_ids=ids, labels=ids, **places).loss
        loss.backward()
    return whole(loss.detach())


def train(config: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The loss, and whole gradients, by name; and their sum with those of the same tokens backwards."""
    model = seeded(config, recipe)
    split_over_ranks(model, recipe, mesh_of("cpu", recipe))  # type: ignore[arg-type]
    ids = whole_batch(1)[0] % 1000
    loss = loss_of(model, ids, recipe)
    gradients = whole_gradients(model)
    loss_of(model, ids.flip(1), recipe)
    return {"loss": loss, "gradients": gradients, "accumulated": whole_gradients(model)}


def and_train(rank: int, folder: Path) -> None:
    found = {(name, way): train(config, recipes()[way]) for name, config in MODELS.items() for way in TRAINED}
    if rank == 0:
        torch.save(found, folder / "trained.pt")


if __name__ == "__main__":
    two_ranks.main(recipes(), and_then=and_train, config=MODELS["llama"])
