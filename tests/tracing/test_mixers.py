"""Layers that mix tokens otherwise than by attention: every instant of the formula is the trace's."""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING

from bench.fused_mixers import ALONE, CONVOLUTIONS, EXPERTS, MIXED, PARTED, SCAN, SIZES
from mstplan.errors import ModelError, RecipeError, UnreadError
from mstplan.plan import solve
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.recipe import strategy
from mstplan.tracing.tracer import trace

from ..recipes import in_chunks

CARD = card("h100")
EXACT = 0.0005
LINEAR = {
    "layer_types": MIXED,
    "head_dim": 64,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
DELTA = {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 512}
MAMBA = {
    "layer_types": MIXED,
    "num_local_experts": 0,
    "shared_intermediate_size": 1024,
    **SCAN,
}
BESIDE = {**SCAN, "mamba_d_ssm": 768, "mamba_n_heads": 12}
ROUTED_PARTS = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention", "moe"],
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "moe_shared_expert_intermediate_size": 1024,
}
ROUTED = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 512}
MODELS = {
    "lfm2": ("lfm2", CONVOLUTIONS),
    "lfm2, biases": ("lfm2", {**CONVOLUTIONS, "conv_bias": True}),
    "qwen3_next": ("qwen3_next", DELTA),
    "qwen3.5": ("qwen3_5_text", LINEAR),
    "qwen3.5, experts": ("qwen3_5_moe_text", DELTA),
    "granite, mamba": ("granitemoehybrid", MAMBA),
    "granite, mamba and experts": ("granitemoehybrid", {**MAMBA, **ROUTED}),
    "granite, attention": (
        "granitemoehybrid",
        {**MAMBA, "layer_types": ["full_attention"] * 4, "position_embedding_type": "rope"},
    ),
    "lfm2_moe": ("lfm2_moe", {**CONVOLUTIONS, **EXPERTS, "num_dense_layers": 1}),
    "bamba": ("bamba", {**SCAN, "attn_layer_indices": [2]}),
    "falcon_h1": ("falcon_h1", BESIDE),
    "falcon_h1, normed first": ("falcon_h1", {**BESIDE, "mamba_rms_norm": True}),
    "falcon_h1, gated first": ("falcon_h1", {**BESIDE, "mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    "nemotron_h": ("nemotron_h", PARTED),
    "nemotron_h, experts": ("nemotron_h", {**PARTED, **ROUTED_PARTS}),
    "nemotron_h, narrowed experts": (
        "nemotron_h",
        {**PARTED, **ROUTED_PARTS, "moe_latent_size": 128, "mlp_bias": True, "use_bias": True},
    ),
    "mamba2": ("mamba2", ALONE),
    "mamba2, hidden states in bf16": ("mamba2", {**ALONE, "residual_in_fp32": False, "tie_word_embeddings": True}),
}
WHOLE = {"falcon_h1": "side by side", "mamba2": "do nothing else"}
"""Families whose layers do not run in pieces, and words of the refusal."""
STRATEGIES = ("standard", "checkpoint", "checkpoint-sqrt", "mst", "mst-offload", "mst-layer", "mst-layer-offload")
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


def config_of(name, models=MODELS):
    family, changes = models[name]
    return json.loads(CONFIG_MAPPING[family](**{**SIZES, **changes}).to_json_string(use_diff=False))


def recipe_of(name, strategy_name):
    """In pieces, of the MLP where there is one."""
    return in_chunks(strategy(strategy_name), 1 if name.startswith("mamba2") else 4, 4)


def agree(config, recipe, seq_len):
    traced = trace(config, recipe, seq_len, workspace=CARD.gpu.workspaces_bytes, platform=CARD.platform)
    told = {i.name: i.bytes for i in solve.plan_at(read_config(config, "m"), recipe, CARD, seq_len).instants()}
    assert told == {peak.instant: pytest.approx(peak.bytes, rel=EXACT) for peak in traced.peaks}


# Every model with every strategy, each at one of two lengths.
ROTATION = [
    (name, strategy_name, (4096, 32768)[(m + n) % 2])
    for m, name in enumerate(MODELS)
    for n, strategy_name in enumerate(STRATEGIES)
]


@pytest.mark.parametrize(("name", "strategy_name", "seq_len"), ROTATION)
def test_every_instant(name, strategy_name, seq_len):
    if name.startswith("qwen"):  # whose loop over chunks takes a trace minutes
        seq_len = 1024
    if "layer" in strategy_name and (why := WHOLE.get(name.partition(",")[0])):
        return check_refusal(name, recipe_of(name, strategy_name), why)
    agree(config_of(name), recipe_of(name, strategy_name), seq_len)


def test_the_trace_refuses_pieces_of_layers_that_mix_tokens_twice():
    """Its tensors have no values, by which the runtime would find out."""
    with pytest.raises(ModelError, match="in more than one place"):
        trace(config_of("falcon_h1"), recipe_of("falcon_h1", "mst-layer"), 4096)


def test_a_quarter_of_a_million_tokens():
    for name in ("falcon_h1", "nemotron_h", "mamba2"):
        agree(config_of(name), recipe_of(name, "mst-offload"), 262144)


def test_layer_inputs_of_two_dtypes_on_their_way():
    """Hidden states are fp32 from the second layer on: while the third runs, what comes back is twice what comes back for the first."""
    family, changes = MODELS["mamba2"]
    config = json.loads(
        CONFIG_MAPPING[family](**{**SIZES, **changes, "num_hidden_layers": 7}).to_json_string(use_diff=False)
    )
    agree(config, recipe_of("mamba2", "mst-offload"), 65536)


ATTENTION_ALONE = {"layer_types": ["full_attention"] * 3, "num_hidden_layers": 3}
GATED = {
    "qwen3_next": ("qwen3_next", {**DELTA, **ATTENTION_ALONE}),
    "qwen3.5": ("qwen3_5_text", {**LINEAR, **ATTENTION_ALONE}),
}
"""Their layers of gated attention alone, whose traces are quick."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch": 2},
        {"attention_groups": 2},
        {"attention_groups": 2, "attention_on_host": True},
        {"lora_rank": 16},
        {"freeze": ["layers.*.self_attn.q_proj*"]},
        {"train": ["attention"]},
        {"accumulation": 2},
        {"optimizer_in_backward": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("strategy_name", ["mst-layer", "mst-layer-offload"])
def test_gated_attention_in_pieces(strategy_name, changes):
    """Pieces make queries twice, for attention and for its gates: the second time nothing but the gates leads anywhere."""
    if strategy_name == "mst-layer-offload" and set(changes) - {"batch"}:
        pytest.skip("the layers are those of mst-layer")
    agree(config_of("qwen3.5", GATED), in_chunks(strategy(strategy_name), 4, 4).changed(**changes), 32768)


@pytest.mark.parametrize("strategy_name", ["standard", "mst", "mst-layer"])
@pytest.mark.parametrize("name", GATED)
def test_several_rows_of_gated_attention(name, strategy_name):
    """Qwen3.5 makes cos and sin of each row, Qwen3-Next one for all."""
    agree(config_of(name, GATED), in_chunks(strategy(strategy_name), 4, 4).changed(batch=2), 16384)


@pytest.mark.parametrize("widths", [(64, 128), (128, 64), (32, 32)], ids=str)
def test_heads_of_other_widths(widths):
    """Which gradient of a chunk is the largest depends on them."""
    keys, values = widths
    family, changes = MODELS["qwen3_next"]
    changes = {**changes, "linear_key_head_dim": keys, "linear_value_head_dim": values, "num_hidden_layers": 4}
    config = json.loads(CONFIG_MAPPING[family](**{**SIZES, **changes}).to_json_string(use_diff=False))
    agree(config, strategy("checkpoint"), 1024)


REFUSED = [
    ("qwen3_next", {"precision": "mixed"}, "without autocast only"),
    ("granite, mamba", {"autocast": True}, "without autocast only"),
    ("granite, mamba", {"precision": "fp32"}, "without autocast only"),
    ("granite, mamba", {"packing": 4}, "does not tell packed samples apart"),
    ("granite, mamba", {"offload": "saved-tensors"}, "are not checkpointed"),
    ("falcon_h1", {"checkpoint": "children"}, "--checkpoint children"),
    ("nemotron_h", {"lora_rank": 16}, "peft puts no adapters on out_proj"),
    ("mamba2", {"loss": "cce", "checkpoint": "layer"}, "in fp32, of which the loss"),
    ("mamba2", {"mlp_chunks": 4}, "no MLP to run in pieces"),
]


@pytest.mark.parametrize(("name", "changes", "why"), REFUSED)
def test_what_is_not_counted_is_refused(name, changes, why):
    check_refusal(name, strategy("standard").changed(**changes), why)


def check_refusal(name, recipe, why):
    with pytest.raises(RecipeError, match=why) as caught:
        solve.plan_at(read_config(config_of(name), "m"), recipe, CARD, 4096)
    assert len(str(caught.value).splitlines()) == 2


def test_a_chunk_that_no_published_model_has_is_refused():
    config = {**config_of("granite, mamba"), "mamba_chunk_size": 100}
    with pytest.raises(UnreadError, match="mamba_chunk_size is 100"):
        read_config(config, "m")


@pytest.mark.parametrize("strategy_name", ["standard", "checkpoint", "mst", "mst-layer"])
@pytest.mark.parametrize("name", ["lfm2", "lfm2_moe", "granite, attention"])
def test_a_length_of_begun_chunks(name, strategy_name):
    """Sums of biases' gradients are no whole shares of tokens there (step/workspaces.py, SumOverTokens.sizes)."""
    agree(config_of(name), in_chunks(strategy(strategy_name), 4, 4), 5003)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_instant_of_another_recipe(changes):
    agree(config_of("lfm2"), strategy("standard").changed(**changes), 4096)


LISTED = ("bamba", "falcon_h1", "nemotron_h, experts", "mamba2")
OVER_CHUNKS = [
    {"batch": 2},
    {"lora_rank": 16},
    {"freeze": ["attention"]},
    {"freeze": ["head"]},
    {"train": ["layers.1.*"]},
    {"accumulation": 2},
]


# Every model with every change, with one of two strategies.
IN_TURN = [
    (name, ("standard", "checkpoint")[(m + n) % 2], changes)
    for m, name in enumerate(("qwen3_next", "granite, mamba", *LISTED))
    for n, changes in enumerate(OVER_CHUNKS)
]


@pytest.mark.parametrize(("name", "strategy_name", "changes"), IN_TURN, ids=str)
def test_every_instant_of_a_recipe_over_chunks(name, strategy_name, changes):
    if "lora_rank" in changes and name in LISTED[1:]:
        changes = {**changes, "lora_targets": ("in_proj", "q_proj", "up_proj")[: 1 if name == "mamba2" else 3]}
    agree(config_of(name), strategy(strategy_name).changed(**changes), 700 if name == "qwen3_next" else 4096)


@pytest.mark.parametrize("changes", [{"train": ["attention"]}, {"lora_rank": 16, "quantize": "nf4"}], ids=str)
def test_when_a_checkpointed_layer_runs_again(changes):
    """A frozen matrix is packed by the checkpoint, so that its backward runs the layer again; one of 4 bits is not."""
    if "quantize" in changes:
        changes = {**changes, "lora_targets": ("attention",)}
    agree(config_of("granite, mamba"), strategy("checkpoint").changed(**changes), 4096)
