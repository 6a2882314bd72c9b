"""One of four real ranks on the CPU, two replicas of two: `python -m tests.tracing.four_ranks RANK FOLDER`; see two_ranks.py."""

from __future__ import annotations

from typing import Any

from mstplan.step.recipe import Recipe, strategy

from .two_ranks import main


def recipes() -> dict[str, Recipe]:
    both: dict[str, Any] = {"gpus": 4, "replicas": 2, "sharding": "fsdp", "precision": "fp32", "attention": "eager"}
    return {
        "replicas": strategy("checkpoint", **both),
        "replicas, accumulated": strategy("checkpoint", **both, accumulation=2),
        "replicas, optimizer in backward": strategy("checkpoint", **both, optimizer_in_backward=True),
    }


if __name__ == "__main__":
    main(recipes(), ranks=4)
