"""Gemma 4's layers, which differ in heads, keys and widths and have inputs of their own: every instant of the formula is the trace's."""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING

from mstplan.errors import RecipeError
from mstplan.plan import solve
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.recipe import strategy
from mstplan.tracing.tracer import trace

from ..recipes import in_chunks

CARD = card("h100")
EXACT = 0.0005
KINDS = ["sliding_attention", "full_attention"] * 2
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "global_head_dim": 128,
    "layer_types": KINDS,
    "sliding_window": 1024,
    "vocab_size": 4000,
    "vocab_size_per_layer_input": 4000,
    "hidden_size_per_layer_input": 0,
}
SAME_KEYS = {"attention_k_eq_v": True, "num_global_key_value_heads": 2, "final_logit_softcapping": 30.0}
EXPERTS = {**SAME_KEYS, "enable_moe_block": True, "num_experts": 64, "top_k_experts": 8, "moe_intermediate_size": 96}
INPUTS = {"hidden_size_per_layer_input": 64}
SHARED = {**INPUTS, "num_hidden_layers": 8, "layer_types": KINDS * 2, "num_kv_shared_layers": 4}
MODELS = {
    "dense": SAME_KEYS,  # as the 31B
    "large heads": {"head_dim": 256, "global_head_dim": 512},
    "experts": EXPERTS,  # as the 26B-A4B
    "inputs of each layer": INPUTS,
    "shared keys": {**SHARED, "use_double_wide_mlp": True},  # as the E2B
}
STRATEGIES = ("standard", "checkpoint", "checkpoint-sqrt", "mst", "mst-offload", "mst-layer", "mst-layer-offload")
REFUSED = {
    "experts": ("mst", "mst-offload"),
    "shared keys": ("checkpoint-sqrt", "mst-layer", "mst-layer-offload"),
}
CASES = [(name, way) for name in MODELS for way in STRATEGIES if way not in REFUSED.get(name, ())]


def config_of(name, **changes):
    settings = CONFIG_MAPPING["gemma4_text"](**{**SIZES, **MODELS[name], **changes})
    return json.loads(settings.to_json_string(use_diff=False))


def agree(config, recipe, seq_len):
    traced = trace(config, recipe, seq_len, workspace=CARD.gpu.workspaces_bytes, platform=CARD.platform)
    told = {i.name: i.bytes for i in solve.plan_at(read_config(config, "m"), recipe, CARD, seq_len).instants()}
    assert told == {peak.instant: pytest.approx(peak.bytes, rel=EXACT) for peak in traced.peaks}


@pytest.mark.parametrize("seq_len", [4096, 32768])
@pytest.mark.parametrize(("name", "strategy_name"), CASES)
def test_every_instant(name, strategy_name, seq_len):
    if seq_len > 4096 and "layer" in strategy_name:
        pytest.skip("a trace of layers in pieces takes half a minute")
    agree(config_of(name), in_chunks(strategy(strategy_name), 4, 4), seq_len)


@pytest.mark.parametrize("strategy_name", ["standard", "checkpoint"])
def test_a_length_whose_masks_are_padded(strategy_name):
    agree(config_of("shared keys"), strategy(strategy_name), 8191)


RECIPES = [
    ("dense", {"precision": "mixed"}),
    ("dense", {"offload": "saved-tensors"}),
    (
        "dense",
        {"lora_rank": 16, "autocast": True},
    ),  # a layer's number is saved: it has run again before backward comes in
    ("dense", {"checkpoint": "selective"}),
    ("experts", {"batch": 2}),
    ("inputs of each layer", {"precision": "fp32"}),
    ("inputs of each layer", {"checkpoint": "every-2"}),
    ("inputs of each layer", {"freeze": ["attention"]}),
    ("shared keys", {"autocast": True}),
    ("shared keys", {"batch": 2}),
    ("shared keys", {"accumulation": 2}),
    ("shared keys", {"attention": "flash"}),
    ("shared keys", {"lora_rank": 16}),
    ("shared keys", {"train": ["attention"]}),
]


@pytest.mark.parametrize(("name", "changes"), RECIPES, ids=str)
def test_every_instant_of_another_recipe(name, changes):
    agree(config_of(name), strategy("checkpoint").changed(**changes), 2048)


NOT_COUNTED = [
    ("experts", "mst", {}, "more than hidden states"),
    ("shared keys", "checkpoint-sqrt", {}, "share keys and values.*checkpoint sqrt"),
    ("shared keys", "mst-layer", {}, "layers in pieces"),
    ("shared keys", "checkpoint", {"precision": "mixed"}, "--precision mixed"),
    ("shared keys", "checkpoint", {"checkpoint": "selective"}, "--checkpoint selective"),
    ("shared keys", "checkpoint", {"gpus": 4, "sharding": "fsdp"}, "sharding"),
    ("inputs of each layer", "checkpoint", {"precision": "mixed"}, "inputs of their own.*--precision mixed"),
    ("inputs of each layer", "checkpoint", {"offload": "saved-tensors"}, "--offload saved-tensors"),
    ("dense", "standard", {"offload": "saved-tensors"}, "without --checkpoint layer"),
]


@pytest.mark.parametrize(("name", "strategy_name", "changes", "why"), NOT_COUNTED)
def test_what_is_not_counted_is_refused(name, strategy_name, changes, why):
    recipe = in_chunks(strategy(strategy_name), 4, 4).changed(**changes)
    with pytest.raises(RecipeError, match=why) as caught:
        solve.plan_at(read_config(config_of(name), "m"), recipe, CARD, 4096)
    assert len(str(caught.value).splitlines()) == 2
