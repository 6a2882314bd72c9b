"""Which weights Muon steps, and what it makes of one matrix."""

from __future__ import annotations

import pytest

from mstplan.step.optimizers import optimizer_memory
from mstplan.step.optimizers.base import bytes_of
from mstplan.step.recipe import Recipe
from mstplan.step.selection import WeightKind
from mstplan.step.tape import Weight

MATRIX, EXPERTS = Weight("q_proj", (128, 512)), Weight("experts", (8, 128, 512))
NORM = Weight("norm", (512,), kinds=frozenset({WeightKind.NORMS}))
TABLE, HEAD = (Weight(k, (1000, 512), kinds=frozenset({k})) for k in (WeightKind.EMBEDDINGS, WeightKind.HEAD))


def memory(*weights: Weight, **fields: object):
    return optimizer_memory(
        Recipe(**{"optimizer": "muon", "adamw_kernel": "fused", **fields}), [(w, 1) for w in weights]
    )


@pytest.mark.parametrize("rest", [EXPERTS, NORM, TABLE, HEAD], ids=lambda w: w.name)
@pytest.mark.parametrize("kernel", ["foreach", "fused", "for-loop"])
def test_the_rest_is_adamws(rest, kernel):
    assert memory(rest, adamw_kernel=kernel) == memory(rest, adamw_kernel=kernel, optimizer="adamw")


@pytest.mark.parametrize(("precision", "size"), [("bf16", 2), ("mixed", 4), ("fp32", 4)])
def test_a_matrix_has_a_momentum_and_is_made_orthogonal_in_bf16(precision, size):
    """Momentum and update in the weights' dtype; two generations of the matrix, its Gram matrix and the polynomial in bf16."""
    held = memory(MATRIX, precision=precision)
    assert bytes_of(held.states) == size * MATRIX.numel
    assert bytes_of(held.temporaries) == size * MATRIX.numel + 2 * 2 * MATRIX.numel + 2 * 2 * 128 * 128


def test_temporaries_are_the_larger_of_both_steps():
    alone, rest = memory(MATRIX, adamw_kernel="foreach"), memory(TABLE, adamw_kernel="foreach")
    assert memory(MATRIX, TABLE, adamw_kernel="foreach").temporaries == rest.temporaries
    assert memory(MATRIX, NORM, adamw_kernel="foreach").temporaries == alone.temporaries
