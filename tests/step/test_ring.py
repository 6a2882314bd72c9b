"""Sequences that several GPUs share in a ring: what makes no sense is refused, with what would do; lengths are of whole sequences."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstplan import load_model
from mstplan.errors import RecipeError
from mstplan.plan.layout import step_of, step_sizes
from mstplan.plan.solve import host_bytes, longest_sequence, plan_at
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.steps import Chunks

MODEL, ON = load_model("llama3.1-8b"), card("h100")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"gpus": 8, "context_parallel": 3}, "does not divide 8 gpus: add --gpus 9 or --context-parallel 2, 4, 8"),
        ({"context_parallel": 8}, "does not divide 1 gpus: add --gpus 8"),
        ({"gpus": 8, "context_parallel": 4, "sequence_parallel": 2}, "leave one of the two out"),
        ({"gpus": 8, "context_parallel": 8, "attention": "flash"}, "use sdpa"),
        ({"gpus": 8, "context_parallel": 8, "attention": "eager"}, "use sdpa"),
        ({"gpus": 8, "context_parallel": 8, "packing": 2}, "leave --packing"),
        ({"gpus": 8, "context_parallel": 8, "offload": "saved-tensors"}, "set offload='layer-inputs'"),
        ({"gpus": 8, "sharding": "fsdp", "rotate_method": "alltoall"}, "add context_parallel=8 (--context-parallel 8)"),
    ],
    ids=str,
)
def test_recipes_that_contradict_themselves(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Recipe(**fields)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "fields", "said"),
    [
        ("gemma3-4b", {}, "sliding windows or chunks of attention, which accelerate refuses"),
        ("deepseek-v3", {}, "values of another size"),
        ("gpt2", {}, "sinks, soft-capping, dropout"),
        ("gpt-oss-20b", {}, "sliding windows|sinks"),
        ("llama3.1-8b", {"precision": "fp32"}, "runs the math kernel"),
    ],
)
def test_models_whose_attention_no_ring_has(model: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=f"--context-parallel 2: .*({said})"):
        plan_at(load_model(model), Recipe(gpus=2, context_parallel=2, **fields), ON, 2048)


@given(tokens=st.integers(1, 1 << 20), ranks=st.integers(2, 64), pad_to=st.integers(1, 512))
def test_each_rank_has_a_piece_of_the_head_and_one_of_the_tail(tokens: int, ranks: int, pad_to: int) -> None:
    recipe = Recipe(gpus=ranks, context_parallel=ranks, pad_to=pad_to)
    run = recipe.padded(tokens)
    assert run % (2 * ranks) == run % pad_to == 0 and 0 <= run - tokens < 2 * ranks * pad_to
    assert recipe.local_tokens(run) * ranks == run and recipe.local_tokens(run) % 2 == 0


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("name", ["standard", "mst", "mst-offload"])
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_s_max_is_the_longest_whole_sequence_that_fits(name: str, sharding: str, ranks: int) -> None:
    recipe = strategy(name, gpus=8, context_parallel=ranks, sharding="fsdp" if ranks == 2 else sharding)
    chunks = Chunks(4, 16) if name != "standard" else Chunks(1, 1)
    longest = longest_sequence(MODEL, recipe, ON, chunks)
    assert longest % (2 * ranks) == 0
    for tokens, fits in ((longest, True), (longest + 2 * ranks, False)):
        step = step_of(MODEL, recipe, ON, chunks, tokens)
        assert (step.largest(step_sizes(recipe, tokens, chunks))[1] <= ON.budget_bytes) == fits


def test_gathering_all_keys_limits_what_more_gpus_reach() -> None:
    """Keys and values of all ranks are as large on many as on few; one rank's at a time shrink with them."""
    reach = {
        method: [
            longest_sequence(
                MODEL, strategy("mst", gpus=n, context_parallel=n, rotate_method=method), ON, Chunks(4, 16)
            )
            for n in (2, 4, 8, 16, 32)
        ]
        for method in ("allgather", "alltoall")
    }
    assert all(1.9 * a < b for a, b in pairwise(reach["alltoall"][1:]))
    growth = [b / a for a, b in pairwise(reach["allgather"])]
    assert growth == sorted(growth, reverse=True) and growth[-1] < 1.8
    assert all(a <= b for a, b in zip(*reach.values(), strict=True))


def test_of_two_ranks_the_larger_counts_at_each_instant() -> None:
    recipe = strategy("standard", gpus=2, context_parallel=2)
    sizes, step = step_sizes(recipe, 8192, Chunks(1, 1)), step_of(MODEL, recipe, ON, Chunks(1, 1), 8192)
    assert step.other is not None and step.other.other is None
    both = {instant.name: instant.bytes for instant in step.instants(sizes)}
    second = {instant.name: instant.bytes for instant in step.other.instants(sizes)}
    assert all(both[name] >= size for name, size in second.items()) and both != second


def test_a_machines_cpu_ram_is_shared() -> None:
    alone, shared = strategy("mst-offload"), strategy("mst-offload", gpus=8, context_parallel=8)
    chunks = Chunks(4, 16)
    one, eight = (host_bytes(MODEL, r, 65536, step_of(MODEL, r, ON, chunks, 65536)) for r in (alone, shared))
    assert one == 8 * eight


def test_time_goes_with_the_work_of_one_gpu() -> None:
    """Queries are shared out, and each meets all keys: an eighth of what a GPU alone does, but for the optimizer's step and what is merged."""
    one = plan_at(MODEL, strategy("mst"), ON, 65536, Chunks(4, 16)).step_seconds
    eight = plan_at(MODEL, strategy("mst", gpus=8, context_parallel=8), ON, 65536, Chunks(4, 16)).step_seconds
    assert one / 8 < eight < one / 7
