"""bitsandbytes' states, by the thresholds of its source."""

from __future__ import annotations

import pytest

from mstplan.step.optimizers import OPTIMIZERS, optimizer_memory
from mstplan.step.optimizers.base import bytes_of
from mstplan.step.recipe import Recipe
from mstplan.step.selection import WeightKind
from mstplan.step.tape import Weight

TABLE = Weight("embed_tokens", (1000, 512), kinds=frozenset({WeightKind.EMBEDDINGS, WeightKind.HEAD}))


def states(name: str, *weights: Weight, **fields: object) -> int:
    recipe = Recipe(optimizer=name, **fields)
    return bytes_of(optimizer_memory(recipe, [(weight, 1) for weight in weights]).states)


@pytest.mark.parametrize(("name", "moments"), [("adamw-8bit", 2), ("paged-adamw-8bit", 2), ("lion-8bit", 1)])
@pytest.mark.parametrize(
    ("numel", "each"), [(4095, 4 * 4095), (4096, 4096 + 4 * 16 + 1024), (4097, 4097 + 4 * 17 + 1024)]
)
def test_small_weights_keep_fp32_states_and_blocks_are_rounded_up(name, moments, numel, each):
    """1,024: the code book, one for all weights."""
    assert states(name, Weight("w", (numel,))) == moments * each


def test_code_books_are_shared_by_weights_and_not_by_optimizers():
    weights = [Weight(f"w{n}", (64, 64)) for n in range(3)]
    once, apart = states("adamw-8bit", *weights), states("adamw-8bit", *weights, optimizer_in_backward=True)
    assert apart - once == 2 * 2048


@pytest.mark.parametrize(("name", "moments"), [("lion", 1), ("paged-adamw", 2)])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_32_bit_states_do_not_depend_on_the_weights_dtype(name, moments, precision):
    assert states(name, Weight("w", (64, 64)), Weight("v", (7,)), precision=precision) == 4 * moments * (4096 + 7)


@pytest.mark.parametrize("name", ["adamw-8bit", "paged-adamw-8bit", "lion-8bit"])
def test_states_of_embeddings_in_fp32(name):
    moments = OPTIMIZERS[name].moments
    other = Weight("w", (64, 64))
    whole = states(name, TABLE, other, fp32_embedding_states=True)
    assert whole == states(name, other) + 4 * moments * TABLE.numel
    assert whole > states(name, TABLE, other)
    assert states(name, other, fp32_embedding_states=True) == states(name, other)


@pytest.mark.parametrize(("numel", "managed"), [(99_999, 0), (100_000, 200_000)])
def test_states_of_large_weights_are_in_managed_memory(numel, managed):
    """The scales are not."""
    memory = optimizer_memory(Recipe(optimizer="paged-adamw-8bit"), [(Weight("w", (numel,)), 1)])
    plain = optimizer_memory(Recipe(optimizer="adamw-8bit"), [(Weight("w", (numel,)), 1)])
    assert memory.managed == managed and bytes_of(memory.states) == bytes_of(plain.states) and plain.managed == 0


def test_kernels_work_in_place():
    for name in ("adamw-8bit", "paged-adamw-8bit", "paged-adamw", "lion", "lion-8bit"):
        assert optimizer_memory(Recipe(optimizer=name), [(TABLE, 1)]).temporaries == ()
