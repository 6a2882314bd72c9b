"""One of two real ranks under FSDP2 that train a part of the weights: `python -m tests.tracing.two_ranks_in_part RANK FOLDER`; see two_ranks.py."""

from __future__ import annotations

from typing import Any

from mstplan.step.recipe import Recipe, strategy

from .two_ranks import CHUNKS, main

RANK = 48
"""Of adapters: their sizes are no other tensor's."""


def recipes() -> dict[str, Recipe]:
    both: dict[str, Any] = {"gpus": 2, "sharding": "fsdp", "precision": "fp32", "attention": "eager"}
    return {
        "frozen": strategy("checkpoint", **both, freeze=("embeddings", "norms")),
        "upper layers": strategy("standard", **both, train=("*.layers.3.*", "*.layers.4.*"), freeze=("norms",)),
        "adapters": strategy("checkpoint", **both, lora_rank=RANK),
        "adapters in chunks": strategy("mst", **both, **CHUNKS, lora_rank=RANK, accumulation=2),
        "adapters, inputs with gradients": strategy("standard", **both, lora_rank=RANK, input_gradients=True),
    }


def mixed_recipes() -> dict[str, Recipe]:
    """Of which only what FSDP2 makes is compared: the CPU's kernels for bf16 take other buffers than a trace has, and TRL's loss is traced as on a
    GPU alone."""
    both: dict[str, Any] = {"gpus": 2, "sharding": "fsdp", "precision": "bf16", "attention": "eager"}
    adapters = strategy("checkpoint", **both, lora_rank=RANK)
    return {
        "adapters in fp32 beside bf16": adapters,
        "adapters gathered in bf16": adapters.changed(autocast=True, reduce_dtype="bf16"),
        "adapters beside 4 bits": adapters.changed(autocast=True, quantize="nf4"),
        "adapters beside 4 bits in shards": adapters.changed(autocast=True, quantize="nf4", quant_storage="bf16"),
        "adapters in bf16 beside 4 bits in shards": adapters.changed(
            autocast=True, quantize="fp4", double_quantize=True, quant_storage="bf16", adapter_dtype="bf16"
        ),
        "fp32 beneath adapters": adapters.changed(precision="mixed"),
        "TRL's loss": strategy("checkpoint", **both, loss="trl"),
        "TRL's loss, adapters": adapters.changed(autocast=True, loss="trl"),
    }


if __name__ == "__main__":
    main(recipes(), once=mixed_recipes())
