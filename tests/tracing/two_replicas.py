"""One of two real ranks under DDP on the CPU: `python -m tests.tracing.two_replicas RANK FOLDER`; see two_ranks.py."""

from __future__ import annotations

from typing import Any

from mstplan.step.recipe import Recipe, strategy

from .two_ranks import CHUNKS, main


def recipes() -> dict[str, Recipe]:
    both: dict[str, Any] = {"gpus": 2, "sharding": "ddp", "precision": "fp32", "attention": "eager"}
    return {
        "standard": strategy("standard", **both),
        "mst": strategy("mst", **both, **CHUNKS),
        "mst-layer": strategy("mst-layer", **both, **CHUNKS, attention_groups=2),
        "accumulation": strategy("checkpoint", **both, accumulation=3),
        "frozen": strategy("checkpoint", **both, freeze=("embeddings", "norms")),
        "adapters": strategy("checkpoint", **both, lora_rank=48),
    }


if __name__ == "__main__":
    main(recipes(), runs=2)
