"""Mixtures of experts, switch by switch: at every instant the formula's peak is the trace's. Shipped models are in checking/test_rungs.py."""

from __future__ import annotations

import json
from itertools import cycle
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from mstplan.errors import RecipeError
from mstplan.plan.layout import layout_of, step_sizes
from mstplan.plan.solve import fixed_chunks
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.steps import step
from mstplan.tracing.tracer import trace

from ..recipes import in_chunks

CARD = card("h100")
PLANS = ("standard", "checkpoint", "mst", "mst-offload", "mst-layer")
LENGTHS = (4096, 32768, 262144)
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 16000,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA4 = {
    "intermediate_size": 512,
    "intermediate_size_mlp": 2816,
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
}
LATENT = {"q_lora_rank": 256, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128}
MIXTURES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {"num_experts": 16}),
    ("qwen3_moe", {"num_experts": 16, "norm_topk_prob": True}),
    ("qwen2_moe", {"num_experts": 16}),
    ("granitemoe", {"num_local_experts": 16, "intermediate_size": 512}),
    ("glm4_moe", {"n_routed_experts": 16, "head_dim": 128}),
    ("glm4_moe", {"n_routed_experts": 16, "head_dim": 128, "use_qk_norm": True, "attention_bias": True, "n_group": 4}),
    ("dots1", {"n_routed_experts": 16, "n_shared_experts": 2, "first_k_dense_replace": 1}),
    ("olmoe", {"num_experts": 16, "num_key_value_heads": 8}),
    ("minimax_m2", {"num_local_experts": 16, "intermediate_size": 512}),
    ("ernie4_5_moe", {"moe_num_experts": 16, "moe_k": 4}),
    ("llama4_text", LLAMA4),
    ("llama4_text", {**LLAMA4, "interleave_moe_layer_step": 2, "use_qk_norm": False, "attn_temperature_tuning": False}),
    ("hunyuan_v1_moe", {"num_experts": 16, "moe_topk": 4, "head_dim": 128, "intermediate_size": 512}),
    ("granitemoeshared", {"num_local_experts": 16, "intermediate_size": 512, "shared_intermediate_size": 1024}),
    ("glm4_moe_lite", {"n_routed_experts": 16, "num_key_value_heads": 8, **LATENT}),
    ("solar_open", {"n_routed_experts": 16, "head_dim": 128}),
    ("flex_olmo", {"num_experts": 16, "num_key_value_heads": 8, "intermediate_size": 512}),
    ("exaone_moe", {"num_experts": 16, "num_hidden_layers": 4, "sliding_window": 1024}),
    ("mellum", {"num_experts": 16, "head_dim": 128, "sliding_window": 1024}),
    ("ernie4_5_moe", {"moe_num_experts": 16, "moe_k": 4, "use_bias": True, "moe_num_shared_experts": 0}),
]
NAMES = [f"{family}-{number}" for number, (family, _) in enumerate(MIXTURES)]
EXACT = 0.0005


def differences(family: str, changes: dict[str, Any], recipe: Recipe, seq_len: int) -> dict[str, float]:
    """Of every instant, the formula's difference as a share of the trace's peak."""
    config = json.loads(CONFIG_MAPPING[family](**{**SIZES, **changes}).to_json_string(use_diff=False))
    model, chunks = read_config(config, family), fixed_chunks(recipe)
    told = step(model, layout_of(model, recipe, chunks, seq_len, CARD.platform), CARD.gpu.workspaces_bytes)
    by_name = {instant.name: instant.bytes for instant in told.instants(step_sizes(recipe, seq_len, chunks))}
    traced = trace(config, recipe, seq_len, workspace=CARD.gpu.workspaces_bytes, platform=CARD.platform)
    return {peak.instant: by_name[peak.instant] / peak.bytes - 1 for peak in traced.peaks}


def in_rotation() -> list[tuple[str, dict[str, Any], str, int]]:
    """Each mixture with two strategies and lengths; all of them come."""
    others = cycle((plan, seq_len) for seq_len in LENGTHS for plan in PLANS)
    return [(*mixture, *next(others)) for mixture in MIXTURES for _ in range(2)]


@pytest.mark.parametrize(("family", "changes", "plan", "seq_len"), in_rotation())
def test_every_instant(family: str, changes: dict[str, Any], plan: str, seq_len: int) -> None:
    off = differences(family, changes, in_chunks(strategy(plan), 16, 32), seq_len)
    assert max(map(abs, off.values())) < EXACT, off


def test_all_strategies_and_lengths_come() -> None:
    assert {case[2:] for case in in_rotation()} == {(plan, seq_len) for plan in PLANS for seq_len in LENGTHS}


@pytest.mark.parametrize(("family", "changes"), MIXTURES, ids=NAMES)
def test_adapters_on_all_linear_layers(family: str, changes: dict[str, Any]) -> None:
    recipe = in_chunks(strategy("mst", lora_rank=16, lora_targets=("all-linear",)), 16, 32)
    if family == "llama4_text":  # whose router is a linear layer that gives two tensors
        with pytest.raises(RecipeError, match="router of llama4_text"):
            differences(family, changes, recipe, 8192)
        recipe = recipe.changed(lora_targets=("attention",))
    off = differences(family, changes, recipe, 8192)
    assert max(map(abs, off.values())) < EXACT, off
