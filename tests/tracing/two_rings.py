"""One of two real ranks on the CPU in a ring: `python -m tests.tracing.two_rings RANK FOLDER`; see two_ranks.py. Each also trains on its part of
a batch, for whose loss and gradients tests/tracing/test_ring.py has a single process beside it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mstplan.step.recipe import Recipe, strategy
from mstplan.train.step import TrainingStep

from .two_ranks import CHUNKS, TOKENS
from .two_sharers import record_and_train, seeded, whole_batch

MODELS: dict[str, dict[str, Any]] = {
    "of as many heads of keys": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "of fewer heads of keys": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "of one head of keys": {"num_attention_heads": 4, "num_key_value_heads": 1},
}


def recipes() -> dict[str, Recipe]:
    both: dict[str, Any] = {"gpus": 2, "context_parallel": 2, "precision": "fp32"}
    return {
        "standard": strategy("standard", **both),
        "mst": strategy("mst", **both, **CHUNKS),
        "mst-layer": strategy("mst-layer", **both, **CHUNKS, attention_groups=1),
        "selective": strategy("checkpoint", **both, checkpoint="selective"),
        "two rows, one rank's keys at a time": strategy("checkpoint", **both, batch=2, rotate_method="alltoall"),
        "fsdp": strategy("mst", **both, **CHUNKS, sharding="fsdp"),
    }


def own_tokens(rank: int, ranks: int) -> torch.Tensor:
    """Places of a rank's tokens: a piece of the head, and the one that mirrors it of the tail."""
    pieces = torch.arange(TOKENS).chunk(2 * ranks)
    return torch.cat([pieces[rank], pieces[-1 - rank]])


def train(config: dict[str, Any], recipe: Recipe, rank: int) -> dict[str, Any]:
    """The loss of the whole sequences, and the gradients that all ranks have in the end, by name."""
    step = TrainingStep(seeded(config, recipe), recipe, TOKENS)  # type: ignore[arg-type]
    places = own_tokens(rank, 2)
    assert step.positions is not None and torch.equal(step.positions[0], places)
    step.tokens, step.labels = (whole[:, places].contiguous() for whole in whole_batch(recipe.batch))
    step.beside["shift_labels"] = step.labels
    step.optimizer = None
    loss = step.run()
    dist.all_reduce(loss)
    return {"loss": loss / 2, "gradients": {n: w.grad for n, w in step.model.named_parameters()}}


if __name__ == "__main__":
    record_and_train(recipes(), MODELS, train)
