"""One of two real ranks under FSDP1: `python -m tests.tracing.two_ranks_flat RANK FOLDER`; see two_ranks.py."""

from __future__ import annotations

from typing import Any

from mstplan.step.recipe import Recipe, strategy

from .two_ranks import main


def recipes() -> dict[str, Recipe]:
    both: dict[str, Any] = {"gpus": 2, "sharding": "fsdp1", "precision": "fp32", "attention": "eager"}
    return {
        "standard": strategy("standard", **both),
        "checkpoint": strategy("checkpoint", **both),
        "no prefetch": strategy("checkpoint", **both, backward_prefetch="none"),
        "accumulation": strategy("checkpoint", **both, accumulation=3),
        "clipped": strategy("checkpoint", **both, max_grad_norm=1.0),
        "views of weights, clipped": strategy("checkpoint", **both, use_orig_params=True, max_grad_norm=1.0),
        "views of weights, accumulation": strategy("checkpoint", **both, use_orig_params=True, accumulation=3),
        "reentrant": strategy("checkpoint", **both, checkpoint="reentrant"),
    }


def synced_recipes() -> dict[str, Recipe]:
    """Of which a trace has the last micro-batch."""
    both: dict[str, Any] = {"gpus": 2, "sharding": "fsdp1", "precision": "fp32", "attention": "eager"}
    return {"each batch scattered": strategy("checkpoint", **both, accumulation=2, sync_each_batch=True)}


def mixed_recipes() -> dict[str, Recipe]:
    """Of which only what FSDP1 makes is compared: the CPU's kernels for bf16 take other buffers than a trace has."""
    both: dict[str, Any] = {"gpus": 2, "sharding": "fsdp1", "precision": "mixed", "attention": "eager"}
    return {
        "sums in bf16": strategy("checkpoint", **both, reduce_dtype="bf16"),
        "sums in fp32": strategy("checkpoint", **both),
        "sums in fp32, accumulated": strategy("checkpoint", **both, accumulation=3),
    }


if __name__ == "__main__":
    main({**recipes(), **synced_recipes()}, once=mixed_recipes())
