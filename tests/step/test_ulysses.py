"""Sequences that several GPUs share: what makes no sense is refused, with what would do; lengths are of whole sequences."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstplan import load_model
from mstplan.errors import RecipeError
from mstplan.plan.layout import step_of, step_sizes
from mstplan.plan.solve import host_bytes, longest_sequence, max_seq, plan_at, recommend_chunks
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.steps import Chunks, Sizes
from mstplan.step.ulysses import shares_groups
from mstplan.units import GIB

MODEL, ON = load_model("llama3.1-8b"), card("h100")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"gpus": 8, "sequence_parallel": 3}, "does not divide 8 gpus: add --gpus 9 or --sequence-parallel 2, 4, 8"),
        ({"sequence_parallel": 8}, "does not divide 1 gpus: add --gpus 8"),
        ({"gpus": 8, "sequence_parallel": 8, "attention": "eager"}, "use sdpa or flash"),
        ({"gpus": 8, "sequence_parallel": 8, "packing": 2}, "add attention='flash' (--attention flash)"),
    ],
    ids=str,
)
def test_recipes_that_contradict_themselves(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match="--sequence-parallel") as refused:
        Recipe(**fields)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("model", "ranks", "said"),
    [
        ("llama3.1-8b", 6, "32 heads of queries and 8 of keys, .*\nUse 1 or 2."),
        ("qwen2.5-7b", 8, "28 heads of queries and 4 of keys, .*\nUse 1, 2 or 4."),
        ("gemma3-4b", 2, "sliding windows, .*\nUse --attention flash"),
        ("deepseek-v3", 2, "values of another size"),
        ("gpt2", 2, "learned positions"),
    ],
)
def test_models_whose_attention_cannot_be_shared(model: str, ranks: int, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        plan_at(load_model(model), Recipe(gpus=ranks, sequence_parallel=ranks), ON, 2048)


@pytest.mark.parametrize("groups", [4, 8])
def test_groups_of_heads_that_cannot_be_shared(groups: int) -> None:
    recipe = strategy("mst-layer", gpus=16, sequence_parallel=16, attention_groups=groups, sharding="fsdp")
    with pytest.raises(RecipeError, match=f"32 heads .* in {groups} groups.\nUse --attention-groups auto, or fewer"):
        plan_at(MODEL, recipe, ON, 65536, Chunks(4, 16, groups))


@given(ranks=st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_groups_of_heads_that_are_chosen_can_be_shared(ranks: int) -> None:
    recipe = strategy("mst-layer", gpus=ranks, sequence_parallel=ranks)
    groups = recommend_chunks(MODEL, recipe, ON).groups
    assert shares_groups(MODEL.attention, groups, ranks)
    assert groups > 1 or ranks > 8


@given(tokens=st.integers(1, 1 << 20), ranks=st.integers(1, 64), pad_to=st.integers(1, 512))
def test_lengths_are_padded_to_what_the_ranks_divide(tokens: int, ranks: int, pad_to: int) -> None:
    recipe = Recipe(gpus=ranks, sequence_parallel=ranks, sharding="ddp" if ranks > 1 else "none", pad_to=pad_to)
    run = recipe.padded(tokens)
    assert run % ranks == run % pad_to == 0 and 0 <= run - tokens < ranks * pad_to
    assert recipe.local_tokens(run) * ranks == run


@given(tokens=st.integers(1, 1 << 16), ranks=st.sampled_from([1, 2, 8, 28]), batch=st.integers(1, 4))
def test_attention_is_of_the_whole_sequence(tokens: int, ranks: int, batch: int) -> None:
    """H heads of all ranks' scores, a rank has its part of; workspaces are rounded up for whole sequences."""
    here, whole = (Sizes(batch, n, 1, 1, each).units for n, each in ((tokens, ranks), (tokens * ranks, 1)))
    assert here[4] * ranks == whole[4] and here[5] == whole[5] and here[7] == whole[7]


@pytest.mark.parametrize("name", ["standard", "mst", "mst-offload"])
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_s_max_is_the_longest_whole_sequence_that_fits(name: str, sharding: str) -> None:
    recipe = strategy(name, gpus=8, sequence_parallel=8, sharding=sharding)
    chunks = Chunks(4, 16) if name != "standard" else Chunks(1, 1)
    longest = longest_sequence(MODEL, recipe, ON, chunks)
    assert longest % 8 == 0
    for tokens, fits in ((longest, True), (longest + 8, False)):
        step = step_of(MODEL, recipe, ON, chunks, tokens)
        assert (step.largest(step_sizes(recipe, tokens, chunks))[1] <= ON.budget_bytes) == fits


def test_more_gpus_reach_further() -> None:
    """With the weights whole on each, nearly twice as far with twice the GPUs: what attention copies, position ids of all, do not shrink."""
    reach = [
        longest_sequence(
            MODEL, strategy("mst", gpus=n, sequence_parallel=n) if n > 1 else strategy("mst"), ON, Chunks(4, 16)
        )
        for n in (1, 2, 4, 8, 16, 32)
    ]
    assert all(1.8 * a < b <= 2 * a for a, b in pairwise(reach))


def test_a_machines_cpu_ram_is_shared() -> None:
    alone, shared = strategy("mst-offload"), strategy("mst-offload", gpus=8, sequence_parallel=8)
    chunks = Chunks(4, 16)
    one, eight = (host_bytes(MODEL, r, 65536, step_of(MODEL, r, ON, chunks, 65536)) for r in (alone, shared))
    assert one == 8 * eight
    small = card("h100", host_memory=8 * GIB)
    assert max_seq(MODEL, shared, small).s_max == max_seq(MODEL, alone, small).s_max == 32768  # eight share it
    apart = shared.changed(gpus_per_node=1)
    assert max_seq(MODEL, apart, small).s_max == 8 * 32768


def test_time_goes_with_the_work_of_one_gpu() -> None:
    """Attention of a whole sequence is shared out, too: an eighth of what a GPU alone does, but for the optimizer's step, and what is copied."""
    one = plan_at(MODEL, strategy("mst"), ON, 65536, Chunks(4, 16)).step_seconds
    eight = plan_at(MODEL, strategy("mst", gpus=8, sequence_parallel=8), ON, 65536, Chunks(4, 16)).step_seconds
    assert one / 8 < eight < one / 7
