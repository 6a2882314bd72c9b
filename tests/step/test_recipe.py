from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mstplan.errors import OutputError, RecipeError
from mstplan.step.recipe import STRATEGIES, STRATEGY_FIELDS, USUAL_STRATEGIES, Recipe, recipe_in_words, strategy


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_strategies_are_valid_recipes(name: str) -> None:
    """They are constructed without validation, to spare every start the time."""
    assert Recipe.model_validate(STRATEGIES[name].model_dump()) == STRATEGIES[name]


def test_strategies_differ_only_in_what_a_strategy_decides() -> None:
    assert list(STRATEGIES) == [*USUAL_STRATEGIES, "mst-layer", "mst-layer-offload", "checkpoint-sqrt"]
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
    [
        ({"batch": 0}, "batch"),
        ({"batch": True}, "batch"),
        ({"batch": 1.5}, "batch"),
        ({"batch": "2"}, "batch"),
        ({"optimizer": "adam"}, "adamw"),
        ({"checkpoint": 0}, "checkpoint"),
        ({"checkpoint": "some"}, "none, layer, reentrant, sqrt"),
        ({"mlp_chunks": 0}, "mlp_chunks"),
        ({"mlp_chunks": "many"}, "mlp_chunks"),
        ({"loss_chunks": 4}, "loss='chunked'"),
        ({"offload_layer_inputs": True}, "checkpointing"),
        ({"optimizer_in_backward": True, "accumulation": 2}, "accumulate"),
        ({"optimizer_in_backward": True, "optimizer_on_host": True}, "exclude"),
        ({"weights_on_host": True}, "optimizer_on_host"),
        ({"attention": "flash", "precision": "fp32"}, "bf16 or mixed"),
        ({"optimiser": "adamw"}, "Did you mean optimizer"),
        ({"accumulation": 10**9}, "accumulation"),
        ({"gpus": 8}, "--sharding fsdp"),
        ({"sharding": "fsdp"}, "2 gpus or more"),
        ({"gpus": 0}, "gpus"),
        ({"gpus": 100_000}, "gpus"),
        ({"gpus": 2, "sharding": "zero"}, "zero3"),
        ({"gpus": 2, "sharding": "fsdp", "checkpoint": "sqrt"}, "checkpoint='layer'"),
        ({"gpus": 2, "sharding": "fsdp", "checkpoint": 4}, "checkpoint='layer'"),
        ({"gpus": 2, "sharding": "fsdp", "optimizer": "adamw-8bit"}, "adamw or sgd"),
        ({"gpus": 2, "sharding": "fsdp", "optimizer": "adafactor"}, "adamw or sgd"),
        ({"gpus": 2, "sharding": "fsdp", "optimizer_on_host": True}, "add weights_on_host"),
        ({"sync_each_batch": True}, "--sync-each-batch"),
        ({"gpus": 2, "sharding": "ddp", "replicas": 2}, "--replicas"),
        ({"gpus": 12, "sharding": "fsdp", "replicas": 5}, "can be 2, 3, 4, 6"),
        ({"gpus": 2, "sharding": "fsdp", "replicas": 2}, "2 GPUs allow none"),
        ({"gpus": 2, "sharding": "fsdp", "reduce_dtype": "bf16"}, "--precision mixed"),
        ({"layer_in_chunks": True}, "leave mlp_recompute=False"),
        ({"attention_groups": 2}, "strategy mst-layer"),
        ({"layer_in_chunks": True, "mlp_recompute": True, "offload": "saved-tensors"}, "offload layer-inputs"),
    ],
)
def test_recipes_that_make_no_sense(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as e:
        Recipe.from_json(json.dumps(fields))
    assert len(str(e.value).splitlines()) <= 2
    with pytest.raises(RecipeError):
        Recipe().changed(**fields)
    with pytest.raises(RecipeError, match=says):
        Recipe(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        Recipe.model_validate(fields)


def test_a_recipe_is_an_ordinary_pydantic_model() -> None:
    recipe = Recipe(batch=2, checkpoint=4)
    assert (
        recipe
        == Recipe.model_validate({"batch": 2, "checkpoint": 4})
        == Recipe.model_validate_json('{"batch": 2, "checkpoint": 4}')
    )
    assert (
        recipe
        == Recipe.model_construct(batch=2, checkpoint=4)
        == Recipe().model_copy(update={"batch": 2, "checkpoint": 4})
    )
    assert pickle.loads(pickle.dumps(recipe)) == recipe and len({recipe, Recipe(batch=2, checkpoint=4)}) == 1
    with pytest.raises(ValidationError):
        recipe.batch = 3


@pytest.mark.parametrize("field", ["mlp_chunks", "loss_chunks"])
@pytest.mark.parametrize(
    "value", [0, -1, 1.5, None, True, "many", 10**20, 10**5000], ids=lambda value: type(value).__name__
)
def test_what_a_number_of_chunks_must_be(field: str, value: object) -> None:
    with pytest.raises(RecipeError, match=f"{field}: must be 'auto' or a whole number from 1") as e:
        Recipe(loss="chunked", **{field: value})  # type: ignore[arg-type]
    assert len(str(e.value)) < 250


def test_offloading_without_checkpointing_names_the_way_out() -> None:
    with pytest.raises(RecipeError, match=r"checkpoint='layer' \(--checkpoint layer\)"):
        Recipe(offload_layer_inputs=True)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("mixed", "float32"), ("fp32", "float32")])
def test_what_weights_are_held_in(precision: str, dtype: str) -> None:
    assert Recipe().changed(precision=precision).weight_dtype == dtype


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"adamw"', "\x00", "\ud800", '{"batch": ' + "9" * 5000 + "}", '{"a\\nb": 1}']
)
def test_json_that_is_no_recipe(text: str) -> None:
    with pytest.raises(RecipeError) as e:
        Recipe.from_json(text)
    assert len(str(e.value).splitlines()) <= 2


@given(
    st.dictionaries(
        st.sampled_from([*Recipe.model_fields, "other"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    )
)
def test_any_fields_make_a_recipe_or_a_clear_error(fields: dict[str, object]) -> None:
    try:
        Recipe().changed(**fields)
    except RecipeError as e:
        assert len(str(e).splitlines()) <= 2  # noqa: PT017


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no file"):
        Recipe.read(tmp_path / "nowhere.json")
    with pytest.raises(RecipeError, match="is not a file"):
        Recipe.read(tmp_path)
    with pytest.raises(OutputError, match="cannot write"):
        Recipe().write(tmp_path / "no" / "folder.json")
    assert list(tmp_path.iterdir()) == []


def test_unknown_strategy() -> None:
    with pytest.raises(RecipeError, match="Did you mean mst"):
        strategy("mts")


@pytest.mark.parametrize(
    "name", [None, 3, ["mst"], b"mst", "x" * 100_000, "a\nb"], ids=lambda name: type(name).__name__
)
def test_what_is_no_strategy(name: object) -> None:
    with pytest.raises(RecipeError, match="unknown strategy") as e:
        strategy(name)  # type: ignore[arg-type]
    assert len(str(e.value)) < 300 and len(str(e.value).splitlines()) <= 2


def test_a_recipe_is_not_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    Recipe().write(path)
    with pytest.raises(OutputError, match="exists already"):
        Recipe(batch=2).write(path)
    assert Recipe.read(path).batch == 1
    Recipe(batch=2).write(path, force=True)
    assert Recipe.read(path).batch == 2 and [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b" " * 1_000_001)
    (tmp_path / "bytes").write_bytes(b"{\xff}")
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbf{}")
    for name, says in (
        ("pipe", "is not a file"),
        ("large", "larger than 1 MB"),
        ("bytes", "is not UTF-8"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(RecipeError, match=says) as e:
            Recipe.read(tmp_path / name)
        assert len(str(e.value).splitlines()) == 2
    assert Recipe.read(tmp_path / "bom") == Recipe()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "full fine-tuning, bf16 weights, "),
        ({"autocast": True}, "full fine-tuning, bf16 weights under bf16 autocast, "),
        ({"precision": "mixed"}, "full fine-tuning, fp32 weights under bf16 autocast, "),
        ({"precision": "mixed", "sharding": "fsdp", "gpus": 2}, "full fine-tuning, fp32 shards, gathered in bf16, "),
        ({"lora_rank": 8, "quantize": "nf4"}, "(fp32), nf4 weights, the rest bf16, "),
        (
            {"lora_rank": 8, "quantize": "nf4", "double_quantize": True, "kbit_preparation": True},
            "(fp32), nf4 weights with double quantisation, the rest fp32 by kbit preparation, ",
        ),
        ({"lora_rank": 8, "kbit_preparation": True}, "(fp32), fp32 weights by kbit preparation, "),
    ],
)
def test_words_say_what_each_weight_is_held_in(fields: dict[str, object], words: str) -> None:
    assert words in recipe_in_words(Recipe(**fields))
