"""FSDP1 with adapters over frozen weights: the trace beside two real processes, and the formula beside it."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from mstplan.errors import RecipeError
from mstplan.plan.layout import step_of, step_sizes
from mstplan.plan.solve import fixed_chunks
from mstplan.spec.catalog import load_model
from mstplan.step.instants import Instant
from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing.fsdp import GATHERED, SHARDS
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import trace

from ..processes import on_two_ranks
from .real_events import peak, without
from .test_fsdp import LARGE, ON, check_formula
from .test_fsdp1 import OF_GLOO
from .two_ranks import TOKENS
from .two_ranks_flat_adapters import CONFIG, mixed_recipes, recipes


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first of two ranks allocated, by recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks("tests.tracing.two_ranks_flat_adapters", folder)
    found: dict[str, Any] = json.loads((folder / "rank0.json").read_text())
    return found


@cache
def traced(recipe: Recipe) -> Trace:
    return trace(CONFIG, recipe, TOKENS, on="cpu", whole=True)


@pytest.mark.parametrize("name", recipes())
def test_two_real_ranks_allocate_what_the_trace_says_in_that_order(real, name):
    events = without(real[name]["runs"][0], OF_GLOO)
    expected = [made.bytes for made in traced(recipes()[name]).step.storages if made.bytes > LARGE]
    assert [e[0] for e in events if e[0] > LARGE] == expected


@pytest.mark.parametrize("name", recipes())
def test_two_real_ranks_hold_what_the_trace_says(real, name):
    """Before a step to the byte; at most, within what random generators' states make, which are not followed: 0.2%."""
    found, before = traced(recipes()[name]), real[name]["resident"]
    assert before == sum(alive.bytes for alive in found.resident)
    assert max(found.live) == pytest.approx(
        before + peak([without(events, OF_GLOO) for events in real[name]["runs"]]), rel=0.002
    )


@pytest.mark.parametrize("name", mixed_recipes())
def test_two_real_ranks_gather_and_sum_several_dtypes(real, name):
    """Of the sizes that only flat tensors have; and what stays, but for the scales of 4-bit weights, which are no parameters."""
    found = traced(mixed_recipes()[name])
    of_fsdp = {m.bytes for m in found.step.storages if m.operation in (GATHERED, SHARDS)}
    sizes = of_fsdp - {m.bytes for m in found.step.storages if m.operation not in (GATHERED, SHARDS, "cat")}
    assert len(sizes) > 2
    events = without(real[name]["runs"][0], OF_GLOO)
    assert [e[0] for e in events if e[0] in sizes] == [m.bytes for m in found.step.storages if m.bytes in sizes]
    scales = sum(weight.bytes for weight in found.weights if ".quantisation_" in weight.name)
    resident = sum(each.bytes for each in (*found.held_weights, *found.held_states))
    assert real[name]["resident"] + scales == resident


LORA = {"lora_rank": 16}
ALL = {**LORA, "lora_targets": ("all-linear",)}
REENTRANT = {**LORA, "checkpoint": "reentrant", "input_gradients": True}
VIEWS = {**LORA, "use_orig_params": True, "autocast": True}
FOUR_BITS = {**ALL, "quantize": "nf4", "quant_storage": "bf16"}


@pytest.mark.parametrize(
    ("model", "name", "more"),
    [
        ("llama3.2-1b", "checkpoint", LORA),
        ("llama3.2-1b", "standard", ALL),
        ("llama3.2-1b", "checkpoint", {**ALL, "autocast": True, "reduce_dtype": "bf16", "input_gradients": True}),
        ("llama3.2-1b", "checkpoint", {**ALL, "backward_prefetch": "none", "lora_dropout": 0.1}),
        ("llama3.2-1b", "checkpoint", {**LORA, "precision": "mixed", "accumulation": 3}),
        ("llama3.2-1b", "standard", {**LORA, "lora_targets": ("q_proj", "down_proj"), "precision": "mixed", "gpus": 7}),
        ("llama3.2-1b", "checkpoint", {**FOUR_BITS, "autocast": True, "double_quantize": True}),
        ("llama3.2-1b", "standard", {**FOUR_BITS, "adapter_dtype": "bf16", "accumulation": 2}),
        ("qwen3-4b", "checkpoint", {**FOUR_BITS, "autocast": True, "backward_prefetch": "none", "gpus": 2}),
        ("llama3.2-1b", "checkpoint", {**LORA, "accumulation": 2, "sync_each_batch": True, "max_grad_norm": 1.0}),
        ("llama3.2-1b", "checkpoint", {**REENTRANT, "lora_dropout": 0.1, "use_orig_params": True, "autocast": True}),
        ("llama3.2-1b", "checkpoint", {**REENTRANT, "backward_prefetch": "none"}),
        ("llama3.2-1b", "checkpoint", {**VIEWS, "backward_prefetch": "none", "lora_dropout": 0.1}),
        ("llama3.2-1b", "standard", {**VIEWS, **ALL, "reduce_dtype": "bf16"}),
        ("qwen3-4b", "checkpoint", {**FOUR_BITS, **VIEWS, "gpus": 2}),
        ("gpt2", "checkpoint", LORA),
    ],
    ids=str,
)
def test_formula_and_trace_agree(model, name, more):
    """But for the allocator's rounding of each matrix's few bytes."""
    check_formula(model, strategy(name, **{"gpus": 8, "sharding": "fsdp1", **more}), 2048, worst=0.001)


@pytest.mark.parametrize(
    ("more", "way_out"),
    [
        ({**LORA, "dora": True}, "--dora"),
        ({**LORA, "quantize": "nf4"}, "--quant-storage bf16"),
        ({**FOUR_BITS, "autocast": True, "adapter_dtype": "bf16"}, "--adapter-dtype bf16"),
        ({"freeze": ("embeddings",)}, "--sharding fsdp"),
    ],
    ids=str,
)
def test_what_is_refused_says_what_would_do(more, way_out):
    with pytest.raises(RecipeError, match=way_out):
        strategy("checkpoint", **{"gpus": 8, "sharding": "fsdp1", **more})


@pytest.mark.parametrize("prefetch", ["pre", "none"])
def test_reentrant_checkpoints_of_frozen_layers_leave_inputs_and_their_gradients(prefetch):
    """Each layer's, until backward is over, as FSDP1's hooks on them do, to the byte; other checkpoints let go of both."""
    both = {"gpus": 2, "sharding": "fsdp1", **LORA, "input_gradients": True, "backward_prefetch": prefetch}
    model, tokens = load_model("llama3.2-1b"), 4096

    def first_layer(checkpoint: str, layers: int) -> int:
        recipe = strategy("checkpoint", **both, checkpoint=checkpoint)
        chunks = fixed_chunks(recipe)
        step = step_of(model._replace(layer_kinds=model.layer_kinds[:layers]), recipe, ON, chunks, tokens)
        instants = step.instants(step_sizes(recipe, tokens, chunks))
        return next(instant.bytes for instant in instants if instant.name is Instant.FIRST_LAYER)

    reentrant, other = (first_layer(name, 16) - first_layer(name, 12) for name in ("reentrant", "layer"))
    assert reentrant - other == 4 * 2 * (2 * tokens * model.hidden)


@pytest.mark.parametrize(
    ("model", "more", "way_out"),
    [
        ("llama3.2-1b", {}, "--backward-prefetch none"),
        ("llama3.2-1b", {"backward_prefetch": "none", "attention": "eager"}, "--attention eager"),
        ("gpt2", {"backward_prefetch": "none"}, "--use-orig-params"),
        ("gemma2-2b", {"backward_prefetch": "none"}, "--use-orig-params"),
    ],
    ids=str,
)
def test_what_is_not_counted_beside_autocast_is_refused(model, more, way_out):
    recipe = strategy("checkpoint", **{"gpus": 8, "sharding": "fsdp1", **VIEWS, **more})
    with pytest.raises(RecipeError, match=f"(?s){way_out}"):
        step_of(load_model(model), recipe, ON, fixed_chunks(recipe), 512)


@pytest.mark.parametrize(
    "more", [{"quant_storage": "fp32"}, {"kbit_preparation": True}, {"precision": "mixed"}], ids=str
)
def test_four_bits_beside_weights_of_another_dtype_are_no_flat_tensor(more):
    recipe = strategy("checkpoint", **{"gpus": 8, "sharding": "fsdp1", **FOUR_BITS, **more})
    with pytest.raises(RecipeError, match="--sharding fsdp"):
        step_of(load_model("llama3.2-1b"), recipe, ON, fixed_chunks(recipe), 512)
