"""One of two real ranks on the CPU that split every matrix: `python -m tests.tracing.two_splitters RANK FOLDER`; see two_ranks.py. Each also trains
on a batch, for whose loss and gradients tests/tracing/test_tensor_parallel.py has a single process beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

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
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(weight.grad).clone() for name, weight in model.named_parameters() if weight.grad is not None}


def train(config: dict[str, Any]) -> dict[str, Any]:
    """The loss, and whole gradients, by name; and their sum with those of the same tokens backwards."""
    recipe = recipes()["standard"]
    model = seeded(config, recipe)
    split_over_ranks(model, recipe, mesh_of("cpu", recipe))  # type: ignore[arg-type]
    ids = whole_batch(1)[0] % 1000
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = whole_gradients(model)
    model(input_ids=ids.flip(1), labels=ids.flip(1)).loss.backward()
    return {"loss": loss.detach(), "gradients": gradients, "accumulated": whole_gradients(model)}


def and_train(rank: int, folder: Path) -> None:
    found = {name: train(config) for name, config in MODELS.items()}
    if rank == 0:
        torch.save(found, folder / "trained.pt")


if __name__ == "__main__":
    two_ranks.main(recipes(), and_then=and_train, config=MODELS["llama"])
