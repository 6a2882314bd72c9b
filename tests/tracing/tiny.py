"""A llama small enough that a trace of it takes a moment, as a config.json, and steps of it."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from mstplan.step.recipe import Recipe
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import trace

TINY: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 768,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def write_tiny(folder: Path, name: str = "tiny", **changes: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**TINY, **changes}))
    return path


@lru_cache(maxsize=32)
def step_of(recipe: Recipe, seq_len: int, whole: bool = False) -> Trace:
    return trace(TINY, recipe, seq_len, whole=whole)
