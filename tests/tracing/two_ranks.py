"""One of two real ranks on the CPU: `python -m tests.tracing.two_ranks RANK FOLDER`.

Each runs a few steps of every recipe below under FSDP2 over gloo, and writes to FOLDER/rank{RANK}.json what the last of them
allocated; those of two_replicas.py run under DDP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mstplan.measuring.allocations import record_allocations
from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing.expert_parallel import spread_experts
from mstplan.tracing.fsdp import mesh_of, shard_model
from mstplan.tracing.recorder import local_tensor
from mstplan.tracing.tensor_parallel import split_over_ranks
from mstplan.train.step import TrainingStep, build_model, read_settings

from ..ranks import in_group
from .even_router import route_evenly

TOKENS = 96
# Not to be divided by two: the vocabulary. Weights are larger than what a layer makes of 96 tokens, so that sizes tell them apart.
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 640,
    "vocab_size": 1001,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
RUNS = 5
"""gloo's thread may hold on to a finished collective's buffers for a moment more; it does not in all of so many steps."""
CHUNKS = {"mlp_chunks": 3, "loss_chunks": 2}


def recipes() -> dict[str, Recipe]:
    both: dict[str, Any] = {"gpus": 2, "sharding": "fsdp", "precision": "fp32", "attention": "eager"}
    return {
        "standard": strategy("standard", **both),
        "checkpoint": strategy("checkpoint", **both),
        "mst": strategy("mst", **both, **CHUNKS),
        "mst-layer": strategy("mst-layer", **both, **CHUNKS, attention_groups=2),
        "optimizer in backward": strategy("checkpoint", **both, optimizer_in_backward=True),
        "accumulation": strategy("checkpoint", **both, accumulation=3),
        "accumulation in chunks": strategy("mst", **both, **CHUNKS, accumulation=2),
        "reentrant": strategy("checkpoint", **both, checkpoint="reentrant"),
        "every second": strategy("checkpoint", **both, checkpoint="every-2"),
        "selective": strategy("checkpoint", **{**both, "attention": "sdpa"}, checkpoint="selective"),
    }


def mixed_recipes() -> dict[str, Recipe]:
    """Of which only what FSDP2 makes is compared: the CPU's kernels for bf16 take other buffers than a trace has."""
    both: dict[str, Any] = {"gpus": 2, "sharding": "fsdp", "precision": "mixed", "attention": "eager"}
    return {
        "sums in bf16": strategy("checkpoint", **both, reduce_dtype="bf16"),
        "sums in bf16, accumulated": strategy("checkpoint", **both, reduce_dtype="bf16", accumulation=3),
        "sums in fp32": strategy("checkpoint", **both),
    }


def resident(step: TrainingStep) -> int:
    """Bytes of this rank's weights, buffers and optimizer states."""
    optimizers = step.backward_optimizers or ([step.optimizer] if step.optimizer is not None else [])
    states = [t for o in optimizers for state in o.state.values() for t in state.values() if torch.is_tensor(t)]
    return _bytes([*step.model.parameters(), *step.model.buffers(), *states])


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum({s.data_ptr(): s.nbytes() for s in (local_tensor(t).untyped_storage() for t in tensors)}.values())


def run(recipe: Recipe, runs: int = RUNS, config: dict[str, Any] = CONFIG) -> dict[str, Any]:
    settings = read_settings(config, whole=bool(recipe.images))
    model = build_model(settings, recipe, recipe.attention, "cpu")
    spread = recipe.expert_parallel > 1
    mesh = mesh_of("cpu", recipe) if not spread and (recipe.sharded or recipe.tensor_parallel > 1) else None
    if mesh is not None and recipe.tensor_parallel > 1:
        split_over_ranks(model, recipe, mesh)
    if spread:
        spread_experts(model, recipe)
        route_evenly(model)
    elif mesh is not None and recipe.sharded:
        shard_model(model, recipe, mesh)
    step = TrainingStep(model, recipe, TOKENS)
    step.run()
    there = resident(step)

    def again(mark: Any) -> None:
        mark("forward")
        step.renew_batch()
        step.images = {name: tensor.clone() for name, tensor in step.images.items()}
        step.run(mark)

    seen = [record_allocations(again).events for _ in range(runs)]
    return {
        "resident": there,
        "buckets": step.gradient_buckets_bytes,
        "runs": [[[e.bytes, e.phase, e.address, list(e.operations)] for e in events] for events in seen],
    }


def main(
    recipes: Mapping[str, Recipe],
    runs: int = RUNS,
    ranks: int = 2,
    and_then: Callable[[int, Path], None] = lambda rank, folder: None,
    config: dict[str, Any] = CONFIG,
    configs: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    once: Mapping[str, Recipe] = MappingProxyType({}),
) -> None:
    """configs: of recipes whose model is another, by their names. once: recipes of which one step is enough."""

    def record(rank: int, folder: Path) -> None:
        of_all = [(recipes, runs), (once, 1)]
        found = {
            name: run(one, times, configs.get(name, config)) for some, times in of_all for name, one in some.items()
        }
        (folder / f"rank{rank}.json").write_text(json.dumps(found))
        and_then(rank, folder)

    in_group(record, ranks)


if __name__ == "__main__":
    main(recipes(), once=mixed_recipes())
