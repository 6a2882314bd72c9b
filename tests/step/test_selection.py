"""Patterns over weights' names, and words for kinds of weights."""

import pytest

from mstplan.errors import RecipeError
from mstplan.plan.solve import plan_at
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe, options_of
from mstplan.step.selection import Named, Selection, WeightKind
from mstplan.step.steps import frozen_names, named_weights

LLAMA = load_model("llama3.2-1b")


def trained(**fields):
    selection = Selection(**fields)
    return {weight.names[0] for weight in named_weights(LLAMA) if selection.trains(weight)}


@pytest.mark.parametrize(
    "pattern",
    [
        "layers.*.mlp.*",
        "model.layers.*.mlp.*",
        "layers.*.mlp",
        "mlp",
        "mlp.*",
        "*.mlp.*",
        "*gate_proj*,*up_proj*,*down_proj*",
    ],
)
def test_ways_to_name_the_mlps(pattern):
    found = trained(train=tuple(pattern.split(",")))
    assert len(found) == 3 * LLAMA.layers and all(".mlp." in name for name in found)


def test_a_number_is_a_layer_and_no_part_of_one():
    assert {name.split(".")[2] for name in trained(train=("layers.1",))} == {"1"}
    assert {name.split(".")[2] for name in trained(train=("layers.1*",))} == {"1", *map(str, range(10, 16))}


def test_freeze_takes_from_what_train_chose():
    found = trained(train=("mlp",), freeze=("down_proj",))
    assert len(found) == 2 * LLAMA.layers and not any("down" in name for name in found)


@pytest.mark.parametrize("word", ["embeddings", "head"])
def test_tied_embeddings_go_by_both_names(word):
    assert trained(train=(word,)) == trained(train=("lm_head",)) == {"model.embed_tokens.weight"}
    assert "model.embed_tokens.weight" not in trained(freeze=(word,))


def test_words_are_all_weights_and_share_none_but_tied_ones():
    model = load_model("llama3.1-8b")
    for weight in named_weights(model):
        assert sum(Selection((word,)).trains(weight) for word in WeightKind) == 1, weight


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"train": ("mpl",)}, "--train 'mpl' matches no weight of llama3.2-1b. Did you mean mlp"),
        ({"freeze": ("layers.99.*",)}, "--freeze 'layers.99.*' matches no weight"),
        ({"freeze": ("*",)}, "leave no weight of llama3.2-1b to train"),
        ({"train": ("norms",), "freeze": ("norms",)}, "leave no weight"),
    ],
)
def test_what_makes_no_sense(fields, said):
    with pytest.raises(RecipeError) as raised:
        plan_at(LLAMA, Recipe(**fields), card("h100"), 1024)
    assert said in str(raised.value) and len(str(raised.value).splitlines()) == 2


def test_a_recipe_holds_patterns_in_json_and_as_options():
    recipe = Recipe(train=["layers.*.mlp.*", "norms"], freeze=("layers.0",), input_gradients=True)
    assert Recipe.from_json(recipe.model_dump_json()) == recipe and hash(recipe) == hash(recipe.changed())
    assert (
        options_of(recipe)
        == "--strategy no-checkpointing --train 'layers.*.mlp.*,norms' --freeze layers.0 --input-gradients"
    )
    for bad in ("mlp", ["", "mlp"], [1], ["x" * 300], ["a"] * 101):
        with pytest.raises(RecipeError, match="train"):
            Recipe(train=bad)


def test_without_patterns_nothing_is_asked():
    assert not any(frozen_names(LLAMA, Selection()).layers)
    assert not Selection() and Selection(("*",)).trains(Named(("a",), frozenset()))
