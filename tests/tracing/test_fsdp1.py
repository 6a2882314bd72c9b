"""FSDP1: the trace beside two real processes of torch's FullyShardedDataParallel, and the formula beside it."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest

from mstplan.errors import RecipeError
from mstplan.plan.layout import step_of
from mstplan.plan.solve import fixed_chunks
from mstplan.spec.catalog import load_model
from mstplan.step.recipe import strategy
from mstplan.tracing.fsdp import GATHERED
from mstplan.tracing.tracer import trace

from ..processes import on_two_ranks
from .real_events import peak, without
from .test_fsdp import LARGE, ON, check_formula, check_peaks, check_streams, pass_of, traced
from .two_ranks import CONFIG, TOKENS
from .two_ranks_flat import mixed_recipes, recipes, synced_recipes

LAYERS = CONFIG["num_hidden_layers"]
OF_GLOO = re.compile(
    r"c10d::allgather_ > empty$|^gloo:all_gather > empty$"  # an all-gather's flat copy of its output, and the next one's
    r"|c10d::_reduce_scatter_base_ > clone > empty_strided$"  # a reduce-scatter's of its input; no card makes any of the three
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first of two ranks allocated, by recipe."""
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks("tests.tracing.two_ranks_flat", folder)
    found: dict[str, Any] = json.loads((folder / "rank0.json").read_text())
    return found


def last_forward(events: list[list[Any]]) -> int:
    """Where the last micro-batch of a step begins."""
    return max(n for n, (e, before) in enumerate(pairwise(events), 1) if (e[1], before[1]) == ("backward", "forward"))


@pytest.mark.parametrize("name", recipes())
def test_two_real_ranks_allocate_what_the_trace_says_in_that_order(real, name):
    events = without(real[name]["runs"][0], OF_GLOO)
    expected = [made.bytes for made in traced(recipes()[name]).step.storages if made.bytes > LARGE]
    assert [e[0] for e in events if e[0] > LARGE] == expected
    collectives = len(real[name]["runs"][0]) - len(events)
    assert collectives > 2 * LAYERS


@pytest.mark.parametrize("name", recipes())
def test_two_real_ranks_hold_what_the_trace_says(real, name):
    """Within what random generators' states make, which are not followed: 0.2%."""
    check_peaks(
        traced(recipes()[name]), real[name]["resident"], [without(events, OF_GLOO) for events in real[name]["runs"]]
    )


@pytest.mark.parametrize("name", [name for name in recipes() | mixed_recipes() if name != "reentrant"])
def test_the_formula_knows_what_is_on_which_stream(name):
    check_streams({**recipes(), **mixed_recipes()}[name])


@pytest.mark.parametrize("name", synced_recipes())
def test_two_real_ranks_add_shards_to_shards_where_each_batch_is_scattered(real, name):
    """The last micro-batch, allocation by allocation; and what is held in it, the shards of the gradients of those before among it."""
    found = traced(synced_recipes()[name])
    runs = [without(events, OF_GLOO) for events in real[name]["runs"]]
    events = runs[0][last_forward(runs[0]) :]
    assert [e[0] for e in events if e[0] > LARGE] == [m.bytes for m in found.step.storages if m.bytes > LARGE]
    gradients = sum(weight.bytes for weight in found.weights if weight.trained)
    assert real[name]["resident"] + gradients == sum(alive.bytes for alive in found.resident)
    assert max(found.live) == pytest.approx(real[name]["resident"] + peak(runs), rel=0.002)


@pytest.mark.parametrize("name", mixed_recipes())
def test_two_real_ranks_cast_gather_and_sum_in_mixed_precision(real, name):
    """Of the sizes that only flat tensors have: shards in bf16, gathered ones, joined gradients in both dtypes, and shards of these."""
    found = traced(mixed_recipes()[name])
    flat = {weight.bytes for weight in found.weights if weight.name.startswith("flat")}
    sizes = {n * size // 4 for size in flat for n in (2, 4, 8)}
    expected = [made.bytes for made in found.step.storages if made.bytes in sizes]
    assert len(set(expected)) >= 4
    events = without(real[name]["runs"][0], OF_GLOO)
    assert [e[0] for e in events if e[0] in sizes] == expected


def test_one_layer_is_gathered_at_a_time_and_in_backward_the_one_before_it():
    found = trace(CONFIG, strategy("checkpoint", gpus=8, sharding="fsdp1"), TOKENS, whole=True)
    sizes = [weight.bytes for weight in found.weights if weight.name.startswith("flat layer")]
    gathered = {"forward": 0, "backward": 0}
    for place, span in found.step.blocks():
        for e in span:
            alive = [found.step.storages[i] for i in found.step.alive_at(e)]
            layers = len([m for m in alive if m.operation == GATHERED and m.bytes == 8 * sizes[0]])
            run = pass_of(place.run)
            gathered[run] = max(gathered.get(run, 0), layers)
    assert (gathered["forward"], gathered["backward"]) == (1, 2)


@pytest.mark.parametrize(
    ("model", "name", "more"),
    [
        ("llama3.2-1b", "checkpoint", {}),
        ("llama3.2-1b", "standard", {"precision": "mixed"}),
        ("llama3.1-8b", "checkpoint", {"precision": "mixed", "reduce_dtype": "bf16", "gpus": 2}),
        ("llama3.2-1b", "checkpoint", {"precision": "mixed", "accumulation": 3}),
        ("qwen3-0.6b", "checkpoint", {"accumulation": 2, "adamw_kernel": "foreach"}),
        ("qwen3-0.6b", "standard", {"precision": "mixed", "reduce_dtype": "bf16", "gpus": 7, "accumulation": 2}),
        ("llama3.2-1b", "checkpoint", {"loss": "liger", "kernels": "liger", "precision": "mixed"}),
        ("llama3.1-8b", "checkpoint", {"precision": "mixed", "backward_prefetch": "none"}),
        ("llama3.2-1b", "checkpoint", {"max_grad_norm": 1.0}),
        ("llama3.2-1b", "checkpoint", {"precision": "mixed", "accumulation": 3, "sync_each_batch": True}),
        ("llama3.2-1b", "checkpoint", {"use_orig_params": True, "precision": "mixed", "accumulation": 3, "gpus": 7}),
        ("gpt2", "checkpoint", {"gpus": 5, "use_orig_params": True, "max_grad_norm": 1.0}),
        ("gpt2", "checkpoint", {"gpus": 5}),
        ("mixtral-8x7b", "checkpoint", {"gpus": 64}),
    ],
    ids=str,
)
def test_formula_and_trace_agree(model, name, more):
    check_formula(model, strategy(name, **{"gpus": 8, "sharding": "fsdp1", **more}), 1024, worst=0.001)


@pytest.mark.parametrize("gpus", [2, 3, 8, 1000, 65_536])
def test_a_flat_shard_is_padded_once(gpus):
    """Of a layer, where FSDP2 pads each of its weights."""
    recipe = strategy("checkpoint", gpus=gpus, sharding="fsdp1")
    model = load_model("qwen3-0.6b")
    flat, each = (
        step_of(model, r, ON, fixed_chunks(r), 512).card_parameters for r in (recipe, recipe.changed(sharding="fsdp"))
    )
    whole = step_of(model, recipe, ON, fixed_chunks(recipe), 512).parameters
    assert whole <= flat * gpus < whole + gpus * (model.layers + 1) and flat <= each


@pytest.mark.parametrize(
    ("more", "way_out"),
    [
        ({"freeze": ("embeddings",)}, "--sharding fsdp"),
        ({"loss": "chunked", "loss_chunks": 4}, "--sharding fsdp"),
        ({"mlp_chunks": 4, "mlp_recompute": True}, "--sharding fsdp"),
        ({"offload": "layer-inputs"}, "--offload"),
        ({"gpus": 8, "replicas": 2}, "--sharding fsdp"),
        ({"optimizer_on_host": True, "weights_on_host": True}, "--sharding fsdp"),
        ({"sequence_parallel": 8}, "--sharding fsdp"),
        ({"accumulation": 2, "sync_each_batch": True, "use_orig_params": True}, "--use-orig-params"),
        ({"sharding": "fsdp", "use_orig_params": True}, "--sharding fsdp1"),
    ],
    ids=str,
)
def test_what_is_refused_says_what_would_do(more, way_out):
    with pytest.raises(RecipeError, match=way_out):
        strategy("checkpoint", **{"gpus": 8, "sharding": "fsdp1", **more})


def test_reentrant_checkpoints_of_all_weights_are_refused():
    recipe = strategy("checkpoint", gpus=8, sharding="fsdp1", checkpoint="reentrant")
    with pytest.raises(RecipeError, match="--checkpoint layer"):
        step_of(load_model("llama3.2-1b"), recipe, ON, fixed_chunks(recipe), 512)


def test_weights_of_two_dtypes_are_no_flat_tensor():
    model = load_model("ernie-4.5-21b-a3b")
    recipe = strategy("checkpoint", gpus=8, sharding="fsdp1")
    with pytest.raises(RecipeError, match="--sharding fsdp"):
        step_of(model, recipe, ON, fixed_chunks(recipe), 512)
