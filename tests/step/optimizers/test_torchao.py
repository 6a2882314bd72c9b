"""torchao's states and what its compiled step makes, in bytes for each value of a weight."""

from __future__ import annotations

import pytest

from mstplan.step.optimizers import optimizer_memory
from mstplan.step.optimizers.base import bytes_of
from mstplan.step.recipe import Recipe, recipe_in_words
from mstplan.step.tape import Weight

N = 1 << 20


@pytest.mark.parametrize(
    ("name", "each", "code_book", "step"),
    [
        ("adamw-4bit", 2 * (1 / 2 + 4 / 128), 16, 24 + 8 / 128),
        ("adamw-8bit-torchao", 2 * (1 + 4 / 256), 256, 8 + 8 / 256),
    ],
)
def test_bytes_of_a_weight(name, each, code_book, step):
    memory = optimizer_memory(Recipe(optimizer=name), [(Weight("w", (N,)), 5)])
    assert bytes_of(memory.states) == 5 * (N * each + 2 * 4 * code_book)
    assert bytes_of(memory.temporaries) == N * step


@pytest.mark.parametrize(("name", "block"), [("adamw-4bit", 128), ("adamw-8bit-torchao", 256)])
@pytest.mark.parametrize(("precision", "size"), [("bf16", 2), ("fp32", 4)])
def test_small_and_odd_weights_keep_states_in_their_own_dtype_and_are_stepped_in_place(name, block, precision, size):
    for numel in (4095, 4096 - block, 8192 + block // 2):
        memory = optimizer_memory(Recipe(optimizer=name, precision=precision), [(Weight("w", (numel,)), 1)])
        assert bytes_of(memory.states) == 2 * size * numel and memory.temporaries == ()


def test_it_is_called_4_bit():
    assert "(4-bit states)" in recipe_in_words(Recipe(optimizer="adamw-4bit"))
