"""What options ask for: the same recipe wherever they stand, and back again from a recipe to the options that ask for it."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan.cli.commands import declared
from mstplan.cli.options import RecipesOptions, recipes_of
from mstplan.step.recipe import STRATEGIES as NAMED
from mstplan.step.recipe import Recipe, options_of, strategy, strategy_label

from ..step.strategies import recipes

OPTIONS = declared(RecipesOptions)
FLAGS = {flag: name for name, one in OPTIONS.items() for flag in one.flags}


def parsed(text: str) -> RecipesOptions:
    """What the command line makes of these options."""
    found: dict[str, object] = {}
    words = iter(shlex.split(text))
    for word in words:
        name = FLAGS[word]
        kind = OPTIONS[name].kind
        found[name] = True if kind is bool else kind(next(words))
    return RecipesOptions(**found)


@settings(max_examples=300)
@given(st.data())
def test_options_of_a_recipe_ask_for_it(data: st.DataObject) -> None:
    recipe = data.draw(recipes())
    for name in ("mlp_chunks", "loss_chunks"):
        if getattr(recipe, name) == "auto" and data.draw(st.booleans()):
            recipe = recipe.changed(**{name: data.draw(st.integers(1, 64))})
    if not recipe.layer_in_chunks and data.draw(st.booleans()):
        recipe = recipe.changed(
            **{name: getattr(NAMED[data.draw(st.sampled_from([*NAMED]))], name) for name in ("mlp_recompute",)}
        )
    (found,) = recipes_of(parsed(options_of(recipe))).values()
    assert found == recipe


@pytest.mark.parametrize("name", NAMED)
def test_a_strategy_is_called_by_its_name(name: str) -> None:
    assert options_of(strategy(name)) == f"--strategy {strategy_label(name)}"
    refused = {"checkpoint-sqrt": "checkpoint", "mst-layer": "mst", "mst-layer-offload": "mst-offload"}  # in shards
    name = refused.get(name, name)
    sharded = strategy(name, gpus=8, sharding="fsdp", optimizer_in_backward=True)
    assert recipes_of(parsed(options_of(sharded))) == {name: sharded}


def test_a_recipe_of_ones_own_is_described() -> None:
    assert options_of(Recipe(checkpoint=4)) == "--checkpoint 4"
    assert options_of(Recipe(loss="transformers<4.45")) == "--loss 'transformers<4.45'"
    assert (
        options_of(strategy("mst", mlp_chunks=4, loss_chunks=8, optimizer="sgd"))
        == "--strategy mst --chunks 4,8 --optimizer sgd"
    )
