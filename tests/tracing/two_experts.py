"""One of two real ranks on the CPU that share out experts: `python -m tests.tracing.two_experts RANK FOLDER`; see two_ranks.py. What their router chooses is
replaced (even_router.py)."""

from __future__ import annotations

from typing import Any

from mstplan.step.recipe import Recipe, strategy

from . import two_ranks
from .even_router import EXPERTS
from .two_ranks import CONFIG

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": CONFIG
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_hidden_layers": 3,
        "vocab_size": 1000,
        "head_dim": 64,
        "moe_intermediate_size": 192,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
    },
}


def recipes() -> dict[str, Recipe]:
    both: dict[str, Any] = {
        "gpus": 2,
        "expert_parallel": 2,
        "sharding": "fsdp",
        "precision": "fp32",
        "attention": "eager",
    }
    return {
        "standard": strategy("standard", **both),
        "checkpoint": strategy("checkpoint", **both),
        "two rows": strategy("checkpoint", **both, batch=2),
        "clipping": strategy("checkpoint", **both, max_grad_norm=1.0),
        "accumulation": strategy("checkpoint", **both, accumulation=3, max_grad_norm=1.0),
        "adapters": strategy("standard", **both, lora_rank=8, lora_targets=("attention",), max_grad_norm=1.0),
        "experts frozen": strategy("checkpoint", **both, freeze=("mlp",)),
        "experts and norms trained": strategy("standard", **both, train=("mlp", "norms")),
    }


def of_four() -> dict[str, Recipe]:
    """Of four ranks, which share out experts among all, or two by two, each of which has shards of its experts."""
    both: dict[str, Any] = {"gpus": 4, "sharding": "fsdp", "precision": "fp32", "attention": "eager"}
    return {
        "one of four": strategy("checkpoint", **both, expert_parallel=4),
        "two by two": strategy("checkpoint", **both, expert_parallel=2),
        "two by two, nothing run again": strategy("standard", **both, expert_parallel=2),
        "two by two, accumulation": strategy(
            "checkpoint", **both, expert_parallel=2, accumulation=3, max_grad_norm=1.0
        ),
    }


if __name__ == "__main__":
    two_ranks.main(recipes(), runs=6, config=MODELS["qwen3_moe"])
