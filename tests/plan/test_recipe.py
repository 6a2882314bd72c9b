from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstplan.errors import OutputError, RecipeError
from mstplan.plan.recipe import STRATEGIES, STRATEGY_FIELDS, Recipe, strategy


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_strategies_are_valid_recipes(name: str) -> None:
    """They are constructed without validation, to spare every start the time."""
    assert Recipe.model_validate(STRATEGIES[name].model_dump()) == STRATEGIES[name]


def test_the_five_strategies_differ_only_in_what_a_strategy_decides() -> None:
    assert list(STRATEGIES) == ["standard", "checkpoint", "checkpoint-sqrt", "mst", "mst-offload"]
    for recipe in STRATEGIES.values():
        changed = {field for field in Recipe.model_fields if getattr(recipe, field) != getattr(Recipe(), field)}
        assert changed <= set(STRATEGY_FIELDS)


@pytest.mark.parametrize("name", STRATEGIES)
def test_json_round_trip(name: str, tmp_path: Path) -> None:
    recipe = strategy(name, batch=3, checkpoint="layer" if name == "standard" else STRATEGIES[name].checkpoint)
    recipe.write(tmp_path / "r.json")
    assert Recipe.read(tmp_path / "r.json") == recipe


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"batch": 0}, "batch"), ({"batch": True}, "batch"), ({"batch": 1.5}, "batch"), ({"batch": "2"}, "batch"), ({"optimizer": "adam"}, "adamw"),
     ({"checkpoint": 0}, "checkpoint"), ({"checkpoint": "some"}, "none, layer, sqrt"), ({"mlp_chunks": 0}, "mlp_chunks"),
     ({"mlp_chunks": "many"}, "mlp_chunks"), ({"loss_chunks": 4}, "loss='chunked'"), ({"offload_layer_inputs": True}, "checkpointing"),
     ({"optimizer_in_backward": True, "accumulation": 2}, "accumulate"), ({"optimizer_in_backward": True, "optimizer_on_host": True}, "exclude"),
     ({"weights_on_host": True}, "optimizer_on_host"), ({"optimiser": "adamw"}, "Did you mean optimizer"), ({"accumulation": 10**9}, "accumulation")],
)  # fmt: skip
def test_recipes_that_make_no_sense(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as e:
        Recipe.from_json(json.dumps(fields))
    assert len(str(e.value).splitlines()) <= 2
    with pytest.raises(RecipeError):
        Recipe().changed(**fields)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"adamw"', "\x00"])
def test_json_that_is_no_recipe(text: str) -> None:
    with pytest.raises(RecipeError):
        Recipe.from_json(text)


@given(st.dictionaries(st.sampled_from([*Recipe.model_fields, "other"]), st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)))
def test_any_fields_make_a_recipe_or_a_clear_error(fields: dict[str, object]) -> None:
    try:
        Recipe().changed(**fields)
    except RecipeError as e:
        assert len(str(e).splitlines()) <= 2  # noqa: PT017


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read"):
        Recipe.read(tmp_path / "nowhere.json")
    with pytest.raises(RecipeError, match="cannot read"):
        Recipe.read(tmp_path)
    with pytest.raises(OutputError, match="cannot write"):
        Recipe().write(tmp_path / "no" / "folder.json")
    assert list(tmp_path.iterdir()) == []


def test_unknown_strategy() -> None:
    with pytest.raises(RecipeError, match="Did you mean mst"):
        strategy("mts")
