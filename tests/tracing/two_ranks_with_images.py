"""One of two real ranks under FSDP2 or DDP, whose sequences have images: `python -m tests.tracing.two_ranks_with_images RANK FOLDER`; see two_ranks.py."""

from __future__ import annotations

from typing import Any

from mstplan.step.recipe import Recipe, strategy

from .two_ranks import CONFIG, main

IMAGE = 1000  # its token id
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
TEXT = {**{name: CONFIG[name] for name in (*SIZES, "vocab_size")}, "max_position_embeddings": 512, "pad_token_id": 0}
VIT = {
    "image_size": 56,
    "patch_size": 14,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
WHOLE = {"image_token_id": IMAGE, "image_token_index": IMAGE}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3",
        **WHOLE,
        "mm_tokens_per_image": 4,
        "text_config": {**TEXT, "model_type": "gemma3_text", "head_dim": 64, "query_pre_attn_scalar": 64},
        "vision_config": {**VIT, "model_type": "siglip_vision_model", "vision_use_head": False},
    },
    "llava": {
        "model_type": "llava",
        **WHOLE,
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VIT, "model_type": "clip_vision_model"},
    },
}


def config_of(name: str) -> dict[str, Any]:
    return CONFIGS[name.split(", ")[0]]


def recipes() -> dict[str, Recipe]:
    both: dict[str, Any] = {"gpus": 2, "precision": "fp32", "images": 2}
    shards, copies = {**both, "sharding": "fsdp"}, {**both, "sharding": "ddp"}
    frozen: dict[str, Any] = {"freeze": ("vision",)}
    return {
        "gemma3, trained tower": strategy("checkpoint", **shards),
        "gemma3, frozen tower, accumulation": strategy("checkpoint", **shards, **frozen, accumulation=2),
        "gemma3, adapters": strategy("checkpoint", **shards, lora_rank=48),
        "gemma3, trained tower, ddp": strategy("checkpoint", **copies),
        "llava, trained tower": strategy("checkpoint", **shards),
        "llava, trained tower, no checkpoints": strategy("standard", **shards),
        "llava, frozen tower": strategy("checkpoint", **shards, **frozen),
        "llava, adapters, no checkpoints": strategy("standard", **shards, lora_rank=48),
        "llava, frozen tower, ddp": strategy("checkpoint", **copies, **frozen),
    }


if __name__ == "__main__":
    configs = {name: config_of(name) for name in recipes()}
    main(recipes(), configs=configs)
