"""What all optimizers have in common: sums over weights, and refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstplan.errors import RecipeError
from mstplan.step.optimizers import OPTIMIZERS, bytes_to_step, optimizer_memory, states_in_order
from mstplan.step.optimizers.base import bytes_of
from mstplan.step.recipe import Recipe
from mstplan.step.runnable import check_trainer
from mstplan.step.tape import Weight

NAMES = list(OPTIMIZERS)
WEIGHTS = st.lists(
    st.tuples(st.integers(1, 600), st.integers(1, 600)) | st.tuples(st.integers(1, 5000)), min_size=1, max_size=5
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_backward", [False, True])
@given(shapes=WEIGHTS)
def test_states_in_order_are_the_states_in_sum(name, in_backward, shapes):
    recipe = Recipe(optimizer=name, optimizer_in_backward=in_backward)
    weights = [Weight(f"w{n}", shape) for n, shape in enumerate(shapes)]
    held = states_in_order(recipe, weights)
    assert bytes_of(held) == bytes_of(optimizer_memory(recipe, [(weight, 1) for weight in weights]).states)
    assert all(each.bytes % each.copies == 0 for each in held)


@pytest.mark.parametrize("name", NAMES)
@given(shapes=WEIGHTS, count=st.integers(1, 40))
def test_alike_weights_have_alike_states(name, shapes, count):
    recipe = Recipe(optimizer=name)
    weights = [Weight(f"w{n}", shape) for n, shape in enumerate(shapes)]
    counted = optimizer_memory(recipe, [(weight, count) for weight in weights])
    listed = optimizer_memory(recipe, [(weight, 1) for weight in weights for _ in range(count)])
    assert counted.states == listed.states and bytes_of(counted.temporaries) == bytes_of(listed.temporaries)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_stepped_alone_takes_no_more_than_all(name):
    recipe, weights = Recipe(optimizer=name), [Weight("w", (512, 2048)), Weight("norm", (2048,))]
    whole = bytes_of(optimizer_memory(recipe, [(weight, 3) for weight in weights]).temporaries)
    assert max(map(bytes_to_step(recipe), weights)) <= whole


@pytest.mark.parametrize("name", [name for name in NAMES if OPTIMIZERS[name].no_shards])
def test_what_cannot_step_shards_says_why(name):
    with pytest.raises(RecipeError) as e:
        Recipe(optimizer=name, sharding="fsdp", gpus=2)
    assert OPTIMIZERS[name].label in str(e.value) and OPTIMIZERS[name].no_shards in str(e.value)
    assert "use adamw or sgd" in str(e.value)


@pytest.mark.parametrize("name", [name for name in NAMES if not OPTIMIZERS[name].keeps_fp32_for_embeddings])
def test_fp32_states_of_embeddings_are_for_8_bit_ones(name):
    with pytest.raises(RecipeError, match="needs states in 8 bits: set optimizer to adamw-8bit"):
        Recipe(optimizer=name, fp32_embedding_states=True)


def test_a_trainer_keeps_states_of_embeddings_in_fp32():
    """transformers' has no other 8-bit optimizer of bitsandbytes, and none for Muon."""
    check_trainer(Recipe(optimizer="adamw-8bit", fp32_embedding_states=True))
    check_trainer(Recipe(optimizer="adamw-4bit"))
    for fields in ({"optimizer": "adamw-8bit"}, {"optimizer": "muon"}, {"adamw_kernel": "for-loop"}):
        with pytest.raises(RecipeError, match="no such optimizer"):
            check_trainer(Recipe(**fields))
