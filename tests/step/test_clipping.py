"""What clipping makes of gradients, against torch's own clip_grad_norm_."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstplan.errors import RecipeError
from mstplan.step.clipping import CHUNK, clipping, parts_of_norm
from mstplan.step.optimizers.base import bytes_of
from mstplan.step.recipe import Recipe
from mstplan.step.tape import Weight

CLIPPED = Recipe(max_grad_norm=1.0)
SHAPES = st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 200)), min_size=1, max_size=6)


def test_nothing_is_made_where_nothing_is_clipped():
    assert clipping(Recipe(), [(Weight("w", (8, 8)), 3)]) == () == clipping(CLIPPED, [])


@given(SHAPES)
def test_room_for_the_parts_of_the_largest_in_every_tensor(shapes):
    made = clipping(CLIPPED, [(Weight("w", shape), 2) for shape in shapes])
    parts = max(-(-a * b // CHUNK) for a, b in shapes)
    assert [(held.dtype, held.bytes) for held in made] == [
        ("float32", 4 * 2 * len(shapes) * parts),
        ("bfloat16", 2 * 2 * len(shapes)),
    ]


def test_dtypes_are_clipped_one_after_the_other():
    large, small = Weight("w", (4096, 4096)), Weight("adapter", (16, 4096), dtype="float32")
    both, alone = clipping(CLIPPED, [(large, 1), (small, 1)]), clipping(CLIPPED, [(large, 1)])
    assert both[0].bytes == alone[0].bytes and bytes_of(both) == bytes_of(alone) + 4


def test_weights_of_7b_parameters_are_clipped_in_less_than_8_mib():
    assert bytes_of(clipping(CLIPPED, [(Weight("w", (4096, 4096)), 400)])) < 8 << 20


def test_flat_gradients_have_norms_in_fp32_one_after_the_other():
    made = clipping(CLIPPED.changed(gpus=2, sharding="fsdp1"), [(Weight("flat", (1 << 20,)), 33)])
    assert [(held.dtype, held.bytes) for held in made] == [("float32", parts_of_norm(1 << 20)), ("float32", 4 * 33)]
    assert 4 * 33 < parts_of_norm(1 << 20) < 1 << 10


def test_an_optimizer_in_backward_has_nothing_to_clip():
    with pytest.raises(RecipeError, match="all gradients at once"):
        Recipe(max_grad_norm=1.0, optimizer_in_backward=True)


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_a_norm_is_positive(norm):
    with pytest.raises(RecipeError, match="max_grad_norm"):
        Recipe(max_grad_norm=norm)
