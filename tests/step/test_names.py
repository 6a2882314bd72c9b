"""What other trainers call things: everything that the table knows gets two lines, and what they recommend can be had."""

from __future__ import annotations

import json
import re
import string
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mstplan.errors import RecipeError
from mstplan.step import names
from mstplan.step.names import VALUES, Advice
from mstplan.step.recipe import CHUNK_FIELDS, Recipe, planned, strategy, strategy_labels

FIELDS = [field for field in VALUES if field != "strategy"]
CASES = [(field, row) for field, rows in VALUES.items() for row in rows]
TYPED = [(field, row, name) for field, row in CASES for name in row.names.split()]


def values(field: str) -> list[str]:
    return strategy_labels() if field == "strategy" else planned(field)[0]


def said_of(field: str, value: Any) -> str:
    """What each of the ways to a recipe says of a value; all say the same."""
    if field == "strategy":
        with pytest.raises(RecipeError) as e:
            strategy(value)
        return str(e.value)
    with pytest.raises(RecipeError) as e:
        Recipe(**{field: value})
    with pytest.raises(RecipeError) as changed:
        Recipe().changed(**{field: value})
    with pytest.raises(RecipeError) as read:
        Recipe.from_json(json.dumps({field: value}), "r.json")
    assert str(read.value) == f"r.json: {e.value}" and str(changed.value) == str(e.value)
    return str(e.value)


def test_every_field_that_takes_names_has_a_table() -> None:
    assert set(FIELDS) == {field for field in Recipe.model_fields if planned(field)[0]} - {
        *CHUNK_FIELDS,
        "reduce_bucket_size",
        "prefetch_bucket_size",
        "param_persistence_threshold",
    }


@pytest.mark.parametrize("field", VALUES)
def test_what_other_trainers_call_it(field: str) -> None:
    for row in VALUES[field]:
        for name in row.names.split():
            typed = name.replace("*", "_of_some_kind")
            for dress in (typed, typed.upper(), typed.replace("_", "-")):
                said = said_of(field, dress)
                first, second = said.splitlines()
                assert f"'{dress}'" in first and row.statement in first and len(said) < 300
                assert all(value in second for value in (row.write.values() or values(field)) if isinstance(value, str))
                assert second.startswith("Nearest: ") == bool(row.difference) and (
                    row.write or second.startswith("Planned: ")
                )


@pytest.mark.parametrize("field", VALUES)
def test_what_is_recommended_makes_a_recipe(field: str) -> None:
    for row in VALUES[field]:
        cards: dict[str, Any] = (
            {"gpus": 8} if row.write.get("sharding") in ("fsdp", "fsdp1", "ddp", "zero1", "zero2", "zero3") else {}
        )
        if row.write.get("quantize", "none") != "none" or "adapter_dtype" in row.write:
            cards["lora_rank"] = 16
        if "quant_storage" in row.write:
            cards = {"lora_rank": 16, "quantize": "nf4"}
        if "backward_prefetch" in row.write:
            cards = {"gpus": 8, "sharding": "fsdp1"}
        if "reduce_dtype" in row.write:
            cards = {"gpus": 8, "sharding": "fsdp", "precision": "mixed"}
        if "rotate_method" in row.write:
            cards = {"gpus": 8, "context_parallel": 8}
        more = {key: value for key, value in row.write.items() if key != "strategy"}
        assert strategy(str(row.write.get("strategy", "standard"))).changed(**{**cards, **more})


def test_no_name_says_two_things() -> None:
    for field, row, name in TYPED:
        assert names._find_advice(VALUES[field], name.replace("*", "")) is row, name
        assert names._letters(name) not in map(names._letters, values(field)), name
    for row in names._OPTIONS:
        for name in row.names.split():
            assert names._find_advice(names._OPTIONS, name.replace("*", "x")) is row, name


@pytest.mark.parametrize("field", VALUES)
def test_a_value_in_other_dress_is_told_how_it_is_spelled(field: str) -> None:
    for value in values(field):
        dresses = {
            value.upper(),
            value.title(),
            value.replace("-", "_"),
            value.replace("-", ""),
            f" {value} ",
            f"{value}.",
        } - {value}
        assert all(
            f"{field}='{value}'" in said_of(field, dress) or f"--{field} {value}" in said_of(field, dress)
            for dress in dresses
        )


@st.composite
def slips(draw: st.DrawFn) -> tuple[str, str, str]:
    """(field, a value of it, the value with one letter left out, put in, replaced, or two in each other's place)."""
    field = draw(st.sampled_from(list(VALUES)))
    value = draw(st.sampled_from(values(field)))
    at, letter = (
        draw(st.integers(0, len(value) - 1)),
        draw(st.sampled_from(string.ascii_lowercase + string.digits + "-_")),
    )
    ways = (
        value[:at] + value[at + 1 :],
        value[:at] + letter + value[at:],
        value[:at] + letter + value[at + 1 :],
        value[:at] + value[at + 1 : at + 2] + value[at] + value[at + 2 :],
    )
    return field, value, draw(st.sampled_from(ways))


@settings(max_examples=400)
@given(slips())
def test_a_slip_gets_the_near_name(slip: tuple[str, str, str]) -> None:
    field, value, typed = slip
    assume(typed not in values(field) and names._find_advice(VALUES[field], typed) is None)
    first, second = said_of(field, typed).splitlines()
    near = first.partition("Did you mean ")[2] if first.startswith("unknown") else second
    assert value in re.split(r"[\s,?']+", near.rstrip(".")), (first, second)


@settings(max_examples=200)
@given(st.sampled_from(list(VALUES)), st.text(max_size=200) | st.booleans() | st.none() | st.integers())
def test_any_value_gets_two_printable_lines(field: str, value: object) -> None:
    assume(value not in values(field) and not (field == "checkpoint" and isinstance(value, int)))
    lines = said_of(field, value).splitlines()
    assert len(lines) == 2 and all(line.isprintable() and len(line) < 300 for line in lines)


def test_a_recipe_with_a_trainers_fields() -> None:
    own = {"mlp-chunks", "loss-chunks"}  # as an option they are --chunks
    for row in names._OPTIONS:
        for name in {*row.names.split()} - own:
            typed = name.replace("*", "-of-some-kind").replace("-", "_")
            with pytest.raises(RecipeError) as e:
                Recipe.from_json(json.dumps({typed: 1}))
            first, second = str(e.value).removeprefix("recipe: ").splitlines()
            assert (
                first.startswith(f"a recipe has no field '{typed}'")
                and first.endswith(f"{row.statement}.")
                and len(second) < 200
            )
            assert all(flag in second for flag in names.flags_of(row)) and (row.write or second == "Leave it out.")


def test_only_a_slip_asks_for_the_table() -> None:
    assert (
        isinstance(names.find_option("--lora-r"), Advice)
        and names.find_option("--frobnicate") is None
        and names.unknown_field("frobnicate") is None
    )
