"""Gemma 3n's layers, of several streams, with Laurel, gates that are cut off and keys of earlier layers: every instant of the formula is the
trace's."""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING

from mstplan.errors import ModelError, RecipeError, UnreadError
from mstplan.plan import solve
from mstplan.spec.config import NO_TOWERS, read_config
from mstplan.spec.hardware import card
from mstplan.step.parameters import parameter_count
from mstplan.step.recipe import strategy
from mstplan.tracing.tracer import trace

from ..recipes import in_chunks

CARD = card("h100")
EXACT = 0.0005
STRATEGIES = ("standard", "checkpoint", "mst", "mst-offload")
WIDTHS = [4096, 4096, 4096, 2048, 8192, 4096]
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 1024,
    "vocab_size": 8000,
    "vocab_size_per_layer_input": 8000,
    "hidden_size_per_layer_input": 128,
    "num_kv_shared_layers": 2,
    "laurel_rank": 32,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
}


def config_of(**changes):
    return json.loads(CONFIG_MAPPING["gemma3n_text"](**{**SIZES, **changes}).to_json_string(use_diff=False))


def agree(config, recipe, seq_len):
    traced = trace(config, recipe, seq_len, workspace=CARD.gpu.workspaces_bytes, platform=CARD.platform)
    told = {i.name: i.bytes for i in solve.plan_at(read_config(config, "m"), recipe, CARD, seq_len).instants()}
    assert told == {peak.instant: pytest.approx(peak.bytes, rel=EXACT) for peak in traced.peaks}


@pytest.mark.parametrize("seq_len", [4096, 32768])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_instant(name, seq_len):
    agree(config_of(), in_chunks(strategy(name), 4, 4), seq_len)


@pytest.mark.parametrize("name", ["checkpoint", "mst-offload"])
def test_a_long_sequence(name):
    agree(config_of(), in_chunks(strategy(name), 16, 16), 262144)


@pytest.mark.parametrize("name", ["standard", "checkpoint"])
def test_a_length_whose_masks_are_padded(name):
    agree(config_of(), strategy(name), 8191)


VARIANTS = [
    {"num_kv_shared_layers": 0},
    {"altup_correct_scale": False},
    {"intermediate_size": WIDTHS},
    {"activation_sparsity_pattern": [0.95] * 6},
]


@pytest.mark.parametrize("name", ["standard", "mst"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_instant_of_a_variant(changes, name):
    agree(config_of(**changes), in_chunks(strategy(name), 4, 4), 4096)


RECIPES = [
    {"batch": 2},
    {"accumulation": 2},
    {"optimizer_in_backward": True},
    {"lora_rank": 8},
    {"train": ["attention"]},
    {"freeze": ["attention"]},
    {"attention": "flash"},
    {"attention": "eager"},
    {"packing": 2},
]


@pytest.mark.parametrize("changes", RECIPES, ids=str)
def test_every_instant_of_another_recipe(changes):
    agree(config_of(), strategy("checkpoint").changed(**changes), 4096)


NOT_COUNTED = [
    ("mst-layer", {}),
    ("checkpoint-sqrt", {}),
    ("checkpoint", {"precision": "mixed"}),
    ("checkpoint", {"autocast": True, "lora_rank": 8}),
    ("checkpoint", {"lora_rank": 8, "quantize": "nf4"}),
    ("checkpoint", {"checkpoint": "selective"}),
    ("checkpoint", {"kernels": "liger"}),
    ("checkpoint", {"gpus": 2, "sharding": "ddp"}),
    ("checkpoint", {"gpus": 2, "sharding": "fsdp"}),
    ("standard", {"offload": "saved-tensors"}),
]


@pytest.mark.parametrize(("name", "changes"), NOT_COUNTED, ids=str)
def test_what_is_not_counted_is_refused(name, changes):
    recipe = in_chunks(strategy(name), 4, 4).changed(**changes)
    with pytest.raises(RecipeError, match="several streams of hidden states") as caught:
        solve.plan_at(read_config(config_of(num_kv_shared_layers=0), "m"), recipe, CARD, 4096)
    assert len(str(caught.value).splitlines()) == 2


def test_widths_and_cut_gates_of_each_layer_are_read():
    model = read_config(config_of(intermediate_size=WIDTHS), "m")
    assert model.mlp.width == 4096
    assert [model.of_kind(kind).mlp.width for kind in model.layer_kinds] == WIDTHS
    assert [kind.cuts_gates for kind in model.layer_kinds] == [True, True, False, False, False, False]


def test_what_a_file_does_not_say_is_as_transformers_has_it():
    left_out = {"layer_types", "activation_sparsity_pattern"}
    short = {"model_type": "gemma3n_text", **{k: v for k, v in SIZES.items() if k not in left_out}}
    short |= {"num_hidden_layers": 15, "num_kv_shared_layers": 5}
    whole = json.loads(CONFIG_MAPPING["gemma3n_text"](**short).to_json_string(use_diff=False))
    assert read_config(short, "m").layer_kinds == read_config(whole, "m").layer_kinds
    assert sum(kind.cuts_gates for kind in read_config(short, "m").layer_kinds) == 10


def test_the_text_part_of_the_published_whole():
    """E4B's, whose text part has 6,842,158,080 parameters."""
    e4b = {"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text"}, "vision_config": {}}
    model = read_config(e4b, "e4b", assume="no-towers")
    assert NO_TOWERS in model.notes
    assert parameter_count(model)[0] == parameter_count(read_config({**e4b["text_config"], **E4B}, "m"))[0]


E4B = {
    "vocab_size": 262400,
    "hidden_size": 2048,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 16384,
}
WRONG = [
    ({"intermediate_size": [4096] * 5}, ModelError, "intermediate_size lists 5 widths for the 6 layers"),
    ({"intermediate_size": []}, ModelError, "intermediate_size"),
    ({"intermediate_size": [4096] * 5 + [True]}, ModelError, "must be a whole number"),
    ({"activation_sparsity_pattern": [0.95]}, ModelError, "activation_sparsity_pattern"),
    ({"activation_sparsity_pattern": [1.5] * 6}, ModelError, "activation_sparsity_pattern"),
    ({"altup_num_inputs": 2}, UnreadError, "altup_num_inputs is 2"),
    ({"hidden_size_per_layer_input": 0}, UnreadError, "hidden_size_per_layer_input is 0"),
    ({"altup_active_idx": 1}, UnreadError, "altup_active_idx is 1"),
]


@pytest.mark.parametrize(("changes", "kind", "what"), WRONG, ids=str)
def test_what_does_not_fit_is_refused(changes, kind, what):
    with pytest.raises(kind, match=what):
        read_config({**config_of(), **changes}, "m")
