"""Stand-ins keep what the real optimizers keep, where those are installed, and the formula says the same."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from mstplan.errors import MissingError
from mstplan.measuring.allocations import _parts_of
from mstplan.step.optimizers import OPTIMIZERS, optimizer_memory
from mstplan.step.optimizers.base import bytes_of
from mstplan.step.optimizers.bitsandbytes import Bitsandbytes
from mstplan.step.optimizers.torchao import Torchao
from mstplan.step.recipe import Recipe
from mstplan.step.selection import Kinds, WeightKind
from mstplan.step.tape import Weight
from mstplan.tracing.optimizers import make_fake_optimizer

SHAPES = ((1000, 64), (64, 64), (130, 40), (64,), (70, 70))
STOOD_FOR = [name for name, each in OPTIMIZERS.items() if isinstance(each, Bitsandbytes | Torchao)]
RECIPES = [
    Recipe(optimizer=name, precision=precision, fp32_embedding_states=fp32)
    for name in STOOD_FOR
    for precision in ("bf16", "fp32")
    for fp32 in {False, OPTIMIZERS[name].keeps_fp32_for_embeddings}
]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def kinds_of(weight: torch.Tensor) -> Kinds:
    return frozenset({WeightKind.EMBEDDINGS} if weight.shape == SHAPES[0] else ())


def states_of(make, recipe: Recipe) -> list[tuple[str, int]]:
    """(dtype, bytes) of all states after a step."""
    weights = [nn.Parameter(torch.randn(shape, dtype=DTYPES[recipe.precision])) for shape in SHAPES]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = make(recipe, kinds_of)(weights)
    optimizer.step()
    values = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    parts = {part.data_ptr(): part for value in values if torch.is_tensor(value) for part in _parts_of(value)}
    return sorted((str(part.dtype), part.nbytes) for part in parts.values())


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_the_formula_says_what_a_stand_in_keeps(recipe):
    weights = [(Weight(str(n), s, kinds=kinds_of(torch.empty(s))), 1) for n, s in enumerate(SHAPES)]
    kept = states_of(make_fake_optimizer, recipe)
    assert bytes_of(optimizer_memory(recipe, weights).states) == sum(size for _, size in kept)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_a_stand_in_keeps_what_the_real_one_keeps(recipe, monkeypatch):
    optimizer = OPTIMIZERS[recipe.optimizer]
    if isinstance(optimizer, Bitsandbytes):
        optim = pytest.importorskip("bitsandbytes").optim
        optim.GlobalOptimManager.get_instance().initialize()  # it knows weights by their ids, which come again
    else:
        pytest.importorskip("torchao")
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # which changes no state
    assert states_of(optimizer.make, recipe) == states_of(make_fake_optimizer, recipe)


@pytest.mark.parametrize("name", STOOD_FOR)
def test_a_package_that_is_missing_is_named(name, monkeypatch):
    package = "bitsandbytes" if isinstance(OPTIMIZERS[name], Bitsandbytes) else "torchao"
    for module in (package, f"{package}.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingError, match=f"pip install {package}"):
        OPTIMIZERS[name].make(Recipe(optimizer=name), kinds_of)
