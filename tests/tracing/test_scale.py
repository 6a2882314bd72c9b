"""Many ranks: one process answers for all of them, in the time of one, and no rank holds more than the first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan import load_model
from mstplan.plan.layout import step_of
from mstplan.plan.solve import fixed_chunks
from mstplan.step.fsdp import shard_of
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.tape import Weight
from mstplan.tracing.fsdp import shard_shape

from .test_fsdp import ON, check_formula

MOST = 65_536


def sharded(gpus: int, **more: object) -> Recipe:
    return strategy("checkpoint", gpus=gpus, sharding="fsdp", **more)


@given(st.integers(1, 200_000), st.integers(2, MOST))
@settings(max_examples=60, deadline=None)
def test_ranks_differ_in_rows_at_the_end_alone(rows, gpus):
    """As torch.chunk splits: full shares, then one of what is left, then none. What is kept is padded to the first's."""
    share = -(-rows // gpus)
    real = [len(part) for part in torch.arange(rows).chunk(gpus)]
    full, left = divmod(rows, share)
    assert real == [share] * full + [left] * bool(left) and len(real) <= gpus
    assert shard_shape((rows,), gpus) == shard_of(Weight("w", (rows,)), sharded(gpus)).shape == (share,)


@pytest.mark.parametrize("sharding", ["fsdp", "ddp"])
def test_a_step_of_most_ranks_is_as_long_as_one_of_two(sharding):
    """What is replayed does not grow with ranks, so that its time does not."""
    model = load_model("llama3.1-8b")

    def size(gpus: int) -> tuple[int, int]:
        recipe = strategy("checkpoint", gpus=gpus, sharding=sharding)
        step = step_of(model, recipe, ON, fixed_chunks(recipe), 4096)
        return len(step.tape.ops), sum(map(len, step.detailed().values()))

    assert size(2) == size(1000) == size(MOST)


@pytest.mark.parametrize("gpus", [3, 1000, MOST])
def test_formula_and_trace_agree_from_few_to_most_ranks(gpus):
    """Of uneven shares too, and where most of what is gathered is padding."""
    check_formula("llama3.2-1b", sharded(gpus), 1024)


def test_adapters_of_most_ranks():
    check_formula("llama3.2-1b", sharded(MOST, lora_rank=16, autocast=True), 1024)
