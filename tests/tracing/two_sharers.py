"""One of two real ranks on the CPU that share sequences: `python -m tests.tracing.two_sharers RANK FOLDER`; see two_ranks.py. Each also trains
on its part of a batch, for whose loss and gradients tests/tracing/test_ulysses.py has a single process beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mstplan.step.recipe import Recipe, strategy
from mstplan.train.step import TrainingStep, build_model, read_settings

from . import two_ranks
from .two_ranks import CHUNKS, CONFIG, TOKENS

MODELS: dict[str, dict[str, Any]] = {
    "of two heads a rank": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "of one head of keys a rank": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "of one head of keys for both": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "of one head a rank": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128},
}
"""The heads of attention, which the ranks share out in different ways."""


def recipes() -> dict[str, Recipe]:
    both: dict[str, Any] = {"gpus": 2, "sequence_parallel": 2, "precision": "fp32", "attention": "sdpa"}
    return {
        "standard": strategy("standard", **both),
        "mst": strategy("mst", **both, **CHUNKS),
        "mst-layer": strategy("mst-layer", **both, **CHUNKS, attention_groups=1),
        "mst-layer in groups": strategy("mst-layer", **both, **CHUNKS, attention_groups=2),
        "selective": strategy("checkpoint", **both, checkpoint="selective"),
        "two rows": strategy("checkpoint", **both, batch=2),
        "fsdp": strategy("mst", **both, **CHUNKS, sharding="fsdp"),
        "ddp": strategy("checkpoint", **both, sharding="ddp"),
    }


def seeded(config: dict[str, Any], recipe: Recipe) -> nn.Module:
    torch.manual_seed(0)
    return build_model(read_settings(config), recipe, "sdpa", "cpu")


def whole_batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (rows, TOKENS), labels shifted already."""
    chance = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(0, CONFIG["vocab_size"], (rows, TOKENS), generator=chance) for _ in range(2))
    return ids, labels


def train(config: dict[str, Any], recipe: Recipe, rank: int) -> dict[str, Any]:
    """The loss of the whole sequences, and the gradients that all ranks have in the end, by name."""
    step = TrainingStep(seeded(config, recipe), recipe, TOKENS)  # type: ignore[arg-type]
    part = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2)
    step.tokens, step.labels = (whole[:, part].contiguous() for whole in whole_batch(recipe.batch))
    step.optimizer = None
    loss = step.run()
    dist.all_reduce(loss)
    return {"loss": loss / 2, "gradients": {n: w.grad for n, w in step.model.named_parameters()}}


def pairs(recipes: dict[str, Recipe], models: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """What is trained: models by recipes whose weights are not shared out, and whose groups of heads the model's heads make."""
    return [
        (model, name)
        for model, heads in models.items()
        for name, recipe in recipes.items()
        if recipe.sharding == "none" and heads.get("num_key_value_heads", 0) % recipe.attention_groups == 0
    ]


def record_and_train(
    recipes: dict[str, Recipe],
    models: dict[str, dict[str, Any]],
    train: Callable[[dict[str, Any], Recipe, int], dict[str, Any]],
) -> None:
    """What `python -m MODULE RANK FOLDER` runs: steps of all recipes, then training of every model, by those whose weights are not shared out."""

    def and_train(rank: int, folder: Path) -> None:
        found = {
            (model, name): train(CONFIG | models[model], recipes[name], rank) for model, name in pairs(recipes, models)
        }
        if rank == 0:
            torch.save(found, folder / "trained.pt")

    two_ranks.main(recipes, and_then=and_train)


if __name__ == "__main__":
    record_and_train(recipes(), MODELS, train)
