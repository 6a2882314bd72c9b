"""One of two real ranks under FSDP1 that train adapters: `python -m tests.tracing.two_ranks_flat_adapters RANK FOLDER`; see two_ranks.py."""

from __future__ import annotations

from typing import Any

from mstplan.step.recipe import Recipe, strategy

from . import two_ranks

CONFIG = {**two_ranks.CONFIG, "num_hidden_layers": 3}
RANK = 48
"""Of adapters: their sizes are no other tensor's."""
ALL: dict[str, Any] = {"lora_rank": RANK, "lora_targets": ("all-linear",)}


def recipes() -> dict[str, Recipe]:
    both: dict[str, Any] = {"gpus": 2, "sharding": "fsdp1", "precision": "fp32", "attention": "eager"}
    return {
        "standard": strategy("standard", **both, **ALL),
        "checkpoint": strategy("checkpoint", **both, **ALL),
        "of attention, not ahead": strategy("checkpoint", **both, lora_rank=RANK, backward_prefetch="none"),
        "not ahead": strategy("checkpoint", **both, **ALL, backward_prefetch="none", input_gradients=True),
        "accumulation": strategy("checkpoint", **both, lora_rank=RANK, accumulation=2, input_gradients=True),
        "clipped": strategy("checkpoint", **both, **ALL, max_grad_norm=1.0),
        "views of weights": strategy("checkpoint", **both, **ALL, use_orig_params=True),
        "reentrant": strategy("checkpoint", **both, **ALL, checkpoint="reentrant", input_gradients=True),
    }


def mixed_recipes() -> dict[str, Recipe]:
    """Of which only what FSDP1 makes is compared: the CPU's kernels for bf16 take other buffers than a trace has."""
    both: dict[str, Any] = {"gpus": 2, "sharding": "fsdp1", "precision": "bf16", "attention": "eager"}
    adapters = strategy("checkpoint", **both, **ALL)
    return {
        "adapters in fp32 beside bf16": adapters,
        "adapters gathered in bf16": adapters.changed(autocast=True, reduce_dtype="bf16"),
        "beside 4 bits": adapters.changed(autocast=True, reduce_dtype="bf16", quantize="nf4", quant_storage="bf16"),
        "in bf16 beside 4 bits": adapters.changed(
            quantize="fp4", double_quantize=True, quant_storage="bf16", adapter_dtype="bf16"
        ),
        "fp32 beneath adapters": adapters.changed(precision="mixed"),
        "beside autocast": adapters.changed(
            autocast=True, reduce_dtype="bf16", use_orig_params=True, backward_prefetch="none"
        ),
        "beside autocast and 4 bits": adapters.changed(
            autocast=True, reduce_dtype="bf16", use_orig_params=True, quantize="nf4", quant_storage="bf16"
        ),
    }


if __name__ == "__main__":
    two_ranks.main(recipes(), config=CONFIG, once=mixed_recipes())
