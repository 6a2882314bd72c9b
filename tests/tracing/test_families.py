"""Families whose parameters alone do not show how their layers run: the formula's peaks are the trace's."""

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
FAMILIES = ("arcee", "granitemoe", "helium", "internlm3", "iquestcoder", "ministral3", "nemotron", "youtu")
WHOLES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Of images and text: their text part is what is planned and traced."""
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 16000,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXACT = 0.0005


def config_of(family: str) -> dict:
    sizes = {**SIZES, "num_key_value_heads": 8 if family == "youtu" else 2}
    sizes |= {"head_dim": 64} if family == "helium" else {}
    if family in WHOLES:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
        sizes = {"text_config": {**sizes, "head_dim": 64, "rope_parameters": rope}, "tie_word_embeddings": False}
    return json.loads(CONFIG_MAPPING[family](**sizes).to_json_string(use_diff=False))


@pytest.mark.parametrize("name", ["standard", "mst", "mst-layer"])
@pytest.mark.parametrize("family", FAMILIES + WHOLES)
def test_the_formulas_peak_is_the_traces(family, name):
    recipe = in_chunks(strategy(name), 4, 4)
    config = config_of(family)
    traced = trace(config, recipe, 4096, workspace=CARD.gpu.workspaces_bytes, platform=CARD.platform)
    told = solve.plan_at(read_config(config, family), recipe, CARD, 4096)
    assert told.peak_bytes == pytest.approx(traced.peak.bytes, rel=EXACT)
    assert told.instant == traced.peak.instant


@pytest.mark.parametrize("name", ["standard", "mst", "mst-layer"])
@pytest.mark.parametrize("family", WHOLES)
def test_several_rows_each_with_cos_and_sin(family, name):
    recipe = in_chunks(strategy(name), 4, 4).changed(batch=2)
    check_instants(config_of(family), recipe, 4096)


VARIANTS = [
    ("cohere2", {"num_hidden_layers": 4}),  # whose last layer is not turned
    ("exaone4", {"num_hidden_layers": 4}),
    ("olmo3", {"num_hidden_layers": 4}),
    ("phi", {"num_key_value_heads": 8, "resid_pdrop": 0.1}),  # and no dropout after the embedding
    ("smollm3", {"num_hidden_layers": 4}),
    ("smollm3", {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 1024}),
    ("stablelm", {"hidden_dropout": 0.1}),  # after the MLP only
    ("stablelm", {"use_parallel_residual": True}),
    ("opt", {"ffn_dim": 1408, "max_position_embeddings": 4096}),
    ("opt", {"ffn_dim": 1408, "max_position_embeddings": 4096, "dropout": 0.0, "enable_bias": False}),
    ("falcon", {}),  # whose one head of keys products broadcast
    ("falcon", {"multi_query": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4}),  # two norms
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4, "num_ln_in_parallel_attn": 1}),
    ("gpt_bigcode", {"n_positions": 4096}),  # a buffer of causality
    ("gpt_bigcode", {"n_positions": 4096, "multi_query": False, "resid_pdrop": 0.0}),
    ("gptj", {"n_positions": 4096, "resid_pdrop": 0.1}),  # each layer has a buffer of positions
    ("codegen", {"n_positions": 4096}),
    ("bloom", {"n_layer": 3, "n_head": 8, "hidden_dropout": 0.1}),  # alibi, a norm of embeddings
    ("cwm", {"num_hidden_layers": 4, "sliding_window": 1024}),  # the first of four layers has no window
    ("jais2", {}),
    ("hyperclovax", {"residual_multiplier": 0.22, "logits_scaling": 0.125}),
    ("vaultgemma", {"head_dim": 64, "num_hidden_layers": 4, "sliding_window": 1024}),
    ("granite", {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0}),
]


@pytest.mark.parametrize("name", ["standard", "mst", "mst-layer"])
@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_every_instant_of_a_variant(family, changes, name):
    """The wider the layers beside the vocabulary, the more of the tensors that only one instant shows."""
    sizes = {**SIZES, "num_key_value_heads": 2, "vocab_size": 4000, **changes}
    config = json.loads(CONFIG_MAPPING[family](**sizes).to_json_string(use_diff=False))
    check_instants(config, in_chunks(strategy(name), 4, 4), 4096)


def check_instants(config, recipe, seq_len):
    traced = trace(config, recipe, seq_len, workspace=CARD.gpu.workspaces_bytes, platform=CARD.platform)
    told = {i.name: i.bytes for i in solve.plan_at(read_config(config, "m"), recipe, CARD, seq_len).instants()}
    assert told == {peak.instant: pytest.approx(peak.bytes, rel=EXACT) for peak in traced.peaks}
