"""FSDP2 where a part of the weights is trained, adapters above all: the trace beside two real processes, and the formula beside it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mstplan.errors import RecipeError
from mstplan.step.recipe import strategy
from mstplan.tracing.fsdp import BUFFER, COPY_IN, SCATTER, SHARDS
from mstplan.tracing.tracer import trace

from ..processes import on_two_ranks
from .test_fsdp import IN_CPU_RAM, KNOWN, LARGE, check_formula, check_peaks, traced, without_known
from .two_ranks import CONFIG, TOKENS
from .two_ranks_in_part import mixed_recipes, recipes

LAYERS = CONFIG["num_hidden_layers"]
COLLECTIVES = {
    "frozen": (LAYERS, LAYERS + 1, 1),
    "upper layers": (3, 2, 0),  # the layer below the first that is trained is gathered for nothing
    "adapters": (LAYERS, LAYERS, 0),
    "adapters in chunks": (LAYERS, LAYERS, 0),
    "adapters, inputs with gradients": (LAYERS, LAYERS, 0),
}
"""Groups gathered in backward, groups scattered, and weights of these that are padded."""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first of two ranks allocated, by recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks("tests.tracing.two_ranks_in_part", folder)
    found: dict[str, Any] = json.loads((folder / "rank0.json").read_text())
    return found


@pytest.mark.parametrize("name", recipes())
def test_two_real_ranks_allocate_what_the_trace_says_in_that_order(real, name):
    events, _ = without_known(real[name]["runs"][0])
    expected = [made.bytes for made in traced(recipes()[name]).step.storages if made.bytes > LARGE]
    assert [e[0] for e in events if e[0] > LARGE] == expected


@pytest.mark.parametrize("name", recipes())
def test_two_real_ranks_hold_what_the_trace_says(real, name):
    """Within what random generators' states make, which are not followed: 0.2%."""
    check_peaks(
        traced(recipes()[name]), real[name]["resident"], [without_known(events)[0] for events in real[name]["runs"]]
    )


@pytest.mark.parametrize("name", recipes())
def test_only_groups_with_something_trained_are_scattered(real, name):
    recipe = recipes()[name]
    gathered, scattered, padded = COLLECTIVES[name]
    _, count = without_known(real[name]["runs"][0])
    gathers = recipe.accumulation * (LAYERS + 1 + gathered)
    expected = dict(zip(KNOWN, (gathers, gathers, scattered, padded), strict=True))
    assert count == {buffer: number for buffer, number in expected.items() if number}


@pytest.mark.parametrize("name", mixed_recipes())
def test_two_real_ranks_gather_and_scatter_several_dtypes(real, name):
    """Of the sizes that only FSDP2's tensors have; and what stays, but for the scales of 4-bit weights, which are no parameters."""
    recipe = mixed_recipes()[name]
    found = trace(CONFIG, recipe, TOKENS, on="cpu" if recipe.loss == "transformers" else "cuda", whole=True)
    of_fsdp = {m.bytes for m in found.step.storages if m.operation in (BUFFER, COPY_IN, SCATTER, SHARDS)}
    others = {m.bytes for m in found.step.storages if m.operation not in (BUFFER, COPY_IN, SCATTER, SHARDS, "_to_copy")}
    sizes = of_fsdp - others
    assert len(sizes) > 3
    events, _ = without_known(real[name]["runs"][0])
    assert [e[0] for e in events if e[0] in sizes] == [m.bytes for m in found.step.storages if m.bytes in sizes]
    scales = sum(weight.bytes for weight in found.weights if ".quantisation_" in weight.name)
    resident = sum(each.bytes for each in (*found.held_weights, *found.held_states))
    assert real[name]["resident"] + scales == resident


LORA = {"lora_rank": 16}
FOUR_BITS = {**LORA, "quantize": "nf4", "quant_storage": "bf16"}
CHUNKS = {"mlp_chunks": 4, "loss_chunks": 8}


@pytest.mark.parametrize(
    ("model", "name", "more"),
    [
        ("llama3.2-1b", "checkpoint", LORA),
        ("llama3.2-1b", "standard", {**LORA, "autocast": True, "reduce_dtype": "bf16", "input_gradients": True}),
        ("llama3.2-1b", "checkpoint", {**LORA, "adapter_dtype": "bf16", "lora_targets": ("attention",)}),
        ("llama3.2-1b", "mst", {**LORA, **CHUNKS, "autocast": True, "accumulation": 3}),
        ("llama3.2-1b", "checkpoint", {**LORA, "accumulation": 2, "sync_each_batch": True, "lora_dropout": 0.05}),
        ("llama3.2-1b", "mst-layer", {**LORA, **CHUNKS, "attention_groups": 2, "precision": "mixed"}),
        ("llama3.2-1b", "checkpoint", {**LORA, "gpus": 16, "replicas": 2, "autocast": True, "reduce_dtype": "bf16"}),
        ("llama3.2-1b", "checkpoint", {**LORA, **IN_CPU_RAM, "autocast": True}),
        ("llama3.2-1b", "checkpoint", {**LORA, **IN_CPU_RAM, "accumulation": 2}),
        ("llama3.2-1b", "checkpoint", {**LORA, "optimizer_in_backward": True, "autocast": True}),
        ("llama3.2-1b", "checkpoint", {**LORA, "quantize": "nf4", "double_quantize": True, "autocast": True}),
        ("llama3.2-1b", "mst", {**LORA, **CHUNKS, "quantize": "nf4", "kbit_preparation": True}),
        ("llama3.2-1b", "checkpoint", {**FOUR_BITS, "double_quantize": True, "autocast": True}),
        ("llama3.2-1b", "checkpoint", {**FOUR_BITS, "autocast": True, "adapter_dtype": "bf16"}),
        ("llama3.1-8b", "checkpoint", {**FOUR_BITS, **IN_CPU_RAM, "double_quantize": True, "autocast": True}),
        ("llama3.2-1b", "standard", {**FOUR_BITS, "quant_storage": "fp32", "accumulation": 2}),
        ("llama3.2-1b", "mst", {**FOUR_BITS, **CHUNKS, "kbit_preparation": True, "gpus": 7}),
        ("llama3.2-1b", "mst", {**LORA, **CHUNKS, "autocast": True, "sequence_parallel": 4}),
        ("llama3.1-8b", "mst-offload", {**LORA, **CHUNKS, "autocast": True}),
        ("mixtral-8x7b", "checkpoint", {**LORA, "autocast": True}),
        ("gpt2", "checkpoint", {**LORA, "autocast": True}),
        ("llama3.2-1b", "checkpoint", {"freeze": ("embeddings", "head"), "accumulation": 3}),
        ("llama3.2-1b", "standard", {"train": ("*.layers.1?.*",)}),
        ("llama3.2-1b", "checkpoint", {"train": ("*.layers.1?.*", "head"), "precision": "mixed"}),
        ("llama3.2-1b", "checkpoint", {"train": ("head",)}),
        ("llama3.2-1b", "checkpoint", {"freeze": ("attention",), **IN_CPU_RAM}),
    ],
    ids=str,
)
def test_formula_and_trace_agree(model, name, more):
    check_formula(model, strategy(name, **{"gpus": 8, "sharding": "fsdp", **more}), 2048)


@pytest.mark.parametrize(
    ("more", "way_out"),
    [
        ({"autocast": True}, "--precision mixed"),
        ({**LORA, "autocast": True, "adapter_dtype": "bf16"}, "--autocast"),
        ({**LORA, "lora_modules_to_save": ("lm_head",)}, "--lora-modules-to-save"),
        ({**LORA, "quantize": "int8"}, "--quantize nf4"),
        ({**LORA, "quantize": "nf4", **IN_CPU_RAM}, "--quant-storage bf16"),
        ({**FOUR_BITS, "quant_storage": "fp32", "autocast": True}, "--quant-storage bf16"),
        ({**LORA, "quant_storage": "bf16"}, "--quantize nf4"),
        ({**LORA, "reduce_dtype": "bf16"}, "--precision mixed"),
    ],
    ids=str,
)
def test_what_is_refused_says_what_would_do(more, way_out):
    with pytest.raises(RecipeError, match=way_out):
        strategy("checkpoint", gpus=8, sharding="fsdp", **more)
