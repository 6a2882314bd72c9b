"""One of two real ranks on the CPU that split every matrix: `python -m tests.tracing.two_splitters RANK FOLDER`; see two_ranks.py. Each also trains
on a batch, for whose loss and gradients tests/tracing/test_tensor_parallel.py has a single process beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
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
    }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(config: dict[str, Any]) -> dict[str, Any]:
    """The loss, and whole gradients, by name."""
    recipe = recipes()["standard"]
    model = seeded(config, recipe)
    split_over_ranks(model, recipe, mesh_of("cpu", recipe))  # type: ignore[arg-type]
    ids, _ = whole_batch(1)
    loss = model(input_ids=ids % 1000, labels=ids % 1000).loss
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": {n: whole(w.grad) for n, w in model.named_parameters() if w.grad is not None},
    }


def and_train(rank: int, folder: Path) -> None:
    found = {name: train(config) for name, config in MODELS.items()}
    if rank == 0:
        torch.save(found, folder / "trained.pt")


if __name__ == "__main__":
    two_ranks.main(recipes(), and_then=and_train, config=MODELS["llama"])
