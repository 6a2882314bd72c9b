"""DeepSeek-V3.2, whose indexer chooses the keys that a query sees: every instant of the formula is the trace's."""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING

from mstplan.errors import ModelError, RecipeError, UnreadError
from mstplan.plan import solve
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.parameters import parameter_count, trained_count
from mstplan.step.recipe import strategy
from mstplan.tracing.tracer import trace

from ..recipes import in_chunks

CARD = card("h100")
EXACT = 0.0005
STRATEGIES = ("standard", "checkpoint", "checkpoint-sqrt", "mst", "mst-offload")
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4000,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 4,
}


def config_of(**changes):
    return json.loads(CONFIG_MAPPING["deepseek_v32"](**{**SIZES, **changes}).to_json_string(use_diff=False))


def model_of(**changes):
    return read_config(config_of(**changes), "m")


def agree(config, recipe, seq_len):
    traced = trace(config, recipe, seq_len, workspace=CARD.gpu.workspaces_bytes, platform=CARD.platform)
    told = {i.name: i.bytes for i in solve.plan_at(read_config(config, "m"), recipe, CARD, seq_len).instants()}
    assert told == {peak.instant: pytest.approx(peak.bytes, rel=EXACT) for peak in traced.peaks}


def test_no_4_bits_are_advised_where_they_are_refused():
    notes = model_of().notes, read_config({**config_of(), "quantization_config": {"quant_method": "fp8"}}, "m").notes
    assert any("quantised (fp8)" in note for note in notes[1]) and not any(
        "nf4" in note for each in notes for note in each
    )


@pytest.mark.parametrize("seq_len", [4096, 32768, 262144])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_instant(name, seq_len):
    agree(config_of(), in_chunks(strategy(name), 4, 4), seq_len)


@pytest.mark.parametrize("seq_len", [256, 1001, 2047, 4097])
@pytest.mark.parametrize("name", ["standard", "checkpoint"])
def test_lengths_of_fewer_keys_than_are_chosen_and_of_padded_masks(name, seq_len):
    agree(config_of(), strategy(name), seq_len)


@pytest.mark.parametrize("heads", [1, 64])
def test_few_and_many_heads(heads):
    """Of one head, scores are not what needs most."""
    agree(config_of(index_n_heads=heads), strategy("checkpoint"), 4096)


RECIPES = [
    {"batch": 2},  # keys are copied for every token
    {"accumulation": 2},
    {"optimizer_in_backward": True},
    {"optimizer": "adamw-8bit"},
    {"lora_rank": 8, "lora_targets": ["q_b_proj", "o_proj"]},
    {"freeze": ["attention"]},
    {"train": ["attention"]},
    {"gpus": 4, "sharding": "fsdp"},
    {"checkpoint": "selective"},
    {"attention": "efficient"},
]


@pytest.mark.parametrize("changes", RECIPES, ids=str)
def test_every_instant_of_another_recipe(changes):
    agree(config_of(), strategy("checkpoint").changed(**changes), 4096)


def test_no_gradient_comes_to_the_indexer():
    model, recipe = model_of(), strategy("standard")
    plain = read_config({**config_of(), "model_type": "deepseek_v3"}, "m")
    assert trained_count(model, recipe) == parameter_count(plain)[0]
    indexer = SIZES["q_lora_rank"] * 4 * 128 + SIZES["hidden_size"] * (128 + 4) + 2 * 128
    assert parameter_count(model)[0] - trained_count(model, recipe) == SIZES["num_hidden_layers"] * indexer
    traced = trace(config_of(), recipe, 1024)
    idle = [weight.name for weight in traced.weights if not weight.trained and "indexer" in weight.name]
    assert len(idle) == SIZES["num_hidden_layers"] * 5
    assert len(traced.states) == 3 * sum(weight.trained for weight in traced.weights)  # AdamW's


NOT_COUNTED = [
    ("checkpoint", {"attention": "eager"}),
    ("checkpoint", {"precision": "mixed"}),
    ("checkpoint", {"autocast": True}),
    ("checkpoint", {"lora_rank": 8}),
    ("checkpoint", {"lora_rank": 8, "lora_targets": ["wk"]}),
    ("checkpoint", {"packing": 2}),
    ("checkpoint", {"gpus": 2, "sharding": "ddp"}),
    ("checkpoint", {"checkpoint": "children"}),
    ("standard", {"offload": "saved-tensors"}),
    ("mst-layer", {}),
]


@pytest.mark.parametrize(("name", "changes"), NOT_COUNTED, ids=str)
def test_what_is_not_counted_is_refused(name, changes):
    recipe = in_chunks(strategy(name), 4, 4).changed(**changes)
    with pytest.raises(RecipeError, match="choose the keys that a query sees") as caught:
        solve.plan_at(model_of(), recipe, CARD, 4096)
    assert len(str(caught.value).splitlines()) == 2


def test_other_numbers_of_keys_go_to_the_trace():
    with pytest.raises(UnreadError, match="index_topk is 1024"):
        model_of(index_topk=1024)


def test_queries_have_a_low_rank():
    with pytest.raises(ModelError, match="q_lora_rank is null"):
        read_config({**config_of(), "q_lora_rank": None}, "m")
