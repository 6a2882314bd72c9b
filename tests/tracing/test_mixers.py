"""Layers that mix tokens otherwise than by attention: every instant of the formula is the trace's."""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING

from mstplan.plan import solve
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.recipe import strategy
from mstplan.tracing.tracer import trace

from ..recipes import in_chunks

CARD = card("h100")
EXACT = 0.0005
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
CONVOLUTIONS = {"layer_types": ["conv", "conv", "full_attention", "conv"]}
MODELS = {
    "lfm2": ("lfm2", CONVOLUTIONS),
    "lfm2, biases": ("lfm2", {**CONVOLUTIONS, "conv_bias": True}),
    "lfm2_moe": ("lfm2_moe", {**CONVOLUTIONS, **EXPERTS, "num_dense_layers": 1}),
}
STRATEGIES = ("standard", "checkpoint", "mst", "mst-offload", "mst-layer", "mst-layer-offload")
CHANGES = [
    {"precision": "mixed"},
    {"precision": "fp32"},
    {"autocast": True},
    {"batch": 2},
    {"packing": 4},
    {"accumulation": 2},
    {"optimizer_in_backward": True},
    {"checkpoint": "selective"},
    {"offload": "saved-tensors"},
    {"attention": "flash"},
    {"lora_rank": 16},
    {"lora_rank": 16, "autocast": True},
    {"lora_rank": 16, "quantize": "nf4"},
    {"freeze": ["attention"]},
    {"train": ["attention"]},
]


def config_of(name):
    family, changes = MODELS[name]
    return json.loads(CONFIG_MAPPING[family](**{**SIZES, **changes}).to_json_string(use_diff=False))


def agree(config, recipe, seq_len):
    traced = trace(config, recipe, seq_len, workspace=CARD.gpu.workspaces_bytes, platform=CARD.platform)
    told = {i.name: i.bytes for i in solve.plan_at(read_config(config, "m"), recipe, CARD, seq_len).instants()}
    assert told == {peak.instant: pytest.approx(peak.bytes, rel=EXACT) for peak in traced.peaks}


@pytest.mark.parametrize("seq_len", [4096, 32768])
@pytest.mark.parametrize("strategy_name", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_every_instant(name, strategy_name, seq_len):
    agree(config_of(name), in_chunks(strategy(strategy_name), 4, 4), seq_len)


@pytest.mark.parametrize("strategy_name", ["standard", "checkpoint", "mst", "mst-layer"])
@pytest.mark.parametrize("name", [name for name in MODELS if "biases" not in name])
def test_a_length_of_begun_chunks(name, strategy_name):
    """Sums of biases' gradients are no whole shares of tokens there (step/workspaces.py, SumOverTokens.sizes)."""
    agree(config_of(name), in_chunks(strategy(strategy_name), 4, 4), 5003)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("name", ["lfm2"])
def test_every_instant_of_another_recipe(name, changes):
    agree(config_of(name), strategy("standard").changed(**changes), 4096)
